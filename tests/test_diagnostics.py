# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""How good a Gaussian is: divergences against quadrature, findings against draws made for them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SIGMAS, long
from jax import random

from numpyro_regloss import (
    Gaussian,
    Loss,
    RegularizedLoss,
    forward_kl,
    kl_divergence,
    shift,
)
from numpyro_regloss._core.pareto import pareto_khat
from numpyro_regloss.diagnostics import distance, gaussian_fit
from numpyro_regloss.values.estimate import Estimate


def skewed(x):
    return jnp.sum(jnp.exp(x) - 0.7 * x)


LOSS = Loss.from_function(skewed, np.zeros(1))
TARGET = RegularizedLoss(LOSS, Gaussian.isotropic(LOSS.x0, 2.0))
GRID = np.linspace(-12, 8, 200_001)


def exact_divergences(gaussian):
    log_q = np.asarray(jax.vmap(TARGET.log_density)(jnp.asarray(GRID)[:, None]), float)
    step = GRID[1] - GRID[0]
    log_q = log_q - np.log(np.sum(np.exp(log_q)) * step)
    log_n = np.asarray(gaussian.log_prob(jnp.asarray(GRID)[:, None]), float)
    forward = np.sum(np.exp(log_q) * (log_q - log_n)) * step
    return forward, np.sum(np.exp(log_n) * (log_n - log_q)) * step


@pytest.fixture(scope="module")
def draws():
    engine = shift.HMC(num_warmup=300, num_samples=1500, num_chains=2)

    @jax.jit
    def draw(key_init, key):
        return engine.step(key, engine.init(key_init, TARGET), TARGET)[1]

    return draw(random.key(0), random.key(1))


@pytest.mark.parametrize("width", [0.6, long(1.4)])
def test_divergences_agree_with_quadrature(draws, width):
    best, _ = forward_kl(draws.x)
    gaussian = best._replace(scale=width * best.scale)
    fit = gaussian_fit(draws, gaussian, TARGET, rng_key=random.key(2))
    for estimate, exact in zip(
        (fit.forward_kl, fit.reverse_kl), exact_divergences(gaussian), strict=True
    ):
        assert abs(estimate.value - exact) < SIGMAS * estimate.error
        assert estimate.error < 0.05
    y = gaussian.sample(random.key(2), (4000,))
    log_weight = jax.vmap(TARGET.log_density)(y) - gaussian.log_prob(y)
    np.testing.assert_allclose(fit.khat, pareto_khat(log_weight), atol=0.02)


@pytest.mark.long
def test_errors_of_divergences_are_calibrated():
    # A correlated normal and a Gaussian that is off: 200 repetitions with independent draws.
    covariance = np.array([[1.0, 0.5], [0.5, 2.0]])
    q = Gaussian(jnp.array([1.0, -1.0]), jnp.linalg.cholesky(jnp.asarray(covariance, jnp.float32)))
    loss = Loss.from_function(lambda x: 3.0 - q.log_prob(x), np.zeros(2))
    target = RegularizedLoss(loss)
    gaussian = Gaussian(jnp.array([0.8, -0.7]), jnp.array([0.9, 1.2]))
    exact = kl_divergence(q, gaussian), kl_divergence(gaussian, q)
    covered = []
    for seed in range(200):
        key, key_fit = random.split(random.key(seed))
        fit = gaussian_fit(
            q.sample(key, (1000,)), gaussian, target, rng_key=key_fit, num_samples=1000
        )
        estimates = fit.forward_kl, fit.reverse_kl
        covered.append([
            abs(e.value - t) < 1.96 * e.error for e, t in zip(estimates, exact, strict=True)
        ])
    rates = np.mean(covered, 0)
    assert np.all((rates >= 0.9) & (rates <= 0.99)), rates


def test_a_good_gaussian_has_no_finding():
    x = random.normal(random.key(0), (4000, 3))
    gaussian, _ = forward_kl(x)
    fit = gaussian_fit(x, gaussian)
    assert fit.findings == ("No deviation from the Gaussian was found in the marginals.",)
    assert fit.forward_kl is fit.khat is None
    np.testing.assert_allclose(fit.sd_ratio, 1.0, rtol=1e-2)
    assert np.all(np.abs(fit.skewness) < SIGMAS * fit.skewness_error)
    # sqrt(6 / n) and sqrt(24 / n), the textbook's errors for normal draws.
    np.testing.assert_allclose(fit.skewness_error, np.sqrt(6 / 4000), rtol=0.2)
    np.testing.assert_allclose(fit.excess_kurtosis_error, np.sqrt(24 / 4000), rtol=0.35)


