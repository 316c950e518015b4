# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SIGMAS, long, with_long
from jax import random
from test_engines import setup

from numpyro_regloss import Gaussian, Loss, Minibatch, RegularizedLoss, problems, shift, values
from numpyro_regloss._core.tail import mean_with_error

PROBLEMS = {
    "linear": problems.linear(np.array([0.5, -1.0])),
    "quadratic": problems.quadratic(np.array([0.5, 2.0, 1.0]), center=np.array([0.3, 0.0, -0.3])),
    "absolute": problems.absolute(3),
    "relu": problems.relu(2),
    "double_well": problems.double_well(2),
    "rastrigin": problems.rastrigin(2),
    "mixture": problems.gaussian_mixture([0.3, 0.7], [[-1.0], [1.0]], [0.3, 0.5]),
}


@pytest.mark.parametrize(
    "name", with_long(PROBLEMS, {"quadratic", "absolute", "relu", "rastrigin"})
)
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


def test_errors_know_what_a_large_constant_hides():
    # Neighbours of 1e9 in single precision are 64 apart: all draws have one loss, and no spread tells of an error.
    loss = Loss.from_function(lambda x, c: 0.5 * jnp.sum(x**2) + c, jnp.full(2, 3.0), 1e9)
    target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, 1.0))
    for estimate in (
        values.local_entropy(random.key(0), target),
        values.heat(random.key(0), target),
    ):
        assert 64 / 2 < estimate.error < 200
    info = shift.AdaptiveImportance()
    info = info.step(random.key(0), info.init(random.key(0), target), target)[2]
    assert info.local_entropy_error > 64 / 2


def test_zero_one_loss_has_an_exact_heat():
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(60, 3))
    labels = np.sign(inputs @ np.array([1.0, -1.0, 0.5]) + 0.3 * rng.normal(size=60))
    problem = problems.zero_one(inputs, labels)
    x = np.array([1.0, -0.5, 0.2])
    estimate = values.heat(random.key(0), setup(problem, x, 0.2, 1.0))
    assert abs(estimate.value - problem.heat(x, 0.2)) < SIGMAS * estimate.error


@pytest.mark.parametrize("temperature", [1.0, long(0.1)])
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


def covered(estimate, exact):
    # What says that it has no error covers everything.
    return np.abs(estimate.value - exact) < 1.96 * np.asarray(estimate.error)


def test_khat_tells_a_degenerate_estimate():
    target = setup(problems.linear(np.full(20, 3.0)), np.zeros(20), 1.0, 1.0)
    with pytest.warns(UserWarning, match=r"local_entropy: the error of F_tau \(k-hat") as told:
        estimate = values.local_entropy(
            random.key(0), target, method="importance", num_samples=1000
        )
    assert len(told) == 1
    assert estimate.khat > 0.7
    assert estimate.error == np.inf
    good = values.local_entropy(random.key(0), setup(PROBLEMS["absolute"], np.zeros(3), 0.3, 1.0))
    assert good.khat < 0.7
    assert 5000 < good.ess <= 10_000
    assert values.heat(random.key(0), target).khat == -jnp.inf


LOG_NORMAL = Loss.from_function(lambda x, s: jnp.exp(s * x[0]), np.zeros(1), 1.0)
LINEAR = Loss.from_function(lambda x, s: s * x[0], np.zeros(1), 1.0)


@pytest.fixture(scope="module")
def heavy():
    """Both values of losses with log-normal terms, exp(s x) and weights exp(-s x), over repetitions."""

    def both(rng_key, s):
        reference = Gaussian.isotropic(jnp.zeros(1), 1.0)
        return (
            values.heat(rng_key, RegularizedLoss(LOG_NORMAL, reference, (s,)), num_samples=4000),
            values.local_entropy(
                rng_key,
                RegularizedLoss(LINEAR, reference, (s,)),
                method="importance",
                num_samples=4000,
            ),
        )

    program = jax.jit(jax.vmap(both, (0, None)))
    return lambda s: jax.device_get(program(random.split(random.key(0), 300), s))


@pytest.mark.parametrize("s", [0.5, 1.0, 2.0, 3.0, long(1.5), long(2.5), long(4.0)])
def test_heavy_tails_have_wide_errors_or_none(heavy, s):
    heat, entropy = heavy(s)
    for estimate, exact in ((heat, np.exp(s**2 / 2)), (entropy, -(s**2) / 2)):
        # The number covered is binomial: four standard deviations are 0.05 at 300 repetitions.
        assert np.mean(covered(estimate, exact)) > 0.9
        unknown = np.mean(estimate.error == np.inf)
        np.testing.assert_array_equal(estimate.error == np.inf, estimate.khat > 0.7)
        # Of tails that are heavier than any sample shows, and of those that do no harm.
        assert unknown > 0.8 if s >= 3 else unknown < 0.02 if s <= 1 else True
    if s == 0.5:
        # sd of a pair's mean is sinh(s²/2) times a number near sqrt(2) exp(s²/2).
        sd = np.sqrt(0.5 * (np.exp(2 * s**2) + 1) - np.exp(s**2))
        np.testing.assert_allclose(np.median(heat.error), sd / np.sqrt(2000), rtol=0.05)


