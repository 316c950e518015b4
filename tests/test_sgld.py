# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""SGLD against the exact stationary law of its own discretization, and against the rules of all engines."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import OPTIMIZED, SIGMAS, Counter, gradients_of_batches, long
from jax import random
from scipy.linalg import solve_discrete_lyapunov

from numpyro_regloss import (
    Gaussian,
    Loss,
    Minibatch,
    RegularizedLoss,
    RejectedError,
    TwoStep,
    diagnostics,
    fit,
    shift,
)
from numpyro_regloss.draws.base import BatchMeans
from numpyro_regloss.draws.batches import in_batches
from numpyro_regloss.fit import ForwardKL

FACTOR = np.array([[1.2, 0.0, 0.0], [0.5, 0.9, 0.0], [-0.4, 0.3, 0.5]])
HESSIAN, MINIMUM = FACTOR @ FACTOR.T, np.array([1.0, -1.0, 0.5])
CHAINS, BATCH_CHAINS = 400, 3000


def bowl(x, hessian):
    return 0.5 * (x - MINIMUM) @ (hessian @ (x - MINIMUM))


@jax.jit
def one_shift(engine, rng_key, state, target):
    return engine.step(rng_key, state, target)


long_shift = jax.jit(one_shift.__wrapped__, compiler_options=OPTIMIZED)


@jax.jit
def project(method, target, draws):
    return method.step(random.key(0), (), target, draws)[1:]


def target_at(center, temperature, loss=None):
    loss = Loss.from_function(bowl, np.zeros(3), HESSIAN) if loss is None else loss
    reference = Gaussian.isotropic(jnp.asarray(center, float), 0.5 * temperature)
    return RegularizedLoss(loss, reference, temperature=temperature)


def law(center, temperature, step_size, diagonal=None):
    """Mean and covariance of the chain: C = (I - ηPA) C (I - ηPA)ᵀ + 2ηT P."""
    precision = HESSIAN + 2.0 * np.eye(3)
    mean = np.linalg.solve(precision, HESSIAN @ MINIMUM + 2.0 * center)
    diagonal = np.ones(3) if diagonal is None else diagonal
    contraction = np.eye(3) - step_size * diagonal[:, None] * precision
    noise = 2.0 * step_size * temperature * np.diag(diagonal)
    return mean, solve_discrete_lyapunov(contraction, noise)


def check_law(draws, mean, covariance):
    # Chains are independent: the scatter of what each says gives the errors.
    about = draws.x - jnp.asarray(mean, draws.x.dtype)
    products = jnp.einsum("cdi,cdj->cij", about, about) / about.shape[1]
    variance = np.max(covariance)
    for values, exact, unit in (
        (jnp.mean(about, 1), 0.0, variance**0.5),
        (products, covariance, variance),
    ):
        error = jnp.std(values, 0, ddof=1) / np.sqrt(len(values))
        assert np.all(np.abs(jnp.mean(values, 0) - exact) < SIGMAS * error), (values.mean(0), exact)
        # A thousand or more independent draws.
        assert np.all(error < 0.045 * unit)


