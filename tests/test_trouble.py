# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Named trouble during a run: what was reached is kept, counted and told, with a remedy that works."""

import dataclasses
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SIGMAS, long
from jax import random
from scipy import stats

from numpyro_regloss import Loss, Minibatch, RejectedError, TwoStep, fit, schemes, shift
from numpyro_regloss.two_step.result import TwoStepResult, disagreement, report_trouble

CHAIN = {"num_warmup": 30, "num_samples": 20, "num_chains": 2}
ENGINES = {
    "importance": (shift.Importance(200), fit.ForwardKL()),
    "nuts": (shift.NUTS(**CHAIN), fit.ForwardKL()),
    "hmc": (shift.HMC(**CHAIN), fit.ForwardKL()),
    "sgld": (shift.SGLD(0.05, 40), fit.ForwardKL()),
    "robbins_monro": (shift.Implicit(), fit.RobbinsMonro(5)),
    "reverse_kl": (shift.Implicit(), fit.ReverseKL(num_steps=10)),
}


def scaled_bowl(x, scale):
    return scale * jnp.sum((x - 1.0) ** 2)


def make(engine="importance", tau=0.1, scale=1.0):
    loss = Loss.from_function(scaled_bowl, np.zeros(2), scale)
    return TwoStep(loss, tau, *ENGINES[engine])


@pytest.mark.parametrize(
    ("engine", "bad"),
    [
        ("importance", np.nan),
        # What the user is told is the driver's; that engines keep their state, `test_conformance.py` has.
        long("hmc", -np.inf),
        *(long(name, np.nan) for name in ("robbins_monro", "nuts", "sgld", "reverse_kl")),
    ],
)
def test_a_loss_that_fails_for_one_step(engine, bad):
    optimizer = make(engine)
    before = optimizer.run(random.key(0), 3, progress_bar=False)
    with pytest.raises(RejectedError, match="1 of 1 steps .* loss itself is not finite") as caught:
        optimizer.run(random.key(0), 1, bad, init_state=before.state, progress_bar=False)
    failed = caught.value.result
    assert failed.state.step == 4
    for old, new in zip(before.state.reference, failed.state.reference, strict=True):
        np.testing.assert_array_equal(old, new)
    after = optimizer.run(random.key(0), 3, init_state=failed.state, progress_bar=False)
    assert after.history.ok.all()
    assert np.sum((after.params - 1) ** 2) < np.sum((failed.params - 1) ** 2)


def test_a_loss_that_fails_for_good_after_some_steps():
    # Every step moves by tau times the slope, 0.1 with a noise of the same size, towards the edge at -1.
    loss = Loss.from_function(lambda x: jnp.where(x[0] < -1.0, jnp.nan, 10 * x[0]), np.zeros(1))
    optimizer = schemes.heat(loss, 0.01, fit=fit.RobbinsMonro(20))
    with pytest.warns(UserWarning, match="of 40 steps were rejected") as caught:
        result = optimizer.run(random.key(0), 40, progress_bar=False)
    ok = result.history.ok
    assert str(np.sum(~ok)) in str(caught[0].message)
    assert len(caught) == 1
    assert ok.shape == (40,)
    assert ok[:5].all()
    assert not ok[-20:].any()
    taken = np.flatnonzero(ok)[-1]
    np.testing.assert_array_equal(result.params, result.history.fitted.mean[taken])
    assert -1.0 < result.params[0] < -0.5


@pytest.mark.parametrize("engine", [long("nuts"), "hmc"])
def test_divergent_chains_are_rejected_and_warm_up_again(engine):
    optimizer = make(engine)
    state = optimizer.run(random.key(0), 3, progress_bar=False).state
    # A million times the curvature needs a thousandth of the step size.
    with pytest.warns(UserWarning, match="1 of 4 steps were rejected"):
        result = optimizer.run(random.key(0), 4, 1e6, init_state=state, progress_bar=False)
    history = result.history
    assert history.ok.tolist() == [False, True, True, True]
    assert history.shift.num_divergent[0] > 0.5 * 40

    def longest(state):
        steps = state.shift.coordinates.forth(state.shift.step_size * jnp.eye(2))
        return np.linalg.norm(steps, 2)  # in units of the reference

    assert longest(result.state) < 0.1 * longest(state)
    np.testing.assert_array_equal(history.reference.mean[0], history.reference.mean[1])


