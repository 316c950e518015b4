# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Sequential Monte Carlo: its ladder, its draws, its evidence and their errors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import OPTIMIZED, SIGMAS, Counter, with_long
from jax import lax, random
from test_engines import random_quadratic, setup

from numpyro_regloss import (
    Gaussian,
    Loss,
    Minibatch,
    RegularizedLoss,
    TwoStep,
    fit,
    problems,
    shift,
)
from numpyro_regloss.draws.resampling import systematic
from numpyro_regloss.shift.smc.ladder import evidence, next_rung

ENGINES = {moves: shift.SMC(num_particles=300, moves=moves) for moves in ("crank_nicolson", "hmc")}
SMALL = shift.SMC(num_particles=40, num_islands=4)


PROBLEM = random_quadratic(2, seed=5, scale=4.0)


def corner(x, bad, behind):
    """Flat in a corner, with something bad beyond one of its sides and something else behind the other."""
    return jnp.where(x[0] > 0, jnp.where(x[1] > 0, 0.0, bad), behind)


def far_edge(x, bad, behind):
    return jnp.where(jnp.abs(x[0]) < 5.0, -0.375 * x[0] ** 2, bad)


def relu(x, bad, behind):
    # max(x, 0) by a branch with a logarithm: its gradient is NaN for negative x, where its value is zero.
    return jnp.sum(jnp.where(x > 0, jnp.exp(jnp.log(x)), 0.0))


LOSSES = {
    "quadratic": lambda x, bad, behind: PROBLEM.loss(x),
    "corner": corner,
    "infinite": lambda x, bad, behind: jnp.inf + 0.0 * x[0],
    "far edge": far_edge,
    "relu": relu,
}
COUNTER = Counter(
    lambda x, which, *values: lax.switch(which.astype(int), list(LOSSES.values()), x, *values)
)


def target_at(name, x, tau=1.0, temperature=1.0, bad=0.0, behind=np.inf):
    """Which loss it is is data, so that each kind of moves is one program."""
    which = np.float32(list(LOSSES).index(name))
    loss = Loss.from_function(COUNTER, np.asarray(x, float), which, bad, behind)
    return RegularizedLoss(loss, Gaussian.isotropic(loss.x0, tau), temperature=temperature)


@jax.jit
def run(engine, rng_key, target):
    """Draws, info and a dense Gaussian with errors, without the control variates that make it exact."""
    _, draws, info = engine.step(rng_key, engine.init(rng_key, target), target)
    method = fit.ForwardKL("dense", control_variates="none")
    _, fitted, fit_info = method.step(rng_key, (), target, draws)
    return draws, info, fitted, fit_info


