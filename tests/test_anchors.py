# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Anchors: exact on quadratics, never worse than the plain step, and the rules that all of them follow."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ANCHORS, SIGMAS, Counter, long, with_long
from harness import count_compiles
from jax import lax, random
from targets import breast_cancer
from test_engines import random_quadratic

from numpyro_regloss import (
    Gaussian,
    Loss,
    LowRankGaussian,
    RegularizedLoss,
    TwoStep,
    anchor,
    fit,
    problems,
    schedules,
    shift,
)
from numpyro_regloss.anchor.safeguard import REASONS
from numpyro_regloss.draws.base import StoredDraws
from numpyro_regloss.draws.descent import half_masks

PROBLEM = random_quadratic(3, seed=20)
CHEAP = shift.Importance(400)
COUNTER = Counter(lambda x, offset: PROBLEM.loss(x - offset))
KEY = random.key(0)
DIM = 4
HESSIAN = np.array([
    [2.0, 0.3, 0.0, 0.1],
    [0.3, 0.02, 0.0, 0.0],
    [0.0, 0.0, 0.5, 0.2],
    [0.1, 0, 0.2, 9.0],
])
HESSIAN = HESSIAN @ HESSIAN.T / 9.0 + 0.02 * np.eye(DIM)
CENTER = np.array([1.0, -2.0, 0.5, 3.0])


def bowl(x):
    gap = x - CENTER.astype(x.dtype)
    return 0.5 * gap @ HESSIAN.astype(x.dtype) @ gap


BOWL = Loss.from_function(bowl, np.zeros(DIM))
TRIANGLE = np.array([[0.4, 0, 0, 0], [0.1, 0.5, 0, 0], [-0.1, 0.2, 0.3, 0], [0, 0.1, 0.1, 0.6]])
SCALES = {"isotropic": np.array(0.5), "diagonal": np.diag(TRIANGLE), "dense": TRIANGLE}


def make(name, start=0.0, tau=0.3, offset=0.0, temperature=1.0):
    loss = Loss.from_function(COUNTER, np.full(3, start), np.full(3, offset))
    row = ANCHORS[name]
    return TwoStep(loss, tau, CHEAP, row.fit(), row.make(), temperature)


def target_at(x, scale=SCALES["isotropic"], temperature=1.0, loss=BOWL):
    reference = Gaussian(jnp.asarray(x, float), jnp.asarray(scale, float))
    return RegularizedLoss(loss, reference, temperature=temperature)


def exact_draws(rng_key, target, count=40, chains=2):
    """Independent draws from q of the quadratic, with scores."""
    precision = jnp.asarray(HESSIAN, float) / target.temperature
    precision = precision + jnp.linalg.inv(target.reference.covariance)
    gradient = jax.grad(target.log_density)(target.reference.mean)
    mean = target.reference.mean + jnp.linalg.solve(precision, gradient)
    lower = jnp.linalg.cholesky(jnp.linalg.inv(precision))
    x = mean + random.normal(rng_key, (chains, count, DIM)) @ lower.T
    score = -(x - mean) @ precision
    loss = jax.vmap(jax.vmap(target.value))(x)
    return StoredDraws(x, jnp.zeros_like(loss), loss, target.temperature, score), mean


@jax.jit
def one_step(step, target, rng_key):
    draws, _ = exact_draws(rng_key, target)
    _, fitted, fit_info = fit.ForwardKL().step(rng_key, (), target, draws)
    _, reference, info = step.step(rng_key, step.init(target), target, draws, fitted, fit_info)
    return reference, info


