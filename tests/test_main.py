# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""The main job as a user runs it, and the promise on memory."""

import json
import os
import subprocess
import sys

import pytest
from conftest import QUICK_FLAGS

from numpyro_regloss.__main__ import main


def run(*arguments, **kwargs):
    command = [sys.executable, "-m", "numpyro_regloss", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)


DIGITS, SCHOOLS = ["digits", "digits"], ["eight schools"]


# The digits take most of the time; `notebooks/a_network_without_gradients.ipynb` trains a network likewise.
@pytest.mark.both
@pytest.mark.parametrize(
    ("options", "problems"),
    [
        pytest.param([], DIGITS + SCHOOLS, id="all", marks=pytest.mark.long),
        pytest.param(["--problem", "eight-schools"], SCHOOLS, id="schools"),
    ],
)
def test_quick(options, problems, tmp_path):
    environment = os.environ | {"XLA_FLAGS": QUICK_FLAGS}
    done = run("--quick", "--no-progress", *options, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    (out,) = tmp_path.glob("regloss-*")
    assert (out / "figure.png").stat().st_size > 10_000
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [row["problem"] for row in rows] == problems
    for row in rows:
        assert row["rejected_steps"] == 0
        assert row["local_entropy"]["value"] < row["heat"]["value"] + 4 * row["heat"]["error"]
    for row in rows[: problems.count("digits")]:
        assert float(row["outcome"].split()[-2]) > 90.0  # per cent of test digits, 10 by chance
    assert (rows[0]["num_grad"] == 0) == (problems[0] == "digits")
    for word in ("local entropy", "heat", "seconds"):
        assert word in done.stdout
    assert ("mu" in done.stdout) == (SCHOOLS[0] in problems)
    assert ("test accuracy" in done.stdout) == ("digits" in problems)


def test_help_is_complete(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    assert done.value.code == 0
    shown = capsys.readouterr().out
    for word in (
        "digits",
        "eight-schools",
        "--out",
        "--quick",
        "--seed",
        "--no-progress",
        "--version",
    ):
        assert word in shown


def test_unknown_problem_is_refused(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--problem", "mnist"])
    assert done.value.code == 2
    assert "eight-schools" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_memory_of_a_large_cloud(tmp_path):
    # 2,000 draws in 20,000 dimensions would take 0.15 GiB if they were stored.
    code = """
import resource, numpy as np, jax, jax.numpy as jnp
from numpyro_regloss import Loss, TwoStep, fit, shift
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
def build(num_samples):
    loss = Loss.from_function(lambda x: jnp.sum(jnp.abs(x[:10])) + jnp.mean(x**2), np.ones(20_000))
    return TwoStep(loss, 1e-3, shift=shift.Importance(num_samples), fit=fit.ForwardKL(), temperature=0.1)
build(200).run(jax.random.key(0), 1, progress_bar=False)
before = peak()
result = build(2_000).run(jax.random.key(0), 1, progress_bar=False)
assert np.isfinite(result.params).all()
print(peak() - before)
"""
    environment = os.environ | {"XLA_FLAGS": QUICK_FLAGS}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert float(done.stdout) < 0.1, f"{done.stdout} GiB above the baseline"
