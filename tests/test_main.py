# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""The main job as a user runs it, and the promise on memory."""

import json
import os
import subprocess
import sys

import arviz as az
import numpy as np
import pytest
from conftest import QUICK_FLAGS

from numpyro_regloss.__main__ import _write, main


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
        "--model",
        "--data",
        "--tau",
        "--steps",
    ):
        assert word in shown


def test_unknown_problem_is_refused(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--problem", "mnist"])
    assert done.value.code == 2
    assert "eight-schools" in capsys.readouterr().err


MODULE = """
import numpyro
import numpyro.distributions as dist

number = 3.0


def line(x, num_rows, y=None):
    slope = numpyro.sample("draw", dist.Normal(0, 1))
    noise = numpyro.sample("noise", dist.HalfNormal(1))
    with numpyro.plate("rows", num_rows):
        numpyro.sample("y", dist.Normal(slope * x, noise), obs=y)


def clash():
    numpyro.sample("w", dist.Normal(0, 1).expand([2]))
    numpyro.sample("w_dim_0", dist.Normal(0, 1))
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with a model of the user's own and its data, as `python -m` sees it."""
    name = f"own_{tmp_path.name}"  # every test imports a module of its own
    (tmp_path / f"{name}.py").write_text(MODULE)
    rng = np.random.default_rng(0)
    x = rng.normal(size=20)
    y = 2.0 * x + 0.5 * rng.normal(size=20)
    np.savez(tmp_path / "data.npz", x=x, y=y, num_rows=20)
    np.savez(tmp_path / "other.npz", x=x, z=y, num_rows=20)
    np.savez(tmp_path / "words.npz", x=np.array(["a", None], object))
    np.save(tmp_path / "one.npy", x)
    (tmp_path / "text.npz").write_text("x,y")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return name


@pytest.mark.both
def test_own_model(own, capsys, tmp_path):
    out = tmp_path / "out"
    options = ["--model", f"{own}:line", "--data", "data.npz", "--out", str(out), "--tau", "0.1"]
    assert main([*options, "--quick", "--no-progress"]) == 0
    names = ["draws.nc", "figure.png", "report.txt", "results.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    shown, report = capsys.readouterr().out, (out / "report.txt").read_text()
    # ArviZ has an axis `draw`.
    for text in ("draw_", "noise", "local entropy", "2 parameters", "Checked:"):
        assert text in shown
        assert text in report
    (row,) = json.loads((out / "results.json").read_text())["rows"]
    assert row["problem"] == f"{own}:line"
    assert row["rejected_steps"] == 0
    draws = az.from_netcdf(out / "draws.nc").posterior
    # Least squares, and the shares of the priors in it are small.
    with np.load("data.npz") as data:
        slope = data["x"] @ data["y"] / (data["x"] @ data["x"])
    assert float(draws["draw_"].mean()) == pytest.approx(slope, abs=0.15)
    assert float(draws["noise"].mean()) == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "{own}"], "expected module:function"),
        (["--model", "not_{own}:line"], "No module named 'not_{own}'"),
        (["--model", "{own}:curve"], "has no attribute 'curve'"),
        (["--model", "{own}:clash"], "'w_dim_0' has the name of a dimension"),
        (["--model", "{own}:number"], "expected a NumPyro model, a function, got float"),
        (["--model", "{own}:line"], "missing a required argument: 'x'; the model has"),
        (["--model", "{own}:line", "--data", "other.npz"], "unexpected keyword argument 'z'"),
        (["--model", "{own}:line", "--data", "none.npz"], "No such file"),
        (["--model", "{own}:line", "--data", "words.npz"], "arrays of numbers"),
        (["--model", "{own}:line", "--data", "one.npy"], "expected a file of np.savez"),
        (["--model", "{own}:line", "--data", "text.npz"], "expected a file of np.savez"),
        (["--model", "{own}:line", "--data", "data.npz", "--tau", "0"], "tau"),
        (["--problem", "eight-schools", "--out", "data.npz"], "data.npz"),
    ],
)
def test_an_error_is_one_line(own, options, message, capsys):
    options = [text.format(own=own) for text in options]
    out = [] if "--out" in options else ["--out", "out"]
    assert main([*options, *out, "--quick", "--no-progress"]) == 1
    shown = capsys.readouterr().err
    assert len(shown.splitlines()) == 1
    assert message.format(own=own) in shown
    with pytest.raises(Exception, match=".") as raised:
        main([*options, *out, "--quick", "--no-progress", "--traceback"])
    assert str(raised.value).split()[0] in shown


@pytest.mark.parametrize(
    "options", [["--model", "a:b", "--problem", "digits"], ["--data", "data.npz"]]
)
def test_options_that_do_not_go_together(options, capsys):
    with pytest.raises(SystemExit) as done:
        main(options)
    assert done.value.code == 2
    assert "--model" in capsys.readouterr().err


def test_a_file_that_was_not_finished_has_another_name(tmp_path):
    def fails(path):
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        _write(tmp_path / "results.json", fails)
    assert list(tmp_path.iterdir()) == []


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
