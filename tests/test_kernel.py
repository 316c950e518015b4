# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""NumPyro's kernels as shift engines: exact moments, also where the centre has moved far."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from conftest import SIGMAS, Counter, long
from jax import random
from numpyro.infer import AIES, ESS, HMC, NUTS, SA, BarkerMH, DiscreteHMCGibbs, MixedHMC

from numpyro_regloss import Gaussian, Loss, RegularizedLoss, TwoStep, fit, problems, shift
from numpyro_regloss.shift.kernel.tuning import renewed
from numpyro_regloss.shift.kernel.walkers import batches, ess_of_blocks

FACTOR = np.random.default_rng(3).normal(size=(3, 3)) / np.sqrt(3)
PROBLEM = problems.quadratic(FACTOR @ FACTOR.T, center=np.array([0.5, -1.0, 1.0]))
# Finite up to an edge, which is data: one program for all tests of a kernel.
COUNTER = Counter(lambda x, edge: jnp.where(x[0] < edge, PROBLEM.loss(x), jnp.inf))
TAU, TEMPERATURE = 0.5, 0.5


def hmc(model):
    # The default path of 2 π is a full period of a whitened Gaussian: it ends where it began.
    return HMC(model, trajectory_length=1.5)


def sample_adaptive(model):
    return SA(model, adapt_state_size=30)


KERNELS = {
    "nuts": shift.Kernel(NUTS, num_warmup=150, num_samples=200),
    "hmc": shift.Kernel(hmc, num_warmup=150, num_samples=200),
    "barker": shift.Kernel(BarkerMH, num_warmup=400, num_samples=800),
    "aies": shift.Kernel(AIES, num_warmup=400, num_samples=600, num_chains=20),
    "ess": shift.Kernel(ESS, num_warmup=100, num_samples=200, num_chains=20),
    # One new point per iteration: it needs thousands of them to arrive.
    "sa": shift.Kernel(sample_adaptive, num_warmup=6000, num_samples=4000),
}
WITH_GRADIENT = ("nuts", "hmc", "barker")
# Control variates leave rounding only; without them the draws themselves are judged.
PLAIN = fit.ForwardKL("dense", control_variates="none")


def target_at(x, edge=np.inf):
    loss = Loss.from_function(COUNTER, np.asarray(x, float), edge)
    return RegularizedLoss(loss, Gaussian.isotropic(loss.x0, TAU), temperature=TEMPERATURE)


@jax.jit
def start(engine, rng_key, target):
    return engine.init(rng_key, target)