LIGHT = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "chi-squared": lambda rng, shape: rng.normal(size=shape) ** 2,
    "exponential": lambda rng, shape: rng.exponential(size=shape),
    "bounded": lambda rng, shape: rng.uniform(size=shape),
    "counts": lambda rng, shape: rng.poisson(1.0, shape),
    "zero or one": lambda rng, shape: rng.binomial(1, 0.3, shape),
}


@pytest.mark.parametrize("count", [20, long(100), 2000])
def test_light_tails_keep_their_errors(count):
    @jax.jit
    @jax.vmap
    def judge(terms):
        error = mean_with_error(terms, jnp.max(jnp.abs(terms)))[1]
        return error * jnp.sqrt(count) / jnp.std(terms, ddof=1)

    for name, draw in LIGHT.items():
        # Seeds without a sample of equal terms: they have no spread to compare with.
        terms = draw(np.random.default_rng(count + 1), (200, count)).astype(np.float32)
        ratio = judge(terms)
        # Chance refuses a sample of a hundred in 50 at most, and widens errors of few terms a little.
        assert np.mean(ratio == np.inf) <= (0.03 if count < 1000 else 0.0), name
        assert np.median(ratio) < {20: 1.15, 100: 1.3, 2000: 1.02}[count], name


def test_a_mean_without_an_error_says_so_once():
    def say(s):
        target = RegularizedLoss(LOG_NORMAL, Gaussian.isotropic(jnp.zeros(1), 1.0), (s,))
        return values.heat(random.key(0), target)

    with pytest.warns(UserWarning, match="values.heat: .*k-hat.*infinite.*smaller tau") as told:
        estimate = say(4.0)
    assert len(told) == 1
    assert estimate.error == np.inf
    assert np.isfinite(estimate.value)
    assert jax.jit(say)(4.0).error == np.inf  # in silence
    assert say(0.5).error < 0.02


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
    # Of the local entropy `test_evidence.py` has it.
    estimate = values.heat(random.key(0), target)
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
    # The mean itself is infinite, and says so by itself.
    assert values.heat(random.key(0), RegularizedLoss(loss, Gaussian.isotropic(loss.x0, 1.0)))[
        :2
    ] == (np.inf, np.inf)


@pytest.mark.parametrize("method", [long("auto"), "importance", "smc"])
def test_a_wall_that_few_draws_pass(method):
    loss = Loss.from_function(lambda x: jnp.where(x[0] > 3, 0.0, jnp.inf), np.array([3.5]))
    target = RegularizedLoss(loss, Gaussian.isotropic(jnp.zeros(1), 1.0))
    exact = -jax.scipy.stats.norm.logcdf(-3.0)
    for seed in range(3):
        estimate = values.local_entropy(random.key(seed), target, method=method)
        # Some 13 draws of 10,000.
        assert abs(estimate.value - exact) < SIGMAS * estimate.error
        assert estimate.error < 0.6


@pytest.mark.long
def test_a_gaussian_of_islands_that_did_not_pass_a_wall_has_no_error():
    loss = Loss.from_function(lambda x: jnp.where(x[0] > 3.5, x[0], jnp.inf), np.array([4.0]))
    target = RegularizedLoss(loss, Gaussian.isotropic(jnp.zeros(1), 1.0))
    exact = -0.5 - jax.scipy.stats.norm.logcdf(-4.5)
    settings = {"method": "gaussian", "num_samples": 4_000}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "values.local_entropy: the error of F_tau")
        found = [values.local_entropy(random.key(seed), target, **settings) for seed in range(20)]
    # Where none of all draws passed it, too, the value is what was seen, not NaN.
    assert not np.isnan([estimate.value for estimate in found]).any()
    assert np.isposinf([estimate.value for estimate in found]).any()
    # A Gaussian beside q was once 40 errors off, at a k-hat of 0.69.
    near = [abs(estimate.value - exact) < SIGMAS * estimate.error for estimate in found]
    assert all(near[i] or np.isposinf(found[i].error) for i in range(20))


def test_gradient_of_draws_whose_weights_set_the_temperature():
    # Of a linear loss the gradient of F_tau is its slope, whatever the temperature.
    slope = jnp.array([3.0, -2.0])
    loss = Loss.from_function(lambda x: slope @ x, np.zeros(2))
    engine = shift.Importance(20_000, ess=0.5)
    regularized = jax.jit(values.value_and_grad(loss, 0.5, shift=engine, num_samples=20_000))
    _, gradient = regularized(jnp.zeros(2), random.key(0))
    np.testing.assert_allclose(gradient, slope, rtol=0.1)
