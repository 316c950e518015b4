# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""The documentation site: `python -m sphinx -W --keep-going docs docs/_build`."""

import re
from pathlib import Path

from numpyro_regloss import __version__

project = "numpyro_regloss"
author = "Contributors to the numpyro_regloss project"
release = __version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]

# Pages show the outputs that were committed: CI executes the notebooks in their own tests.
nb_execution_mode = "off"
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3

# Docstrings name shapes and units in words; jaxtyping's annotations would say them again, at length.
autodoc_typehints = "none"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
add_module_names = False
maximum_signature_line_length = 80
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
# Single backticks are links where they name something documented, and code elsewhere.
default_role = "py:obj"

html_theme = "furo"
html_title = f"numpyro_regloss {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
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
    "is_my_minimum_flat",
    "when_a_run_goes_wrong",
)


def prepare_page(app, docname, source):
    """The contents of the page of notebooks, of which there may be none; doctests without their last line."""
    source[0] = source[0].replace("\n\n```\n", "\n```\n")
    if docname != "notebooks":
        return
    found = sorted(path.stem for path in Path(app.srcdir, "notebooks").glob("*.ipynb"))
    names = [name for name in NOTEBOOKS if name in found]
    names += [name for name in found if name not in NOTEBOOKS]
    if names:
        pages = "\n".join(f"notebooks/{name}" for name in names)
        source[0] += f"\n```{{toctree}}\n:maxdepth: 1\n\n{pages}\n```\n"


def docstring_to_rst(app, what, name, obj, options, lines):
    """Before napoleon: indented formulas are displayed as they stand, and |x| is a norm, no substitution."""
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
        escaped = "".join(p if p.startswith("`") else p.replace("|", r"\|") for p in parts)
        # A letter or a power may follow code at once only so.
        escaped = re.sub(r"(`[^`]*`)(?=\w)", r"\1\\ ", escaped)
        out.append(line if is_code else escaped)
    lines[:] = out


def skip_fields(app, what, name, obj, skip, options):
    """Fields of named tuples are described under Attributes, not as aliases of numbers."""
    return True if (getattr(obj, "__doc__", "") or "").startswith("Alias for field") else None


def hide_protocol_signature(app, what, name, obj, options, signature, returns):
    """Nobody calls a protocol."""
    return ("", returns) if getattr(obj, "_is_protocol", False) else None


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


def visit_math(self, node):
    """MathML, which browsers render without a script or a network."""
    from docutils.nodes import SkipNode, math_block
    from latex2mathml.converter import convert

    block = isinstance(node, math_block)
    mathml = convert(node.astext(), display="block" if block else "inline")
    self.body.append(f'<div class="math">{mathml}</div>' if block else mathml)
    raise SkipNode


def setup(app):
    """Connects what is above."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
    app.connect("source-read", prepare_page)
    app.connect("autodoc-process-docstring", docstring_to_rst, priority=400)
    app.connect("autodoc-process-signature", hide_protocol_signature)
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("missing-reference", find_reference)