@jax.jit
def step(engine, rng_key, state, target):
    state, draws, info = engine.step(rng_key, state, target)
    gaussian, fit_info = PLAIN.step(rng_key, (), target, draws)[1:]
    return state, draws, info, gaussian, fit_info


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("barker", marks=pytest.mark.both),
        *map(long, ("aies", "nuts", "hmc", "ess", "sa")),
    ],
)
def test_moments_are_exact_at_both_centres_and_nothing_is_retraced(name):
    engine = KERNELS[name]
    # Sample adaptive chains creep, and would take a hundred thousand iterations for a distance of 30.
    first, second = np.zeros(3), np.full(3, 3.0 if name == "sa" else 30.0)
    state, count = start(engine, random.key(0), target_at(first)), None
    # The loss is steep at the second centre, where kernels bound to the first target would stay behind.
    for i, x in enumerate((first, second, second)):
        target = target_at(x)
        types = jax.tree.map(lambda a: (a.shape, a.dtype, a.weak_type), state)
        state, draws, info, gaussian, fit_info = step(engine, random.key(i), state, target)
        assert jax.tree.map(lambda a: (a.shape, a.dtype, a.weak_type), state) == types
        count = count or COUNTER.count
        exact = PROBLEM.shift_mean(x, TAU, TEMPERATURE)
        covariance = PROBLEM.shift_covariance(x, TAU, TEMPERATURE)
        sd = np.sqrt(np.diag(covariance))
        assert info.ok
        assert info.rhat < 1.1
        assert np.all(np.abs(gaussian.mean - exact) < SIGMAS * fit_info.mean_error)
        assert np.all(fit_info.mean_error < 0.25 * sd)
        # Entries of a sample covariance err by sqrt(2 / n), of slow chains and of squares a little more.
        error = np.abs(gaussian.covariance - covariance) / np.outer(sd, sd)
        assert np.max(error) < SIGMAS * np.sqrt(3 / float(info.ess))
    assert COUNTER.count == count
    if name in WITH_GRADIENT:
        # The metric of all chains, each with a step size of its own.
        (matrices,) = jax.tree.leaves(state.tuning["inverse_mass_matrix"])
        np.testing.assert_array_equal(matrices, np.tile(matrices[0], (len(matrices), 1)))
        assert np.ptp(state.tuning["step_size"]) > 0
    # Values and scores that came with the draws are those of the target.
    x = draws.x[0, :5]
    np.testing.assert_allclose(draws.loss[0, :5], jax.vmap(target.value)(x), rtol=1e-3, atol=1e-3)
    assert (draws.score is not None) == (name in WITH_GRADIENT)
    if draws.score is not None:
        scores = jax.vmap(jax.grad(target.log_density))(x)
        np.testing.assert_allclose(draws.score[0, :5], scores, rtol=1e-2, atol=1e-2)
    spent = (info.num_grad > 0, info.num_loss > 0)
    assert spent == ((True, False) if name in WITH_GRADIENT else (False, True))


@pytest.mark.long
def test_stated_error_of_an_ensemble_is_calibrated():
    engine = shift.Kernel(ESS, num_warmup=60, num_samples=400, num_chains=12)
    target = target_at(np.zeros(3))
    exact = PROBLEM.shift_mean(np.zeros(3), TAU, TEMPERATURE)

    @jax.jit
    @jax.vmap
    def scores(rng_key):
        draws = engine.step(rng_key, engine.init(rng_key, target), target)[1]
        method = fit.ForwardKL(control_variates="none")
        fitted, info = method.step(rng_key, (), target, draws)[1:]
        return (fitted.mean - exact) / info.mean_error

    spread = jnp.sqrt(jnp.mean(scores(random.split(random.key(4), 150)) ** 2, 0))
    # Quantiles of a chi distribution with 150 degrees of freedom at 0.01 %, widened above since errors from
    # ten batches, or from a slow chain, are themselves known to a fifth only.
    assert jnp.all((spread > 0.75) & (spread < 1.4)), spread


def test_a_run_of_a_gradient_free_kernel():
    # Rounding makes the loss a step function: no gradient, and chains that need none.
    loss = Loss.from_function(
        lambda x: jnp.sum(jnp.round(10.0 * x**2)).astype(int), np.full(2, 2.0)
    )
    engine = shift.Kernel(AIES, num_warmup=50, num_samples=100, num_chains=20)
    optimizer = TwoStep(loss, tau=0.3, shift=engine, fit=fit.ForwardKL(), temperature=2.0)
    result = optimizer.run(random.key(0), 8, progress_bar=False)
    assert result.history.ok.all()
    assert np.all(np.abs(result.params) < 0.3)


def test_a_step_that_fails_is_rejected_and_recovered_from():
    # Finite at the first centre only: no chain can stand anywhere near the second.
    engine = KERNELS["barker"]
    here, there = (target_at(np.full(3, c), 10.0) for c in (0.0, 1000.0))
    state = start(engine, random.key(0), here)
    state, _, info, _, _ = step(engine, random.key(1), state, here)
    assert info.ok
    after, _, info, _, _ = step(engine, random.key(2), state, there)
    assert not info.ok
    state = engine.after_rejection(state, after)
    assert not state.warm
    assert step(engine, random.key(3), state, here)[2].ok


def dense_nuts(model):
    return NUTS(model, dense_mass=True)


def fixed_nuts(model):
    return NUTS(model, dense_mass=True, adapt_mass_matrix=False)