@pytest.mark.parametrize("noise", ["normal", long("two_point")])
def test_full_batches_have_the_exact_stationary_moments(noise):
    # One program for every step size, temperature, center and preconditioner.
    counter = Counter(bowl)
    loss = Loss.from_function(counter, np.zeros(3), HESSIAN)
    fixed = np.array([1.5, 1.0, 0.5])
    cases = [
        (0.05, 1.0, np.zeros(3), None),
        (0.3, 1.0, np.zeros(3), None),
        (0.3, 0.1, np.full(3, 30.0), None),
        (0.05, 0.1, np.zeros(3), None),
        (0.2, 1.0, np.full(3, 30.0), fixed),
    ]
    counts = []
    for step_size, temperature, center, diagonal in cases:
        engine = shift.SGLD(
            step_size,
            num_samples=60,
            num_warmup=300,
            num_chains=CHAINS,
            preconditioner=np.ones(3) if diagonal is None else diagonal,
            noise=noise,
        )
        target = target_at(center, temperature, loss)
        state = engine.init(random.key(0), target)
        state, draws, info = one_shift(engine, random.key(1), state, target)
        counts.append(counter.count)
        assert info.ok
        mean, covariance = law(center, temperature, step_size, diagonal)
        check_law(draws, mean, covariance)
        root = np.sqrt(np.ones(3) if diagonal is None else diagonal)
        curvature = root[:, None] * (HESSIAN + 2.0 * np.eye(3)) * root
        steepest = step_size * np.linalg.eigvalsh(curvature)[-1]
        # Ten power iterations, from below.
        assert 0.9 * steepest < info.stability < 1.001 * steepest
    assert len(set(counts)) == 1
    # The formula of theory, without preconditioner.
    precision = HESSIAN + 2.0 * np.eye(3)
    exact = np.linalg.inv(precision @ (np.eye(3) - 0.15 * precision))
    np.testing.assert_allclose(law(np.zeros(3), 1.0, 0.3)[1], exact, rtol=1e-10)


def test_perturbed_gradients_of_a_quadratic_keep_mean_and_covariance():
    # C = (I - ηA) C (I - ηA)ᵀ + 2ηT + η² p H²: the last term is what the perturbation adds, of second order.
    step_size, p = 0.05, 0.3
    engine = shift.SGLD(
        step_size, num_samples=60, num_warmup=300, num_chains=CHAINS, perturbation=p
    )
    target = target_at(np.zeros(3), 1.0)
    state = engine.init(random.key(0), target)
    _, draws, info = one_shift(engine, random.key(1), state, target)
    assert info.ok
    assert draws.center_loss is None
    precision = HESSIAN + 2.0 * np.eye(3)
    contraction = np.eye(3) - step_size * precision
    noise = 2.0 * step_size * np.eye(3) + step_size**2 * p * HESSIAN @ HESSIAN
    covariance = solve_discrete_lyapunov(contraction, noise)
    mean = law(np.zeros(3), 1.0, step_size)[0]
    check_law(draws, mean, covariance)
    # The law of the loss along the chain is shifted by p tr(H) / 2, as F and the heat regularization are.
    about = mean - MINIMUM
    expected = 0.5 * (about @ HESSIAN @ about + np.trace(HESSIAN @ covariance))
    losses = jnp.mean(draws.loss, 1)
    error = jnp.std(losses, ddof=1) / np.sqrt(CHAINS)
    assert abs(jnp.mean(losses) - expected - 0.5 * p * np.trace(HESSIAN)) < SIGMAS * error


def wells(x):
    return jnp.sum((x**2 - 1.0) ** 2)


def test_perturbed_gradients_sample_the_heat_regularization():
    # E (z² - 1)² over z ~ N(x, p) is x⁴ + (6p - 2) x² and a constant: a third of it, and the wells are gone.
    p, temperature, tau = 1 / 3, 0.3, 4.0
    loss = Loss.from_function(wells, np.zeros(1))
    target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, tau), temperature=temperature)
    grid = np.linspace(-4, 4, 4001)
    for perturbation, middle in ((None, -2.0), (p, 6 * p - 2.0)):
        energy = (grid**4 + middle * grid**2) / temperature + 0.5 * grid**2 / tau
        weight = np.exp(energy.min() - energy)
        exact = weight @ grid**2 / weight.sum()
        engine = shift.SGLD(
            0.004, 1500, num_warmup=500, num_chains=200, perturbation=perturbation, keep="draws"
        )
        _, draws, info = one_shift(
            engine, random.key(1), engine.init(random.key(0), target), target
        )
        assert info.ok
        squares = jnp.mean(draws.x[..., 0] ** 2, 1)
        error = jnp.std(squares, ddof=1) / np.sqrt(200)
        # The step size is a hundredth of what the curvature allows, and so is its bias.
        assert abs(jnp.mean(squares) - exact) < SIGMAS * error + 0.02 * exact
    # Far apart: 0.3 and 0.9.
    assert exact < 0.5