@pytest.mark.parametrize("moves", with_long(ENGINES, {"crank_nicolson"}))
def test_conjugate_targets_at_two_centres(moves):
    traces = []
    for x, tau, temperature in ((np.zeros(2), 1.0, 1.0), (np.array([12.0, -9.0]), 0.7, 0.5)):
        target = target_at("quadratic", x, tau, temperature)
        draws, info, fitted, fit_info = run(ENGINES[moves], random.key(1), target)
        traces.append(COUNTER.count)
        assert info.ok
        mean, covariance = (
            PROBLEM.shift_mean(x, tau, temperature),
            PROBLEM.shift_covariance(x, tau, temperature),
        )
        sd = np.sqrt(np.diag(covariance))
        assert np.all(np.abs(fitted.mean - mean) < SIGMAS * fit_info.mean_error)
        assert np.all(fit_info.mean_error < 0.1 * sd)
        error = np.abs(fitted.covariance - covariance)
        assert np.all(error < SIGMAS * fit_info.covariance_error)
        assert np.all(fit_info.covariance_error < 0.15 * np.outer(sd, sd))
        value = -temperature * info.log_evidence
        exact = PROBLEM.local_entropy(x, tau, temperature)
        assert abs(value - exact) < SIGMAS * temperature * info.log_evidence_error
        assert draws.x.shape == (8, 300, 2)
    # A new centre, tau and temperature are the same program.
    assert traces[0] == traces[1]
    if moves == "hmc":
        expected = jax.vmap(jax.grad(target.log_density))(draws.x[0, :5])
        np.testing.assert_allclose(draws.score[0, :5], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.long
def test_errors_of_mean_and_evidence_are_calibrated():
    problem = problems.double_well(3)
    x, tau = np.full(3, 0.2), 2.0
    target = setup(problem, x, tau, 0.2)
    engine = shift.SMC(num_particles=100, num_islands=16)

    @partial(jax.jit, compiler_options=OPTIMIZED)
    def standardized(keys):
        def one(rng_key):
            _, draws, info = engine.step(rng_key, (), target)
            _, fitted, fit_info = fit.ForwardKL().step(rng_key, (), target, draws)
            value = (info.log_evidence - exact) / info.log_evidence_error
            return jnp.append((fitted.mean - mean) / fit_info.mean_error, value)

        return lax.map(one, keys)

    exact = -problem.local_entropy(x, tau, 0.2) / 0.2
    mean = jnp.asarray(problem.shift_mean(x, tau, 0.2), float)
    covered = np.mean(np.abs(standardized(random.split(random.key(0), 200))) < 1.96, 0)
    assert np.all((covered >= 0.9) & (covered <= 0.995)), covered


rung = jax.jit(next_rung)


def test_ladder_hits_the_effective_sample_size():
    energy = 50.0 * random.normal(random.key(0), (4, 500)) ** 2
    s = jnp.zeros(())
    total, rungs = jnp.zeros(4), []
    while s < 1:
        before = s
        s, log_weight, increment = rung(energy, s, 0.5)
        weight = np.exp(log_weight)
        rungs.append(weight.sum() ** 2 / (weight**2).sum() / weight.size)
        np.testing.assert_allclose(
            increment, np.log(np.mean(np.exp(-(s - before) * energy), 1)), rtol=1e-3, atol=1e-4
        )
        total += increment
    assert s == 1.0
    np.testing.assert_allclose(rungs[:-1], 0.5, atol=1e-3)
    assert rungs[-1] >= 0.5


def test_walls_leave_the_ladder_alone():
    energy = jnp.where(jnp.arange(2000) % 4 == 0, 1.0, jnp.inf).reshape(4, 500)
    s, log_weight, increment = rung(energy, jnp.zeros(()), 0.5)
    assert s == 1.0
    np.testing.assert_allclose(increment, np.log(0.25) - 1.0, rtol=1e-5)
    assert np.all(np.isneginf(log_weight) == np.isinf(energy))


def test_systematic_resampling():
    resample = jax.jit(systematic, static_argnums=2)
    weight = np.array([0.0, 0.5, 0.125, 0.0, 0.375, 0.0])
    for seed in range(5):
        index = resample(random.key(seed), jnp.log(weight), 16)
        np.testing.assert_array_equal(np.bincount(index, minlength=6), 16 * weight)
        assert np.all(np.diff(index) >= 0)
    assert np.all(systematic(random.key(0), jnp.full(4, -jnp.inf), 4) == np.arange(4))


def test_error_of_the_evidence():
    value, error = evidence(jnp.log(jnp.array([1.0, 3.0])))
    np.testing.assert_allclose(value, np.log(2.0), rtol=1e-6)
    assert error > 1.0  # of two islands that far apart
    # Islands without any count: a mean of 4, 0, 0, 0 and so on in sixteen is known to a share of one.
    value, error = evidence(jnp.where(jnp.arange(16) == 0, np.log(16.0), -np.inf))
    np.testing.assert_allclose(value, 0.0, atol=1e-6)
    assert 1.0 < error < 1.2
    assert evidence(jnp.zeros(1))[1] == np.inf
    assert evidence(jnp.full(4, -jnp.inf))[1] == np.inf


def test_walls_and_failures_of_the_loss():
    infos = []
    for name, bad in (
        ("corner", np.inf),
        ("corner", np.nan),
        ("corner", -np.inf),
        ("infinite", 0.0),
    ):
        target = target_at(name, np.ones(2), bad=bad)
        draws, info, fitted, fit_info = run(ENGINES["crank_nicolson"], random.key(0), target)
        infos.append(info)
        if name == "infinite":
            break
        assert info.ok
        # N(1, 1) cut off at zero on both axes, whatever it is that lies behind.
        inside = jax.scipy.stats.norm.cdf(1.0)
        exact = 1.0 + jax.scipy.stats.norm.pdf(1.0) / inside
        assert np.all(np.abs(fitted.mean - exact) < SIGMAS * fit_info.mean_error)
        error = abs(info.log_evidence - 2 * np.log(inside))
        assert error < SIGMAS * info.log_evidence_error
    assert infos[0].num_rejected == 0
    assert infos[1].num_rejected == infos[2].num_rejected > infos[1].num_undefined > 100
    assert infos[0].num_undefined == infos[3].num_undefined == 0
    assert not infos[3].ok
    assert infos[3].num_stages == 0
    assert infos[3].log_evidence == -np.inf
    assert np.isfinite(draws.x).all()


@pytest.mark.parametrize("moves", ENGINES)
def test_failures_on_the_way_are_rejected_moves(moves):
    # Beyond five standard deviations of the reference, where moves come and draws do not: q is a normal
    # distribution of twice its width before the wall.
    inside = np.log(2.0) + np.log(0.9875806693)  # P(|N(0, 1)| < 2.5)
    for bad in (np.nan, -np.inf):
        target = target_at("far edge", np.zeros(2), bad=bad)
        draws, info, fitted, fit_info = run(ENGINES[moves], random.key(0), target)
        assert info.ok
        assert info.num_undefined == 0
        assert info.num_rejected > 10
        assert abs(info.log_evidence - inside) < SIGMAS * info.log_evidence_error
        assert np.abs(draws.x[..., 0]).max() < 5.0
        assert abs(fitted.mean[0]) < SIGMAS * fit_info.mean_error[0]


def test_a_loss_whose_gradient_is_missing_in_places():
    target = target_at("relu", np.zeros(2), temperature=0.2)
    _, info, *_ = run(ENGINES["hmc"], random.key(0), target)
    # E exp(-5 max(x, 0)) in each of two coordinates.
    exact = 2 * np.log(0.5 + np.exp(12.5 + jax.scipy.stats.norm.logcdf(-5.0)))
    assert abs(info.log_evidence - exact) < SIGMAS * info.log_evidence_error


def test_a_ladder_that_is_too_short_is_not_ok():
    loss = Loss.from_function(problems.quadratic(np.full(4, 1e4)).loss, np.ones(4))
    engine = shift.SMC(num_particles=40, num_islands=4, max_stages=2)
    optimizer = TwoStep(loss, 1.0, engine, fit.ForwardKL())
    state, info = optimizer.step(optimizer.init(random.key(0)))
    assert not info.ok
    assert info.shift.num_stages == 2
    assert np.isfinite(info.fitted.mean).all()
    np.testing.assert_array_equal(state.reference.mean, np.ones(4))


@pytest.mark.parametrize("moves", with_long(ENGINES, {"crank_nicolson"}))
def test_evaluations_are_counted(moves):
    calls = []

    def counted(x):
        jax.debug.callback(lambda x: calls.append(1), x[0])
        return 20.0 * jnp.sum(x**2)

    loss = Loss.from_function(counted, np.zeros(2))
    target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, 1.0))
    engine = shift.SMC(8, num_islands=2, num_moves=2, moves=moves, num_leapfrog=3)
    info = jax.jit(engine.step)(random.key(0), (), target)[2]
    jax.effects_barrier()
    assert info.num_loss + info.num_grad == len(calls)
    assert min(info.num_loss, info.num_grad) == 0
    assert len(calls) == 16 * (1 + info.num_stages * (3 if moves == "hmc" else 1))