# Long and narrow along no axis.
ROTATION, _ = np.linalg.qr(np.random.default_rng(5).normal(size=(6, 6)))
NARROW = ROTATION @ np.diag(np.logspace(0, 5, 6)) @ ROTATION.T
MATRICES = ("inverse_mass_matrix", "mass_matrix_sqrt", "mass_matrix_sqrt_inv")


@pytest.mark.parametrize("form", ["diagonal", "dense"])
def test_a_metric_of_draws_and_scores(form):
    exact = np.linalg.inv(NARROW)
    draws = np.random.default_rng(0).multivariate_normal(np.zeros(6), exact, (2, 300))
    # NumPyro keeps dense matrices by the names of their sites.
    old = np.ones((2, 6)) if form == "diagonal" else {("eps",): np.tile(np.eye(6), (2, 1, 1))}
    tuning = {"step_size": np.array([0.1, 0.2])} | dict.fromkeys(MATRICES, old)
    tuning = jax.tree.map(jnp.asarray, tuning)
    one = jax.jit(renewed)
    found = one(tuning, jnp.asarray(draws), jnp.asarray(draws @ NARROW))
    np.testing.assert_array_equal(found["step_size"], tuning["step_size"])
    inverse, root, root_inverse = (np.asarray(*jax.tree.leaves(found[name])) for name in MATRICES)
    if form == "diagonal":
        # Standard deviations of 600 draws, and their ratios, are off by some per cent.
        sd = (np.diag(exact) / np.diag(NARROW)) ** 0.25
        np.testing.assert_allclose(root_inverse, np.tile(sd, (2, 1)), rtol=0.15)
        np.testing.assert_allclose(inverse, root_inverse**2, rtol=1e-5)
        np.testing.assert_allclose(root, 1 / root_inverse, rtol=1e-5)
    else:
        # Exact but for the prior of draws and rounding, where variances differ by a factor of 100,000.
        unit = np.linalg.cholesky(NARROW)
        for chain in range(2):
            np.testing.assert_allclose(unit.T @ inverse[chain] @ unit, np.eye(6), atol=0.02)
            mass = root[chain] @ root[chain].T
            np.testing.assert_allclose(unit.T @ np.linalg.inv(mass) @ unit, np.eye(6), atol=0.02)
            np.testing.assert_allclose(root[chain] @ root_inverse[chain], np.eye(6), atol=1e-3)
    kept = one(tuning, jnp.asarray(draws), jnp.full_like(draws, jnp.nan))
    jax.tree.map(np.testing.assert_array_equal, kept, tuning)


def steps_at(target, make):
    engine, gradients = shift.Kernel(make, num_warmup=60, num_samples=60), []
    state, one = engine.init(random.key(0), target), jax.jit(engine.step)
    for i in range(3):
        state, draws, info = one(random.key(i), state, target)
        assert info.ok
        gradients.append(int(info.num_grad))
    return state, draws, info, gradients


@pytest.mark.long
def test_later_steps_take_the_metric_of_earlier_ones():
    loss = Loss.from_function(lambda x, p: 0.5 * x @ p @ x, np.zeros(6), NARROW)
    target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, 10.0))
    _, draws, info, gradients = steps_at(target, dense_nuts)
    # Three to seven gradients a draw on a standard normal, fifty and more where it is 300 times as long as wide.
    assert gradients[2] < 0.3 * gradients[0]
    assert info.accept_prob > 0.7
    covariance = np.linalg.inv(jax.hessian(target.whitened_potential)(jnp.zeros(6)))
    noise = jax.vmap(target.reference.whiten)(draws.x.reshape(-1, 6))
    z = np.asarray(noise).mean(0) / np.sqrt(np.diag(covariance) / float(info.ess))
    assert np.all(np.abs(z) < SIGMAS)


@pytest.mark.long
def test_a_matrix_that_a_kernel_was_told_to_keep_is_kept():
    state, *_ = steps_at(target_at(np.zeros(3)), fixed_nuts)
    matrices = jax.tree.leaves(state.tuning["inverse_mass_matrix"])[0]
    np.testing.assert_array_equal(matrices, np.tile(np.eye(3), (4, 1, 1)))