def test_an_update_by_minibatches_is_its_gradients():
    history = gradients_of_batches(
        lambda loss: TwoStep(loss, 1e-3, shift.SGLD(1e-2, 5), ForwardKL(), temperature=0.01)
    )
    looked = np.asarray(history.shift.looked)
    np.testing.assert_array_equal(np.flatnonzero(looked), 14 * np.arange(8))
    np.testing.assert_array_equal(np.isnan(history.shift.ess), ~looked)
    # Of its chain's start, by a batch.
    assert history.loss[0] == 1.0


def test_long_chains_are_judged_by_batches():
    # As many numbers as make the fit take batches in one passage, and their autocorrelations beside it.
    x = np.random.default_rng(0).normal(size=(2, 999, 40)).cumsum(1) / 30
    x = jnp.asarray(x, float)
    log_weight = 1e-3 * jnp.tile(jnp.arange(999.0), (2, 1))
    mean, total, spread = in_batches(x, log_weight, 32)
    weight = jax.nn.softmax(log_weight.reshape(-1))
    exact = weight @ x.reshape(-1, 40)
    share = jax.nn.softmax(total.reshape(-1))
    np.testing.assert_allclose(share @ mean.reshape(-1, 40), exact, atol=1e-5)
    within = share @ (spread + (mean - exact) ** 2).reshape(-1, 40)
    np.testing.assert_allclose(within, weight @ (x.reshape(-1, 40) - exact) ** 2, rtol=1e-4)


def skewed(x, slope):
    """A convex loss whose density is skewed, so that the discretization moves the mean."""
    return jnp.mean(jnp.exp(1.5 * x[0]) - slope * x[0])


@pytest.mark.long
def test_bias_is_of_first_order_in_the_step_size():
    # Batches of one row of two: the slope of the loss is 1 ± 1.5. Exact mean by quadrature.
    rows = np.array([-0.5, 2.5], np.float32)
    loss = Loss.from_function(skewed, np.zeros(1), rows, minibatch=Minibatch(1))
    grid = np.linspace(-5, 4, 40_001)
    log_q = -(np.exp(1.5 * grid) - grid) - 0.5 * grid**2
    weight = np.exp(log_q - log_q.max())
    exact = weight @ grid / weight.sum()
    target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, 1.0))
    step_sizes, biases, errors = np.array([0.1, 0.05, 0.025]), [], []
    for step_size in step_sizes:
        engine = shift.SGLD(
            step_size, 1500, num_warmup=200, num_chains=BATCH_CHAINS, preconditioner=np.ones(1)
        )
        state = engine.init(random.key(0), target)
        _, draws, info = long_shift(engine, random.key(3), state, target)
        assert info.ok
        means = np.asarray(draws.x[..., 0], float).mean(1)
        biases.append(means.mean() - exact)
        errors.append(means.std(ddof=1) / np.sqrt(len(means)))
    biases, errors = np.array(biases), np.array(errors)
    assert np.all(np.abs(biases) > 5 * errors)
    # Weighted regression of log |bias| on log step size.
    log_step, log_bias, weight = np.log(step_sizes), np.log(np.abs(biases)), (biases / errors) ** 2
    log_step = log_step - np.average(log_step, weights=weight)
    slope = np.sum(weight * log_step * log_bias) / np.sum(weight * log_step**2)
    error = 1.0 / np.sqrt(np.sum(weight * log_step**2))
    print(f"bias {biases} ± {errors}: order {slope:.3f} ± {error:.3f}")
    # Terms of second order bend the line by about the largest step size times a half.
    assert abs(slope - 1.0) < SIGMAS * error + 0.15
    assert error < 0.15


