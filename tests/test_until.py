# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Runs that stop by themselves: not too early, not much too late, and at one step however they were chunked."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import long
from jax import random

from numpyro_regloss import Arrived, Gaussian, Loss, TwoStep, diagnostics, fit, shift
from numpyro_regloss.two_step import TwoStepInfo
from numpyro_regloss.two_step.until import NEGLIGIBLE

NUM_RUNS = 1000


class Fitted(NamedTuple):
    ok: object
    mean_error: object


def window_of(center, fitted, error):
    """The history of some steps with the reference N(centre, I)."""
    count = len(center)
    blank = dict.fromkeys(TwoStepInfo._fields)
    reference = Gaussian(center, np.ones(count))
    mean = Gaussian(fitted, np.ones(count))
    ok = np.ones(count, bool)
    fitted = Fitted(ok, error)
    return TwoStepInfo(**blank | {"ok": ok, "reference": reference, "fitted": mean, "fit": fitted})


def simulated(rng, dim, contraction, noise, rule, *, times):
    """A quadratic loss: stops, and what the true pull was then, and when it first was no longer than the noise."""
    center = start = np.full(dim, 30.0 * noise / (1 - contraction))
    sd = noise * np.sqrt(np.linspace(0.5, 1.5, dim) / dim)
    rows, first = [], None
    for step in range(1, 4001):
        pull = (contraction - 1) * center
        # Of the centre's expectation: at rest it goes about by as much as the noise of a step itself.
        expected = start * contraction ** (step - 1) * (contraction - 1)
        long = np.sum(expected**2) > max(np.sum(sd**2), NEGLIGIBLE)
        if first is None and not long:
            first = step
        fitted = center + pull + sd * rng.normal(size=dim)
        rows.append((center, fitted))
        center = fitted
        if step % rule.patience == 0:
            centers, means = (np.array(a) for a in zip(*rows, strict=True))
            error = np.broadcast_to(times * sd, centers.shape) if times else None
            if rule.holds(window_of(centers, means, error), step // rule.patience):
                return step, long, first
            rows = []
    raise AssertionError("did not stop")


# Steps that reach the minimum at once, and those that take hundreds; many parameters; errors that no fit
# knows, and fits that state twice the error there is.
CASES = {
    "narrow": (5, 0.1, 0.5, 1.0),
    "wide": (5, 0.97, 0.5, 1.0),
    "one parameter": (1, 0.9, 0.5, 1.0),
    "many parameters": (50, 0.9, 2.0, 1.0),
    "unknown errors": (5, 0.9, 0.5, None),
    "large errors": (50, 0.98, 2.0, 2.0),
    "large errors, few parameters": (10, 0.98, 0.5, 2.0),
    "small noise": (5, 0.9, 0.005, 1.0),
}


# One of a kind waits for the long tests.
@pytest.mark.parametrize("case", [long(case) if case == "large errors" else case for case in CASES])
def test_it_seldom_stops_too_early_and_not_late(case):
    dim, contraction, noise, times = CASES[case]
    rng, rule = np.random.default_rng(0), Arrived()
    found = [
        simulated(rng, dim, contraction, noise, rule, times=times) for _ in range(NUM_RUNS // 5)
    ]
    steps, long, first = (np.array(a, float) for a in zip(*found, strict=True))
    # 5 % at most, and three standard errors of so many runs.
    assert np.mean(long) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / len(found))
    # A window begins before the pull is short, and another sees it; where steps are short, they take their time.
    delay = np.nanmedian(steps - first)
    assert delay <= 3 * rule.patience + 3 / (1 - contraction)


@pytest.mark.parametrize("times", [1.0, None])
@pytest.mark.parametrize("contraction", [-0.6, 0.1])
def test_a_fast_start_is_no_noise(contraction, times):
    # The first coordinate jumps to its end, or overshoots it, while a slow one is far from its own.
    rates, center, sd = np.array([contraction, 0.9]), np.array([-4.0, 2.0]), 0.02
    rng, rows = np.random.default_rng(0), []
    for _ in range(10):
        fitted = rates * center + sd * rng.normal(size=2)
        rows.append((center, fitted))
        center = fitted
    centers, means = (np.array(a) for a in zip(*rows, strict=True))
    error = None if times is None else np.full_like(centers, times * sd)
    assert not Arrived().holds(window_of(centers, means, error), 1)


def test_the_way_that_few_inner_steps_have_left_is_no_noise():
    # Steps of four tenths of the way, without noise, state errors as long as themselves.
    center = 3.0 * 0.6 ** np.arange(11.0)[:, None] * np.ones(3)
    error = 0.4 * center[:-1]
    window = window_of(center[:-1], center[1:], error)
    assert Arrived().holds(window, 1)
    biased = window._replace(fit=fit.FitInfo(mean_error=error, biased=np.ones(10, bool)))
    assert not Arrived().holds(biased, 1)


@pytest.fixture(scope="module")
def optimizer():
    loss = Loss.from_function(lambda x: jnp.sum((x - 1.0) ** 4), jnp.full(3, 4.0))
    return TwoStep(loss, 0.1, shift.AdaptiveImportance(), fit.ForwardKL())


def test_a_run_stops_and_says_why(optimizer):
    result = optimizer.run(random.key(0), 2000, until=Arrived(), progress_bar=False)
    count = len(result.history.ok)
    assert result.stopped == "arrived"
    assert count % 10 == 0
    assert count < 200
    np.testing.assert_allclose(result.params, 1.0, atol=0.3)
    report = diagnostics.summary(result, optimizer)
    assert f"Arrived: the run stopped by itself, after {count} steps" in str(report)
    # Chunks of one step.
    stepwise = optimizer.run(
        random.key(0), 2000, until=Arrived(), progress_bar=False, callback=lambda *_: None
    )
    np.testing.assert_array_equal(result.params, stepwise.params)


def test_other_ends_have_their_names(optimizer):
    assert optimizer.run(random.key(0), 3, progress_bar=False).stopped is None
    early = optimizer.run(random.key(0), 5, progress_bar=False, callback=lambda *_: True)
    assert early.stopped == "callback"
    far = optimizer.run(random.key(0), 10, until=Arrived(), progress_bar=False)
    assert far.stopped is None


def test_what_it_refuses(optimizer):
    with pytest.raises(TypeError, match="expected until as a numpyro_regloss.Arrived"):
        optimizer.run(random.key(0), 5, until=0.95)
    with pytest.raises(ValueError, match="confidence between 0 and 1"):
        Arrived(confidence=1.0)
    with pytest.raises(ValueError, match="patience"):
        Arrived(patience=2)
