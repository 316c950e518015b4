# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Statistics of draws against ArviZ, NumPyro, blackjax and closed forms."""

import functools
import math
import re
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.infer.importance import _psis_khat

from numpyro_regloss._core import linalg, pareto, stats

# The same algorithm in float64, other order of summation.
SAME_FLOAT64 = 1e-8
# ArviZ and NumPyro drop grid points of the fit with a posterior weight below 2e-15; theirs reach
# 1e3 times the size of the others.
SAME_KHAT = 1e-6
# Single precision: 1e-7 per operation, a few hundred of them, conditioned by k and the FFT.
SAME_FLOAT32 = 2e-4
# ArviZ 1.x and blackjax round the length of the tail down, ArviZ 0.23, NumPyro and the paper round
# it up: one draw more among M. The sizes here have equal M, others may differ by some 1e-2.
KHAT_TOLERANCE = 0.02
# Averages over R seeds stay within 4.5 standard errors but for 7 in a million seeds.
SIGMAS = 4.5

INF = math.inf


def log_weights(kind, n, seed=0):
    """Log weights of a light, a heavy, a bounded or a heavy-tailed-in-logarithm kind."""
    rng = np.random.default_rng(seed + n)
    name, _, parameter = kind.partition(":")
    scale = float(parameter or 1)
    return {
        "normal": lambda: scale * rng.normal(size=n) + 3,
        "student": lambda: np.log(np.abs(rng.standard_t(scale, n))),
        "log-student": lambda: rng.standard_t(scale, n),
        "exponential": lambda: scale * rng.exponential(size=n),
        "bounded": lambda: np.log(rng.uniform(size=n)),
    }[name]()


KINDS = [
    "normal:0.5",
    "normal:1",
    "normal:2",
    "normal:3",
    "student:2",
    "student:5",
    "log-student:3",
    "exponential:0.2",
    "exponential:0.8",
    "bounded",
]


def autoregressive(rho, chains, draws, seed=0, event=()):
    """Stationary AR(1) chains of unit innovations."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(chains, draws, *event))
    x = np.empty_like(noise)
    x[:, 0] = noise[:, 0] / math.sqrt(1 - rho**2)
    for t in range(1, draws):
        x[:, t] = rho * x[:, t - 1] + noise[:, t]
    return x


@pytest.fixture(scope="module")
def reference():
    """`psislw`, `ess`, `rhat`, `mcse` of whichever ArviZ generation is installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import arviz
    if hasattr(arviz, "psislw"):
        return SimpleNamespace(
            legacy=True,
            psislw=lambda lw: arviz.psislw(lw.copy(), normalize=False),
            ess=lambda x: arviz.ess(x, method="mean"),
            rhat=lambda x: arviz.rhat(x, method="split"),
            mcse=lambda x: arviz.mcse(x, method="mean"),
        )
    from arviz_stats.base import array_stats

    return SimpleNamespace(
        legacy=False,
        psislw=lambda lw: array_stats.psislw(-lw),
        ess=lambda x: array_stats.ess(x, chain_axis=0, draw_axis=1, method="mean"),
        rhat=lambda x: array_stats.rhat(x, chain_axis=0, draw_axis=1, method="split"),
        mcse=lambda x: array_stats.mcse(x, chain_axis=0, draw_axis=1, method="mean"),
    )


def in_float64(function, *args):
    with jax.enable_x64(True):
        out = function(*(jnp.asarray(a, jnp.float64) for a in args))
        assert all(leaf.dtype in (jnp.float64, jnp.bool_) for leaf in jax.tree.leaves(out))
        return jax.tree.map(np.asarray, out)


def in_float32(function, *args):
    out = function(*(jnp.asarray(a, jnp.float32) for a in args))
    assert all(leaf.dtype in (jnp.float32, jnp.bool_) for leaf in jax.tree.leaves(out))
    return jax.tree.map(np.asarray, out)


@functools.cache
def batched(function):
    """One compiled function for all tests that need it: compilation is what they cost."""
    return jax.jit(jax.vmap(function))


