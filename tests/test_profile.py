# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""The flatness report and the gradients for other training loops, against exact values."""

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
import pytest
from conftest import SIGMAS
from jax import random

from numpyro_regloss import Loss, Minibatch, plots, problems, shift, values

mpl.use("Agg")
TAUS = np.geomspace(1e-3, 1.0, 4)
PROBLEM = problems.double_well(3)


@pytest.fixture(scope="module")
def report():
    loss = Loss.from_function(PROBLEM.loss, np.zeros(3))
    return values.profile(random.key(0), loss, np.ones(3), taus=TAUS, temperature=0.5)


def test_profile_is_exact_within_errors(report):
    for i, tau in enumerate(TAUS):
        entropy = PROBLEM.local_entropy(np.ones(3), tau, 0.5)
        assert abs(report.local_entropy.value[i] - entropy) < SIGMAS * report.local_entropy.error[i]
        heat = PROBLEM.heat(np.ones(3), tau)
        assert abs(report.heat.value[i] - heat) < SIGMAS * report.heat.error[i]
    assert report.loss == 0.0
    np.testing.assert_allclose(report.heat_rise, report.heat.value)
    # Neighbors share their noise: the heat of a well rises with tau, also within errors.
    assert np.all(np.diff(report.heat_rise) > 0)


def test_profile_prints_as_a_table(report):
    lines = str(report).splitlines()
    assert len(lines) == 2 + len(TAUS)
    assert "sqrt(tau)" in lines[1]
    assert all(method in line for method, line in zip(report.method, lines[2:], strict=True))


def test_profile_as_a_figure(report):
    ax = plots.profile(report)
    assert ax.get_xscale() == "log"
    assert {line.get_label() for line in ax.lines} >= {"local entropy", "heat"}
    np.testing.assert_allclose(ax.lines[0].get_xdata(), np.sqrt(TAUS), rtol=1e-6)
    # Rises from 1e-2 to 1e2 can all be read.
    assert ax.get_yscale() == "log"
    assert plots.profile(report, ax=ax) is ax
    assert not any("trusted" in label for label in ax.get_legend_handles_labels()[1])
    mpl.pyplot.close(ax.figure)
    below = report._replace(loss=report.heat.value[0] * (1 + 1e-3))
    ax = plots.profile(below)
    assert ax.get_yscale() == "symlog"
    ax.figure.canvas.draw()
    places = ax.transData.transform(np.stack(ax.lines[1].get_data(), 1))[:, 1]
    zero = ax.transData.transform((1.0, 0.0))[1]
    assert places[0] < zero - 1.0 < zero + 1.0 < places[1]
    mpl.pyplot.close(ax.figure)


def test_profile_with_values_that_have_no_error():
    # exp(3 x): the heat at a wide tau hangs on draws that are not there.
    loss = Loss.from_function(lambda x: jnp.exp(3.0 * x[0]), np.zeros(1))
    with pytest.warns(UserWarning, match="values.profile: the error of the heat at 1 of 2") as told:
        report = values.profile(random.key(0), loss, taus=[1e-2, 2.0])
    assert len(told) == 1
    assert np.isfinite(report.heat.error[0])
    assert report.heat.error[1] == np.inf
    assert np.isfinite(report.local_entropy.error).all()
    assert "± inf" in str(report).splitlines()[-1]
    assert [line.endswith("! do not trust heat") for line in str(report).splitlines()[2:]] == [
        False,
        True,
    ]
    np.testing.assert_array_equal(report.trusted, [True, False])
    ax = plots.profile(report)
    ax.figure.canvas.draw()
    assert np.isfinite(ax.lines[1].get_ydata()).all()
    assert np.isfinite(ax.get_ylim()).all()
    (marks,) = (line for line in ax.lines if line.get_label() == "not to be trusted")
    np.testing.assert_allclose(marks.get_xydata(), ax.lines[1].get_xydata()[1:])
    mpl.pyplot.close(ax.figure)


def test_profile_of_trained_sites():
    from test_loss import SIGMA, Y, eight_schools  # noqa: PLC0415

    loss = Loss.from_model(eight_schools, 8, SIGMA, Y)
    params = loss.constrain(loss.x0)
    sites = {name: params[name] for name in loss.names}
    report = values.profile(random.key(1), loss, sites, taus=1e-4, num_samples=200)
    np.testing.assert_allclose(report.loss, loss.value(loss.x0), rtol=1e-5)
    assert report.tau.shape == (1,)


