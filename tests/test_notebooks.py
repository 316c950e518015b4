# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Notebooks run as they are, in their fast mode, and were committed as they ran.

They run in this process, without starts and imports of nine kernels. Warnings are errors here too.
"""

import ast
import json
import linecache
import re
from pathlib import Path

import matplotlib as mpl
import pytest
from conftest import long

FOLDER = Path(__file__).parent.parent / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
NAMES = [
    "a_network_without_gradients",
    "an_existing_numpyro_model",
    "does_regularization_help_training",
    "first_steps",
    "forward_or_reverse_kl",
    "is_my_minimum_flat",
    "when_a_run_goes_wrong",
    "where_does_the_trouble_come_from",
    "which_shift_engine",
]
# CI runs it on both stacks, and the others with `--everything`: their code is that of the pages.
SHORTEST = "a_network_without_gradients"
MAX_BYTES = 150_000


def cells(path, kind):
    notebook = json.loads(path.read_text())
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def test_all_are_there():
    assert [path.stem for path in PATHS] == NAMES


@pytest.mark.parametrize(
    "path",
    [long(p) for p in PATHS if p.stem != SHORTEST]
    + [pytest.param(p, marks=pytest.mark.both) for p in PATHS if p.stem == SHORTEST],
    ids=lambda path: path.stem,
)
def test_runs(path, monkeypatch):
    monkeypatch.setenv("REGLOSS_FAST", "1")
    mpl.use("agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    names = {"__name__": path.stem}
    with mpl.rc_context():
        for number, cell in enumerate(cells(path, "code")):
            text, where = source(cell), f"{path.stem}[{number}]"
            # For tracebacks that show the line.
            linecache.cache[where] = (len(text), None, text.splitlines(keepends=True), where)
            exec(compile(text, where, "exec"), names)  # noqa: S102
        plt.close("all")
    assert names["FAST"]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_is_committed_as_it_ran(path):
    assert path.stat().st_size < MAX_BYTES
    title = source(cells(path, "markdown")[0]).splitlines()[0]
    assert re.fullmatch(r"# \S.*\?", title)
    code = cells(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert any("image/png" in output.get("data", ()) for output in outputs)
    for output in outputs:
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr"
    asserted = [
        node for node in ast.walk(ast.parse(source(code[-1]))) if isinstance(node, ast.Assert)
    ]
    assert len(asserted) >= 3
    # A kernel's times would change with every run.
    assert not any("execution" in cell["metadata"] for cell in code)
