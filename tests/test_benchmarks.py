# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Every benchmark runs at its smallest size and reports finite numbers; what they say is for quiet machines."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

ROOT = Path(__file__).parent.parent / "benchmarks"
SCRIPTS = sorted(path for path in ROOT.glob("*.py") if "__main__" in path.read_text())


def run_smoke(script, tmp_path):
    out = tmp_path / "tables.json"
    command = [sys.executable, script, "--smoke", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert report["environment"]["versions"]["numpyro_regloss"]
    assert report["tables"]
    for title, rows in report["tables"].items():
        assert title in done.stdout
        assert rows
        for row in rows:
            numbers = [value for value in row.values() if isinstance(value, float)]
            assert numbers
            assert all(map(math.isfinite, numbers)), row


# Two classes, since a worker takes whole classes.
class TestSmokeOfSome:
    @pytest.mark.parametrize("script", SCRIPTS[::2], ids=lambda path: path.stem)
    def test_smoke(self, script, tmp_path):
        run_smoke(script, tmp_path)


class TestSmokeOfOthers:
    @pytest.mark.parametrize("script", SCRIPTS[1::2], ids=lambda path: path.stem)
    def test_smoke(self, script, tmp_path):
        run_smoke(script, tmp_path)