FINDINGS = {
    "shifted": (lambda z: z + 1.0, r"mean: .*off.* a \(-(0\.9|1\.0)"),
    "wide": (lambda z: 2.0 * z, r"sd: the Gaussian is narrower.* a \(0\.\d"),
    "tight": (lambda z: 0.5 * z, r"sd: the Gaussian is wider.* a \((1\.9|2\.0)"),
    "skewed": (lambda z: (jnp.exp(0.5 * z) - 1.13) / 0.604, r"skewness: .* a \(1\.\d"),
    "heavy": (
        lambda z: 0.6 * jnp.sign(z) * jnp.abs(z) ** 1.8,
        r"kurtosis: tails are heavier.* a \(",
    ),
    "two modes": (lambda z: 0.95 * jnp.sign(z) + 0.3 * z, r"two modes, at a \(-1\.\d"),
}


@pytest.mark.parametrize("name", FINDINGS)
def test_findings_name_what_is_wrong(name):
    move, words = FINDINGS[name]
    z = random.normal(random.key(3), (2, 2000, 2))
    standard = Gaussian(jnp.zeros(2), jnp.ones(2))
    samples = {"a": move(z[..., 0]).reshape(-1), "b": z[..., 1].reshape(-1)}
    fit = gaussian_fit(samples, standard)
    assert re.search(words, str(fit)), str(fit)
    assert " b (" not in str(fit)


def modes(x, gap):
    return -jnp.logaddexp(-0.5 * jnp.sum((x - gap) ** 2), -0.5 * jnp.sum((x + gap) ** 2))


def test_reverse_kl_of_two_modes_is_seen_as_narrow():
    x = jnp.concatenate([
        random.normal(random.key(0), (2000, 1)) - 3,
        random.normal(random.key(1), (2000, 1)) + 3,
    ])
    loss = Loss.from_function(modes, np.zeros(1), 3.0)
    fit = gaussian_fit(
        x, Gaussian(jnp.array([3.0]), jnp.array(1.0)), RegularizedLoss(loss), rng_key=random.key(2)
    )
    # One of two equal modes: KL(Gaussian || q) is log 2, the other direction is large.
    assert abs(fit.reverse_kl.value - np.log(2.0)) < 0.05
    assert fit.forward_kl.value > 5
    assert "narrower" in str(fit)


NEAR = Gaussian(jnp.zeros(2), jnp.ones(2))
REPORTS = {
    # What the estimates are, with k-hat and the share of q that is reached; how the report begins and goes on.
    "below zero": (
        (-0.06, 0.04, 0.01, 0.002, 0.1, 1.0),
        [
            "It cannot be told whether the Gaussian is near q, within 0.05 nats: errors are too large.",
            "KL(q || Gaussian) cannot be distinguished from 0: it is at most 0.08 nats.",
            "KL(Gaussian || q) = 0.01 ± 0.002 nats.",
            "k-hat = 0.10: averages over the Gaussian can be corrected",
        ],
    ),
    "near": (
        (-0.001, 0.002, 0.0, 0.001, 0.1, 1.0),
        [
            "The Gaussian is near q, within 0.05 nats in both directions.",
            "KL(q || Gaussian) cannot be distinguished from 0: it is at most 0.004 nats.",
            "KL(Gaussian || q) cannot be distinguished from 0: it is at most 0.002 nats.",
        ],
    ),
    "far one way": (
        (5.0, 0.1, 0.02, 0.02, 0.9, 0.5),
        [
            "The Gaussian is not near q, by KL(q || Gaussian) (near is below 0.05 nats).",
            "KL(q || Gaussian) = 5 ± 0.1 nats.",
            "KL(Gaussian || q) cannot be distinguished from 0",
            "mass: draws of the Gaussian reach only 50% of q.",
            "k-hat = 0.90: averages over the Gaussian cannot be corrected",
        ],
    ),
    "heavy tails": (
        (0.01, 0.002, 0.01, 0.002, 0.8, 1.0),
        [
            "The Gaussian is near q, within 0.05 nats in both directions, but for its tails, which are too heavy"
        ],
    ),
    "impossible": (
        (-3.0, 0.04, 0.01, 0.002, 0.1, 1.0),
        ["It cannot be told whether", "KL(q || Gaussian) cannot be estimated: the result is -3,"],
    ),
    "one unknown": (
        (1.0, np.inf, 0.3, 0.02, 2.0, 1.0),
        [
            "The Gaussian is not near q, by KL(Gaussian || q)",
            "KL(q || Gaussian) cannot be estimated: draws",
        ],
    ),
    "nothing in common": (
        (1.0, np.inf, 9.0, np.inf, np.inf, 1.0),
        ["The Gaussian is not near q, or the draws are not q's: they do not overlap."],
    ),
}