PRECISIONS = pytest.mark.parametrize("compute", [in_float64, in_float32])


# --- importance weights -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("log_weight", "expected"),
    [
        ([0.0, math.log(3.0)], math.log(2.0)),
        ([1000.0, 1000.0], 1000.0),
        ([-1000.0, -1000.0 + math.log(3.0)], -1000.0 + math.log(2.0)),
        ([0.0, -INF], -math.log(2.0)),
        ([-INF, -INF], -INF),
        ([2.5], 2.5),
    ],
)
@PRECISIONS
def test_log_mean_exp(compute, log_weight, expected):
    # float32 holds 1000 to 6e-5
    np.testing.assert_allclose(compute(stats.log_mean_exp, log_weight), expected, rtol=1e-6)


@PRECISIONS
@pytest.mark.parametrize("shape", [(), (7,), (3, 4), (2, 3, 4)])
def test_normalized_weights_and_their_effective_size(compute, shape):
    log_weight = 800 + 2 * np.random.default_rng(0).normal(size=shape)
    weight = compute(stats.normalize_log_weight, log_weight)
    expected = np.exp(log_weight - log_weight.max())
    expected /= expected.sum()
    assert weight.shape == shape
    # the float32 input itself is rounded to 3e-5
    np.testing.assert_allclose(weight, expected, rtol=1e-4)
    np.testing.assert_allclose(weight.sum(), 1, rtol=1e-6)
    ess = compute(stats.weight_ess, log_weight)
    np.testing.assert_allclose(ess, 1 / np.sum(expected**2), rtol=1e-4)


@pytest.mark.parametrize(
    ("log_weight", "weight", "ess"),
    [
        ([0.0, -INF, 0.0], [0.5, 0.0, 0.5], 2.0),
        ([-INF, -INF], [0.0, 0.0], 0.0),
        ([-5000.0, -INF], [1.0, 0.0], 1.0),
        ([0.0, -2000.0], [1.0, 0.0], 1.0),
    ],
)
@PRECISIONS
def test_zero_weights(compute, log_weight, weight, ess):
    np.testing.assert_array_equal(compute(stats.normalize_log_weight, log_weight), weight)
    assert compute(stats.weight_ess, log_weight) == ess


def test_weight_ess_of_unusable_weights_is_zero():
    for bad in (np.nan, np.inf):
        assert stats.weight_ess(jnp.array([0.0, bad, -1.0])) == 0


def test_weight_ess_counts_many_equal_weights_in_float32():
    np.testing.assert_allclose(stats.weight_ess(jnp.full((1000, 1000), -3.0)), 1e6, rtol=1e-5)


# --- Pareto smoothing ---------------------------------------------------------------------------


@pytest.mark.both
@pytest.mark.parametrize("n", [200, 10_000])
@pytest.mark.parametrize("kind", KINDS)
def test_pareto_smooth_matches_arviz_and_numpyro(reference, kind, n):
    log_weight = log_weights(kind, n)
    smoothed, khat = in_float64(pareto.pareto_smooth, log_weight)
    with np.errstate(over="ignore"):  # in the weights of ArviZ's grid, where it is harmless
        expected, arviz_khat = reference.psislw(log_weight)
    if not reference.legacy:  # ArviZ 1.x always normalizes
        smoothed = smoothed - np.logaddexp.reduce(smoothed)
    np.testing.assert_allclose(smoothed, expected, atol=SAME_KHAT)
    np.testing.assert_allclose(khat, arviz_khat, atol=SAME_KHAT)
    np.testing.assert_allclose(khat, _psis_khat(log_weight), atol=SAME_KHAT)


@pytest.mark.parametrize("n", [21, 1000])
@pytest.mark.parametrize("kind", ["normal:1", "normal:3", "normal:30", "normal:300"])
def test_tail_of_sizes_that_are_not_round_is_that_of_the_paper(reference, kind, n):
    log_weight = log_weights(kind, n)
    _, khat = in_float64(pareto.pareto_smooth, log_weight)
    np.testing.assert_allclose(khat, _psis_khat(log_weight), rtol=SAME_KHAT)
    if reference.legacy:
        np.testing.assert_allclose(khat, reference.psislw(log_weight)[1], rtol=SAME_KHAT)