def test_batch_means_say_what_the_draws_do():
    target = target_at(np.zeros(3), 1.0)
    for decay in (1.0, 0.99):
        stored, short = (
            shift.SGLD(0.2, 1001, num_warmup=7, num_chains=2, keep=keep, averaging_decay=decay)
            for keep in ("draws", "batch_means")
        )
        state = stored.init(random.key(0), target)
        all_draws, draws = (
            one_shift(engine, random.key(1), state, target)[1] for engine in (stored, short)
        )
        assert isinstance(draws, BatchMeans)
        assert draws.x.shape[1] == 32
        full, part = (project(ForwardKL("diagonal"), target, d) for d in (all_draws, draws))
        sd = full[0].scale
        np.testing.assert_allclose(part[0].mean, full[0].mean, atol=1e-4)
        # Of a finite chain, the variance about the batch means' mean differs by the error of that mean.
        np.testing.assert_allclose(part[0].scale, sd, rtol=0.05)
        # Errors of errors: from 32 batches of a chain about 12 %, and a wrong one is off by sqrt(time) ~ 2.5.
        np.testing.assert_allclose(part[1].mean_error, full[1].mean_error, rtol=0.6)
        np.testing.assert_allclose(part[1].covariance_error, full[1].covariance_error, rtol=0.6)
        isotropic = project(ForwardKL("isotropic"), target, draws)[0]
        np.testing.assert_allclose(isotropic.scale**2, np.mean(part[0].scale ** 2), rtol=1e-4)
        weight = jax.nn.softmax(draws.log_weight.reshape(-1))
        plain = jax.nn.softmax(all_draws.log_weight.reshape(-1))
        losses = weight @ draws.loss.reshape(-1), plain @ all_draws.loss.reshape(-1)
        np.testing.assert_allclose(*losses, rtol=1e-4)
    with pytest.raises(ValueError, match='keep="draws"'):
        ForwardKL("dense").step(random.key(0), (), target, draws)
    with pytest.raises(TypeError, match='keep="draws"'):
        diagnostics.gaussian_fit(draws, part[0])


def test_long_chains_of_many_parameters_are_not_stored():
    engine = shift.SGLD(0.1, 1000)
    loss = Loss.from_function(lambda x: 0.5 * jnp.sum(x**2), np.zeros(25_450))
    shapes = jax.eval_shape(
        lambda key, target: engine.step(key, engine.init(key, target), target)[1],
        random.key(0),
        RegularizedLoss(loss, Gaussian.isotropic(loss.x0, 1.0)),
    )
    numbers = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert numbers < 0.1 * 1000 * 25_450
    # The memory of a short chain is no matter, but the time of its fit.
    short = dataclasses.replace(engine, num_samples=20)
    assert short._batches(25_450) == (4, 5)  # noqa: SLF001
    assert short._batches(1000) == (1, 20)  # noqa: SLF001


@pytest.mark.parametrize("keep", [long("draws"), "batch_means"])
def test_stated_error_of_the_mean_is_calibrated(keep):
    # Bounds as for the other engines, see test_engines: 200 repetitions.
    engine = shift.SGLD(0.25, 1200, num_warmup=60, num_chains=2, keep=keep)
    target = target_at(np.zeros(3), 1.0)
    exact = jnp.asarray(law(np.zeros(3), 1.0, 0.25)[0], float)

    def go(rng_key):
        _, draws, info = engine.step(rng_key, engine.init(rng_key, target), target)
        _, fitted, fit_info = ForwardKL().step(rng_key, (), target, draws)
        return (fitted.mean - exact) / fit_info.mean_error, info.ess, fitted.mean

    scores, ess, means = jax.jit(jax.vmap(go))(random.split(random.key(4), 200))
    spread = jnp.sqrt(jnp.mean(scores**2, 0))
    assert jnp.all((spread > 0.75) & (spread < 1.25)), spread
    # The effective sample size of all coordinates together: total variance over total squared error.
    covariance = law(np.zeros(3), 1.0, 0.25)[1]
    expected = np.trace(covariance) / np.sum((means - exact) ** 2, 1).mean()
    assert 0.7 < np.median(ess) / expected < 1.4