@pytest.mark.parametrize("name", REPORTS)
def test_one_verdict_and_estimates_that_respect_their_sign(name):
    (forward, forward_error, reverse, reverse_error, khat, share), lines = REPORTS[name]
    plain = gaussian_fit(random.normal(random.key(0), (400, 2)), NEAR)
    khat = jnp.asarray(khat)
    estimates = [
        Estimate(jnp.asarray(value), jnp.asarray(error), jnp.asarray(400.0), khat)
        for value, error in ((forward, forward_error), (reverse, reverse_error), (share, 0.01))
    ]
    fit = plain._replace(
        forward_kl=estimates[0], reverse_kl=estimates[1], reached=estimates[2], khat=khat
    )
    found = distance._findings(fit, None)
    for text, start in zip(found, lines, strict=False):
        assert text.startswith(start), (text, start)
    # Only the first sentence judges.
    assert not re.search(r"\bnear\b", " ".join(found[1:]))
    assert "-0" not in " ".join(found)


def test_chains_in_different_modes_are_a_finding():
    x = random.normal(random.key(0), (4, 200, 2)) + jnp.array([[[4.0, 0.0]], [[-4.0, 0.0]]] * 2)
    fit = gaussian_fit(x, Gaussian(jnp.zeros(2), jnp.array([4.0, 1.0])))
    assert re.search(r"^draws: the chains do not agree.* at 0 \(\d", str(fit), re.MULTILINE)


def test_no_overlap_is_said_so():
    x = random.normal(random.key(0), (4000, 1))
    loss = Loss.from_function(modes, np.zeros(1), 0.0)
    far = Gaussian(jnp.array([10.0]), jnp.array(1.0))
    fit = gaussian_fit(x, far, RegularizedLoss(loss), rng_key=random.key(1))
    assert np.isinf(fit.forward_kl.error)
    assert "do not overlap" in str(fit)


def test_draws_without_weight_do_not_count():
    # A normal cut off at zero; half of the draws lie where it is zero.
    loss = Loss.from_function(lambda x: jnp.where(x[0] > 0, 0.5 * x[0] ** 2, jnp.inf), np.ones(1))
    x = random.normal(random.key(5), (2000, 1))
    inside = x > 0
    log_weight = jnp.where(inside[:, 0], 0.0, -jnp.inf)
    gaussian = Gaussian(jnp.array([0.8]), jnp.array([0.6]))
    # Where they lie changes nothing, and they are no draws that tell of q.
    fits = [
        gaussian_fit(
            jnp.where(inside, x, away),
            gaussian,
            RegularizedLoss(loss),
            rng_key=random.key(3),
            log_weight=log_weight,
        )
        for away in (x, 7.0 * x - 1.0)
    ]
    np.testing.assert_allclose(fits[0].forward_kl.value, fits[1].forward_kl.value, rtol=1e-3)
    second_moment = 1.0 - 1.6 * np.sqrt(2 / np.pi) + 0.64
    exact = np.log(2 * 0.6) - 0.5 + second_moment / (2 * 0.36)
    for found in fits:
        assert abs(found.forward_kl.value - exact) < SIGMAS * found.forward_kl.error
        assert found.forward_kl.error < 0.05


BAD = [
    (lambda: gaussian_fit(np.eye(3), "gaussian"), TypeError, "LowRankGaussian"),
    (
        lambda: gaussian_fit(np.eye(3), Gaussian(jnp.zeros(2), jnp.ones(2))),
        ValueError,
        "3 parameters",
    ),
    (
        lambda: gaussian_fit(np.eye(3), Gaussian(jnp.zeros(3), jnp.ones(3)), LOSS),
        TypeError,
        "RegularizedLoss",
    ),
    (
        lambda: gaussian_fit(np.eye(3)[:, :1], Gaussian(jnp.zeros(1), jnp.ones(1)), TARGET),
        TypeError,
        "rng_key",
    ),
    (
        lambda: gaussian_fit(np.full((3, 1), np.nan), Gaussian(jnp.zeros(1), jnp.ones(1))),
        ValueError,
        "gaussian_fit",
    ),
]


@pytest.mark.parametrize(("call", "error", "words"), BAD)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
