# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""The house: modules import lower floors only."""

import ast
from pathlib import Path

import pytest

import numpyro_regloss

pytestmark = pytest.mark.both

ROOT = Path(numpyro_regloss.__file__).parent
# The whole house: a folder imports from itself and from floors below it.
FLOORS = [
    {"_core", "problems"},
    {"gaussians", "schedules"},
    {"losses"},
    {"draws"},
    {"shift", "fit"},
    {"anchor"},
    {"values", "guides"},
    {"two_step"},
    {"schemes", "diagnostics", "io_arviz", "transforms"},
    {"plots"},
    {""},
    {"__main__"},
]
SHARED = {
    "shift": [["base"], ["metric"], ["sampler_stats"]],
    "fit": [["base"]],
    "anchor": [["base"], ["regression"], ["safeguard"]],
}
ENGINES = ("shift", "fit", "anchor")  # one algorithm, one file or folder: none imports another
# But those whose work is to choose between others.
CHOOSES = {"shift.auto": [["adaptive_importance"], ["hmc"]]}
MODULES = sorted(ROOT.rglob("*.py"))


def floor_of(folder):
    (found,) = [i for i, floor in enumerate(FLOORS) if folder in floor]
    return found


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("numpyro_regloss"):
            base = node.module.removeprefix("numpyro_regloss").removeprefix(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".removeprefix(".")
                is_module = (ROOT / (inner.replace(".", "/") + ".py")).exists() or (
                    ROOT / inner
                ).is_dir()
                yield inner if is_module else base


def lines_of_code(text):
    docstrings = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docstrings.update(range(node.lineno, node.end_lineno + 1))
    lines = enumerate(map(str.strip, text.splitlines()), 1)
    return sum(
        bool(line) and not line.startswith("#") and number not in docstrings
        for number, line in lines
    )


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_lower_floors_only(path):
    name = module_name(path)
    folder, *rest = name.split(".")
    for imported in imports(path):
        other, *inner = imported.split(".")
        if other != folder:
            assert floor_of(other) < floor_of(folder), (
                f"{name} imports {imported}, on no lower floor"
            )
        elif folder in ENGINES and rest and path.name != "__init__.py" and inner[:1] != rest[:1]:
            allowed = SHARED[folder] + CHOOSES.get(name, [])
            assert inner in allowed, f"{name} imports sideways: {imported}"


def test_no_circles():
    graph = {module_name(path): set(imports(path)) for path in MODULES}
    while leaves := [name for name, below in graph.items() if not below & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph


def test_helpers_live_with_their_user():
    folder = {module_name(path): path.parent for path in MODULES}
    # A folder's front belongs to the folder above.
    home = {n: f.parent if f.name == n.rpartition(".")[2] else f for n, f in folder.items()}
    users = {name: set() for name in home}
    for path in MODULES:
        for imported in imports(path):
            users[imported].add(module_name(path))
    # The front of the package exports.
    alone = {name: found.pop() for name, found in users.items() if len(found) == 1}
    assert {name: user for name, user in alone.items() if user and home[name] != folder[user]} == {}


def test_the_top_of_the_house():
    names = [p.name for p in ROOT.iterdir() if p.name != "__pycache__"]
    assert len(names) <= 20
    private = {n for n in names if n.startswith("_") and not n.startswith("__")}
    assert private == {"_core"}
    assert not [p for p in MODULES if p.name.startswith("_") and not p.name.startswith("__")]


def test_no_module_is_too_long():
    # A file above 400 lines of code, docstrings left out, wants a reason; none has one.
    long = {module_name(p): lines_of_code(p.read_text()) for p in MODULES}
    assert [name for name, lines in long.items() if lines > 400] == []
    assert lines_of_code('"""Two\n\nlines."""\n\n# why\nx = [\n    1,\n]\n') == 3


def test_headers():
    for path in [*MODULES, *Path(__file__).parent.glob("*.py")]:
        lines = path.read_text().splitlines()[:2]
        assert lines == [
            "# Copyright Contributors to the numpyro_regloss project.",
            "# SPDX-License-Identifier: Apache-2.0",
        ], path
