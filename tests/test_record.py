# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Verdicts and values in the history, against exact ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SIGMAS, long
from jax import random

from numpyro_regloss import Loss, Record, TwoStep, anchor, fit, problems, schemes, shift
from numpyro_regloss.anchor import Anchor
from numpyro_regloss.two_step.result import headline

TAU = 0.5


def _steps(history, begin, end):
    return jax.tree.map(lambda leaf: leaf[begin:end], history)


def optimizer_of(problem, x, **settings):
    loss = Loss.from_function(problem.loss, np.asarray(x, float))
    settings = {"shift": shift.NUTS(100, 50), "fit": fit.ForwardKL(), **settings}
    return TwoStep(loss, TAU, record=settings.pop("record", Record()), **settings)


@pytest.mark.parametrize("dim", [2, long(30), long(100)])
@pytest.mark.parametrize(
    "engine",
    [
        pytest.param(shift.NUTS(100, 50), id="nuts", marks=pytest.mark.long),
        pytest.param(shift.Importance(2000, antithetic=False), id="importance"),
    ],
)
def test_no_verdict_at_a_fixed_point(engine, dim):
    # Near flat, so that a cloud keeps its weight in 100 dimensions; pairs would find the centre of symmetry
    # exactly, and so would the control variates of a Gaussian q.
    problem = problems.quadratic(np.linspace(0.05, 0.3, dim))
    plain = fit.ForwardKL(control_variates="none")
    optimizer = optimizer_of(problem, np.zeros(dim), shift=engine, fit=plain)
    history = optimizer.run(random.key(dim), 300, progress_bar=False).history
    assert history.ok.all()
    assert np.mean(history.record.verdict != 0) <= 0.08
    assert np.isfinite(history.record.decrease_error).all()


class Overshoot(Anchor):
    """Four times the plain step: up the other side of a quadratic of curvature above 1 / tau."""

    def init(self, target):
        return ()

    def step(self, rng_key, state, target, draws, fitted, fit_info):
        _, plain, info = anchor.Proximal().step(rng_key, state, target, draws, fitted, fit_info)
        mean = target.reference.mean + 4.0 * (plain.mean - target.reference.mean)
        return state, plain._replace(mean=mean), info


def test_progress_and_overshooting_are_told_apart():
    problem = problems.quadratic(np.linspace(4.0, 8.0, 5))
    for moves, expected in ((anchor.Proximal(), 1), (Overshoot(), -1)):
        optimizer = optimizer_of(
            problem, np.full(5, 0.5), anchor=moves, shift=shift.Importance(20_000)
        )
        history = optimizer.run(random.key(0), 2, progress_bar=False).history
        assert history.record.verdict[0] == expected
        before, after = history.reference.mean[:2]
        exact = problem.local_entropy(before, TAU) - problem.local_entropy(after, TAU)
        # Half of the draws choose nearly the same centre, but its noise counts four times.
        error, noise = history.record.decrease_error[0], 0.1 * abs(exact)
        assert abs(history.record.decrease[0] - exact) < SIGMAS * error + noise


@pytest.mark.parametrize("temperature", [1.0, 0.2])
def test_values_are_exact_and_come_at_their_interval(temperature, capsys):
    problem = problems.double_well(3)
    record = Record(values_every=3, num_samples=2000)
    optimizer = optimizer_of(
        problem,
        np.full(3, 0.4),
        record=record,
        temperature=temperature,
        shift=shift.Importance(4000),
    )
    history = optimizer.run(random.key(1), 8, progress_bar=False).history
    due = np.arange(8) % 3 == 0
    for estimate in (history.record.local_entropy, history.record.heat):
        assert np.array_equal(np.isfinite(estimate.value), due)
    for step in np.flatnonzero(due):
        center = history.reference.mean[step]
        entropy, heat = (
            jax.tree.map(lambda leaf: leaf[step], estimate)  # noqa: B023
            for estimate in (history.record.local_entropy, history.record.heat)
        )
        exact = problem.local_entropy(center, TAU, temperature), problem.heat(center, TAU)
        assert abs(entropy.value - exact[0]) < SIGMAS * entropy.error
        assert abs(heat.value - exact[1]) < SIGMAS * heat.error
        assert entropy.value - SIGMAS * entropy.error <= heat.value + SIGMAS * heat.error
    plain = optimizer_of(
        problem, np.full(3, 0.4), record=None, temperature=temperature, shift=shift.Importance(4000)
    ).run(random.key(1), 8, progress_bar=False)
    for uses_draws, name, estimate in (
        (True, "F_tau", history.record.local_entropy),
        (False, "heat", history.record.heat),
    ):
        # Of steps 4 and 5 no value is known; of all eight that of step 6 is the last.
        assert not {"F_tau", "heat"} & headline(_steps(history, 4, 6), uses_draws).keys()
        shown = headline(_steps(history, 0, 8), uses_draws)
        assert shown["loss"] == f"{history.loss[7]:.4g}"
        assert shown[name] == f"{estimate.value[6]:.4g} ± {estimate.error[6]:.2g}"
        assert len({"F_tau", "heat"} & shown.keys()) == 1
    optimizer.run(random.key(1), 8)
    bar = capsys.readouterr().err.rpartition("\r")[2]
    entropy = history.record.local_entropy
    assert f"F_tau={entropy.value[6]:.4g} ± {entropy.error[6]:.2g}" in bar
    # Writing down changes nothing, and its evaluations are counted.
    assert np.array_equal(history.reference.mean, plain.history.reference.mean)
    assert np.array_equal(history.num_loss - plain.history.num_loss, 2000 * due)
    assert plain.history.record is None


def test_heat_steps_are_judged_by_the_heat():
    problem = problems.double_well(4)
    loss = Loss.from_function(problem.loss, np.full(4, 1.5))
    optimizer = schemes.heat(loss, TAU, fit.RobbinsMonro(500), record=Record(num_samples=500))
    history = optimizer.run(random.key(2), 4, progress_bar=False).history
    assert history.record.verdict[0] == 1
    for step in range(3):
        before, after = history.reference.mean[step : step + 2]
        exact = problem.heat(before, TAU) - problem.heat(after, TAU)
        error = history.record.decrease_error[step]
        assert abs(history.record.decrease[step] - exact) < SIGMAS * error + 1e-5


def test_rejected_steps_have_no_verdict():
    def tau(step):  # turns negative under way
        return jnp.where(step % 4 == 3, -1.0, TAU)

    loss = Loss.from_function(problems.double_well(2).loss, np.ones(2))
    optimizer = TwoStep(loss, tau, shift.Importance(500), fit.ForwardKL(), record=Record())
    with pytest.warns(UserWarning, match="rejected"):
        history = optimizer.run(random.key(0), 14, progress_bar=False).history
    assert np.sum(~history.ok) == 3
    assert np.all(history.record.verdict[~history.ok] == 0)
    assert np.isnan(history.record.decrease[~history.ok]).all()


BAD = [
    (lambda: Record(values_every=-1), ValueError, "values_every"),
    (lambda: Record(values_every=2.5), TypeError, "values_every"),
    (lambda: Record(num_samples=2), ValueError, "num_samples"),
    (lambda: Record(confidence=95), ValueError, "between 0 and 1"),
    (lambda: Record(confidence=0.0), ValueError, "confidence"),
    (
        lambda: optimizer_of(problems.absolute(2), np.zeros(2), record=True),
        TypeError,
        "Record or None",
    ),
]


@pytest.mark.parametrize(("call", "error", "words"), BAD)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
