# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""NumPyro guides as shift engines: exact where the guide can be q, weighted towards it where it cannot."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from conftest import SIGMAS, Counter, long
from jax import random
from numpyro.distributions import constraints
from numpyro.infer.autoguide import AutoDelta, AutoIAFNormal, AutoMultivariateNormal, AutoNormal

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

FACTOR = np.random.default_rng(3).normal(size=(3, 3)) / np.sqrt(3)
PROBLEM = problems.quadratic(FACTOR @ FACTOR.T, center=np.array([0.5, -1.0, 1.0]))
TAU, TEMPERATURE = 0.5, 0.5
FITS = fit.ForwardKL("dense")


def target_at(x, fn=PROBLEM.loss, temperature=TEMPERATURE):
    loss = Loss.from_function(fn, np.asarray(x, float))
    return RegularizedLoss(loss, Gaussian.isotropic(loss.x0, TAU), temperature=temperature)


@jax.jit
def start(engine, rng_key, target):
    return engine.init(rng_key, target)


@jax.jit
def step(engine, rng_key, state, target):
    state, draws, info = engine.step(rng_key, state, target)
    gaussian, fit_info = FITS.step(rng_key, (), target, draws)[1:]
    return state, draws, info, gaussian, fit_info


def by_hand(target):
    """A diagonal guide, as a user writes it."""
    loc = numpyro.param("loc", jnp.zeros(target.dim))
    scale = numpyro.param("scale", jnp.ones(target.dim), constraint=constraints.positive)
    numpyro.sample("eps", dist.Normal(loc, scale).to_event(1))


ENGINES = {
    "dense": shift.SVI(
        AutoMultivariateNormal, optax.adam(0.03), num_steps=600, num_samples=2000, num_warmup=400
    ),
    "diagonal": shift.SVI(
        AutoNormal, optax.adam(0.03), num_steps=600, num_samples=4000, num_warmup=400
    ),
    "by hand": shift.SVI(
        lambda model: by_hand,
        numpyro.optim.Adam(0.03),
        num_steps=600,
        num_samples=4000,
        num_warmup=400,
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param("dense", marks=pytest.mark.both), long("by hand"), long("diagonal")]
)
def test_moments_are_exact_at_both_centres_and_nothing_is_retraced(name):
    engine, counter = ENGINES[name], Counter(PROBLEM.loss)
    state, count = start(engine, random.key(0), target_at(np.zeros(3), counter)), None
    # Between the centres the guide of eps has to travel several units of the reference.
    for i, x in enumerate((np.zeros(3), np.full(3, 5.0), np.full(3, 5.0))):
        target = target_at(x, counter)
        types = jax.tree.map(lambda a: (a.shape, a.dtype, a.weak_type), state)
        state, draws, info, gaussian, fit_info = step(engine, random.key(i), state, target)
        assert jax.tree.map(lambda a: (a.shape, a.dtype, a.weak_type), state) == types
        count = count or counter.count
        exact = PROBLEM.shift_mean(x, TAU, TEMPERATURE)
        covariance = PROBLEM.shift_covariance(x, TAU, TEMPERATURE)
        assert info.ok
        assert info.khat < 0.7
        assert np.all(np.abs(gaussian.mean - exact) < SIGMAS * fit_info.mean_error)
        assert np.all(np.abs(gaussian.covariance - covariance) < SIGMAS * fit_info.covariance_error)
        value = PROBLEM.local_entropy(x, TAU, TEMPERATURE)
        # The bound is tight where the guide can be q: 0.1 of an absolute value near 20 is Adam's last step.
        assert info.negative_elbo > value - SIGMAS * info.negative_elbo_error
        assert info.ess > (0.7 if name == "dense" else 0.2) * draws.loss.size
        # The weights are those of q over the guide, constants included.
        log_mean = jax.nn.logsumexp(draws.log_weight) - np.log(draws.loss.size)
        relative = jnp.sqrt(1 / info.ess - 1 / draws.loss.size)
        # Rounding of a loss of thousands, in units of the temperature, comes on top.
        slack = 1e-5 * jnp.max(draws.loss) / TEMPERATURE
        assert jnp.abs(log_mean + value / TEMPERATURE) < SIGMAS * relative + slack
    assert counter.count == count
    np.testing.assert_allclose(draws.loss[0, :5], jax.vmap(target.value)(draws.x[0, :5]), rtol=1e-5)


def test_parameters_are_carried_over_and_move_with_the_centre():
    # The linear loss gives the same guide of eps at every centre, so that no training is needed.
    problem = problems.linear(np.array([1.0, -2.0]))
    first, second = (target_at(np.full(2, c), problem.loss) for c in (0.0, 100.0))
    trained = shift.SVI(AutoMultivariateNormal, optax.adam(0.03), num_steps=1, num_warmup=1000)
    state = start(trained, random.key(0), first)
    state, _, before, _, _ = step(trained, random.key(1), state, first)
    state, draws, info, gaussian, fit_info = step(trained, random.key(2), state, second)
    assert info.num_grad == 8
    assert before.num_grad == 1001 * 8
    assert info.ess > 0.9 * draws.loss.size
    exact = problem.shift_mean(np.full(2, 100.0), TAU, TEMPERATURE)
    assert np.all(np.abs(gaussian.mean - exact) < SIGMAS * fit_info.mean_error)


