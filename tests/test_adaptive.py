# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Adaptive effort: few draws far away, the cap at the minimum, and the draws of all rounds as one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SIGMAS, Counter, with_long
from jax import random

from numpyro_regloss import (
    Gaussian,
    Loss,
    Minibatch,
    RegularizedLoss,
    TwoStep,
    fit,
    problems,
    shift,
)

TAU = 0.5
PROBLEM = problems.quadratic(np.linspace(0.2, 1.0, 10), center=np.full(10, 0.5))
ENGINES = {
    "importance": shift.Importance(400),
    "nuts": shift.NUTS(num_warmup=100, num_samples=10),
}


def target_of(problem, x):
    loss = Loss.from_function(problem.loss, np.asarray(x, float))
    return RegularizedLoss(loss, Gaussian.isotropic(loss.x0, TAU))


@jax.jit
def step(engine, rng_key, state, target):
    state, draws, info = engine.step(rng_key, state, target)
    _, fitted, fit_info = fit.ForwardKL(control_variates="none").step(rng_key, (), target, draws)

    def add(total, chunk):
        return total + jnp.exp(chunk.log_weight) @ chunk.x

    folded = draws.fold(add, jnp.zeros(target.dim))
    direct = jnp.einsum("cd,cdi->i", jnp.exp(draws.log_weight), draws.x)
    return state, (draws, info, fitted, fit_info, folded, direct)


def shift_and_fit(engine, rng_key, target):
    return step(engine, rng_key, engine.init(rng_key, target), target)[1]


@pytest.mark.parametrize("name", with_long(ENGINES, {"nuts"}))
def test_effort_follows_the_progress_to_be_made(name):
    engine = shift.Adaptive(ENGINES[name], max_rounds=7)
    assert engine.max_rounds == 8
    far = shift_and_fit(engine, random.key(0), target_of(PROBLEM, np.full(10, 1.3)))
    center = target_of(PROBLEM, np.full(10, 0.5))
    at_center = [shift_and_fit(engine, random.key(i), center) for i in range(1, 11)]
    # By luck a first look is significant: at the confidence of 0.5 in a quarter of the cases at most.
    lasting = [found for found in at_center if not found[1].significant]
    assert len(lasting) >= 6
    there = lasting[0]
    assert far[1].num_rounds == 1
    assert far[1].significant
    assert there[1].num_rounds == 8
    assert not there[1].significant
    for x, (draws, info, fitted, fit_info, folded, direct) in ((1.3, far), (0.5, there)):
        assert info.ok
        rounds, count = int(info.num_rounds), draws.loss.shape[1] // 8
        assert np.array_equal(
            np.isfinite(draws.log_weight[0]), np.arange(8 * count) < rounds * count
        )
        np.testing.assert_allclose(folded, direct, rtol=1e-4, atol=1e-5)
        error = np.abs(fitted.mean - PROBLEM.shift_mean(np.full(10, x), TAU))
        # Pairs about the center of symmetry are exact but for rounding.
        assert np.all(error < SIGMAS * fit_info.mean_error + 1e-6)
        if name == "importance":
            assert info.num_loss == rounds * count
    # Eight rounds know the mean better than one, by the square root of eight.
    ratio = np.mean(far[3].mean_error / there[3].mean_error)
    assert name == "importance" or 2.0 < ratio < 4.0


def test_a_run_adapts_and_never_retraces():
    counter = Counter(PROBLEM.loss)
    loss = Loss.from_function(counter, np.full(10, 1.5))
    optimizer = TwoStep(
        loss, TAU, shift.Adaptive(shift.Importance(400, antithetic=False), 16), fit.ForwardKL()
    )
    result = optimizer.run(random.key(2), 25, progress_bar=False)
    rounds = result.history.shift.num_rounds
    assert result.history.ok.all()
    assert rounds[0] == 1
    assert rounds.max() == 16
    assert np.all(result.history.shift.significant[rounds < 16])
    count = counter.count
    optimizer.run(random.key(3), 5, progress_bar=False, init_state=result.state)
    TwoStep(
        loss, 0.3, shift.Adaptive(shift.Importance(400, antithetic=False), 16, 0.9), fit.ForwardKL()
    ).run(random.key(3), 5, progress_bar=False)
    assert counter.count == count


def test_all_rounds_share_one_batch():
    data = jnp.arange(8.0)

    def loss_fn(x, rows):
        return jnp.mean((x - rows) ** 2)

    loss = Loss.from_function(loss_fn, jnp.zeros(()), data, minibatch=Minibatch(1))
    target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, TAU))
    engine = shift.Adaptive(shift.Importance(4), max_rounds=4)
    state = engine.init(random.key(1), target)
    _, draws, info = jax.jit(engine.step)(random.key(0), state, target)
    drawn = np.isfinite(draws.log_weight[0])
    assert drawn.sum() == 4 * info.num_rounds
    x, value = draws.x[0, drawn], draws.loss[0, drawn]
    # Of one row r the loss is (x - r)², so that x² - loss is linear in x.
    rows = (value[:, None] - (x - data) ** 2) ** 2
    assert np.sum(np.max(rows, 0) < 1e-6) == 1


def test_a_step_begins_with_half_the_rounds_of_the_last():
    engine = shift.Adaptive(ENGINES["importance"], max_rounds=8)
    target = target_of(PROBLEM, np.full(10, 1.3))
    state = engine.init(random.key(0), target)
    assert state.num_rounds == 1
    after, (_, info, *_) = step(engine, random.key(0), state, target)
    assert after.num_rounds == info.num_rounds < 4
    # The second one is of a run with a higher cap.
    for num_rounds in (8, 64):
        before = state._replace(num_rounds=jnp.asarray(num_rounds))
        _, (_, info, *_) = step(engine, random.key(0), before, target)
        assert info.num_rounds == 4
        assert info.significant


BAD = [
    (lambda: shift.Adaptive(shift.NUTS), TypeError, "engine as a shift"),
    (lambda: shift.Adaptive(3), TypeError, "engine as a shift"),
    (lambda: shift.Adaptive(shift.Implicit()), ValueError, "makes draws"),
    (lambda: shift.Adaptive(shift.NUTS(), 0), ValueError, "max_rounds"),
    (lambda: shift.Adaptive(shift.NUTS(), confidence=1.5), ValueError, "between 0 and 1"),
    (
        lambda: shift_and_fit(
            shift.Adaptive(shift.Importance(5)), random.key(0), target_of(PROBLEM, np.zeros(10))
        ),
        ValueError,
        "blocks of 2, got 5",
    ),
]


@pytest.mark.parametrize(("call", "error", "words"), BAD)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
