# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Every public name, its signature and its members: what users may rely on stays.

`python tests/test_public_names.py` writes the snapshot anew, for a change that is meant.
"""

import ast
import inspect
import json
import pickle
import re
from importlib import import_module
from pathlib import Path

import pytest

import numpyro_regloss

pytestmark = pytest.mark.both

SNAPSHOT = Path(__file__).with_name("public_names.txt")
ROOT = Path(__file__).parents[1]
MODULES = (
    "",
    "shift",
    "fit",
    "anchor",
    "values",
    "schemes",
    "schedules",
    "plots",
    "diagnostics",
    "problems",
    "draws",
)


def module(name):
    return import_module(f"numpyro_regloss.{name}".removesuffix("."))


def public(name):
    """The names that a module exports, but for submodules and the version."""
    found = {n: getattr(module(name), n) for n in module(name).__all__ if n != "__version__"}
    return {n: obj for n, obj in found.items() if not inspect.ismodule(obj)}


def signature(fn):
    """Parameters and defaults; annotations follow the modules' names."""
    try:
        found = inspect.signature(fn)
    except (TypeError, ValueError):
        return ""
    bare = [p.replace(annotation=p.empty) for p in found.parameters.values()]
    text = str(found.replace(parameters=bare, return_annotation=found.empty))
    return re.sub(r" at 0x\w+|<function |numpyro_regloss[\w.]*\.", "", text)


def members(cls):
    """What a class has of its own or of the package's bases."""
    for name in sorted(dir(cls)):
        value = inspect.getattr_static(cls, name)
        home = next(c for c in cls.__mro__ if name in vars(c))
        if name.startswith("_") or not home.__module__.startswith("numpyro_regloss"):
            continue
        fn = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        yield f"{name}{signature(fn) if inspect.isfunction(fn) else ''}"


def lines():
    for name in MODULES:
        for n, obj in sorted(public(name).items()):
            full = f"{name}.{n}".removeprefix(".")
            yield f"{full}{signature(obj) if callable(obj) else ''}"
            if inspect.isclass(obj):
                yield from (f"{full}.{member}" for member in members(obj))


def test_names_and_signatures_are_those_of_the_snapshot():
    assert list(lines()) == SNAPSHOT.read_text().splitlines()


@pytest.mark.parametrize("name", MODULES)
def test_names_pickle_by_where_they_are(name):
    for obj in public(name).values():
        if callable(obj):
            assert pickle.loads(pickle.dumps(obj)) is obj
        else:
            assert pickle.loads(pickle.dumps(obj)) == obj


def texts():
    """README, the pages and the cells of the notebooks."""
    for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]:
        yield str(path.relative_to(ROOT)), path.read_text()
    for path in ROOT.glob("notebooks/*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        yield str(path.relative_to(ROOT)), "\n".join("".join(cell["source"]) for cell in cells)


def imports(text):
    """The statements of a text that import from the package, with what stands in its parentheses."""
    found = re.findall(
        r"from numpyro_regloss[\w.]* import (?:\([^)]*\)|.*)",
        re.sub(r"\n(?:>>>|\.\.\.)? *", "\n", text),
    )
    return [ast.parse(re.sub(r"#.*", "", statement)).body[0] for statement in found]


TEXTS = dict(texts())
AUTODOC = r"\.\. auto(class|function|data):: (numpyro_regloss[\w.]*)"


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_what_texts_import_is_exported(name):
    for statement in imports(TEXTS[name]):
        exported = {*import_module(statement.module).__all__, *MODULES}
        assert {alias.name for alias in statement.names} <= exported, (name, statement.module)
    for directive, path in re.findall(AUTODOC, TEXTS[name]):
        parent, _, leaf = path.rpartition(".")
        assert hasattr(import_module(parent), leaf), (name, directive, path)


def test_the_package_itself():
    assert sorted(dir(numpyro_regloss)) == sorted(numpyro_regloss.__all__)


if __name__ == "__main__":
    SNAPSHOT.write_text("\n".join(lines()) + "\n")