@pytest.mark.both
@pytest.mark.parametrize("kind", KINDS)
def test_khat_matches_blackjax(kind):
    util = pytest.importorskip("blackjax.util")
    log_weight = log_weights(kind, 200)
    _, expected = in_float64(util.psis_weights, log_weight)
    _, khat = in_float64(pareto.pareto_smooth, log_weight)
    assert in_float64(pareto.pareto_khat, log_weight) == pytest.approx(float(khat), rel=1e-12)
    np.testing.assert_allclose(khat, expected, atol=KHAT_TOLERANCE)


@pytest.mark.parametrize("kind", [*KINDS, "normal:0.001", "normal:100"])
def test_float32_smooths_like_float64(kind):
    log_weight = log_weights(kind, 1000).astype(np.float32)
    smoothed, khat = in_float32(pareto.pareto_smooth, log_weight)
    expected, expected_khat = in_float64(pareto.pareto_smooth, log_weight)
    np.testing.assert_allclose(khat, expected_khat, rtol=SAME_FLOAT32, atol=SAME_FLOAT32)
    np.testing.assert_allclose(smoothed, expected, rtol=SAME_FLOAT32, atol=SAME_FLOAT32)


def test_khat_finds_the_shape_of_pareto_weights():
    # w = U^-k is exactly generalized Pareto above any threshold; the prior pulls towards 0.5.
    repetitions, n = 50, 1000
    tail = math.ceil(3 * math.sqrt(n))
    shape = np.repeat([0.2, 0.5, 0.9], repetitions)
    uniform = np.random.default_rng(1).uniform(size=(shape.size, n))
    _, khat = in_float32(batched(pareto.pareto_smooth), -shape[:, None] * np.log(uniform))
    excess = (khat - (tail * shape + 5) / (tail + 10)).reshape(3, repetitions)
    error = np.std(excess, axis=1, ddof=1) / math.sqrt(repetitions)
    # Zhang & Stephens report a bias of the order of 1 / M besides.
    assert np.all(np.abs(np.mean(excess, axis=1)) < SIGMAS * error + 3 / tail)


def test_smoothed_weights_estimate_the_normalizing_constant():
    # N(0, 1) through draws of N(0, 0.8^2): weights have mean 1, infinite fourth moment.
    repetitions, n, sd = 150, 1000, 0.8
    z = sd * np.random.default_rng(2).normal(size=(repetitions, n))
    log_weight = math.log(sd) - z**2 / 2 + (z / sd) ** 2 / 2
    smoothed, khat = in_float32(batched(pareto.pareto_smooth), log_weight)
    ratio = np.mean(np.exp(smoothed), axis=1)
    error = np.std(ratio, ddof=1) / math.sqrt(repetitions)
    assert np.all(khat < 0.7)
    # Cutting at the largest raw weight biases downwards, by less than a permille here.
    assert abs(np.mean(ratio) - 1) < SIGMAS * error + 1e-3


def test_smoothing_touches_the_tail_alone_keeps_order_and_maximum():
    log_weight = log_weights("normal:2", 1000)
    smoothed, _ = in_float64(pareto.pareto_smooth, log_weight)
    order = np.argsort(log_weight)
    tail = math.ceil(3 * math.sqrt(1000))
    np.testing.assert_array_equal(smoothed[order[:-tail]], log_weight[order[:-tail]])
    assert np.all(np.diff(smoothed[order]) >= 0)
    assert smoothed.max() <= log_weight.max()


