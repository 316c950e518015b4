# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""The documentation site: `python -m sphinx -W --keep-going docs docs/_build`."""

import html
import json
import re
import tomllib
from pathlib import Path

from numpy.typing import ArrayLike
from sphinx.util.typing import stringify_annotation

from numpyro_regloss import __version__

project = "numpyro_regloss"
author = "numpyro_regloss contributors"
repository = tomllib.loads(Path(__file__).parent.with_name("pyproject.toml").read_text())[
    "project"
]["urls"]["Repository"]
release = __version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "training/*"]  # tables that a page includes

# Pages show the outputs that were committed: CI executes the notebooks in their own tests.
nb_execution_mode = "off"
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3

# In signatures and beside the parameters that docstrings describe.
autodoc_typehints = "both"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
add_module_names = False
maximum_signature_line_length = 80
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = True
# Single backticks are links where they name something documented, and code elsewhere.
default_role = "py:obj"

html_theme = "furo"
html_title = f"numpyro_regloss {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_logo = html_favicon = "_static/logo.svg"
html_theme_options = {
    "source_repository": repository,
    "source_branch": "main",
    "source_directory": "docs/",
    "footer_icons": [{"name": "Repository", "url": repository, "html": "Repository", "class": ""}],
}
html_math_renderer = "mathml"
html_show_copyright = False
html_show_sphinx = False

# Where names in docstrings are looked for.
SCOPES = ("", "shift.", "fit.", "anchor.", "values.", "schemes.", "draws.")


# From the first to read to the last; others follow.
NOTEBOOKS = (
    "first_steps",
    "an_existing_numpyro_model",
    "which_shift_engine",
    "forward_or_reverse_kl",
    "a_network_without_gradients",
    "does_regularization_help_training",
    "is_my_minimum_flat",
    "when_a_run_goes_wrong",
    "where_does_the_trouble_come_from",
)


def prepare_page(app, docname, source):
    """The notebooks and their figures on the page of notebooks; doctests without their last line."""
    source[0] = source[0].replace("\n\n```\n", "\n```\n")
    if docname != "notebooks":
        return
    found = sorted(path.stem for path in Path(app.srcdir, "notebooks").glob("*.ipynb"))
    # Of notebooks there may be none.
    names = [name for name in NOTEBOOKS if name in found]
    names += [name for name in found if name not in NOTEBOOKS]
    if names:
        pages = "\n".join(f"notebooks/{name}" for name in names)
        shown = "\n".join(
            figure for name in names for figure in figures(Path(app.srcdir, "notebooks"), name)
        )
        source[0] += f"\n```{{toctree}}\n:maxdepth: 1\n\n{pages}\n```\n"
        source[0] += (
            f'\n## Gallery\n\nA figure leads to its notebook.\n\n<div class="gallery">\n{shown}\n</div>\n'
        )


def figures(folder, name):
    """The figures of a notebook, as links to it; their captions are its title and the heading above."""
    title = heading = ""
    for cell in json.loads((folder / f"{name}.ipynb").read_text())["cells"]:
        for level, text in re.findall(r"^(#+) (.*)$", "".join(cell["source"]), re.MULTILINE):
            if cell["cell_type"] == "markdown":
                title, heading = (text, "") if level == "#" else (title, text)
        for output in cell.get("outputs", ()):
            picture = "".join(output.get("data", {}).get("image/png", "")).replace("\n", "")
            if picture:
                says = html.escape(f"{title} {heading}".strip())
                yield (
                    f'<a href="notebooks/{name}.html"><img alt="{says}" src="data:image/png;base64,{picture}">'
                    f"<span><b>{html.escape(title)}</b> {html.escape(heading)}</span></a>"
                )


def docstring_to_rst(app, what, name, obj, options, lines):
    """Before napoleon: indented formulas stay as they stand, F_tau is set, and |x| is a norm, no substitution."""
    out, margin, display = [], 0, None
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if display is not None and line.strip() and indent < display:
            display = None
        # Sections follow their title at once; what is indented after a blank line is on display.
        if line.strip() and display is None and out and not out[-1].strip() and indent > margin:
            display = indent
            if not line.lstrip().startswith(">>>"):
                out += [" " * margin + "::", ""]
        if line.strip():
            margin = indent if display is None else margin
        is_code = display is not None or line.lstrip().startswith((">>>", "..."))
        parts = re.split(r"(`[^`]*`)", line)
        parts[::2] = [
            re.sub(r"\bF(\^H)?_tau\b", r"\\ :math:`F\1_\\tau`\\ ", part.replace("|", r"\|"))
            for part in parts[::2]
        ]
        # Before a line's end the escaped space would join the word after it.
        escaped = re.sub(r"(`)\\ (?=\s|$)", r"\1", "".join(parts))
        # A letter and a dot are no list.
        escaped = re.sub(r"^(\s*\w+: \w+)\.(?=\s|$)", r"\1\.", escaped)
        # A letter or a power may follow code at once only so.
        escaped = re.sub(r"(`[^`]*`)(?=\w)", r"\1\\ ", escaped)
        out.append(line if is_code else escaped)
    lines[:] = out


