# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SIGMAS
from jax import random
from test_engines import setup

from numpyro_regloss import Gaussian, Loss, Minibatch, RegularizedLoss, problems, values

PROBLEMS = {
    "linear": problems.linear(np.array([0.5, -1.0])),
    "quadratic": problems.quadratic(np.array([0.5, 2.0, 1.0]), center=np.array([0.3, 0.0, -0.3])),
    "absolute": problems.absolute(3),
    "relu": problems.relu(2),
    "double_well": problems.double_well(2),
    "rastrigin": problems.rastrigin(2),
    "mixture": problems.gaussian_mixture([0.3, 0.7], [[-1.0], [1.0]], [0.3, 0.5]),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_values_are_exact_within_their_errors(name):
    problem = PROBLEMS[name]
    x, tau = np.full(problem.dim, 0.2), 0.3
    target = setup(problem, x, tau, 1.0)
    for estimate, exact in (
        (values.local_entropy(random.key(0), target), problem.local_entropy(x, tau)),
        (values.heat(random.key(0), target), problem.heat(x, tau)),
    ):
        # 1e-5: the antithetic mean of a linear loss has no error but rounding.
        assert abs(estimate.value - exact) < SIGMAS * estimate.error + 1e-5


def test_zero_one_loss_has_an_exact_heat():
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(60, 3))
    labels = np.sign(inputs @ np.array([1.0, -1.0, 0.5]) + 0.3 * rng.normal(size=60))
    problem = problems.zero_one(inputs, labels)
    x = np.array([1.0, -0.5, 0.2])
    estimate = values.heat(random.key(0), setup(problem, x, 0.2, 1.0))
    assert abs(estimate.value - problem.heat(x, 0.2)) < SIGMAS * estimate.error


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_errors_are_calibrated(temperature):
    problem = PROBLEMS["double_well"]
    x, tau, num = np.full(2, 0.6), 0.3 * temperature, 400
    target = setup(problem, x, tau, temperature)

    def standardized(rng_key):
        entropy = values.local_entropy(rng_key, target, num_samples=1000)
        heat = values.heat(rng_key, target, num_samples=1000)
        return (entropy.value - exact[0]) / entropy.error, (heat.value - exact[1]) / heat.error

    exact = problem.local_entropy(x, tau, temperature), problem.heat(x, tau)
    scores = jnp.stack(jax.jit(jax.vmap(standardized))(random.split(random.key(0), num)))
    covered = jnp.mean(jnp.abs(scores) < 1.96, 1)
    # The number covered is binomial: four standard deviations are 0.044 at 400 repetitions.
    assert jnp.all(jnp.abs(covered - 0.95) < 0.044), covered


def test_khat_tells_a_degenerate_estimate():
    target = setup(problems.linear(np.full(20, 3.0)), np.zeros(20), 1.0, 1.0)
    estimate = values.local_entropy(random.key(0), target, method="importance", num_samples=1000)
    assert estimate.khat > 0.7
    good = values.local_entropy(random.key(0), setup(PROBLEMS["absolute"], np.zeros(3), 0.3, 1.0))
    assert good.khat < 0.7
    assert 5000 < good.ess <= 10_000
    assert values.heat(random.key(0), target).khat == -jnp.inf


def test_full_data_whatever_the_minibatch():
    data = np.linspace(0, 1, 32)

    def fn(x, d):
        return jnp.mean((d - x[0]) ** 2)

    plain = Loss.from_function(fn, np.zeros(1), data)
    batched = Loss.from_function(fn, np.zeros(1), data, minibatch=Minibatch(4))
    reference = Gaussian.isotropic(plain.x0, 0.1)
    for value in (values.local_entropy, values.heat):
        a, b = (value(random.key(0), RegularizedLoss(loss, reference)) for loss in (plain, batched))
        np.testing.assert_allclose(a.value, b.value, rtol=1e-6)


def test_nan_losses_have_no_value():
    loss = Loss.from_function(lambda x: jnp.log(x[0]), np.ones(1))
    target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, 1.0))
    for value in (values.local_entropy, values.heat):
        estimate = value(random.key(0), target)
        assert jnp.isnan(estimate.value)
        assert jnp.isposinf(estimate.error)
        assert not jnp.isnan(estimate.ess)


def test_infinite_losses():
    def wall(x):
        return jnp.where(x[0] > 0, 0.0, jnp.inf)

    loss = Loss.from_function(wall, np.ones(1))
    estimate = values.local_entropy(
        random.key(0), RegularizedLoss(loss, Gaussian.isotropic(loss.x0, 1.0))
    )
    exact = -jax.scipy.stats.norm.logcdf(1.0)
    assert abs(estimate.value - exact) < SIGMAS * estimate.error