@pytest.mark.parametrize("scale", with_long(SCALES, {"isotropic", "diagonal"}))
def test_newton_ends_on_a_quadratic_in_one_step(scale):
    # The flattest direction has an eigenvalue of I - C / tau of 0.003.
    newton = anchor.Newton(floor=1e-3, max_step=1e3)
    target = target_at(np.full(DIM, -1.0), SCALES[scale], temperature=0.5)
    reference, info = one_step(newton, target, KEY)
    assert info.accelerated
    # Single precision, divided by that eigenvalue.
    np.testing.assert_allclose(reference.mean, CENTER, atol=5e-3)
    np.testing.assert_array_equal(reference.scale, target.reference.scale)
    exact = target.value(jnp.full(DIM, -1.0)) - 0.0
    # F_tau of a quadratic falls by less than the loss does, and the estimate of a Gaussian q is exact.
    assert 0 < info.plain_decrease < info.decrease < exact


def test_bounds_of_newton():
    target = target_at(np.full(DIM, -1.0))
    plain = one_step(anchor.Proximal(), target, KEY)[0].mean
    for settings, most in (({"floor": 1.0}, 0.0), ({"max_step": 0.25}, 0.25 * DIM**0.5)):
        reference, info = one_step(anchor.Newton(**settings), target, KEY)
        beyond = jnp.linalg.norm(reference.mean - plain) / SCALES["isotropic"]
        np.testing.assert_allclose(beyond, most, rtol=1e-3, atol=1e-5)


def fixed_point(x, scale, temperature):
    """Where the plain step leads from x, exactly, as the fit that an anchor sees."""
    target = target_at(x, scale, temperature)
    precision = jnp.linalg.inv(target.reference.covariance)
    hessian = jnp.asarray(HESSIAN, float) / temperature
    return target, jnp.linalg.solve(precision + hessian, precision @ x + hessian @ CENTER)


NO_DRAWS = shift.Implicit().step(KEY, (), target_at(np.zeros(DIM)))[1]


@partial(jax.jit, static_argnums=1)
def run(step, num_steps, scale=SCALES["isotropic"], noise=0.0, rng_key=KEY, taus=None):
    """Centres of an anchor that sees exact means, or noisy ones of known errors."""

    def body(carry, item):
        (state, x), (rng_key, share) = carry, item
        target, mean = fixed_point(x, scale * share, 1.0)
        mean = mean + noise * random.normal(rng_key, (DIM,))
        info = fit.FitInfo(mean_error=jnp.full(DIM, noise))
        fitted = target.reference._replace(mean=mean)
        state, reference, info = step.step(rng_key, state, target, NO_DRAWS, fitted, info)
        return (state, reference.mean), reference.mean

    shares = jnp.ones(num_steps) if taus is None else taus
    x = jnp.zeros(DIM)
    start = (step.init(target_at(x)), x)
    items = (random.split(rng_key, num_steps), shares)
    return lax.scan(body, start, items)[1]


@pytest.mark.parametrize("scale", with_long(SCALES, {"diagonal"}))
def test_anderson_ends_on_a_linear_map(scale):
    step = anchor.Anderson(memory=DIM + 1, max_step=1e6)
    centers = run(step, DIM + 1, 5.0 * SCALES[scale])
    # Differences for every dimension are there after as many steps, and the next one ends. Single precision,
    # divided by the least eigenvalue of I - C / tau, 0.1, and by that of the differences.
    errors = np.abs(centers - CENTER).max(1)
    assert errors[-1] < 0.1 < 1.0 < errors[1]


def test_anderson_follows_a_schedule_of_tau():
    # Gradients are remembered, not steps: they do not depend on tau much where it is small.
    shares = 0.97 ** np.arange(30)
    ends = [run(step, 30, taus=shares)[-1] for step in (anchor.Anderson(), anchor.Proximal())]
    assert bowl(ends[0]) < 0.1 * bowl(ends[1])


@pytest.mark.long
def test_anderson_does_not_stall_at_the_noise():
    # 200 runs at once. The flattest direction takes 200 plain steps for a factor of e, and the first step along it
    # is 0.01 long: ten times the noise, or as long as that.
    starts = random.split(random.key(1), 200)

    def excess(step, num_steps, noise):
        last = jax.vmap(lambda key: run(step, num_steps, 0.5, noise, key)[-1])
        gap = last(starts) - CENTER
        return jnp.mean(0.5 * jnp.sum(gap @ HESSIAN * gap, -1))

    for num_steps, noise, most in (
        (60, 1e-3, 0.3),
        (400, 1e-3, 0.1),
        (60, 1e-2, 0.9),
        (400, 1e-2, 1.0),
    ):
        accelerated = excess(anchor.Anderson(), num_steps, noise)
        assert accelerated < most * excess(anchor.Proximal(), num_steps, noise)