def test_smoothing_follows_a_shift_of_the_scale():
    log_weight = log_weights("normal:2", 1000)
    smoothed, khat = in_float64(pareto.pareto_smooth, log_weight)
    shifted, shifted_khat = in_float64(pareto.pareto_smooth, log_weight - 1e4)
    np.testing.assert_allclose(shifted, smoothed - 1e4, atol=SAME_FLOAT64)
    np.testing.assert_allclose(shifted_khat, khat, atol=SAME_FLOAT64)


@PRECISIONS
def test_tied_weights_stay_tied_and_the_order_of_draws_does_not_matter(reference, compute):
    rng = np.random.default_rng(3)
    log_weight = -rng.poisson(20, 1000).astype(float)
    permutation = rng.permutation(1000)
    smoothed, khat = compute(pareto.pareto_smooth, log_weight)
    permuted, permuted_khat = compute(pareto.pareto_smooth, log_weight[permutation])
    np.testing.assert_array_equal(permuted, smoothed[permutation])
    assert permuted_khat == khat
    for value in np.unique(log_weight):
        assert np.ptp(smoothed[log_weight == value]) == 0
    if reference.legacy:
        # ArviZ 0.23 ends the tail above the tie too; it breaks the ties inside, at equal sums.
        expected, expected_khat = reference.psislw(log_weight)
        total = np.logaddexp.reduce
        np.testing.assert_allclose(khat, expected_khat, atol=SAME_FLOAT32)
        np.testing.assert_allclose(total(smoothed), total(expected), atol=SAME_FLOAT32)


def edge_cases():
    """Name, log weights, expected k-hat; the weights must come back unchanged."""
    rng = np.random.default_rng(4)
    normal = rng.normal(size=1000)
    tied = np.sort(normal)[::-1]
    tied[:95] = 4.0
    few_positive = np.where(np.arange(1000) < 94, normal, -INF)
    three_above_a_tie = np.where(np.arange(1000) < 3, np.arange(1000.0), -1.0)
    twenty_equal = np.where(np.arange(1000) < 20, 1.0, 0.0)
    one_beyond_underflow = np.where(np.arange(1000) == 5, 1e4, 0.0)
    not_a_number = np.where(np.arange(1000) == 7, math.nan, normal)
    infinite = np.where(np.arange(1000) == 7, INF, normal)
    return [
        ("one draw", normal[:1], INF),
        ("twenty draws: M is 4", normal[:20], INF),
        ("all equal", np.full(1000, -3.0), -INF),
        ("tail of M equal weights", tied, -INF),
        ("tail of fewer equal weights above a tie", twenty_equal, -INF),
        ("equal but for zero weights", np.where(np.arange(1000) < 500, 2.0, -INF), -INF),
        ("all zero", np.full(1000, -INF), INF),
        ("one positive weight", np.where(np.arange(1000) == 5, 1.0, -INF), INF),
        ("one positive weight fewer than M", few_positive, INF),
        ("three above a tie", three_above_a_tie, INF),
        ("beside one weight all others underflow", one_beyond_underflow, INF),
        ("NaN", not_a_number, INF),
        ("infinite weight", infinite, INF),
    ]


@PRECISIONS
@pytest.mark.parametrize(
    ("log_weight", "expected"),
    [case[1:] for case in edge_cases()],
    ids=[case[0] for case in edge_cases()],
)
def test_weights_without_a_tail_to_judge_come_back_unchanged(compute, log_weight, expected):
    smoothed, khat = compute(pareto.pareto_smooth, log_weight)
    assert khat == expected
    np.testing.assert_array_equal(smoothed, log_weight.astype(smoothed.dtype))


@PRECISIONS
@pytest.mark.parametrize("positive", [95, 96, 500])
def test_zero_weights_outside_the_tail_do_no_harm(compute, positive):
    log_weight = np.where(np.arange(1000) < positive, log_weights("normal:1", 1000), -INF)
    smoothed, khat = compute(pareto.pareto_smooth, log_weight)
    np.testing.assert_allclose(khat, _psis_khat(log_weight), atol=SAME_FLOAT32)
    np.testing.assert_array_equal(np.isneginf(smoothed), np.isneginf(log_weight))
    assert not np.any(np.isnan(smoothed))


