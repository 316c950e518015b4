# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Histories without vectors: the same run, the same verdicts, and errors that say how to have the rest."""

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import pytest
from conftest import long
from jax import random
from test_two_step import make, same

from numpyro_regloss import (
    Arrived,
    Loss,
    Record,
    TwoStep,
    anchor,
    diagnostics,
    fit,
    plots,
    schemes,
    shift,
    to_arviz,
)
from numpyro_regloss.two_step import motion, outer_step

mpl.use("Agg")
QUIET = {"progress_bar": False}


def quadratic(params, scale):
    return 0.5 * scale * jnp.sum((params - 1.0) ** 2)


def heat(dim, **settings):
    loss = Loss.from_function(quadratic, jnp.zeros(dim), 1.0)
    return schemes.heat(loss, 0.1, fit=fit.RobbinsMonro(5), **settings)


def numbers(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if np.ndim(leaf) == 1]


@pytest.mark.parametrize("scheme", [long("cloud"), "heat", long("scales")])
def test_what_is_kept_changes_no_number(scheme):
    optimizer = {"cloud": make, "heat": lambda: heat(70), "scales": dense}[scheme]()
    whole = optimizer.run(random.key(0), 6, **QUIET)
    thin = optimizer.run(random.key(0), 6, history="scalars", **QUIET)
    assert same(whole.state, thin.state)
    again = optimizer.run(random.key(0), 4, history="scalars", **QUIET)
    again = optimizer.run(random.key(0), 2, init_state=again.state, history="scalars", **QUIET)
    assert same(whole.state, again.state)
    assert same(jax.tree.map(lambda a: a[4:], thin.history), again.history)
    full = whole.history
    assert full.motion is None
    for part in ("ok", "loss", "num_loss", "num_grad", "draws"):
        assert same(vars_of(full, part), vars_of(thin.history, part))
    for part in ("shift", "fit", "anchor"):
        assert same(numbers(vars_of(full, part)), vars_of(thin.history, part))
    assert all(leaf.shape == (6,) for leaf in jax.tree.leaves(thin.history._replace(motion=None)))
    # Lengths as the vectors of the other run have them, up to the order of a sum in float32.
    sd = np.sqrt(np.asarray(full.reference.variance))
    moved, pull = np.diff(whole.centers, axis=0), full.fitted.mean - full.reference.mean
    expected = {
        "step": moved / sd,
        "pull": pull / sd,
        "error": full.fit.mean_error / sd,
        "step_norm": moved,
        "error_norm": full.fit.mean_error,
    }
    found = thin.history.motion._asdict()
    for name, vectors in expected.items():
        np.testing.assert_allclose(found[name], np.linalg.norm(vectors, axis=1), rtol=1e-4)
    np.testing.assert_allclose(thin.history.tau, full.tau.reshape(6, -1).mean(1), rtol=1e-6)
    reports = [diagnostics.summary(result, optimizer) for result in (whole, thin)]
    assert reports[0].arrived == reports[1].arrived
    assert reports[0].columns.keys() == reports[1].columns.keys()
    for name in set(reports[0].columns) - {"seconds"}:
        np.testing.assert_allclose(reports[0].columns[name], reports[1].columns[name], rtol=1e-4)
    assert "judged by sketches" in str(reports[1])
    assert "judged by sketches" not in str(reports[0])


def dense():
    loss = Loss.from_function(quadratic, jnp.zeros(3), 1.0)
    kept = {"fit": fit.ForwardKL("dense"), "anchor": anchor.KeepCovariance("dense")}
    return TwoStep(loss, 0.3, shift=shift.Importance(400), **kept)


def vars_of(info, name):
    return info._asdict()[name]