def test_a_rise_sends_the_centre_back():
    engine = anchor.Anderson(max_step=1e6)
    step = jax.jit(engine.step)
    first = target_at(np.zeros(DIM))
    exact = fit.FitInfo(mean_error=jnp.zeros(DIM))
    state = engine.init(first)
    means = [jnp.array([1.0, 0, 0, 0]), jnp.array([1.5, 0, 0, 0])]
    x = jnp.zeros(DIM)
    for mean in means:
        fitted = first.reference._replace(mean=mean)
        state, reference, info = step(KEY, state, target_at(x), NO_DRAWS, fitted, exact)
        x = reference.mean
    assert info.accelerated
    np.testing.assert_allclose(x, [2.0, 0, 0, 0], atol=1e-3)
    # From there the gradient points back, and more strongly.
    fitted = first.reference._replace(mean=jnp.array([-1.0, 0, 0, 0]))
    state, reference, info = step(KEY, state, target_at(x), NO_DRAWS, fitted, exact)
    assert REASONS[info.reason] == "went back"
    np.testing.assert_allclose(reference.mean, means[-1])
    assert state.used.sum() == 1


@pytest.mark.long
def test_at_a_fixed_point_accelerated_steps_stay():
    # 200 repetitions of plain averages of 40 draws: what sampling alone moves the centre by, in F_tau.
    target, method = target_at(CENTER, temperature=0.5), fit.ForwardKL(control_variates="none")

    def once(step, rng_key):
        draws, _ = exact_draws(rng_key, target, count=20)
        draws = dataclasses.replace(draws, score=None)
        _, fitted, fit_info = method.step(rng_key, (), target, draws)
        reference = step.step(rng_key, step.init(target), target, draws, fitted, fit_info)[1]
        return bowl(reference.mean)

    keys = random.split(random.key(2), 200)
    rises = {
        step: jnp.mean(jax.jit(jax.vmap(lambda key: once(step, key)))(keys))  # noqa: B023
        for step in (anchor.Proximal(), anchor.Newton())
    }
    plain, newton = rises.values()
    assert newton < 2.0 * plain


def test_kept_covariance_of_a_quadratic():
    # C_k⁻¹ = C_0⁻¹ + k H: every fit multiplies the density once more.
    target = target_at(np.zeros(DIM), TRIANGLE)
    hessian = jnp.asarray(HESSIAN, float)

    def settle(step, scale, num_steps):
        state, reference = step.init(target_at(np.zeros(DIM), np.eye(DIM))), target.reference
        reference = reference._replace(scale=scale)
        for _ in range(num_steps):
            precision = jnp.linalg.inv(reference.covariance) + hessian
            fitted = reference._replace(scale=jnp.linalg.cholesky(jnp.linalg.inv(precision)))
            state, reference, info = step.step(KEY, state, target, NO_DRAWS, fitted, None)
        return reference.covariance, info

    scale = jnp.asarray(TRIANGLE, float)
    collapsing = anchor.KeepCovariance("dense", inflation=1.0, floor=0.0, ceiling=1e6)
    covariance, info = settle(collapsing, scale, 5)
    expected = jnp.linalg.inv(scale @ scale.T) + 5 * hessian
    np.testing.assert_allclose(jnp.linalg.inv(covariance), expected, rtol=1e-4, atol=1e-3)
    assert info.kept
    # (c - 1) H⁻¹ in the steep directions, the floor and the ceiling elsewhere.
    covariance, info = settle(anchor.KeepCovariance("dense", 2.0, floor=0.2), scale, 40)
    value, vector = np.linalg.eigh(HESSIAN)
    np.testing.assert_allclose(
        np.diag(vector.T @ covariance @ vector), np.clip(1 / value, 0.2, 1.0), rtol=1e-3
    )
    assert (info.num_floored, info.num_capped) == (np.sum(value > 5), np.sum(value < 1))


