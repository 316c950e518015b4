# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from jax import random

from numpyro_regloss import Gaussian, LowRankGaussian, kl_divergence

DIM = 4


def gaussians(seed=0):
    rng = np.random.default_rng(seed)
    mean = jnp.asarray(rng.normal(size=DIM), jnp.float32)
    factor = np.tril(rng.normal(size=(DIM, DIM)) * 0.3) + np.diag(rng.uniform(0.5, 1.5, DIM))
    return {
        "isotropic": Gaussian(mean, jnp.asarray(0.7)),
        "diagonal": Gaussian(mean, jnp.asarray(rng.uniform(0.3, 2.0, DIM), jnp.float32)),
        "dense": Gaussian(mean, jnp.asarray(factor, jnp.float32)),
        "low_rank": LowRankGaussian(
            mean,
            jnp.asarray(rng.uniform(0.3, 2.0, DIM), jnp.float32),
            jnp.asarray(rng.normal(size=(DIM, 2)), jnp.float32),
        ),
    }


KINDS = list(gaussians())


@pytest.mark.both
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_numpyro(kind):
    gaussian = gaussians()[kind]
    assert gaussian.structure == kind
    dense = dist.MultivariateNormal(gaussian.mean, gaussian.covariance)
    x = random.normal(random.key(0), (5, DIM))
    # 1e-4: float32 rounding of a quadratic form of size ten.
    np.testing.assert_allclose(gaussian.log_prob(x), dense.log_prob(x), rtol=1e-4)
    np.testing.assert_allclose(gaussian.distribution.log_prob(x), dense.log_prob(x), rtol=1e-4)
    np.testing.assert_allclose(gaussian.variance, jnp.diagonal(gaussian.covariance), rtol=1e-5)
    again = type(gaussian).from_distribution(gaussian.distribution)
    np.testing.assert_allclose(again.covariance, gaussian.covariance, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(again.mean, gaussian.mean)


@pytest.mark.parametrize("kind", KINDS)
def test_whitening_and_its_transposes_are_inverses(kind):
    gaussian = gaussians()[kind]
    x, g = random.normal(random.key(1), (2, 3, DIM))
    np.testing.assert_allclose(gaussian.unwhiten(gaussian.whiten(x)), x, atol=1e-5)
    np.testing.assert_allclose(
        gaussian.scaled_transpose(gaussian.unscale_transpose(g)), g, atol=1e-5
    )
    inner = jnp.sum(gaussian.scaled(x) * g, -1)
    np.testing.assert_allclose(
        inner, jnp.sum(x * gaussian.scaled_transpose(g), -1), rtol=1e-4, atol=1e-5
    )
    columns = jnp.stack([x[0], g[0]], -1)
    expected = gaussian.whiten(gaussian.mean + columns.T).T
    np.testing.assert_allclose(gaussian.whiten_columns(columns), expected, atol=1e-5)
    precision = jnp.linalg.inv(gaussian.covariance)
    np.testing.assert_allclose(gaussian.precision_diagonal, jnp.diagonal(precision), rtol=1e-4)
    log_det = jnp.linalg.slogdet(gaussian.covariance)[1] / 2
    np.testing.assert_allclose(gaussian.log_det, log_det, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_sample_has_the_right_moments(kind):
    gaussian = gaussians()[kind]
    num = 20_000
    x = gaussian.sample(random.key(2), (num,))
    sd = jnp.sqrt(gaussian.variance)
    assert jnp.all(jnp.abs(x.mean(0) - gaussian.mean) < 4 * sd / num**0.5)
    # The relative error of a variance is sqrt(2 / n); entries of a covariance are no worse in units of sd.
    error = jnp.abs(jnp.cov(x.T) - gaussian.covariance) / jnp.outer(sd, sd)
    assert jnp.max(error) < 5 * (2 / num) ** 0.5


@pytest.mark.parametrize("p", KINDS)
@pytest.mark.parametrize("q", KINDS)
def test_kl_divergence(p, q):
    p, q = gaussians(0)[p], gaussians(1)[q]
    dense = [dist.MultivariateNormal(g.mean, g.covariance) for g in (p, q)]
    expected = dist.kl_divergence(*dense)
    np.testing.assert_allclose(kl_divergence(p, q), expected, rtol=1e-4)
    assert jnp.abs(kl_divergence(p, p)) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_survives_vmap_and_stacking(kind):
    pair = [gaussians(seed)[kind] for seed in (0, 1)]
    stack = jax.tree.map(lambda *a: jnp.stack(a), *pair)
    assert stack.structure == kind
    x = random.normal(random.key(3), (DIM,))
    expected = jnp.stack([g.log_prob(x) for g in pair])
    np.testing.assert_allclose(stack.log_prob(x), expected, rtol=1e-4)
    np.testing.assert_allclose(jax.vmap(lambda g: g.log_prob(x))(stack), expected, rtol=1e-4)
    np.testing.assert_allclose(
        kl_divergence(stack, jax.tree.map(lambda a: a[::-1], stack)),
        [kl_divergence(*pair), kl_divergence(*pair[::-1])],
        rtol=1e-4,
    )
    assert stack.sample(random.key(0), (5,)).shape == (5, 2, DIM)
    assert stack.covariance.shape == (2, DIM, DIM)


@pytest.mark.parametrize("p", KINDS)
@pytest.mark.parametrize("q", KINDS)
def test_kl_divergence_broadcasts(p, q):
    single = [gaussians(seed) for seed in (0, 1, 2)]
    batch = jax.tree.map(lambda *a: jnp.stack(a), single[1][q], single[2][q])
    expected = [kl_divergence(single[0][p], single[i][q]) for i in (1, 2)]
    np.testing.assert_allclose(kl_divergence(single[0][p], batch), expected, rtol=1e-4)
    expected = [kl_divergence(single[i][q], single[0][p]) for i in (1, 2)]
    np.testing.assert_allclose(kl_divergence(batch, single[0][p]), expected, rtol=1e-4)


def test_isotropic_takes_variances():
    mean = jnp.zeros((2, 3))
    assert Gaussian.isotropic(mean, 0.25).scale.tolist() == [0.5, 0.5]
    assert Gaussian.isotropic(jnp.array([1, 2]), 0.25).scale == 0.5
    assert Gaussian.isotropic(mean[0], jnp.array([0.25, 1.0, 4.0])).scale.tolist() == [
        0.5,
        1.0,
        2.0,
    ]


@pytest.mark.both
def test_from_distribution_of_other_kinds():
    low_rank = dist.LowRankMultivariateNormal(jnp.zeros(3), jnp.ones((3, 1)), jnp.full(3, 0.5))
    np.testing.assert_allclose(
        Gaussian.from_distribution(low_rank).covariance, low_rank.covariance_matrix, rtol=1e-5
    )
    with pytest.raises(TypeError, match="MultivariateNormal"):
        Gaussian.from_distribution(dist.Gamma(1.0, 1.0))
    with pytest.raises(TypeError, match=r"Gaussian\.from_distribution"):
        LowRankGaussian.from_distribution(dist.Normal(jnp.zeros(3), 1.0))
    with pytest.raises(ValueError, match="scale of shape"):
        _ = Gaussian(jnp.zeros(3), jnp.zeros((1, 1, 3, 3))).structure
