# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Every engine against exact answers and against the rules that all engines follow."""

import itertools
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAMILIES, HEAT_FITS, SHIFTS, SIGMAS, long, with_long
from jax import lax, random
from scipy.stats import norm

from numpyro_regloss import Gaussian, Loss, RegularizedLoss, fit, problems, shift
from numpyro_regloss.fit import ForwardKL


def random_quadratic(dim, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(dim, dim)) * (scale / dim) ** 0.5
    return problems.quadratic(factor @ factor.T, center=rng.normal(size=dim))


# Built once, all in two dimensions, and one loss, chosen by data: an engine is one compiled program in all tests.
PROBLEMS = {
    "quadratic": random_quadratic(2, seed=1),
    "mixture": problems.gaussian_mixture(
        [0.3, 0.7], [[-1.0, 0.0], [1.0, 1.0]], [0.3 * np.eye(2), [[0.5, 0.2], [0.2, 0.4]]]
    ),
    "absolute": problems.absolute(2),
    "double_well": problems.double_well(2),
}
TEMPERATURES = (1.0, 0.1)


def wall(x):
    return jnp.where(x[0] > 0, jnp.where(x[1] > 0, 0.0, jnp.nan), jnp.inf)


LOSSES = {name: problem.loss for name, problem in PROBLEMS.items()} | {"wall": wall}


def any_loss(x, which):
    return lax.switch(which.astype(int), list(LOSSES.values()), x)


def setup(problem, x, tau, temperature):
    loss = Loss.from_function(problem.loss, np.asarray(x, float))
    return RegularizedLoss(loss, Gaussian.isotropic(loss.x0, tau), temperature=temperature)


def setup_named(name, x, tau, temperature):
    which = np.float32(list(LOSSES).index(name))
    loss = Loss.from_function(any_loss, np.asarray(x, float), which)
    return RegularizedLoss(loss, Gaussian.isotropic(loss.x0, tau), temperature=temperature)


@jax.jit
def start(engine, rng_key, target):
    return engine.init(rng_key, target)


@jax.jit
def shift_and_fit(engine, rng_key, state, target):
    key_step, key_fit = random.split(rng_key)
    state, draws, info = engine.step(key_step, state, target)
    _, fitted, fit_info = ForwardKL().step(key_fit, (), target, draws)
    return state, draws, info, fitted, fit_info


def one_shift(engine, target, seed=0):
    key_init, key = random.split(random.key(seed))
    return shift_and_fit(engine, key, start(engine, key_init, target), target)[1:]


@jax.jit
def plain_fit(target, draws):
    return ForwardKL(control_variates="none").step(random.key(0), (), target, draws)[1:]


# Engines on every problem; HMC shares its code with NUTS, and its rows of `test_conformance.py` have it. Kernels,
# guides and SMC have such tests in their own files.
# NUTS is on the second stack in the main job.
BOTH = ("importance_chunked", "quadratic")
CASES = [
    pytest.param(*case, marks=[pytest.mark.both] if case == BOTH else [])
    for case in itertools.product(FAMILIES, PROBLEMS)
    if case[0] != "hmc"
]
CASES += [long("hmc", name) for name in PROBLEMS]
CASES += [long(name, "quadratic") for name in ("importance", "importance_iid", "importance_sobol")]


@pytest.mark.parametrize(("engine", "name"), CASES)
def test_shift_and_fit_give_the_exact_mean(engine, name):
    problem = PROBLEMS[name]
    for temperature in TEMPERATURES:
        # Near enough to the mass for importance weights: the error of a degenerate cloud is not normal.
        x, tau = np.full(problem.dim, 0.6 if name == "double_well" else 0.3), 0.5 * temperature
        target = setup_named(name, x, tau, temperature)
        means, plain_means, errors = [], [], []
        # Four runs: stated errors of one are estimates too, which gives their ratios long tails.
        for seed in range(4):
            draws, info, fitted, _ = one_shift(SHIFTS[engine](), target, seed)
            assert info.ok
            assert draws.x.shape == (*draws.loss.shape, target.dim)
            plain, plain_info = plain_fit(target, draws)
            means.append(fitted.mean)
            plain_means.append(plain.mean)
            errors.append(plain_info.mean_error)
        exact = problem.shift_mean(x, tau, temperature)
        error = np.sqrt(np.sum(np.square(errors), 0)) / 4
        # With control variates and without: no worse than plain averages say of themselves.
        for mean in (means, plain_means):
            assert np.all(np.abs(np.mean(mean, 0) - exact) < SIGMAS * error), (mean, exact, error)
        assert np.max(errors) < 0.2 * np.sqrt(tau)


