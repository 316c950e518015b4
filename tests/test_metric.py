# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Mass matrices from draws and scores: exact on Gaussians, harmless elsewhere, and what they save."""

import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SIGMAS, long
from jax import random
from reference_posteriors import POSTERIORS

from numpyro_regloss import Gaussian, Loss, RegularizedLoss, shift
from numpyro_regloss._core.stats import effective_sample_size
from numpyro_regloss.shift.metric import RANK, SMALL, Metric

LARGE = SMALL + 36
DIAGONAL, LOW_RANK = Metric("scores", dense=False), Metric("low_rank", dense=False)


def estimate(metric, draws, scores, old=None):
    draws, scores = jnp.asarray(draws, jnp.float32), jnp.asarray(scores, jnp.float32)
    old = metric.identity(draws.shape[1], draws.dtype) if old is None else old
    return jax.jit(metric.estimate)(old, draws, scores, jnp.ones(len(draws), bool))


def with_stiff_directions(rng, dim, number, value):
    """A precision of ones but for some directions across the coordinates."""
    directions, _ = np.linalg.qr(rng.normal(size=(dim, number)))
    return np.eye(dim) + (value - 1) * directions @ directions.T


def left_over(coordinates, precision):
    """The condition number of a Gaussian in the coordinates: 1 where they whiten it."""
    columns = np.asarray(coordinates.forth(jnp.eye(len(precision))), float)
    return np.linalg.cond(columns @ precision @ columns.T)


def test_diagonal_of_a_few_points_off_the_target():
    rng = np.random.default_rng(0)
    sd = np.geomspace(1e-5, 1e3, 8)
    # Five points about another mean, and of other scales, than those of the Gaussian.
    draws = (1.0 + rng.normal(size=(5, 8))) * rng.permutation(np.geomspace(10.0, 0.1, 8)) * sd
    coordinates = estimate(DIAGONAL, draws, -draws / sd**2)
    np.testing.assert_allclose(coordinates.scale, sd, rtol=1e-5)


def far_and_wide(dim, form):
    """Two scales of a reference that narrows; one that widens magnifies errors of the first metric."""
    rng = np.random.default_rng(dim)
    first, ratio = np.exp(-np.abs(rng.normal(size=(2, dim))))
    second = first * ratio
    if form == "one":
        return np.asarray(0.7), np.asarray(0.1)
    if form == "diagonal":
        return first, second
    mix = np.tril(0.3 * rng.normal(size=(dim, dim)) / np.sqrt(dim), -1)
    return np.diag(first), np.diag(second) @ (np.eye(dim) + mix)


@pytest.mark.parametrize(
    ("metric", "dim", "form"),
    [
        (DIAGONAL, 5, "one"),
        (LOW_RANK, 5, "dense"),
        (LOW_RANK, LARGE, "diagonal"),
        long(LOW_RANK, LARGE, "dense"),
    ],
)
def test_a_metric_is_that_of_the_next_reference(metric, dim, form):
    """The metric that whitens q whitens the q of the same loss under a reference of another scale."""
    rng = np.random.default_rng(1)
    before, now = far_and_wide(dim, form)
    first, second = (np.eye(dim) * a if a.ndim < 2 else a for a in (before, now))
    # A loss of the metric's form in the first units: P - I there.
    directions, _ = np.linalg.qr(rng.normal(size=(dim, 3)))
    if metric is DIAGONAL:
        directions = np.eye(dim)[:, :3]
    inverse = np.linalg.inv(first)
    curvature = inverse.T @ (directions * [5.0, 100.0, 3e4]) @ directions.T @ inverse
    exact = [np.eye(dim) + s.T @ curvature @ s for s in (first, second)]
    draws = rng.multivariate_normal(np.zeros(dim), np.linalg.inv(exact[0]), 2000)
    old = estimate(metric, draws, -draws @ exact[0])
    new = jax.jit(metric.moved)(old, jnp.asarray(before), jnp.asarray(now))
    fresh = rng.multivariate_normal(np.zeros(dim), np.linalg.inv(exact[1]), 2000)
    again = estimate(metric, fresh, -fresh @ exact[1], old)
    # Directions of the estimate are off by a little, which steep ones show.
    assert left_over(new, exact[1]) < 1.5 * left_over(again, exact[1])
    assert left_over(new, exact[1]) < 0.5 * left_over(old, exact[1])
    kept = jax.jit(metric.moved)(old, jnp.asarray(before), jnp.asarray(before))
    jax.tree.map(np.testing.assert_array_equal, kept, old)


@pytest.mark.parametrize("metric", [DIAGONAL, LOW_RANK])
def test_width_at_a_wall(metric):
    rng, width = np.random.default_rng(7), np.geomspace(0.001, 0.1, 4)
    # Exponential beyond walls, of which the score is a slope, but for a slight curvature.
    draws = rng.exponential(size=(200, 4)) * width
    coordinates = estimate(metric, draws, -1 / width - 0.01 * draws / width**2)
    found = np.linalg.norm(coordinates.forth(jnp.eye(4)), axis=0)
    # What is left out of the mean, three deviations of the score, and the few draws.
    np.testing.assert_allclose(found, width, rtol=0.2)