def test_stretches_of_time():
    # Two walkers that mirror each other's past: single walkers look independent, their mean does not move.
    draws = jnp.arange(2 * 23).reshape(2, 23).astype(float)
    blocks = batches(draws)
    assert blocks.shape == (11, 4)  # batches of 2 of 23 draws, the first dropped
    np.testing.assert_array_equal(blocks[0], [1.0, 24.0, 2.0, 25.0])
    noise = random.normal(random.key(0), (1, 40, 500))
    mirrored = jnp.concatenate([noise, -noise])
    independent = jnp.concatenate([noise, random.normal(random.key(1), (1, 40, 500))])
    assert jnp.all(ess_of_blocks(batches(mirrored)) == 80)
    # Of ten means the estimate is skewed upwards: the mean of 9 / chi-squared of nine is 9 / 7.
    np.testing.assert_allclose(np.median(ess_of_blocks(batches(independent))), 80, rtol=0.2)
    assert ess_of_blocks(batches(jnp.ones((2, 1, 3)))).tolist() == [1.0, 1.0, 1.0]


def other_model(target):
    del target
    numpyro.sample("other", dist.Normal(0.0, 1.0))


SMALL = {"num_warmup": 2, "num_samples": 2}
BAD = {
    "kernel, not a factory": (
        lambda: shift.Kernel(NUTS(other_model)),
        TypeError,
        "function that makes a kernel, got NUTS",
    ),
    "number": (lambda: shift.Kernel(3), TypeError, "got int"),
    "factory of nothing": (lambda: shift.Kernel(lambda model: None), TypeError, "got NoneType"),
    "factory of the class": (lambda: shift.Kernel(lambda model: NUTS), TypeError, "the class NUTS"),
    "metric": (lambda: shift.Kernel(NUTS, metric="low_rank"), ValueError, "'scores', 'variance'"),
    "odd ensemble": (lambda: shift.Kernel(AIES, num_chains=5), ValueError, "even number of chains"),
    "no draws": (lambda: shift.Kernel(NUTS, num_samples=0), ValueError, "integer >= 1"),
    "kernel of another model": (
        lambda: start(
            shift.Kernel(lambda model: NUTS(other_model), **SMALL), random.key(0), target_at([0.0])
        ),
        ValueError,
        "built on the model that make_kernel is given",
    ),
    "kernel for discrete sites": (
        lambda: start(
            shift.Kernel(lambda m: MixedHMC(HMC(m)), **SMALL), random.key(0), target_at([0.0])
        ),
        ValueError,
        "one latent site is the real vector",
    ),
    "Gibbs kernel for discrete sites": (
        lambda: start(
            shift.Kernel(lambda m: DiscreteHMCGibbs(NUTS(m)), **SMALL),
            random.key(0),
            target_at([0.0]),
        ),
        ValueError,
        "one latent site is the real vector",
    ),
}


@pytest.mark.parametrize("row", BAD)
def test_bad_input(row):
    call, error, words = BAD[row]
    with pytest.raises(error, match=words):
        call()


def test_a_loss_that_is_no_number_far_out_does_not_end_an_adaptation():
    # Of every long step: without a wall there BarkerMH took NaN for its step size, and stood still.
    loss = Loss.from_function(
        lambda x: jnp.where(jnp.sum(x**2) > 9.0, jnp.nan, 0.5 * jnp.sum(x**2)), np.full(2, 2.0)
    )
    target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, 1.0))
    engine = shift.Kernel(BarkerMH, num_warmup=300, num_samples=500, num_chains=8)
    _, draws, info = jax.jit(engine.step)(random.key(1), engine.init(random.key(0), target), target)
    assert info.ok
    assert info.rhat < 1.1
    assert 0.1 < info.accept_prob < 0.9
    assert jnp.max(jnp.sum(draws.x**2, -1)) <= 9.0