def test_smoothing_survives_random_hard_weights():
    # ties, zero weights, enormous and tiny spreads, of both signs, at once
    rng = np.random.default_rng(5)
    spread = 10.0 ** rng.uniform(-12, 4, size=(150, 1))
    log_weight = spread * rng.standard_t(1.5, size=(150, 1000)).round(1)
    log_weight[rng.uniform(size=log_weight.shape) < rng.uniform(-0.5, 1, size=(150, 1))] = -INF
    smoothed, khat = in_float32(batched(pareto.pareto_smooth), log_weight)
    assert not np.any(np.isnan(khat))
    assert not np.any(np.isnan(smoothed))
    assert np.all(smoothed.max(axis=1) <= log_weight.astype(smoothed.dtype).max(axis=1))
    assert np.any(np.isfinite(khat))


# --- Markov chains ------------------------------------------------------------------------------


@jax.jit
def chain_statistics(x):
    """All three at once: one compilation."""
    ess = stats.effective_sample_size(x)
    return ess, stats.split_rhat(x), stats.monte_carlo_error(x)


@pytest.mark.both
@pytest.mark.parametrize(("chains", "draws"), [(1, 101), (3, 4), (3, 7), (3, 10), (3, 1001)])
def test_chain_statistics_match_arviz(reference, chains, draws):
    rhos = [-0.9, -0.5, 0.0, 0.5, 0.9, 0.95]
    cases = [autoregressive(rho, chains, draws, seed=i) for i, rho in enumerate(rhos)]
    # chains that disagree, by one innovation from each to the next
    cases += [x + np.arange(chains)[:, None] for x in cases]
    ess, rhat, error = in_float64(chain_statistics, np.stack(cases, axis=-1))
    expected = np.array([reference.ess(x) for x in cases])
    np.testing.assert_allclose(ess, expected, rtol=SAME_FLOAT64)
    if chains > 1:  # ArviZ gives no R-hat of a single chain
        np.testing.assert_allclose(rhat, [reference.rhat(x) for x in cases], rtol=SAME_FLOAT64)
    mcse = np.array([reference.mcse(x) for x in cases]) * np.sqrt(np.minimum(expected, 1))
    np.testing.assert_allclose(error, mcse, rtol=SAME_FLOAT64)


def test_float32_chain_statistics_of_a_distant_mean_and_of_any_unit():
    # the squares of the first and the last coordinate are outside of float32's range
    x = autoregressive(0.5, 4, 20, event=(3,))
    x = np.asarray(x * [1e-30, 1.0, 1e30] + [0, 1e3, 0], np.float32)
    for actual, expected in zip(
        in_float32(chain_statistics, x), in_float64(chain_statistics, x), strict=True
    ):
        np.testing.assert_allclose(actual, expected, rtol=SAME_FLOAT32)


@pytest.mark.parametrize("rho", [-0.3, 0.0, 0.8])
def test_effective_sample_size_of_autoregressive_chains_is_known(rho):
    chains, draws, repetitions = 4, 500, 400
    x = autoregressive(rho, chains, draws, event=(repetitions,))
    ess, _, _ = in_float32(chain_statistics, x)
    expected = chains * draws * (1 - rho) / (1 + rho)
    error = np.std(ess, ddof=1) / math.sqrt(repetitions)
    # Geyer's sequence stops at noise, which costs a few percent of bias.
    assert abs(np.mean(ess) - expected) < SIGMAS * error + 0.04 * expected


def test_monte_carlo_error_covers():
    x = autoregressive(0.6, 4, 500, seed=6, event=(400,))
    _, _, error = in_float32(chain_statistics, x)
    covered = np.mean(np.abs(x.mean(axis=(0, 1))) < 1.96 * error)
    # binomial error of 400 intervals, and half a percent for the error's own error
    assert abs(covered - 0.95) < SIGMAS * math.sqrt(0.95 * 0.05 / 400) + 0.005