def test_a_scale_that_is_not_known_is_not_kept():
    target, step = target_at(np.zeros(DIM), SCALES["diagonal"]), anchor.KeepCovariance("diagonal")
    fitted = Gaussian(jnp.ones(DIM), jnp.full(DIM, 0.1))
    info = fit.FitInfo(covariance_error=jnp.full(DIM, 0.1))
    _, reference, info = step.step(KEY, step.init(target), target, NO_DRAWS, fitted, info)
    assert not info.kept
    np.testing.assert_array_equal(reference.scale, target.reference.scale)
    np.testing.assert_array_equal(reference.mean, fitted.mean)


@pytest.mark.parametrize("weighted", [True, False])
def test_tau_is_adapted_to_the_overlap(weighted):
    # Of a linear loss g·x the share is exp(-tau |g|² / T²), whether draws are from the reference, with weights, or
    # from q itself.
    slope, scale, temperature = jnp.array([0.6, 0.0, -0.8, 0.0]), 0.25, 0.5
    linear = Loss.from_function(lambda x: x @ slope, np.zeros(DIM))
    target = target_at(np.zeros(DIM), scale, temperature, linear)
    x = scale * random.normal(KEY, (1, 20_000, DIM))
    x = x if weighted else x - scale**2 * slope / temperature
    loss = x @ slope
    log_weight = -loss / temperature if weighted else jnp.zeros_like(loss)
    draws = StoredDraws(x, log_weight, loss, temperature, block_size=1)
    step = anchor.AdaptTau(anchor.Proximal(), ess=0.5)
    state, reference, info = step.step(
        KEY, step.init(target), target, draws, target.reference, None
    )
    # Squared weights have a relative variance of e - 1 here, so the share an error of at most 1 %.
    np.testing.assert_allclose(info.ess, np.exp(-0.25), rtol=SIGMAS * 0.01)
    np.testing.assert_allclose(state.factor, (np.log(2.0) / 0.25) ** 0.5, rtol=0.1)
    np.testing.assert_allclose(reference.scale**2, scale**2 * state.factor, rtol=1e-5)


def test_a_degenerate_cloud_halves_tau_until_it_is_not():
    steep = Loss.from_function(lambda x: 300.0 * jnp.sum(x), np.zeros(3))
    step = anchor.AdaptTau(anchor.Proximal(), least=1e-7)
    optimizer = TwoStep(steep, 1.0, CHEAP, fit.ForwardKL(), step)
    with pytest.warns(UserWarning, match="steps were rejected"):
        history = optimizer.run(KEY, 40, progress_bar=False).history
    rejected = np.flatnonzero(~history.ok)
    np.testing.assert_allclose(history.tau[rejected + 1] / history.tau[rejected], 0.5, rtol=1e-5)
    # |g|² = 270,000: the share is one half at tau = log(2) / |g|².
    np.testing.assert_allclose(np.mean(history.tau[-8:]), np.log(2.0) / 270_000, rtol=0.2)


def test_scoping_is_a_value():
    counter = Counter(lambda x: jnp.sum(x**2))

    def run(tau, rate, least):
        loss = Loss.from_function(counter, np.ones(2))
        optimizer = TwoStep(loss, schedules.Scoping(tau, rate, least), CHEAP, fit.ForwardKL())
        return optimizer.run(KEY, 4, progress_bar=False).history.tau

    np.testing.assert_allclose(run(0.8, 1.0, 0.15), [0.8, 0.4, 0.2, 0.15], rtol=1e-5)
    count = counter.count
    with count_compiles() as compiled:
        np.testing.assert_allclose(run(0.4, 0.25, 0.1), 0.4 / 1.25 ** np.arange(4), rtol=1e-5)
    assert (counter.count, compiled) == (count, [])