def skip_fields(app, what, name, obj, skip, options):
    """Fields of named tuples are described under Attributes, not as aliases of numbers."""
    return True if (getattr(obj, "__doc__", "") or "").startswith("Alias for field") else None


# What `numpy.typing.ArrayLike` is made of.
ARRAY_LIKE = re.sub(r"(?:[A-Za-z_]\w*\.)+(?=\w)", "", stringify_annotation(ArrayLike))


def short_type(text):
    """A type as the code writes it: without modules, and `ArrayLike` for all that it stands for."""
    text = re.sub(r"\bClassVar\[(\w+)\]", r"\1", re.sub(r"~?\b(?:[A-Za-z_]\w*\.)+(?=\w)", "", text))
    return text.replace(ARRAY_LIKE, "ArrayLike")


def shorten_signature(app, what, name, obj, options, signature, returns):
    """Types of a signature in short; nobody calls a protocol."""
    if getattr(obj, "_is_protocol", False):
        return "", returns
    if signature is None:
        return None
    # Not default values, which may be names of a module.
    signature = re.sub(r"~(?:[A-Za-z_]\w*\.)+(?=\w)|\bjaxlib\._jax\.", "", signature)
    return signature.replace(ARRAY_LIKE, "ArrayLike"), returns and short_type(returns)


def shorten_fields(app, domain, objtype, content):
    """Types of parameters and attributes in short, before they become links."""
    from docutils import nodes

    for field in content.findall(nodes.field):
        name, body = field.children
        if name.astext().split()[0] in {"type", "vartype", "rtype"}:
            for text in list(body.findall(nodes.Text)):
                text.parent.replace(text, nodes.Text(short_type(text.astext())))


def find_reference(app, env, node, contnode):
    """Names as users write them: `shift.NUTS`, `TwoStep.run`, `NUTS()`."""
    from sphinx.util.nodes import make_refnode

    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"].split("(")[0]
    objects = env.domains["py"].objects
    for scope in SCOPES:
        entry = objects.get(f"numpyro_regloss.{scope}{target}")
        if entry is not None:
            return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, contnode)
    return None


def mend_links_of_sources(app, pagename, templatename, context, doctree):
    """Links from sources to the reference, of what is exported under another name than it was defined with."""
    if not pagename.startswith("_modules/") or "body" not in context:
        return
    objects = app.env.domains["py"].objects

    def link(match):
        name = match[1].removeprefix("numpyro_regloss.")
        entries = (objects.get(f"numpyro_regloss.{scope}{name}") for scope in (*SCOPES, "guides."))
        entry = next(filter(None, entries), None)
        return f'#{entry.node_id}"' if entry else match[0]

    context["body"] = re.sub(r'#(numpyro_regloss\.[\w.]+)"', link, context["body"])


def wrap_sentences(app, pagename, templatename, context, doctree):
    """Sentences and comments in blocks of code go on below. Code, tables and options keep their lines."""
    if "body" not in context:
        return

    def wrap(match):
        is_text = re.search(r"highlight-(?:text|myst-ansi)", match[1])
        is_session = 'class="gp"' in match[2]
        lines = match[2].split("\n")
        for i, line in enumerate(lines):
            text = html.unescape(re.sub(r"<[^>]+>", "", line)).strip()
            is_output = is_text or (is_session and 'class="gp"' not in line)
            # Two spaces are between columns.
            if text.startswith("#") or (is_output and text and "  " not in text):
                lines[i] = f'<span class="sentence">{line}</span>'
        return match[1] + "\n".join(lines) + "</pre>"

    block = r'(<div class="[^"]*highlight-[^"]*"><div class="highlight"><pre>(?:<span></span>)?)(.*?)</pre>'
    body = re.sub(block, wrap, context["body"], flags=re.DOTALL)
    context["body"] = body.replace('<span class="pre">-', '<span class="pre option">-')


def visit_math(self, node):
    """MathML, which browsers render without a script or a network."""
    from docutils.nodes import SkipNode, math_block
    from latex2mathml.converter import convert

    block = isinstance(node, math_block)
    mathml = convert(node.astext(), display="block" if block else "inline")
    # The converter makes letters of relations, and sets the name of a function without a space.
    mathml = mathml.replace("<mi>&#x0007E;</mi>", "<mo>&#x0223C;</mo>")
    mathml = mathml.replace("<mi>:</mi>", '<mo rspace="0.278em">:</mo>')
    space = '<mspace width="0.167em" />'
    mathml = mathml.replace("<mi>log</mi>", f"{space}<mi>log</mi>{space}")
    mathml = mathml.replace(f"<mrow>{space}", "<mrow>")
    self.body.append(f'<div class="math">{mathml}</div>' if block else mathml)
    raise SkipNode


def setup(app):
    """Connects what is above."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
    app.connect("source-read", prepare_page)
    app.connect("autodoc-process-docstring", docstring_to_rst, priority=400)
    app.connect("autodoc-process-signature", shorten_signature)
    # After autodoc, which puts types there.
    app.connect("object-description-transform", shorten_fields, priority=800)
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("missing-reference", find_reference)
    app.connect("html-page-context", mend_links_of_sources)
    app.connect("html-page-context", wrap_sentences)