@PRECISIONS
@pytest.mark.parametrize("value", [0.0, 0.1, -3e5, 1e-30])
@pytest.mark.parametrize("draws", [20, 21])
def test_equal_draws(compute, value, draws):
    ess, rhat, error = compute(chain_statistics, np.full((4, draws), value))
    assert (ess, rhat, error) == (4 * draws, 1, 0)


@PRECISIONS
def test_half_chains_that_are_stuck_apart(compute):
    chains_differ = np.repeat([[0.1], [0.7], [0.3], [0.4]], 20, axis=1)
    halves_differ = np.tile(np.repeat([0.1, 0.7], 10), (4, 1))
    for x in (chains_differ, halves_differ):
        ess, rhat, error = compute(chain_statistics, x)
        assert rhat == INF
        # never more than one draw per half chain
        assert 1 < ess < 8
        np.testing.assert_allclose(error, x.std(ddof=1) / np.sqrt(ess), rtol=1e-6)


@PRECISIONS
def test_one_stuck_chain_among_moving_ones_is_not_hidden(compute):
    x = autoregressive(0.0, 4, 20)
    x[0] = 5.0
    ess, rhat, _ = compute(chain_statistics, x)
    assert rhat > 1.5
    assert ess < 20


@pytest.mark.parametrize("draws", [1, 2, 3])
def test_few_draws_are_judged_conservatively(draws):
    x = np.random.default_rng(7).normal(size=(5, draws, 2))
    ess, rhat, error = in_float32(chain_statistics, x)
    np.testing.assert_array_equal(ess, [5, 5])
    np.testing.assert_array_equal(rhat, [INF, INF])
    np.testing.assert_allclose(error, x.std(axis=(0, 1), ddof=1) / math.sqrt(5), rtol=1e-5)


def test_a_single_draw_has_an_unknown_error():
    np.testing.assert_array_equal(stats.monte_carlo_error(jnp.ones((1, 1, 2))), [INF, INF])


@PRECISIONS
@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
@pytest.mark.parametrize(("draws", "where"), [(20, 0), (21, 10), (21, 20)])
def test_draws_that_are_not_finite_raise_the_alarm_without_nan(compute, bad, draws, where):
    # number 10 of 21 draws lies between the halves
    x = np.random.default_rng(8).normal(size=(4, draws))
    x[1, where] = bad
    assert compute(chain_statistics, x) == (0, INF, INF)
    x[:] = bad
    assert compute(chain_statistics, x) == (0, INF, INF)


def test_split_rhat_of_shifted_halves_is_known():
    # halves of m draws 0, 1, 0, 1, ... and 3, 4, 3, 4, ...: W = m / (4 (m - 1)), B = 9 / 2
    m = 50
    x = np.tile([0.0, 1.0], m)[None] + np.repeat([0.0, 3.0], m)
    expected = math.sqrt((m - 1) / m + 4.5 / (m / (4 * (m - 1))))
    np.testing.assert_allclose(in_float64(stats.split_rhat, x), expected, rtol=1e-12)


def test_thousands_of_coordinates_at_once():
    x = autoregressive(0.3, 4, 20, event=(30, 100))
    together = in_float32(chain_statistics, x)
    alone = in_float32(chain_statistics, x[:, :, 3, 5])
    for array, value in zip(together, alone, strict=True):
        assert array.shape == (30, 100)
        np.testing.assert_allclose(array[3, 5], value, rtol=SAME_FLOAT32)


# --- Cholesky factor with a floor ---------------------------------------------------------------