def test_halves_of_halves():
    x = jnp.zeros((4, 6, 2))
    of = lambda weight, block=None: half_masks(  # noqa: E731
        StoredDraws(x, jnp.log(jnp.asarray(weight, float)), x[..., 0], 1.0, block_size=block)
    )
    whole = of(np.ones((4, 6)))[0]
    np.testing.assert_array_equal(whole.sum(1), [6, 0, 6, 0])
    half = of(whole)
    np.testing.assert_array_equal((half[0] & whole).sum(1), [6, 0, 0, 0])
    np.testing.assert_array_equal((half[1] & whole).sum(1), [0, 0, 6, 0])
    quarter = of(half[0] & whole)
    np.testing.assert_array_equal((quarter[0] & half[0] & whole)[0], [1, 1, 1, 0, 0, 0])
    pairs = of(np.ones((4, 6)), 2)[0]
    np.testing.assert_array_equal(pairs.reshape(-1, 2).any(1), pairs.reshape(-1, 2).all(1))
    again = of(pairs, 2)
    assert (again[0] & pairs).sum() == (again[1] & pairs).sum() == 6


# Types, traces and what runs side by side: test_conformance.py.
@pytest.mark.parametrize("name", ["newton", long("anderson"), "adapt_tau"])
def test_a_rejected_step_keeps_the_state(name):
    optimizer = make(name)
    state = optimizer.init(KEY)
    for _ in range(2):
        state, info = optimizer.step(state)
        assert info.ok
    lost, info = optimizer.step(state, np.full(3, np.nan))
    assert not info.ok
    kept, before = lost.anchor, state.anchor
    if name == "adapt_tau":
        assert kept.factor == before.factor / 2
        kept, before = kept.anchor, before.anchor
        np.testing.assert_allclose(lost.reference.scale**2, state.reference.scale**2 / 2, rtol=1e-5)
    else:
        np.testing.assert_array_equal(lost.reference.scale, state.reference.scale)
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(lost.reference.mean, state.reference.mean)


@pytest.mark.long
def test_anderson_on_a_double_well():
    # 20 dimensions, to 1 % of the first gradient of F_tau: 8 plain steps.
    problem, tau = problems.double_well(20), 0.1
    loss = Loss.from_function(problem.loss, np.full(20, 2.0))
    engine = shift.NUTS(num_warmup=100, num_samples=25, num_chains=4)
    optimizer = TwoStep(loss, tau, engine, fit.ForwardKL(), anchor.Anderson())
    history = optimizer.run(KEY, 8, progress_bar=False).history
    norm = np.linalg.norm(history.fitted.mean - history.reference.mean, axis=1)
    assert norm[:7].min() < 0.01 * norm[0]
    # The least F_tau, to what noise of that size costs.
    end = problem.local_entropy(np.asarray(history.reference.mean[-1], float), tau)
    assert end < problem.local_entropy(problem.shift_mean(np.ones(20), tau), tau) + 0.01


@pytest.mark.long
def test_newton_on_flat_directions():
    # The plain scheme takes about 560 steps and 394,000 gradients.
    fn, x0, data = breast_cancer()
    engine = shift.NUTS(num_warmup=60, num_samples=50, num_chains=4)
    loss = Loss.from_function(fn, x0, *data)
    optimizer = TwoStep(loss, 0.1, engine, fit.ForwardKL(), anchor.Newton(floor=0.01))
    history = optimizer.run(KEY, 21, progress_bar=False).history
    norm = np.linalg.norm(history.fitted.mean - history.reference.mean, axis=1) / 0.1
    arrival = np.flatnonzero(norm < 0.2)[0]
    assert arrival <= 20
    assert history.num_grad[: arrival + 1].sum() <= 30_000