@pytest.mark.parametrize("engine", ["importance", long("nuts")])
def test_fifty_dimensions(engine):
    problem = random_quadratic(50, seed=2, scale=0.2)
    x, tau = np.zeros(50), 0.3
    engines = {
        "importance": shift.Importance(num_samples=20_000),
        "nuts": shift.NUTS(num_samples=250),
    }
    _, info, fitted, fit_info = one_shift(engines[engine], setup(problem, x, tau, 1.0))
    assert info.ok
    error = np.abs(fitted.mean - problem.shift_mean(x, tau)) / fit_info.mean_error
    assert np.all(error < SIGMAS)


# Of clouds, `test_forward_kl.py` checks coverage.
@pytest.mark.parametrize("engine", [*map(long, ("importance", "importance_iid", "nuts")), "hmc"])
def test_stated_error_of_the_mean_is_calibrated(engine):
    # 200 repetitions at once: standardized errors must have standard deviation one. The bounds are the
    # 0.01 % quantiles of a chi distribution with 200 degrees of freedom, widened below since antithetic
    # and NUTS errors are estimated from few effective draws.
    problem = random_quadratic(2, seed=3)
    x, tau = np.array([0.5, -0.5]), 0.5
    target = setup(problem, x, tau, 1.0)
    small = {
        "importance": shift.Importance(num_samples=200),
        "importance_iid": shift.Importance(num_samples=200, antithetic=False),
        "nuts": shift.NUTS(num_warmup=150, num_samples=100, num_chains=2),
        "hmc": shift.HMC(num_warmup=150, num_samples=100, num_chains=2),
    }[engine]

    def go(rng_key):
        _, draws, _ = small.step(rng_key, small.init(rng_key, target), target)
        # With control variates a Gaussian q leaves rounding only; test_forward_kl has those.
        method = ForwardKL(control_variates="none")
        _, fitted, info = method.step(rng_key, (), target, draws)
        return (fitted.mean - exact) / info.mean_error

    exact = jnp.asarray(problem.shift_mean(x, tau), target.loss.x0.dtype)
    scores = jax.jit(lambda keys: lax.map(go, keys))(random.split(random.key(4), 200))
    spread = jnp.sqrt(jnp.mean(scores**2, 0))
    assert jnp.all((spread > 0.75) & (spread < 1.25)), spread


dense_fit = jax.jit(ForwardKL("dense").step)


@pytest.mark.parametrize("engine", ["importance_chunked", "nuts", long("hmc")])
def test_dense_fit_matches_the_covariance(engine):
    problem = PROBLEMS["quadratic"]
    x, tau = np.zeros(problem.dim), 0.7
    target = setup_named("quadratic", x, tau, 0.5)
    draws, info, _, _ = one_shift(SHIFTS[engine](), target)
    fitted = dense_fit(random.key(0), (), target, draws)[1]
    exact = problem.shift_covariance(x, tau, 0.5)
    sd = np.sqrt(np.diag(exact))
    # Entries of a sample covariance have standard error at most sqrt(2 / n) in units of sd_i sd_j.
    error = np.abs(fitted.covariance - exact) / np.outer(sd, sd)
    assert np.max(error) < SIGMAS * np.sqrt(2 / float(info.ess))


@jax.jit
def heat_step(method, rng_key, target):
    return method.step(rng_key, method.init(rng_key, target), target, None)[1:]


def heat_case(name, temperature):
    return np.full(PROBLEMS[name].dim, 0.3), 0.5 * temperature


@cache
def exact_heat_step(name, temperature):
    return PROBLEMS[name].heat_step(*heat_case(name, temperature), temperature)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("method", HEAT_FITS)
def test_heat_fits_reach_the_exact_step(method, name):
    method = HEAT_FITS[method]()
    for temperature in TEMPERATURES:
        x, tau = heat_case(name, temperature)
        target = setup_named(name, x, tau, temperature)
        fitted, info = heat_step(method, random.key(0), target)
        assert info.ok
        # In units of sqrt(tau) the noise of one gradient is at most about one after preconditioning by
        # the curvature, so 2,000 to 8,000 of them leave less than 0.03; four of those.
        error = np.abs(fitted.mean - exact_heat_step(name, temperature)) / np.sqrt(tau)
        assert np.max(error) < 0.12, error


def test_robbins_monro_is_exact_on_quadratics_of_any_stiffness():
    for scale in (0.1, 300.0):
        problem = problems.quadratic(np.array([0.1, 1.0]) * scale, center=np.array([1.0, -1.0]))
        target = setup(problem, np.zeros(2), 0.5, 1.0)
        fitted, info = heat_step(fit.RobbinsMonro(num_steps=3000), random.key(1), target)
        np.testing.assert_allclose(info.curvature, 0.5 * scale, rtol=0.05)
        assert info.residual < 0.05  # no noise, so only what is left of the equation
        # Antithetic gradients of a quadratic have no noise: only the decay of the start is left.
        np.testing.assert_allclose(fitted.mean, problem.heat_step(np.zeros(2), 0.5), atol=0.02)