# Loss Σ (x + 1)² beyond a wall: where q is normal in each coordinate, cut off at zero in some of them.
def behind_walls(x, num_walls):
    inside = jnp.all((x > 0) | (jnp.arange(x.size) >= num_walls))
    return jnp.where(inside, jnp.sum((x + 1.0) ** 2), jnp.inf)


@pytest.mark.parametrize("dim", [2, long(12)])
def test_chains_that_a_wall_stops_are_taken_where_they_agree(dim):
    tau, temperature, start = 0.3, 0.06, 1.5
    loss = Loss.from_function(behind_walls, np.full(dim, start), 1)
    engine = shift.NUTS(num_warmup=150, num_samples=250)
    optimizer = schemes.local_entropy(loss, tau, engine, temperature=temperature)
    history = optimizer.run(random.key(0), 1, progress_bar=False).history
    assert history.ok.all()
    assert history.shift.num_divergent[0] > 0.5 * 1000
    precision = 1 / tau + 2 / temperature
    exact = np.full(dim, (start / tau - 2 / temperature) / precision)
    exact[0] = stats.truncnorm.mean(
        -exact[0] * np.sqrt(precision), np.inf, exact[0], 1 / np.sqrt(precision)
    )
    error = np.abs(history.fitted.mean[0] - exact)
    assert np.all(error < SIGMAS * history.fit.mean_error[0] + 1e-4)


@pytest.mark.long
@pytest.mark.parametrize("engine", ["nuts", "hmc"])
def test_chains_that_walls_hold_are_rejected_and_others_named(engine):
    # One draw of a pair of coordinates in hundreds is behind no wall where the reference is.
    loss = Loss.from_function(behind_walls, np.full(8, 0.01), 8)
    optimizer = TwoStep(loss, 1.0, *ENGINES[engine], temperature=1e-4)
    others = "shift.HMC, shift.SMC or" if engine == "nuts" else "use shift.SMC or"
    with pytest.raises(RejectedError, match=f"{others} shift.Importance"):
        optimizer.run(random.key(0), 2, progress_bar=False)


def test_chains_in_different_modes_are_told_where_their_steps_are_taken():
    taken = make().run(random.key(0), 5, progress_bar=False).history
    rhat = np.array([np.nan, 9.0, 12.0, 1.1, 15.0])

    class Info(NamedTuple):
        rhat: np.ndarray

    class Mute:
        remedy = staticmethod(lambda info, ok: "")

    apart = taken._replace(shift=Info(rhat))
    assert "in 3 of 4 steps that were taken" in disagreement(apart)
    assert "split R-hat 10.5 in the median" in disagreement(apart)
    # Steps that were rejected are told of as such; and one unlucky step in many is no news.
    assert not disagreement(apart._replace(ok=rhat < 9.0))
    assert not disagreement(apart._replace(shift=Info(np.array([1.0, 1.2, 9.0, 1.1, 1.3]))))
    assert not disagreement(taken)
    with pytest.warns(UserWarning, match="different places .* shift.SMC"):
        report_trouble(
            TwoStepResult(None, None, apart), SimpleNamespace(shift=Mute, fit=Mute, anchor=Mute)
        )


def test_a_loss_that_is_undefined_around_its_start():
    loss = Loss.from_function(lambda x: jnp.sum(jnp.sqrt(x)), np.zeros(20))
    optimizer = schemes.local_entropy(loss, 0.1, shift.Importance(100))
    words = "1 of 1 steps .* finite at the centre, but NaN or -infinity at the draws"
    with pytest.raises(RejectedError, match=words) as caught:
        optimizer.run(random.key(0), 1, progress_bar=False)
    assert "more draws" not in str(caught.value)