def test_auto_keeps_all_within_its_budget(monkeypatch):
    row = jax.eval_shape(lambda: jnp.zeros(1000, jnp.float32))
    fits = motion.HISTORY_BYTES // 4000
    assert motion.keeps_vectors("auto", row, fits)
    assert not motion.keeps_vectors("auto", row, fits + 1)
    assert motion.keeps_vectors("all", row, 10 * fits)
    assert not motion.keeps_vectors("scalars", row, 1)
    optimizer = heat(70)
    monkeypatch.setattr(motion, "HISTORY_BYTES", 10_000)
    results = [optimizer.run(random.key(0), count, **QUIET) for count in (2, 20)]
    assert [result.history.motion is None for result in results] == [True, False]
    with pytest.raises(ValueError, match='expected history as "auto", "all" or "scalars", got 1'):
        optimizer.run(random.key(0), 1, history=1, **QUIET)


def test_sketches_have_the_lengths_and_the_angles_of_vectors():
    rng = np.random.default_rng(0)
    width, dim = 64, 64 * 100
    ratios = []
    for _ in range(200):
        x = rng.normal(size=dim) ** 3
        # One column of a layer, as of an input that is always zero but for a few steps.
        column = np.zeros((dim // width, width))
        column[:, rng.integers(width)] = rng.normal(size=dim // width)
        ratios.append([ratio(x), ratio(column.ravel())])
    # Relative variance 2 / 61 of each, and 200 of them; four standard errors.
    spread = np.sqrt(2 / 61)
    np.testing.assert_allclose(np.mean(ratios, 0), 1.0, atol=4 * 1.5 * spread / np.sqrt(200))
    assert (np.std(ratios, 0) < 1.5 * spread).all()
    x, y = rng.normal(size=(2, dim)).astype(np.float32)
    total = motion._sketch(jnp.asarray(x)) + motion._sketch(jnp.asarray(y))
    np.testing.assert_allclose(motion._sketch(jnp.asarray(x + y)), total, atol=1e-3)
    few = jnp.arange(61.0)
    np.testing.assert_array_equal(motion._sketch(few), few)
    # A sum of squares is all there, whatever the dimension.
    np.testing.assert_allclose(motion._sums(jnp.ones(dim)).sum(), dim, rtol=1e-6)


def ratio(x):
    sketch = motion._sketch(jnp.asarray(x, jnp.float32))
    return float(jnp.sum(sketch**2) / np.sum(x**2))


def test_a_run_without_vectors_tells_whether_it_arrived():
    # So many parameters that each number of a sketch is a sum of many.
    optimizer = heat(1000)
    moving = optimizer.run(random.key(0), 12, history="scalars", **QUIET)
    report = diagnostics.summary(moving)
    assert report.arrived is False
    stopped = optimizer.run(random.key(0), 500, history="scalars", until=Arrived(), **QUIET)
    assert stopped.stopped == "arrived"
    assert len(stopped.history.ok) < 400
    whole = optimizer.run(random.key(0), 500, until=Arrived(), **QUIET)
    # The same question in 61 dimensions and in a thousand, asked every tenth step.
    assert abs(len(stopped.history.ok) - len(whole.history.ok)) <= 20
    assert diagnostics.summary(stopped, optimizer).arrived is True


def test_what_is_missing_says_so_and_how_to_have_it():
    optimizer = heat(70)
    result = optimizer.run(random.key(0), 6, history="scalars", **QUIET)
    how = r'history="all".*Record\(centers_every=k, verdicts=False\)'
    with pytest.raises(ValueError, match=f"TwoStepResult.centers: .*{how}"):
        _ = result.centers
    with pytest.raises(AttributeError, match=f"left out of this history.*{how}"):
        _ = result.history.reference.mean
    with pytest.raises(AttributeError, match=how):
        np.asarray(result.history.fitted.variance)
    for draw in (plots.trajectory, lambda r: plots.trajectory(r.history)):
        with pytest.raises(ValueError, match=f"plots.trajectory: .*{how}"):
            draw(result)
    axes = plots.optimization(result)
    assert axes[1].get_ylabel().startswith("length of the step")
    np.testing.assert_allclose(axes[1].lines[0].get_ydata(), result.history.motion.step_norm)
    data = to_arviz(result, optimizer)
    dataset = data["optimization"]
    assert "center" not in dataset
    assert "every k-th centre alone" in dataset.attrs["left_out"]
    np.testing.assert_array_equal(dataset["step_norm"], result.history.motion.step_norm)
    cloud = make()
    few = cloud.run(random.key(0), 6, history="scalars", **QUIET)
    assert "shift_posterior" not in groups(to_arviz(few, cloud))
    with pytest.raises(ValueError, match=f"to_arviz: step_draws: .*{how}"):
        to_arviz(few, cloud, step_draws=[0])


def groups(data):
    return data.groups() if callable(data.groups) else [name.strip("/") for name in data.groups]


def test_every_kth_centre():
    plain = heat(70).run(random.key(0), 11, **QUIET)
    optimizer = heat(70, record=Record(centers_every=4, verdicts=False))
    first = optimizer.run(random.key(0), 6, history="scalars", **QUIET)
    rest = optimizer.run(
        random.key(0),
        5,
        init_state=first.state,
        history="scalars",
        **QUIET,
        callback=lambda *_: None,
    )
    assert first.center_steps.tolist() == [0, 4, 6]
    assert rest.center_steps.tolist() == [6, 8, 11]
    np.testing.assert_array_equal(first.centers, plain.centers[[0, 4, 6]])
    np.testing.assert_array_equal(rest.centers, plain.centers[[6, 8, 11]])
    assert rest.history.record is None
    whole = optimizer.run(random.key(0), 6, **QUIET)
    assert whole.path is None
    assert whole.center_steps.tolist() == list(range(7))
    (axes,) = plots.trajectory(rest, optimizer, [0])
    assert axes.lines[0].get_xdata().tolist() == [0, 2, 5]
    (axes,) = plots.trajectory(rest, plane=True)
    assert axes.get_xlabel()
    dataset = to_arviz(first, optimizer)["optimization"]
    assert dataset["center"].dims == ("center_iteration", "param")
    assert dataset["center_iteration"].values.tolist() == [0, 4, 6]


def test_values_without_verdicts():
    record = Record(values_every=2, num_samples=50, verdicts=False)
    result = make(record=record).run(random.key(0), 4, **QUIET)
    assert result.history.record.verdict is None
    assert np.isfinite(result.history.record.heat.value).tolist() == [True, False, True, False]
    assert result.history.record.decrease is None
    assert plots.optimization(result)[1].get_ylabel().startswith("length of the step")


def test_a_callback_every_few_steps():
    optimizer, seen = make(), []

    def callback(state, info):
        seen.append((int(state.step), float(info.loss)))

    result = optimizer.run(random.key(0), 11, callback=callback, callback_every=4, **QUIET)
    assert [step for step, _ in seen] == [4, 8, 11]
    assert [loss for _, loss in seen] == result.history.loss[[3, 7, 10]].tolist()
    assert same(result.state, optimizer.run(random.key(0), 11, **QUIET).state)
    with pytest.raises(TypeError, match="callback_every"):
        optimizer.run(random.key(0), 1, callback_every=1.5)


def test_long_runs_of_large_networks_are_few_dispatches_and_small(monkeypatch):
    dim, num_steps, calls = 100_000, 60, []
    optimizer, plain = heat(dim), outer_step.advance

    def counted(*args):
        done = plain(*args)
        calls.append(sum(leaf.size for leaf in jax.tree.leaves(done[1])))
        return done

    monkeypatch.setattr(motion, "HISTORY_BYTES", 2**20)
    # As soon as the run has shown how fast it is, however slow the machine.
    monkeypatch.setattr("numpyro_regloss.two_step.chunks.SECONDS_PER_CHUNK", 1e3)
    monkeypatch.setattr("numpyro_regloss.two_step.chunks.MOST_SECONDS", 1e3)
    monkeypatch.setattr(outer_step, "advance", counted)
    result = optimizer.run(random.key(0), num_steps, **QUIET)
    assert len(calls) / num_steps <= 0.1
    # Chunks of up to 512 steps, of which not one vector is kept.
    assert max(calls) < 512 * 250
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(result.history)) < 1000 * num_steps
    with pytest.raises(ValueError, match="left out"):
        _ = result.centers