def test_natural_steps_diverge_where_the_default_does_not():
    problem = problems.quadratic(np.array([1.0, 200.0]), center=np.ones(2))
    target = setup(problem, np.zeros(2), 0.5, 1.0)
    exact = problem.heat_step(np.zeros(2), 0.5)
    natural = fit.RobbinsMonro(20, averaging=False, step_size=lambda j: 1.0 / (j + 1.0))
    errors = [
        np.abs(heat_step(method, random.key(0), target)[0].mean[1] - exact[1])
        for method in (natural, fit.RobbinsMonro(20))
    ]
    assert not errors[0] < 1e6  # or NaN, once the loss overflows
    assert errors[1] < 0.1


def test_natural_steps_are_the_papers():
    # a_j = 1 / j and no averaging: y_M = x - (tau / T) times the mean gradient met on the way.
    target = setup(problems.linear(np.array([1.0, -2.0])), np.zeros(2), 0.5, 0.25)
    natural = fit.RobbinsMonro(
        5, averaging=False, antithetic=False, step_size=lambda j: 1.0 / (j + 1.0)
    )
    fitted = heat_step(natural, random.key(1), target)[0]
    np.testing.assert_allclose(fitted.mean, -0.5 / 0.25 * jnp.array([1.0, -2.0]), rtol=1e-5)


# Quadratics without `--everything`: `test_reverse_kl.py`.
@pytest.mark.long
@pytest.mark.parametrize("covariance", ["reference", "dense"])
def test_reverse_kl_of_a_quadratic(covariance):
    problem = random_quadratic(5, seed=6)
    x, tau, temperature = np.full(5, 0.5), 0.6, 0.5
    target = setup(problem, x, tau, temperature)
    method = fit.ReverseKL(covariance, num_steps=2000)
    fitted, info = heat_step(method, random.key(0), target)
    sd = np.sqrt(np.diag(problem.shift_covariance(x, tau, temperature)))
    assert np.max(np.abs(fitted.mean - problem.heat_step(x, tau, temperature)) / sd) < 0.08
    if covariance == "dense":
        exact = problem.shift_covariance(x, tau, temperature)
        assert np.max(np.abs(fitted.covariance - exact) / np.outer(sd, sd)) < 0.08
        # q is in the family, so the bound is F_tau itself.
        gap = float(info.bound) - problem.local_entropy(x, tau, temperature)
        assert abs(gap) < SIGMAS * float(info.bound_error) + 0.01
    else:
        assert info.bound > problem.local_entropy(x, tau, temperature)


@pytest.mark.parametrize("engine", with_long(FAMILIES, {"hmc"}))
def test_scores_are_gradients_of_log_q(engine):
    target = setup_named("double_well", np.full(2, 0.2), 0.5, 0.5)
    draws, _, _, _ = one_shift(SHIFTS[engine](), target)
    x = draws.x[0, :5]
    np.testing.assert_allclose(draws.loss[0, :5], jax.vmap(target.value)(x), rtol=1e-3, atol=1e-3)
    if draws.score is not None:
        expected = jax.vmap(jax.grad(target.log_density))(x)
        np.testing.assert_allclose(draws.score[0, :5], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("engine", with_long(FAMILIES, {"hmc"}))
def test_fold_visits_every_draw_once(engine):
    target = setup_named("double_well", np.full(2, 0.2), 0.5, 1.0)
    draws, _, _, _ = one_shift(SHIFTS[engine](), target)

    def add(total, chunk):
        weight = jnp.exp(chunk.log_weight)
        return total + jnp.sum(weight[:, None] * chunk.x, 0)

    folded = draws.fold(add, jnp.zeros(2))
    direct = jnp.einsum("cd,cdi->i", jnp.exp(draws.log_weight), draws.x)
    np.testing.assert_allclose(folded, direct, rtol=1e-3, atol=1e-2)


def test_evaluations_of_a_cloud_are_counted():
    calls = []

    def counted(x):
        jax.debug.callback(lambda x: calls.append(1), x[0])
        return jnp.sum(x**2)

    loss = Loss.from_function(counted, np.zeros(2))
    target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, 1.0))
    for num_samples, chunk_size in ((1, None), (1001, 100)):
        engine = shift.Importance(num_samples, chunk_size=chunk_size)
        info = jax.jit(engine.step)(random.key(0), (), target)[2]
        jax.effects_barrier()
        assert info.num_loss == len(calls)
        assert num_samples <= len(calls) <= num_samples + 10
        calls.clear()