def test_gradients_are_exact_within_errors():
    loss = Loss.from_function(
        lambda p: PROBLEM.loss(jnp.stack([p["a"], *p["b"]])), {"a": 0.5, "b": jnp.ones(2)}
    )
    params = {"a": jnp.array(0.5), "b": jnp.array([0.9, -0.2])}
    x, tau = np.array([0.5, 0.9, -0.2]), 0.3
    entropy = jax.jit(values.value_and_grad(loss, tau, num_samples=20_000, temperature=0.5))
    heat = jax.jit(values.value_and_grad(loss, tau, kind="heat", num_samples=20_000))
    exact = {
        "entropy": 0.5 * (x - PROBLEM.shift_mean(x, tau, 0.5)) / tau,
        "heat": 4 * x**3 + 4 * x * (3 * tau - 1),
    }
    for name, call in (("entropy", entropy), ("heat", heat)):
        estimates, grads = jax.vmap(lambda key: call(params, key))(random.split(random.key(0), 8))  # noqa: B023
        assert jax.tree.structure(grads) == jax.tree.structure(params)
        flat = jnp.concatenate([grads["a"][:, None], grads["b"]], -1)
        error = np.std(flat, 0, ddof=1) / np.sqrt(8)
        # Student's t with seven degrees of freedom exceeds 8 as rarely as a normal variable exceeds four.
        assert np.all(np.abs(np.mean(flat, 0) - exact[name]) < 8.0 * error)
        value = PROBLEM.local_entropy(x, tau, 0.5) if name == "entropy" else PROBLEM.heat(x, tau)
        assert np.all(np.abs(estimates.value - value) < SIGMAS * estimates.error)


def test_gradients_of_a_heavy_tail_say_so():
    loss = Loss.from_function(lambda p: jnp.exp(4.0 * p["a"]), {"a": 0.0})
    call, params = values.value_and_grad(loss, 1.0, kind="heat"), {"a": jnp.zeros(())}
    with pytest.warns(UserWarning, match="values.value_and_grad: the error of the value"):
        estimate, _ = call(params, random.key(0))
    assert estimate.error == np.inf
    assert jax.jit(call)(params, random.key(0))[0].error == np.inf  # in silence


def test_any_training_loop_minimizes_the_regularized_loss():
    rows = jnp.arange(4.0)
    loss = Loss.from_function(
        lambda x, rows: jnp.mean((x - rows) ** 2), jnp.zeros(()), rows, minibatch=Minibatch(2)
    )
    optimizer = optax.sgd(0.05)
    regularized = values.value_and_grad(loss, 0.2, shift.HMC(50, 20), num_samples=20)

    def update(carry, key):
        params, state = carry
        updates, state = optimizer.update(regularized(params, key)[1], state)
        return (optax.apply_updates(params, updates), state), params

    start = jnp.array(5.0)
    keys = random.split(random.key(0), 200)
    _, path = jax.jit(lambda: jax.lax.scan(update, (start, optimizer.init(start)), keys))()
    # Batches of two rows out of {0, 1, 2, 3} have means of standard deviation 0.8, averaged over 100 steps.
    assert abs(np.mean(path[100:]) - 1.5) < 0.3


LOSS = Loss.from_function(PROBLEM.loss, np.zeros(3))
BAD = [
    (lambda: values.profile(random.key(0), PROBLEM.loss, taus=[1.0]), TypeError, "expected a Loss"),
    (lambda: values.profile(random.key(0), LOSS, taus=[]), ValueError, "taus as a sequence"),
    (lambda: values.profile(random.key(0), LOSS, taus=[0.1, -1.0]), ValueError, "taus"),
    (
        lambda: values.profile(random.key(0), LOSS, np.full(3, np.nan), taus=[0.1]),
        ValueError,
        "finite loss",
    ),
    (lambda: values.profile(random.key(0), LOSS, np.ones(2), taus=[0.1]), ValueError, "shape"),
    (
        lambda: values.profile(random.key(0), LOSS, taus=[0.1], num_samples=1),
        ValueError,
        "num_samples",
    ),
    (
        lambda: values.profile(random.key(0), LOSS, taus=[0.1], scale="kernel"),
        ValueError,
        "scale: expected None, one of",
    ),
    (
        lambda: values.profile(random.key(0), LOSS, taus=[0.1], scale="filter"),
        ValueError,
        "not all zero",
    ),
    (
        lambda: values.profile(random.key(0), LOSS, taus=[0.1], scale=-1.0),
        ValueError,
        "scale",
    ),
    (
        lambda: values.profile(random.key(0), LOSS, taus=[0.1], batches=True),
        ValueError,
        "with a minibatch",
    ),
    (lambda: values.flatness_verdict(random.key(0), PROBLEM.loss), TypeError, "expected a Loss"),
    (lambda: values.flatness_verdict(random.key(0), LOSS), ValueError, "not all zero"),
    (lambda: values.value_and_grad(PROBLEM.loss, 0.1), TypeError, "expected a Loss"),
    (lambda: values.value_and_grad(LOSS, -0.1), ValueError, "tau"),
    (lambda: values.value_and_grad(LOSS, 0.1, shift.Implicit()), TypeError, "makes draws"),
    (lambda: values.value_and_grad(LOSS, 0.1, kind="entropy"), ValueError, "kind"),
    (lambda: plots.profile(3), TypeError, "values.profile"),
]


@pytest.mark.parametrize(("call", "error", "words"), BAD)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
