# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Lint, types and README's examples, so that one command runs everything."""

import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMANDS = {
    "lint": ["ruff", "check", "."],
    "format": ["ruff", "format", "--check", "."],
    "types": ["ty", "check", "numpyro_regloss", "--python", sys.prefix],
}


@pytest.mark.both
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_tool(command):
    beside = Path(sys.executable).parent / command[0]
    tool = str(beside) if beside.exists() else shutil.which(command[0])
    assert tool, f"{command[0]} is not installed; install the test extra"
    done = subprocess.run(
        [tool, *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


# On the other stack the notebooks stand for them.
def test_readme_examples():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 5
    names = {}
    with warnings.catch_warnings():
        # flax warns about its own use of JAX in some of the versions that this project supports.
        warnings.filterwarnings("ignore", module="flax")
        for block in blocks:
            exec(compile(block, "README.md", "exec"), names)  # noqa: S102
    accuracy = (
        names["net"].apply(names["result"].params, names["inputs"]).argmax(-1) == names["labels"]
    ).mean()
    assert accuracy > 0.9  # three classes of 600 rows, which the largest input decides


@pytest.mark.both
def test_import_is_light():
    heavy = ("arviz", "matplotlib", "optax", "pandas", "sklearn", "xarray")
    code = f"import sys, numpyro_regloss; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