def test_no_draws_fold_to_nothing():
    target = setup(problems.linear(np.ones(3)), np.zeros(3), 0.5, 1.0)
    _, draws, _ = shift.Implicit().step(random.key(0), (), target)
    assert draws.fold(lambda count, chunk: count + len(chunk.x), 0) == 0


def test_antithetic_pairs_stay_together():
    target = setup_named("absolute", np.full(2, 2.0), 0.5, 1.0)
    draws, _, _, _ = one_shift(SHIFTS["importance_chunked"](), target)
    x = draws.x[0, :3998].reshape(1999, 2, 2)
    np.testing.assert_allclose(x.mean(1), np.full((1999, 2), 2.0), rtol=1e-5)
    assert draws.x.shape == (1, 3999, 2)


def test_walls_and_failures_of_the_loss():
    target = setup_named("wall", np.ones(2), 1.0, 1.0)
    _, info, fitted, fit_info = one_shift(SHIFTS["importance_chunked"](), target)
    assert info.ok
    # Where it is NaN, at one draw of eight.
    inside = norm.cdf(1.0)
    share = inside * (1.0 - inside)
    assert abs(info.num_rejected / 3999 - share) < SIGMAS * np.sqrt(share / 3999)
    # N(1, 1) cut off at zero on both axes.
    exact = 1.0 + norm.pdf(1.0) / inside
    np.testing.assert_allclose(fitted.mean, [exact, exact], atol=0.05)
    assert np.all(np.abs(fitted.mean - exact) < SIGMAS * fit_info.mean_error)


def test_importance_reports_degeneracy():
    target = setup(problems.linear(np.full(20, 3.0)), np.zeros(20), 1.0, 1.0)
    _, info, _, fit_info = one_shift(shift.Importance(1000), target)
    assert info.khat > 0.7
    assert info.ess < 20
    # sqrt(tau) = 1, and a mean over a handful of draws is known to a good part of it.
    assert np.median(fit_info.mean_error) > 0.2


@pytest.mark.parametrize("engine", ["nuts", long("hmc")])
def test_chains_at_a_moved_centre(engine):
    # The chains of the first target stand far out in the second: they must follow it.
    engine, problem = SHIFTS[engine](), PROBLEMS["quadratic"]
    first, second = (setup_named("quadratic", np.full(2, c), 0.5, 1.0) for c in (0.0, 30.0))
    state = start(engine, random.key(0), first)
    for seed, target in enumerate((first, second, second)):
        state, draws, info, *_ = shift_and_fit(engine, random.key(seed), state, target)
    assert info.num_divergent == 0
    fitted, fit_info = plain_fit(second, draws)
    exact = problem.shift_mean(np.full(2, 30.0), 0.5)
    assert np.all(np.abs(fitted.mean - exact) < SIGMAS * fit_info.mean_error)


@pytest.mark.long
def test_diagonal_and_dense_references():
    problem = random_quadratic(3, seed=8)
    loss = Loss.from_function(problem.loss, np.zeros(3))
    rng = np.random.default_rng(9)
    factor = jnp.asarray(
        np.tril(rng.normal(size=(3, 3)) * 0.2) + np.diag([0.5, 0.8, 1.2]), jnp.float32
    )
    hessian = jax.hessian(problem.loss)(jnp.zeros(3))
    gradient = jax.grad(problem.loss)(jnp.zeros(3))
    for scale in (jnp.array([0.5, 0.8, 1.2]), factor):
        reference = Gaussian(loss.x0, scale)
        precision = jnp.linalg.inv(reference.covariance)
        exact = -jnp.linalg.solve(hessian + precision, gradient)
        target = RegularizedLoss(loss, reference)
        for engine in (shift.Importance(20_000), shift.HMC()):
            _, _, fitted, info = one_shift(engine, target)
            assert np.all(np.abs(fitted.mean - exact) < SIGMAS * info.mean_error)
        fitted, _ = heat_step(fit.RobbinsMonro(2000), random.key(0), target)
        np.testing.assert_allclose(fitted.mean, exact, atol=5e-3)


def test_engine_potential_of_a_model_is_the_models():
    from test_loss import SIGMA, Y, eight_schools  # noqa: PLC0415

    loss = Loss.from_model(eight_schools, 8, SIGMA, Y)
    target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, 0.1))
    engine = shift.HMC(num_warmup=100, num_samples=50, num_chains=2)
    _, draws, info = jax.jit(lambda key: engine.step(key, engine.init(key, target), target))(
        random.key(0)
    )
    assert info.ok
    potential = lax.map(target.whitened_potential, jax.vmap(target.reference.whiten)(draws.x[0]))
    noise = jax.vmap(target.reference.whiten)(draws.x[0])
    np.testing.assert_allclose(
        draws.loss[0], potential - 0.5 * jnp.sum(noise**2, -1), rtol=1e-4, atol=1e-3
    )