def test_averages_of_entropy_sgd():
    # The recursion of the paper, mu = 0.75 mu + 0.25 z, but for the weight that it leaves on its start.
    engine = shift.SGLD(0.2, 20, averaging_decay=0.75)
    target = target_at(np.zeros(3), 0.01)
    _, draws, _ = one_shift(engine, random.key(0), engine.init(random.key(0), target), target)
    fitted = project(ForwardKL(), target, draws)[0]
    mu = np.zeros(3)
    for z in np.asarray(draws.x[0]):
        mu = 0.75 * mu + 0.25 * z
    np.testing.assert_allclose(fitted.mean * (1 - 0.75**20), mu, rtol=1e-5)


def test_schedules_start_anew_and_warm_up_counts():
    schedule = optax.exponential_decay(0.3, 10, 0.5)
    engine = shift.SGLD(schedule, 20, num_warmup=20, start="last")
    target = target_at(np.zeros(3), 1e-12)
    state = engine.init(random.key(0), target)
    after, draws, info = one_shift(engine, random.key(1), state, target)
    assert info.step_size == np.float32(0.3)
    assert info.num_grad == 1 + 40 + 10
    # Without noise the chain is gradient descent on loss + |x|²: the reference's T / tau is 2.
    x, path = np.zeros(3), []
    for j in range(40):
        x = x - float(schedule(j)) * (HESSIAN @ (x - MINIMUM) + 2.0 * x)
        path.append(x)
    np.testing.assert_allclose(draws.x[0], path[20:], atol=1e-4)
    np.testing.assert_allclose(draws.loss[0], [bowl(x, HESSIAN) for x in path[20:]], rtol=1e-3)
    np.testing.assert_allclose(after.x[0], path[-1], atol=1e-4)
    again = one_shift(engine, random.key(1), after, target)[1]
    following = path[-1] - 0.3 * (HESSIAN @ (path[-1] - MINIMUM) + 2.0 * path[-1])
    for j in range(1, 21):
        gradient = HESSIAN @ (following - MINIMUM) + 2.0 * following
        following = following - float(schedule(j)) * gradient
    np.testing.assert_allclose(again.x[0, 0], following, atol=1e-4)


def stiff(x):
    return 0.5 * jnp.sum(jnp.array([1.0, 1e4]) * (x - 1.0) ** 2)


def test_rmsprop_lets_a_stiff_direction_and_a_flat_one_move_together():
    loss = Loss.from_function(stiff, np.zeros(2))
    target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, 1.0), temperature=1e-3)
    engine = shift.SGLD(
        0.02, 400, num_warmup=600, preconditioner=shift.RMSprop(decay=0.9), start="last"
    )
    state = engine.init(random.key(0), target)
    state, draws, info = one_shift(engine, random.key(1), state, target)
    assert info.ok
    exact = np.array([1 / 1.001, 1.0])
    assert np.all(np.abs(draws.x.mean((0, 1)) - exact) < 0.15)
    # From a running mean of squared gradients that is carried over.
    assert float(state.moment.weight) == pytest.approx(1.0)
    plain = shift.SGLD(0.02, 400, num_warmup=600, start="last")
    assert not one_shift(plain, random.key(1), plain.init(random.key(0), target), target)[2].ok


