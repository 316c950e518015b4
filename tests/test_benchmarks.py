# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Every benchmark runs at its smallest size and reports finite numbers; what they say is for quiet machines.

They run in this process, which does not optimize programs, without a dozen starts and imports.
"""

import json
import math
import runpy
import sys
import warnings
from pathlib import Path

import pytest
from conftest import QUICK_FLAGS

ROOT = Path(__file__).parent.parent / "benchmarks"
SCRIPTS = sorted(path for path in ROOT.glob("*.py") if "__main__" in path.read_text())


# The quickest; others compare with other libraries, or several engines, or start processes.
SHORT = "global_optimization"


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(path, id=path.stem, marks=[] if path.stem == SHORT else pytest.mark.long)
        for path in SCRIPTS
    ],
)
def test_smoke(script, tmp_path, monkeypatch, capsys):
    out = tmp_path / "tables.json"
    monkeypatch.setattr(sys, "argv", [str(script), "--smoke", "--out", str(out)])
    # For processes that benchmarks start; this one has read them.
    monkeypatch.setenv("XLA_FLAGS", QUICK_FLAGS)
    with warnings.catch_warnings():
        # As for who runs a script: warnings of other libraries, which are compared here, stop nothing.
        warnings.simplefilter("default")
        runpy.run_path(str(script), run_name="__main__")
    shown = capsys.readouterr().out
    report = json.loads(out.read_text())
    assert report["environment"]["versions"]["numpyro_regloss"]
    assert report["tables"]
    for title, rows in report["tables"].items():
        assert title in shown
        assert rows
        for row in rows:
            numbers = [value for value in row.values() if isinstance(value, float)]
            assert numbers
            assert all(map(math.isfinite, numbers)), row
