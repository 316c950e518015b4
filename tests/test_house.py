# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Lint, types, shapes and README's examples, so that one command runs everything."""

import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from numpyro_regloss import Loss

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


def without_seconds(line):
    return re.sub(r"^( *\d[\d.e -]*) \S+$|, \S+ s\.$", r"\1", line).split()


def same_report(printed, shown):
    """Equal words, and numbers to a percent; seconds are those of the machine."""
    for lines in zip(printed.splitlines(), shown.splitlines(), strict=True):
        for a, b in zip(*map(without_seconds, lines), strict=True):
            try:
                assert float(a) == pytest.approx(float(b), rel=0.01, abs=0.01), lines
            except ValueError:
                assert a == b, lines


README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
ENGINE_PAGE = (ROOT / "docs" / "engine.md").read_text()


# A cloud's numbers do not depend on the stack, nor on how XLA rounds.
@pytest.mark.both
def test_readme_shows_what_its_code_prints(capsys):
    found = re.findall(r"```python\n(.*?)```\n(?:[^`]+```text\n(.*?)```)?", README, re.DOTALL)
    assert found
    names = {}
    for code, shown in found:
        exec(compile(code, "README.md", "exec"), names)  # noqa: S102
        same_report(capsys.readouterr().out, shown)


@pytest.mark.long
def test_readme_says_what_the_plain_tools_find(capsys):
    script = runpy.run_path(str(ROOT / "docs" / "wide_mode.py"))
    names = script["example"]()
    capsys.readouterr()
    mode, draws = script["plain_tools"](names)
    said = README[README.index("In its mode") : README.index("![Histogram")]
    tau, effect, *rest = map(float, re.findall(r"\d+\.\d+", said))
    assert float(mode["tau"]) == pytest.approx(tau, abs=0.01)
    np.testing.assert_allclose(script["effects"](mode), effect, atol=0.05)
    found = []
    for sites in (draws, names["result"].params):
        schools = script["effects"](sites).reshape(-1, 8).mean(0)
        found += [np.mean(sites["tau"]), schools.min(), schools.max()]
    # Three Monte Carlo errors of 4,000 draws of NUTS, whose effective ones are a third.
    np.testing.assert_allclose(found, rest, atol=0.3)


def test_readme_is_short_and_the_house_is_today():
    assert len(README.splitlines()) <= 150
    tree = ROOT / "numpyro_regloss"
    folders = {p.name for p in tree.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    (floors,) = re.findall(r"```text\n\s*(_core <.*?)```", CONTRIBUTING, re.DOTALL)
    assert set(re.findall(r"\w+", floors)) == (folders | {"schemes", "schedules"}) - {"problems"}
    (shown,) = re.findall(r"```text\n(numpyro_regloss/.*?)```", ENGINE_PAGE, re.DOTALL)
    assert set(re.findall(r"^  (\w+)/", shown, re.MULTILINE)) == folders


def test_what_is_said_twice_agrees():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    version, repository = project["version"], project["urls"]["Repository"]
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.findall(r"^version: (.*)$", citation, re.MULTILINE) == [version]
    assert re.findall(r"^repository-code: (.*)$", citation, re.MULTILINE) == [repository]
    cited = (ROOT / "docs" / "citing.md").read_text()
    assert re.findall(r"version = \{(.*)\}", cited) == [version]
    assert re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == version
    bounds = dict(name.split(">=") for name in project["dependencies"])
    oldest = f"JAX {bounds['jax']}, NumPyro {bounds['numpyro']} and ArviZ {bounds['arviz']}"
    assert f"Python {project['requires-python'][2:]} or newer; {oldest}" in README
    extras = re.findall(r"`(\w+)` for ", README)
    assert set(extras) == {*project["optional-dependencies"]} - {
        "bench",
        "docs",
        "rivals",
        "test",
    }  # which CONTRIBUTING names, or serve the tests


@pytest.mark.both
def test_import_is_light():
    heavy = ["arviz", "matplotlib", "optax", "orbax", "pandas", "sklearn", "xarray"]
    heavy += [f"numpyro_regloss.{name}" for name in ("diagnostics", "guides", "io_arviz", "plots")]
    code = f"import sys, numpyro_regloss; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.both
def test_shapes_are_checked_at_every_call():
    loss = Loss.from_function(jnp.sum, jnp.zeros(2))
    with pytest.raises(TypeCheckError, match="Loss.value.*\\n.*parameter 'x'"):
        loss.value(jnp.zeros((2, 2, 2)))