@pytest.mark.parametrize("times", [1.05, long(1.5)])
def test_an_unstable_step_size_is_reported_with_the_limit(times):
    # Just above the limit chains are finite after 200 steps, further above they overflow.
    target = target_at(np.zeros(3), 0.5)
    limit = 2.0 / np.linalg.eigvalsh(HESSIAN + 2.0 * np.eye(3))[-1]
    engine = shift.SGLD(times * limit, 200, num_chains=2)
    short = dataclasses.replace(engine, keep="batch_means")
    state = short.init(random.key(0), target)
    assert not one_shift(short, random.key(1), state, target)[2].ok
    optimizer = TwoStep(target.loss, 0.25, engine, fit.ForwardKL(), temperature=0.5)
    with pytest.raises(
        RejectedError, match="3 of 3 steps were rejected.*step size was unstable"
    ) as caught:
        optimizer.run(random.key(0), 3, progress_bar=False)
    message = str(caught.value)
    suggested = float(message.split("use a step_size below ")[1].split(",")[0])
    np.testing.assert_allclose(suggested, limit, rtol=0.1)
    result = caught.value.result
    np.testing.assert_array_equal(result.params, np.zeros(3))
    np.testing.assert_allclose(result.history.shift.stability, 2.0 * times, rtol=0.05)
    assert (result.history.shift.growth > 3).all()
    smaller = dataclasses.replace(
        optimizer, shift=dataclasses.replace(engine, step_size=0.5 * suggested)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert smaller.run(random.key(0), 3, progress_bar=False).history.ok.all()


def test_a_step_size_at_the_limit_is_warned_of_though_short_chains_stay_finite():
    target = target_at(np.zeros(3), 0.5)
    limit = 2.0 / np.linalg.eigvalsh(HESSIAN + 2.0 * np.eye(3))[-1]
    engine = shift.SGLD(1.02 * limit, 4)
    optimizer = TwoStep(target.loss, 0.25, engine, fit.ForwardKL(), temperature=0.5)
    with pytest.warns(UserWarning, match="in [5-8] of 8 steps .* half of it") as caught:
        result = optimizer.run(random.key(0), 8, progress_bar=False)
    assert len(caught) == 1
    assert result.history.ok.all()


def test_chains_that_meet_nan_are_told_apart_from_unstable_ones():
    loss = Loss.from_function(lambda x, s: s * jnp.sum(x**2), np.ones(2), 1.0)
    optimizer = TwoStep(loss, 0.5, shift.SGLD(0.1, 10), fit.ForwardKL())
    state = optimizer.init(random.key(0))
    with pytest.raises(RejectedError, match="in 2 of 2 steps chains became .* NaN among the data"):
        optimizer.run(random.key(0), 2, np.nan, init_state=state, progress_bar=False)


def test_double_precision(x64):
    loss = Loss.from_function(lambda x: 0.5 * jnp.sum((x - 1.0) ** 2), np.zeros(3))
    target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, 0.5))
    engine = shift.SGLD(
        optax.constant_schedule(0.1),
        40,
        start="last",
        preconditioner=shift.RMSprop(),
        keep="batch_means",
        averaging_decay=0.9,
        noise="two_point",
    )
    state = engine.init(random.key(0), target)
    after, draws, info = one_shift(engine, random.key(1), state, target)
    assert info.ok
    assert jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, state)
    for number in (draws.x, draws.spread, draws.loss, info.stability, info.growth, info.ess):
        assert number.dtype == jnp.float64


def test_minibatches_are_fresh_at_every_inner_step_and_in_every_chain():
    rows = np.arange(1000.0, dtype=np.float32)
    # The gradient is the batch's row: from the moves of a cold chain the rows can be read off.
    loss = Loss.from_function(
        lambda x, rows: jnp.mean(rows) * x[0], np.zeros(1), rows, minibatch=Minibatch(1)
    )
    target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, 1e-3), temperature=1e-12)
    engine = shift.SGLD(1e-4, 30, num_chains=2)
    _, draws, _ = one_shift(engine, random.key(0), engine.init(random.key(0), target), target)
    moves = np.diff(np.asarray(draws.x[..., 0]), axis=1).round(4)
    assert len(np.unique(moves)) > 50