def test_one_batch_for_the_whole_run():
    # A loss that is the mean of a batch and nothing else: one batch, one value.
    loss = Loss.from_function(
        lambda x, rows: jnp.mean(rows) + 0.0 * jnp.sum(x),
        np.zeros(2),
        np.arange(100.0),
        minibatch=Minibatch(3),
    )
    target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, 1.0))
    draws, *_ = jax.jit(SMALL.step)(random.key(0), (), target)[1:]
    assert np.ptp(draws.loss) == 0


def test_several_starts_in_one_program_and_a_scheme():
    # Steps of the two-step scheme on a quadratic: the proximal steps, within errors of a few hundred draws.
    problem = problems.quadratic(np.array([2.0, 20.0]), center=np.array([1.0, -1.0]))
    loss = Loss.from_function(problem.loss, np.zeros(2))
    optimizer = TwoStep(loss, 1.0, SMALL, fit.ForwardKL())
    starts = jax.vmap(optimizer.init)(random.split(random.key(0), 3))
    states, history = jax.vmap(lambda state: optimizer.scan(state, 6))(starts)
    assert history.ok.all()
    # sd of q is sqrt(1 / 3) and sqrt(1 / 21); a mean of some 50 effective draws, four errors.
    assert np.all(np.abs(states.reference.mean - np.array([1.0, -1.0])) < np.array([0.33, 0.13]))


@pytest.mark.long
def test_double_precision(x64):
    target = setup(random_quadratic(2), np.zeros(2), 0.5, 1.0)
    _, draws, info = jax.jit(SMALL.step)(random.key(0), (), target)
    assert info.ok
    assert draws.x.dtype == info.log_evidence.dtype == jnp.float64