def covariance(dim, smallest=0.05, seed=0):
    """Random covariance, correlation eigenvalues from about `smallest`, units 1e-4 to 1e4."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(dim, dim)))
    matrix = (basis * np.geomspace(smallest, 1, dim)) @ basis.T
    sd = np.sqrt(np.diag(matrix))
    units = np.geomspace(1e-4, 1e4, dim) if dim > 1 else np.ones(1)
    return matrix / np.outer(sd, sd) * np.outer(units, units)


def correlation_eigenvalues(lower, scale):
    root = np.asarray(lower, np.float64) / scale[:, None]
    return np.linalg.svd(root, compute_uv=False) ** 2


@PRECISIONS
@pytest.mark.parametrize("dim", [1, 3, 200])
def test_positive_definite_matrices_have_their_plain_factor(compute, dim):
    matrix = covariance(dim)
    lower, floored = compute(linalg.cholesky_with_floor, matrix)
    assert not floored
    np.testing.assert_array_equal(lower, compute(jnp.linalg.cholesky, matrix))


@pytest.mark.parametrize("dim", [2, 3, 200])
@PRECISIONS
def test_small_eigenvalues_are_raised_to_the_floor(compute, dim):
    # condition 1e10, beyond float32, whose rounding makes some of the eigenvalues negative
    matrix = covariance(dim, smallest=1e-10)
    lower, floored = compute(linalg.cholesky_with_floor, matrix)
    scale = np.sqrt(np.diag(matrix))
    assert floored
    assert np.all(np.diag(lower) > 0)
    np.testing.assert_array_equal(lower, np.tril(lower))
    # singular values of the factor are exact to eps * sqrt(largest eigenvalue), 1e-7 * 4 on 1e-3
    np.testing.assert_allclose(correlation_eigenvalues(lower, scale)[-1], 1e-6, rtol=0.02)
    # the change is the floor, spread over the eigenvalues below it, and rounding
    changed = (lower / scale[:, None]) @ (lower / scale[:, None]).T
    np.testing.assert_allclose(changed, matrix / np.outer(scale, scale), atol=2e-5)


def test_floor_of_the_eigenvalues_is_exact():
    # each pair is possible, the three together are not
    correlation = np.array([[1.0, 0.9, -0.9], [0.9, 1.0, 0.9], [-0.9, 0.9, 1.0]])
    units = np.outer([1.0, 1e-3, 1e3], [1.0, 1e-3, 1e3])
    value, vector = np.linalg.eigh(correlation)
    expected = (vector * np.maximum(value, 1e-6)) @ vector.T
    lower, floored = in_float64(linalg.cholesky_with_floor, correlation * units)
    assert value[0] < -0.5
    assert floored
    np.testing.assert_allclose(lower @ lower.T / units, expected, atol=1e-12)


def test_verdict_turns_at_the_floor():
    # correlation r: eigenvalues 1 - r and 1 + r
    for gap, expected in [(0.99e-3, True), (1.01e-3, False)]:
        matrix = jnp.array([[4.0, 6 * (1 - gap)], [6 * (1 - gap), 9.0]])
        _, floored = linalg.cholesky_with_floor(matrix, floor=1e-3)
        assert floored == expected


@PRECISIONS
@pytest.mark.parametrize("dim", [1, 3, 200])
def test_zero_matrix_gives_a_small_multiple_of_the_identity(compute, dim):
    lower, floored = compute(linalg.cholesky_with_floor, np.zeros((dim, dim)))
    assert floored
    np.testing.assert_allclose(lower, 1e-3 * np.eye(dim), rtol=1e-6)


@PRECISIONS
@pytest.mark.parametrize("variance", [0.0, -1e-9, -2.0])
def test_coordinate_without_a_variance_is_cut_off(compute, variance):
    matrix = np.array([[4.0, 0.5, 1.0], [0.5, variance, 0.2], [1.0, 0.2, 2.0]])
    lower, floored = compute(linalg.cholesky_with_floor, matrix)
    assert floored
    expected = np.array([[4.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 2.0]])
    np.testing.assert_allclose(lower @ lower.T, expected, atol=1e-5)
    # the mean of the other variances is 3
    np.testing.assert_allclose(np.linalg.norm(lower[1]), math.sqrt(3e-6), rtol=1e-3)


@PRECISIONS
def test_impossible_correlations_do_not_inflate_the_variances(compute):
    # the covariance is rounding noise beside the unit variance, yet 1e7 standard deviations
    matrix = np.array([[1e-30, 1e-8], [1e-8, 1.0]])
    lower, floored = compute(linalg.cholesky_with_floor, matrix)
    assert floored
    np.testing.assert_allclose(np.diag(lower @ lower.T), [1e-30, 1.0], rtol=1e-5)


@PRECISIONS
@pytest.mark.parametrize("dim", [1, 2, 200])
def test_rank_one_matrix(compute, dim):
    lower, floored = compute(linalg.cholesky_with_floor, np.ones((dim, dim)))
    assert floored == (dim > 1)
    assert np.all(np.diag(lower) > 0)
    # float32: eps times the eigenvalue, dim
    np.testing.assert_allclose(lower @ lower.T, np.ones((dim, dim)), atol=2e-6 * dim)


def test_floor_is_no_smaller_than_the_precision():
    lower, floored = linalg.cholesky_with_floor(jnp.ones((3, 3)), floor=0.0)
    assert floored
    epsilon = float(jnp.finfo(lower.dtype).eps)
    assert correlation_eigenvalues(lower, np.ones(3))[-1] == pytest.approx(epsilon, rel=0.05)


@PRECISIONS
@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
@pytest.mark.parametrize("where", [(0, 0), (0, 1)])
def test_matrix_that_is_not_finite_gives_nan(compute, bad, where):
    matrix = np.eye(2)
    matrix[where] = matrix[where[::-1]] = bad
    lower, floored = compute(linalg.cholesky_with_floor, matrix)
    assert np.all(np.isnan(lower))
    assert not floored


# --- all functions ------------------------------------------------------------------------------


def weight_statistics(x):
    return stats.log_mean_exp(x), stats.normalize_log_weight(x), stats.weight_ess(x)


def batches():
    """All functions with a batch of inputs that takes all of their branches."""
    rng = np.random.default_rng(10)
    weights = rng.normal(size=(150, 1000))
    weights[1, 200:] = weights[2, 20:] = weights[3] = -INF
    weights[0] = 2.0
    chains = np.stack([autoregressive(0.5, 4, 20), np.ones((4, 20))])
    matrices = np.stack([covariance(3), np.ones((3, 3)), np.zeros((3, 3)), np.full((3, 3), np.nan)])
    return [
        (weight_statistics, weights),
        (pareto.pareto_smooth, weights),
        (chain_statistics, chains),
        (linalg.cholesky_with_floor, matrices),
    ]


@pytest.mark.long
@pytest.mark.parametrize(("function", "batch"), batches(), ids=[f.__name__ for f, _ in batches()])
def test_vmap_is_a_loop_and_jit_is_eager(function, batch):
    def assert_close(actual, expected):
        # fusion and batched LAPACK round differently
        np.testing.assert_allclose(actual, expected, rtol=SAME_FLOAT32, atol=SAME_FLOAT32)

    rows = batch[:6]
    compiled = [in_float32(function, x) for x in rows]
    # in the smoothing no step on the way is NaN either
    with jax.disable_jit(), jax.debug_nans(function is pareto.pareto_smooth):
        eager = [function(jnp.asarray(x, jnp.float32)) for x in rows]
    jax.tree.map(assert_close, compiled, eager)
    stacked = jax.tree.map(lambda *x: np.stack(x), *compiled)
    together = jax.tree.map(lambda x: x[:6], in_float32(batched(function), batch))
    jax.tree.map(assert_close, together, stacked)


def test_after_waits_and_changes_nothing():
    value = jnp.arange(6.0).reshape(2, 3)
    for first in (0.0, jnp.nan, jnp.inf, -jnp.inf):
        np.testing.assert_array_equal(linalg.after(jnp.asarray(first), value), value)
    # What waits must still depend on what it waits for once the compiler is through.
    program = jax.jit(linalg.after).lower(jnp.zeros(()), value).compile().as_text()
    root = next(line for line in program.splitlines() if "ROOT" in line and "fusion" in line)
    assert len(re.findall(r"%[\w.]+", root.split("(", 1)[1])) >= 2, program
