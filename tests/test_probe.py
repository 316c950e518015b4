# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""What a probe says of losses whose gradients are right, zero, partly zero, wrong or not there."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax, random

from numpyro_regloss import Gaussian, Loss, Minibatch, RegularizedLoss, fit, schemes
from numpyro_regloss.losses.probe import probe

INPUTS = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
LABELS = np.sin(2 * INPUTS[:, 0])
WEIGHTS = {
    "w": np.random.default_rng(1).normal(size=(5, 20)).astype(np.float32),
    "v": 0.3 * np.random.default_rng(2).normal(size=20).astype(np.float32),
}


def network(p, w_of=lambda w: w):
    hidden = jax.nn.relu(INPUTS @ w_of(p["w"]))
    return jnp.mean((hidden @ p["v"] - LABELS) ** 2)


def straight_through(w):
    return w + lax.stop_gradient(jnp.sign(w) - w)


def hidden_root(x):
    never = jnp.sqrt(jnp.where(x == 0, 1.0, -jnp.abs(x)))
    return jnp.sum(jnp.where(x < 1e9, x**2, never))


def half_stopped(x):
    return jnp.sum((lax.stop_gradient(x[:2]) - 1.0) ** 2) + jnp.sum((x[2:] - 1.0) ** 2)


# Loss, start, tau, verdict.
CASES = {
    "bowl at its minimum": (lambda x: jnp.sum(x**2), np.zeros(3), 0.5, "fine"),
    "kinks": (lambda x: jnp.sum(jnp.abs(x)), np.zeros(3), 0.5, "fine"),
    "ravine": (
        lambda x: jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2),
        np.zeros(6),
        0.5,
        "fine",
    ),
    "ripples": (
        lambda x: jnp.sum(x**2 - 10 * jnp.cos(2 * jnp.pi * x)),
        np.full(6, 2.0),
        4.0,
        "fine",
    ),
    "wall": (lambda x: jnp.where(x[0] > 0, jnp.sum(x**2), jnp.inf), np.ones(3), 2.0, "fine"),
    "network": (network, WEIGHTS, 0.01, "fine"),
    "network, narrow": (network, WEIGHTS, 1e-10, "fine"),
    "most parameters unused": (lambda x: (x[0] - 1.0) ** 2, np.zeros(40), 0.5, "fine"),
    "constant": (lambda x: 3.0 + 0.0 * jnp.sum(x), np.zeros(3), 0.5, "constant"),
    "far below its rounding": (lambda x: jnp.sum(x**2) + 1e8, np.ones(3), 0.5, "constant"),
    "staircase": (lambda x: jnp.sum(jnp.floor(3 * x)), np.zeros(3), 0.5, "zero"),
    "argmax": (lambda x: 1.0 * jnp.argmax(x), np.zeros(4), 1.0, "zero"),
    "all stopped": (lambda x: lax.stop_gradient(jnp.sum(x**2)), np.ones(3), 0.5, "zero"),
    "two of many stopped": (half_stopped, np.zeros(300), 0.5, "some zero"),
    "one term stopped": (
        lambda x: jnp.sum(x**2) + lax.stop_gradient(5.0 * jnp.sum(x**2)),
        np.ones(3),
        0.5,
        "wrong",
    ),
    "straight through": (
        lambda w: network({"w": w, "v": WEIGHTS["v"]}, straight_through),
        WEIGHTS["w"],
        0.01,
        "wrong",
    ),
    "nowhere finite": (hidden_root, np.zeros(3), 0.5, "fails"),
}


def verdict(found):
    if not found.varies:
        return "constant"
    if found.gradient_is_zero:
        return "zero"
    if found.gradient_fails:
        return "fails"
    if found.some_gradient_is_zero:
        return "some zero"
    return "wrong" if found.gradient_is_wrong else "fine"


def target_of(case):
    fn, start, tau, _ = CASES[case]
    loss = Loss.from_function(fn, start)
    return RegularizedLoss(loss, Gaussian.isotropic(loss.x0, tau))


@pytest.mark.parametrize("case", CASES)
def test_verdicts(case):
    target = target_of(case)
    look = jax.jit(probe)
    seen = [verdict(jax.device_get(look(random.key(seed), target))) for seed in range(6)]
    # Of rounded weights most differences are zero, but some happen to be what the gradient says.
    least = 4 if case == "straight through" else 6
    assert seen.count(CASES[case][-1]) >= least


def test_verdicts_are_the_same_under_a_trace():
    target = target_of("two of many stopped")
    names = ("varies", "gradient_is_zero", "some_gradient_is_zero", "gradient_is_wrong")

    def verdicts(key):
        found = probe(key, target)
        return [getattr(found, name) for name in names]

    traced = np.transpose(jax.vmap(verdicts)(random.split(random.key(0), 3)))
    for key, row in zip(random.split(random.key(0), 3), traced, strict=True):
        found = jax.device_get(jax.jit(probe)(key, target))
        assert row.tolist() == [bool(getattr(found, name)) for name in names]


def test_slopes_and_differences_are_those_of_the_loss():
    target = target_of("ravine")
    found = jax.device_get(jax.jit(probe)(random.key(0), target))
    assert found.value.shape == found.slope.shape == (4,)
    np.testing.assert_allclose(found.slope, found.difference, rtol=0.02)
    assert found.values[0] == target.value(target.reference.mean)
    assert not found.disagrees.any()
    assert found.comparable.all()


def test_double_precision_sees_what_single_cannot(x64):
    found = jax.device_get(jax.jit(probe)(random.key(0), target_of("far below its rounding")))
    assert found.values.dtype == np.float64
    assert verdict(found) == "fine"


def test_a_run_warns_once_of_gradients_that_values_contradict():
    optimizer = schemes.heat(Loss.from_function(half_stopped, np.zeros(5)), 0.1)
    with pytest.warns(UserWarning, match="exactly zero for 2 of 5 parameters") as caught:
        optimizer.run(random.key(0), 3, progress_bar=False)
    assert len(caught) == 1
    assert "straight-through" in str(caught[0].message)


@pytest.mark.parametrize("minibatch", [None, Minibatch(16)])
def test_a_run_on_a_sound_loss_says_nothing(minibatch):
    def fn(x, rows):
        return jnp.mean(jnp.abs(rows - x))

    loss = Loss.from_function(fn, np.zeros(5), INPUTS, minibatch=minibatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schemes.heat(loss, 0.01, fit.RobbinsMonro(3)).run(random.key(0), 2, progress_bar=False)
        constant = Loss.from_function(lambda x: 0.0 * jnp.sum(x), np.zeros(5))
        result = schemes.heat(constant, 0.01, fit.RobbinsMonro(3)).run(
            random.key(0), 2, progress_bar=False
        )
    assert result.history.ok.all()