BAD = {
    "floor zero": (lambda: anchor.Newton(floor=0.0), ValueError, "positive"),
    "floor above one": (lambda: anchor.Newton(floor=2.0), ValueError, "between 0 and 1"),
    "max_step a string": (lambda: anchor.Newton(max_step="far"), TypeError, "positive number"),
    "unknown curvature": (lambda: anchor.Newton(curvature="low_rank"), ValueError, "diagonal"),
    "memory of one": (lambda: anchor.Anderson(1), ValueError, "integer >= 2"),
    "memory a float": (lambda: anchor.Anderson(2.0), TypeError, "integer >= 2"),
    "unknown covariance": (lambda: anchor.KeepCovariance("low_rank"), ValueError, "isotropic"),
    "deflation": (lambda: anchor.KeepCovariance(inflation=0.5), ValueError, "inflation >= 1"),
    "floor above ceiling": (
        lambda: anchor.KeepCovariance(floor=2.0),
        ValueError,
        "floor <= ceiling",
    ),
    "negative floor": (lambda: anchor.KeepCovariance(floor=-1.0), ValueError, "positive"),
    "tau of a class": (lambda: anchor.AdaptTau(anchor.Proximal), TypeError, "expected an anchor"),
    "tau of an anchor with a scale": (
        lambda: anchor.AdaptTau(anchor.KeepCovariance()),
        ValueError,
        "leaves the scale alone",
    ),
    "share of all draws": (
        lambda: anchor.AdaptTau(anchor.Proximal(), ess=1.0),
        ValueError,
        "ess below 1",
    ),
    "least tau above the first": (
        lambda: anchor.AdaptTau(anchor.Proximal(), least=2.0),
        ValueError,
        "least <= 1",
    ),
    "Newton on heat": (
        lambda: TwoStep(BOWL, 0.1, CHEAP, fit.RobbinsMonro(), anchor.Newton()),
        ValueError,
        "anchor.Anderson",
    ),
    "tau of heat": (
        lambda: TwoStep(BOWL, 0.1, CHEAP, fit.ReverseKL(), anchor.AdaptTau(anchor.Anderson())),
        ValueError,
        "schedule of tau",
    ),
    "covariance that is not fitted": (
        lambda: TwoStep(BOWL, 0.1, CHEAP, fit.ForwardKL(), anchor.KeepCovariance()),
        ValueError,
        'covariance="dense"',
    ),
    "one covariance for several taus": (
        lambda: TwoStep(
            BOWL,
            np.full(DIM, 0.1),
            CHEAP,
            fit.ForwardKL("isotropic"),
            anchor.KeepCovariance("isotropic"),
        ).init(KEY),
        ValueError,
        "one tau for all",
    ),
    "too few draws for a curvature": (
        lambda: TwoStep(BOWL, 0.1, shift.Importance(6), fit.ForwardKL(), anchor.Newton()).run(
            KEY, 1
        ),
        ValueError,
        "at least 8 draws",
    ),
    "scoping that rises": (lambda: schedules.Scoping(0.1, 0.1, 0.2), ValueError, "least <= tau"),
    "scoping of no rate": (lambda: schedules.Scoping(0.1, 0.0, 0.01), ValueError, "positive"),
    "scoping of a string": (
        lambda: schedules.Scoping("a", 0.1, 0.01),
        TypeError,
        "positive number",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, kind, words = BAD[case]
    with pytest.raises(kind, match=words):
        call()


@pytest.mark.parametrize("part", [anchor.KeepCovariance(), anchor.AdaptTau(anchor.Proximal())])
def test_a_reference_of_low_rank_has_no_scale(part):
    """Its second part is a diagonal of variances, which was taken for one."""
    low_rank = LowRankGaussian(jnp.zeros(2), jnp.ones(2), jnp.ones((2, 1)))
    target = RegularizedLoss(Loss.from_function(jnp.sum, jnp.zeros(2)), low_rank)
    with pytest.raises(TypeError, match="expected a Gaussian as reference"):
        part.after_rejection(part.init(target), low_rank)