BAD = {
    "step size zero": (lambda: shift.SGLD(0.0, 10), ValueError, "step_size"),
    "step size a word": (lambda: shift.SGLD("small", 10), TypeError, "step_size"),
    "step size a vector": (lambda: shift.SGLD(np.ones(3), 10), ValueError, "step_size"),
    "step sizes that end negative": (
        lambda: shift.SGLD(lambda j: 1.0 - 0.1 * j, 20),
        ValueError,
        "step 19",
    ),
    "step sizes that branch in Python": (
        lambda: shift.SGLD(lambda j: 0.1 if j < 3 else 0.01, 20),
        TypeError,
        "jnp.where",
    ),
    "no draws": (lambda: shift.SGLD(0.1, 0), ValueError, "num_samples"),
    "half a draw": (lambda: shift.SGLD(0.1, 0.5), TypeError, "num_samples"),
    "one draw": (lambda: shift.SGLD(0.1, 1), ValueError, "two draws"),
    "negative warm-up": (lambda: shift.SGLD(0.1, 10, -1), ValueError, "num_warmup"),
    "no chains": (lambda: shift.SGLD(0.1, 10, num_chains=0), ValueError, "num_chains"),
    "unknown start": (lambda: shift.SGLD(0.1, 10, start="centre"), ValueError, "'center'"),
    "unknown noise": (lambda: shift.SGLD(0.1, 10, noise="uniform"), ValueError, "two_point"),
    "unknown storage": (lambda: shift.SGLD(0.1, 10, keep=True), ValueError, "batch_means"),
    "decay above one": (lambda: shift.SGLD(0.1, 10, averaging_decay=1.5), ValueError, "between 0"),
    "decay zero": (lambda: shift.SGLD(0.1, 10, averaging_decay=0.0), ValueError, "averaging"),
    "preconditioner by name": (
        lambda: shift.SGLD(0.1, 10, preconditioner="rmsprop"),
        TypeError,
        r"RMSprop\(\)",
    ),
    "preconditioner a number": (
        lambda: shift.SGLD(0.1, 10, preconditioner=2.0),
        TypeError,
        "step_size",
    ),
    "preconditioner a class": (
        lambda: shift.SGLD(0.1, 10, preconditioner=shift.RMSprop),
        TypeError,
        r"RMSprop\(\)",
    ),
    "negative preconditioner": (
        lambda: shift.SGLD(0.1, 10, preconditioner=-np.ones(3)),
        ValueError,
        "positive",
    ),
    "preconditioner of another loss": (
        lambda: TwoStep(
            target_at(np.zeros(3), 1.0).loss,
            0.5,
            shift.SGLD(0.1, 10, preconditioner=np.ones(2)),
            ForwardKL(),
        ).init(random.key(0)),
        ValueError,
        "each of the 3 parameters",
    ),
    "perturbation negative": (
        lambda: shift.SGLD(0.1, 10, perturbation=-1.0),
        ValueError,
        "perturbation",
    ),
    "perturbation of another loss": (
        lambda: shift.SGLD(0.1, 10, perturbation=np.ones(2)).init(
            random.key(0), target_at(np.zeros(3), 1.0)
        ),
        ValueError,
        "each of the 3 parameters",
    ),
    "more steps than rows": (
        lambda: Minibatch(8, split=True).share(10),
        ValueError,
        "10 rows at least",
    ),
    "decay of RMSprop": (lambda: shift.RMSprop(decay=1.0), ValueError, "between 0 and 1"),
    "damping of RMSprop": (lambda: shift.RMSprop(damping=0.0), ValueError, "damping"),
    "loss without a gradient": (
        lambda: TwoStep(
            Loss.from_function(lambda x: jnp.sum(x > 0), np.zeros(2)),
            0.5,
            shift.SGLD(0.1, 10),
            ForwardKL(),
        ).init(random.key(0)),
        TypeError,
        "shift.Importance",
    ),
    "dense covariance of a long chain": (
        lambda: TwoStep(
            Loss.from_function(lambda x: 0.5 * jnp.sum(x**2), np.zeros(300)),
            0.5,
            shift.SGLD(0.1, 5000),
            ForwardKL("dense"),
        ).run(random.key(0), 1, progress_bar=False),
        ValueError,
        'keep="draws"',
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, exception, words = BAD[name]
    with pytest.raises(exception, match=words):
        call()
