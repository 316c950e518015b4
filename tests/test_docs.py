# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""The documentation site builds without a warning, links lead somewhere, and every public name has an entry."""

import html
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
MODULES = (
    "numpyro_regloss",
    *(
        f"numpyro_regloss.{name}"
        for name in (
            "anchor",
            "diagnostics",
            "draws",
            "fit",
            "plots",
            "problems",
            "schedules",
            "schemes",
            "shift",
            "values",
        )
    ),
)

pytestmark = pytest.mark.skipif(
    sys.version_info >= (3, 13), reason="the extra docs is for the first stack"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    doctrees = ["-d", str(tmp_path_factory.mktemp("doctrees"))]
    done = subprocess.run(
        [*command, *doctrees, str(DOCS), str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def sources():
    notebooks = (ROOT / "notebooks").glob("*.ipynb")
    pages = [path for path in DOCS.rglob("*.md") if path.parent.name != "training"]  # included ones
    yield from (path.relative_to(DOCS).with_suffix(".html") for path in pages)
    yield from (Path("notebooks", path.stem + ".html") for path in notebooks)


def test_every_source_is_a_page(site):
    assert [str(page) for page in sources() if not (site / page).exists()] == []
    # Of the figure of a page, and of a formula: the browser needs no script for it.
    assert list((site / "_images").glob("forward_or_reverse.png"))
    assert "<math" in (site / "theory.html").read_text()
    # A letter and a dot begin a list in RST, and no word is joined to a formula.
    reference = "".join(path.read_text() for path in (site / "api").glob("*.html"))
    assert re.findall(r'<ol class="(?:lower|upper)|</math>[a-z]{2,}', reference) == []


def test_every_public_name_has_an_entry(site):
    from sphinx.util.inventory import InventoryFile

    inventory = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="")
    known = {
        name for kind, names in inventory.data.items() if kind.startswith("py:") for name in names
    }
    missing = []
    for module in MODULES:
        assert module in known
        loaded = importlib.import_module(module)
        missing += [
            f"{module}.{name}" for name in loaded.__all__ if f"{module}.{name}" not in known
        ]
    assert missing == []


def test_links_within_the_site(site):
    pages = {page: page.read_text() for page in site.rglob("*.html")}
    anchors = {
        page.resolve(): set(re.findall(r'\bid="([^"]+)"', text)) for page, text in pages.items()
    }
    broken = []
    for page, text in pages.items():
        for link in re.findall(r'href="([^"]+)"', text):
            if re.match(r"[a-z]+:", link) or link == "#":
                continue
            path, _, fragment = link.split("?")[0].partition("#")
            target = (page.parent / path).resolve() if path else page.resolve()
            if not target.exists() or (
                fragment and fragment not in anchors.get(target, {fragment})
            ):
                broken.append(f"{page.relative_to(site)}: {link}")
    assert broken == []


def test_types_are_shown_in_short(site):
    text = "".join(page.read_text() for page in site.glob("api/*.html"))
    shown = html.unescape(re.sub(r"<[^>]+>", "", text))
    assert "covariance: str = 'reference'" in shown
    assert "covariance (str)" in shown
    assert "mean_error (Array)" in shown
    assert re.findall(r"\S*(?:_jax\.|_SupportsArray|ClassVar)\S*", shown) == []


def test_docstrings_are_read_as_they_were_written(site):
    from bs4 import BeautifulSoup  # comes with the theme

    wrong = []
    for page in site.glob("api/*.html"):
        read = BeautifulSoup(page.read_text(), "html.parser")
        for title in read.select("dl.field-list > dt"):
            names = title.find_next_sibling("dd").select(
                ":scope > p > strong, :scope > ul > li > p > strong"
            )
            if title.text.startswith("Raises"):  # a line of a description that is no exception
                wrong += [name.text for name in names if not re.fullmatch(r"[A-Z]\w+", name.text)]
            elif title.text.startswith("Type"):  # a sentence before a colon, of a property
                wrong.append(title.find_next_sibling("dd").text)
        shown = [name.text for name in read.select("dt.py em.sig-param")]
        wrong += [name for name in shown if ":" not in name and name not in ("*", "/")]
        wrong += [code.parent.text for code in read.select("code") if not code.text.strip()]
    assert wrong == []


def test_figures_lead_to_their_notebooks(site):
    names = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    page = (site / "notebooks.html").read_text()
    assert set(re.findall(r'<a href="notebooks/(\w+)\.html"><img', page)) == names


def test_the_build_leaves_the_tree_as_it_was(site):
    # `_build` is where CONTRIBUTING says that a reader may build it.
    folders = {path.name for path in DOCS.iterdir() if path.is_dir()} - {"_build", "__pycache__"}
    assert folders == {"_static", "api", "notebooks", "training"}


def test_no_markup_shows(site):
    shown = []
    for page in site.rglob("api/*.html"):
        article = page.read_text().partition("<article")[2].partition("</article")[0]
        article = re.sub(r'<div class="highlight">.*?</div>', "", article, flags=re.DOTALL)
        text = re.sub(r"<[^>]+>", "", article)
        shown += [f"{page.name}: {found}" for found in re.findall(r".*(?:`|::|:py:).*", text)]
    assert shown == []