def test_a_degenerate_cloud_is_rejected_and_a_smaller_tau_helps():
    optimizer = make(tau=100.0, scale=1e4)
    with pytest.raises(RejectedError, match="all weight on one draw.* smaller tau") as caught:
        optimizer.run(random.key(0), 3, progress_bar=False)
    result = caught.value.result
    assert np.isinf(result.history.fit.mean_error).all()
    np.testing.assert_array_equal(result.params, np.zeros(2))
    smaller = dataclasses.replace(optimizer, tau=1e-8)
    again = smaller.run(random.key(0), 3, init_state=result.state, progress_bar=False)
    assert again.history.ok.all()


def test_a_schedule_that_turns_bad_under_way_leaves_a_finite_scale():
    taus = jnp.array([0.1, 0.1, np.nan, np.inf, -1.0, 0.1])
    optimizer = make(tau=lambda t: taus[t])
    state, history = optimizer.scan(optimizer.init(random.key(0)), 6)
    assert history.ok.tolist() == [True, True, False, False, False, True]
    np.testing.assert_array_equal(history.reference.scale, np.full(6, np.sqrt(np.float32(0.1))))
    assert np.isfinite(state.reference.mean).all()


def test_a_residual_that_cannot_be_computed_is_infinite():
    # One row of eight is NaN: in some steps only the batch of the last gradient holds it.
    data = np.array([np.nan, *range(7)], np.float32)
    loss = Loss.from_function(
        lambda x, d: jnp.mean((x - d) ** 2), np.zeros(1), data, minibatch=Minibatch(1)
    )
    optimizer = schemes.heat(loss, 0.1, fit=fit.RobbinsMonro(2))
    state = optimizer.init(random.key(0), np.zeros(8, np.float32))
    with pytest.warns(UserWarning, match="steps were rejected"):
        history = optimizer.run(random.key(0), 60, init_state=state, progress_bar=False).history
    # Steps that did not look know none.
    residual = history.fit.residual[history.ok & history.fit.looked]
    assert np.isinf(residual).any()
    assert not np.isnan(residual).any()


@pytest.mark.both
def test_an_exception_of_the_callback_carries_the_result():
    def callback(state, info):
        info.reference.mean[:] = np.nan  # the history must not be what a callback is given
        if state.step == 3:
            raise ZeroDivisionError("mine")

    optimizer = make()
    with pytest.raises(ZeroDivisionError, match="mine") as caught:
        optimizer.run(random.key(0), 10, progress_bar=False, callback=callback)
    (note,) = caught.value.__notes__
    assert "after 3 of 10 steps" in note
    assert "`result`" in note
    result = caught.value.result
    whole = optimizer.run(random.key(0), 3, progress_bar=False)
    np.testing.assert_array_equal(result.params, whole.params)
    np.testing.assert_array_equal(result.history.reference.mean, whole.history.reference.mean)
    rest = optimizer.run(random.key(0), 2, init_state=result.state, progress_bar=False)
    assert rest.state.step == 5


@pytest.mark.both
@pytest.mark.parametrize("last", [long(0), 5])
def test_an_exception_of_a_loss_on_the_host_carries_the_result(last):
    calls = []

    def on_host(x):
        calls.append(x)
        if len(calls) > 40 * last + 20:
            raise OSError("the simulator died")
        return np.sum(x**2)

    def simulated(x):
        out = jax.ShapeDtypeStruct((), x.dtype)
        return jax.pure_callback(on_host, out, x, vmap_method="sequential")

    loss = Loss.from_function(simulated, np.ones(2))
    optimizer = TwoStep(loss, 0.1, shift.Importance(40), fit.ForwardKL())
    with pytest.raises(Exception, match="the simulator died") as caught:
        optimizer.run(random.key(0), 10, progress_bar=False)
    if last:
        done = len(caught.value.result.history.ok)
        assert 1 <= done <= last
        assert caught.value.result.state.step == done
    else:
        assert not hasattr(caught.value, "result")