def test_dense_of_a_gaussian():
    rng, dim = np.random.default_rng(1), 6
    root = rng.normal(size=(dim, dim)) * np.geomspace(0.01, 1.0, dim)
    precision = np.linalg.inv(root @ root.T)
    draws = rng.normal(size=(32 * dim, dim)) @ root.T
    assert left_over(LOW_RANK.identity(dim, jnp.float32), precision) > 1e4
    # What is added to the draws is a hundred-thousandth of them, and correlations amplify it and rounding.
    assert left_over(estimate(LOW_RANK, draws, -draws @ precision), precision) < 1.1


def test_low_rank_of_a_gaussian():
    rng = np.random.default_rng(2)
    precision = with_stiff_directions(rng, LARGE, 3, 1e4)
    draws = rng.multivariate_normal(np.zeros(LARGE), np.linalg.inv(precision), 4 * RANK)
    coordinates = estimate(LOW_RANK, draws, -draws @ precision)
    assert coordinates.basis.shape == (LARGE, RANK)
    # Few draws in many directions: not one, but a path ten times shorter.
    assert left_over(coordinates, precision) < 1e4 / 10**2


@pytest.mark.parametrize("metric", [DIAGONAL, LOW_RANK, Metric("variance", dense=True)])
@pytest.mark.parametrize("dim", [5, LARGE])
def test_coordinates_go_back(metric, dim):
    rng = np.random.default_rng(3)
    draws = rng.normal(size=(40, dim)) * np.linspace(0.5, 2.0, dim)
    coordinates = estimate(metric, draws, rng.normal(size=(40, dim)) - draws)
    z, g = jnp.asarray(draws[:3], jnp.float32), jnp.asarray(draws[3:6], jnp.float32)
    y = coordinates.back(z)
    # Rounding, amplified by the condition of covariances of fewer draws than parameters.
    close = dict(rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(coordinates.forth(y), z, **close)
    # The derivative along a direction is the same in both.
    _, pulled = jax.vjp(coordinates.forth, y)
    np.testing.assert_allclose(coordinates.gradient_back(g), pulled(g)[0], **close)
    np.testing.assert_allclose(coordinates.gradient_forth(coordinates.gradient_back(g)), g, **close)


@pytest.mark.parametrize("dim", [5, LARGE])
def test_draws_that_tell_nothing_leave_the_metric(dim):
    old = LOW_RANK.identity(dim, jnp.float32)._replace(scale=jnp.full(dim, 2.0))
    draws = np.random.default_rng(4).normal(size=(40, dim))
    for z, score in [
        (np.ones_like(draws), -draws),
        (draws, np.zeros_like(draws)),
        (draws, np.where(draws > 2, np.nan, draws)),
    ]:
        same = jax.tree.map(np.array_equal, estimate(LOW_RANK, z, score, old), old)
        assert all(jax.tree.leaves(same))


def test_few_draws_leave_no_direction_to_chance():
    # Fewer draws than parameters, and scores that have nothing to do with them.
    draws, scores = np.random.default_rng(5).normal(size=(2, 20, SMALL))
    coordinates = estimate(LOW_RANK, draws, scores)
    values = np.linalg.svd(coordinates.forth(jnp.eye(SMALL)), compute_uv=False)
    assert values.max() / values.min() < 5


def whitened(name, tau):
    posterior = POSTERIORS[name]
    loss = Loss.from_model(posterior.model, *posterior.args, **posterior.kwargs)
    center = jnp.asarray(posterior.unconstrained.mean, loss.x0.dtype)
    return RegularizedLoss(loss, Gaussian.isotropic(center, tau=tau))


def draw(engine, target):
    run = jax.jit(lambda key, target: engine.step(key, engine.init(key, target), target))
    _, draws, info = run(random.key(0), target)
    return draws, info


def test_trees_where_three_directions_are_stiff():
    precision = with_stiff_directions(np.random.default_rng(6), LARGE, 3, 1e4)
    loss = Loss.from_function(
        lambda x, p: 0.5 * x @ p @ x, np.zeros(LARGE), np.asarray(precision, np.float32)
    )
    target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, tau=1e4))
    _, info = draw(shift.NUTS(200, 50, num_chains=4), target)
    assert info.ok
    # With unit mass, leapfrog steps are stable up to twice the least standard deviation, 0.02, and half a period
    # of the others takes π / 0.02 of them.
    assert info.num_steps < np.pi / 0.02 / 5


@pytest.mark.long
@pytest.mark.parametrize("name", POSTERIORS)
def test_means_of_reference_posteriors(name):
    summary = POSTERIORS[name].unconstrained
    # So wide that it moves means by a ten-thousandth of a standard deviation.
    target = whitened(name, float(1e4 * np.max(summary.sd) ** 2))
    draws, info = draw(shift.NUTS(300, 500, num_chains=4), target)
    assert info.ok
    assert info.rhat < 1.03
    error = draws.x.std((0, 1)) / np.sqrt(effective_sample_size(draws.x))
    error = np.hypot(error, summary.mean_standard_error)
    assert np.all(np.abs(draws.x.mean((0, 1)) - summary.mean) < SIGMAS * error)


@pytest.mark.long
def test_half_the_gradients_per_effective_draw():
    def price(engine, target):
        draws, info = draw(engine, target)
        return float(info.num_steps * draws.loss.size / info.ess)

    ratios = []
    for name in POSTERIORS:
        target = whitened(name, 1.0)
        before = price(shift.NUTS(200, 250, num_chains=4, metric="variance"), target)
        ratios.append(price(shift.NUTS(200, 250, num_chains=4), target) / before)
    assert statistics.median(ratios) < 0.5