def test_weights_correct_a_guide_that_cannot_be_q():
    # Two valleys, |x| near one: a Gaussian guide covers both badly; weights put the mass where it is.
    problem = problems.double_well(2)
    target = target_at(np.full(2, 0.3), problem.loss)
    weighted, plain = (
        shift.SVI(
            AutoNormal,
            optax.adam(0.03),
            num_steps=300,
            num_samples=4000,
            weighted=choice,
            num_warmup=0,
        )
        for choice in (True, False)
    )
    means = []
    for engine in (weighted, plain):
        state = start(engine, random.key(0), target)
        _, draws, info, gaussian, fit_info = step(engine, random.key(1), state, target)
        means.append(gaussian.mean)
        assert jnp.ptp(draws.log_weight) > 0 if engine.weighted else jnp.ptp(draws.log_weight) == 0
        if engine.weighted:
            exact = problem.shift_mean(np.full(2, 0.3), TAU, TEMPERATURE)
            assert np.all(np.abs(gaussian.mean - exact) < SIGMAS * fit_info.mean_error)
        ess = info.ess
    assert ess < 0.95 * draws.loss.size
    assert np.all(np.abs(means[1] - exact) > 0.02)


def test_flows_are_guides_too():
    target = target_at(np.full(2, 0.3), problems.double_well(2).loss)

    def flow(model):
        return AutoIAFNormal(model, num_flows=1, hidden_dims=[4])

    engine = shift.SVI(
        flow, optax.adam(0.01), num_steps=200, num_samples=4000, num_particles=4, num_warmup=0
    )
    state = start(engine, random.key(0), target)
    _, _, info, gaussian, fit_info = step(engine, random.key(1), state, target)
    assert info.ok
    exact = problems.double_well(2).shift_mean(np.full(2, 0.3), TAU, TEMPERATURE)
    assert np.all(np.abs(gaussian.mean - exact) < SIGMAS * fit_info.mean_error)


def test_a_run_with_minibatches():
    rows = np.random.default_rng(0).normal(2.0, 1.0, (200, 2)).astype(np.float32)

    def mean_square(x, rows):
        return 0.5 * jnp.mean(jnp.sum((rows - x) ** 2, -1))

    loss = Loss.from_function(mean_square, np.zeros(2), rows, minibatch=Minibatch(50))
    engine = shift.SVI(AutoNormal, optax.adam(0.03), num_steps=60, num_samples=500, num_warmup=200)
    optimizer = TwoStep(loss, tau=0.1, shift=engine, fit=fit.ForwardKL(), temperature=0.1)
    result = optimizer.run(random.key(0), 15, progress_bar=False)
    assert result.history.ok.all()
    # One batch of 50 rows per step is worth 0.14; the centre averages about two of them.
    np.testing.assert_allclose(result.params, rows.mean(0), atol=SIGMAS * 0.12)


def test_the_defaults_reach_a_minimum_at_a_hundred_widths_of_q():
    loss = Loss.from_function(lambda x: 3e3 * jnp.sum((x - 2.0) ** 2), np.zeros(3))
    optimizer = TwoStep(loss, 1.0, shift.SVI(AutoNormal), fit.ForwardKL())
    history = optimizer.run(random.key(0), 8, progress_bar=False).history
    assert history.ok.all()
    # The exact first step leaves 1 / 6001 of the way; q is as wide as the loss rises by 3 / 2.
    assert np.all(history.loss[1:] < 1e-4 * history.loss[0])


def test_a_loss_that_fails_is_reported():
    engine = shift.SVI(AutoNormal, num_steps=5, num_samples=50, num_warmup=0)
    loss = Loss.from_function(lambda x, factor: factor * x[0] ** 2, np.zeros(1), np.nan)
    target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, TAU))
    state = start(engine, random.key(0), target)
    _, _, info, _, _ = step(engine, random.key(1), state, target)
    assert not info.ok
    assert info.num_rejected == 5
    assert info.negative_elbo == jnp.inf == info.negative_elbo_error


def without_eps(target):
    del target
    numpyro.sample("x", dist.Normal(jnp.zeros(2), 1.0).to_event(1))


def of_wrong_size(target):
    del target
    numpyro.sample("eps", dist.Normal(jnp.zeros(5), 1.0).to_event(1))


def with_auxiliary(target):
    z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    numpyro.sample("eps", dist.Normal(z, jnp.ones(target.dim)).to_event(1))


def set_up(guide):
    return lambda: shift.SVI(lambda model: guide).init(
        random.key(0), target_at(np.zeros(2), jnp.sum)
    )


BAD = {
    "guide, not a factory": (
        lambda: shift.SVI(AutoNormal(by_hand)),
        TypeError,
        "function that makes a guide, got AutoNormal",
    ),
    "guide of one's own, not a factory": (
        lambda: shift.SVI(by_hand),
        TypeError,
        "lambda model: guide",
    ),
    "factory of nothing": (lambda: shift.SVI(lambda model: None), TypeError, "got NoneType"),
    "optimizer not built": (lambda: shift.SVI(AutoNormal, optax.adam), TypeError, "optax.adam"),
    "weighted a number": (lambda: shift.SVI(AutoNormal, weighted=1), TypeError, "weighted"),
    "no steps": (lambda: shift.SVI(AutoNormal, num_steps=0), ValueError, "num_steps"),
    "one draw": (lambda: shift.SVI(AutoNormal, num_samples=1), ValueError, "num_samples"),
    "guide without the site": (
        set_up(without_eps),
        ValueError,
        r"'eps' of shape \(2,\), got the sites",
    ),
    "guide of the wrong size": (set_up(of_wrong_size), ValueError, r"got shape \(5,\)"),
    "guide with auxiliary sites": (set_up(with_auxiliary), ValueError, "weighted=False"),
    "point guide": (
        lambda: shift.SVI(AutoDelta).init(random.key(0), target_at(np.zeros(2), jnp.sum)),
        ValueError,
        "point",
    ),
}


@pytest.mark.parametrize("row", BAD)
def test_bad_input(row):
    call, error, words = BAD[row]
    with pytest.raises(error, match=words):
        call()
