# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""The heat step by stochastic approximation: gradients from values, standard errors, the stopping rule."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SIGMAS, Counter, gradients_of_batches, long
from jax import random
from numpy.polynomial.hermite_e import hermegauss
from scipy.optimize import root

from numpyro_regloss import Gaussian, Loss, Minibatch, RegularizedLoss, TwoStep, problems, schemes
from numpyro_regloss import shift as shifts
from numpyro_regloss.fit import RobbinsMonro

Score = partial(RobbinsMonro, gradient="score")
RNG = np.random.default_rng(0)
INPUTS = np.c_[RNG.normal(size=(40, 3)), np.ones(40)]
LABELS = np.where(INPUTS @ [1, -1, 0.5, 0.3] + 0.5 * RNG.normal(size=40) > 0, 1, -1)
# Problem, centre, tau, temperature.
CASES = {
    "double_well": (problems.double_well(2), 0.6, 0.05, 0.1),
    "double_well_20": (problems.double_well(20), 0.6, 0.05, 0.1),
    "absolute": (problems.absolute(1), 0.3, 0.5, 1.0),
    "absolute_5": (problems.absolute(5), 0.3, 0.05, 0.1),
    "rosenbrock": (problems.rosenbrock(), 0.3, 0.01, 1.0),
    "zero_one": (problems.zero_one(INPUTS, LABELS), 0.5, 1.0, 20.0),
}


def setup(problem, center, tau, temperature):
    loss = Loss.from_function(problem.loss, np.full(problem.dim, center))
    target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, tau), temperature=temperature)
    return target, problem.heat_step(np.full(problem.dim, center), tau, temperature)


@jax.jit
def heat_step(method, rng_key, target):
    return method.step(rng_key, method.init(rng_key, target), target, None)[1:]


def repeat(method, target, count=200):
    return jax.vmap(heat_step, in_axes=(None, 0, None))(
        method, random.split(random.key(4), count), target
    )


def check_coverage(method, target, exact, least=0.88):
    fitted, info = repeat(method, target)
    assert jnp.all(info.ok)
    covered = np.mean(np.abs(fitted.mean - exact) < 1.96 * info.mean_error, 0)
    # Of one coordinate 200 repetitions know the coverage to 0.015; coordinates of a problem are alike.
    assert np.all(covered >= least), covered
    assert np.mean(covered) <= 0.99, covered
    return fitted, info


@pytest.mark.parametrize(
    ("name", "method"),
    [
        long("double_well", RobbinsMonro(200)),
        long("double_well_20", RobbinsMonro(200)),
        long("absolute_5", RobbinsMonro(200)),
        ("absolute_5", RobbinsMonro(200, antithetic=False)),
        long("rosenbrock", RobbinsMonro(200, averaging=False)),
        long("double_well_20", Score(200)),
        long("absolute", Score(200)),
        ("zero_one", Score(200, num_pairs=8)),
        long("zero_one", Score(200, antithetic=False)),
        long("absolute_5", Score(200, averaging=False)),
    ],
)
def test_errors_cover(name, method):
    target, exact = setup(*CASES[name])
    fitted, _ = check_coverage(method, target, exact)
    scale = CASES[name][2] ** 0.5
    assert np.mean((fitted.mean - exact) ** 2) < (0.3 * scale) ** 2


def logistic(x, inputs, labels):
    margin = inputs @ x
    return jnp.mean(jnp.logaddexp(0.0, margin) - labels * margin)


def minibatch_target(dim, tau=0.2, temperature=1 / 64):
    rng = np.random.default_rng(1)
    inputs = rng.normal(size=(512, dim)) @ (rng.normal(size=(dim, dim)) * 0.8 ** np.arange(dim))
    labels = 1.0 * (rng.random(512) < 1 / (1 + np.exp(-inputs @ rng.normal(size=dim))))
    nodes, weights = hermegauss(40)
    spread = np.sqrt(tau) * np.linalg.norm(inputs, axis=1)[:, None] * nodes

    def equation(x):
        chance = 1 / (1 + np.exp(-(inputs @ x)[:, None] - spread)) @ weights / weights.sum()
        return inputs.T @ (chance - labels) / 512 + temperature * x / tau

    loss = Loss.from_function(logistic, np.zeros(dim), inputs, labels, minibatch=Minibatch(32))
    target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, tau), temperature=temperature)
    return target, root(equation, np.zeros(dim)).x


@pytest.mark.parametrize("method", [RobbinsMonro(300), long(Score(300, num_pairs=8))])
def test_errors_with_minibatches_cover(method):
    # Inputs are correlated: the curvature is no diagonal.
    check_coverage(method, *minibatch_target(5))


@pytest.mark.parametrize(("scale", "num_steps"), [(0.1, 20), long(10.0, 200), long(0.1, 2000)])
def test_errors_of_quadratics_are_the_bias_that_is_left(scale, num_steps):
    problem = problems.quadratic(np.array([[2.0, 0.5], [0.5, 1.0]]) * scale, center=np.ones(2))
    target, exact = setup(problem, 0.0, 0.5, 1.0)
    fitted, info = repeat(RobbinsMonro(num_steps), target, 20)
    error = np.abs(fitted.mean - exact)
    assert np.all(error < 1.96 * info.mean_error)
    # What moves on the way counts as noise, of which there is none: a bound, yet not an idle one.
    assert np.all(info.mean_error < 1 / num_steps), info.mean_error.max()


def test_errors_at_dense_references():
    factor = jnp.array([[0.5, 0.0], [0.3, 0.4]])
    problem = problems.double_well(2)
    target, _ = setup(problem, 0.6, 1.0, 1.0)
    target = RegularizedLoss(target.loss, Gaussian(target.loss.x0, factor), temperature=1.0)
    exact = heat_step(RobbinsMonro(20_000), random.key(9), target)[0].mean
    check_coverage(RobbinsMonro(400), target, np.asarray(exact))


def test_one_step_has_no_error_to_show():
    target, _ = setup(*CASES["double_well"])
    _, info = heat_step(RobbinsMonro(1), random.key(0), target)
    assert info.ok
    assert np.all(np.isinf(info.mean_error))


def test_one_pair_is_the_stream_of_old():
    # The iteration written out: what the paper's callers have always got.
    target, _ = setup(*CASES["double_well"])
    method = RobbinsMonro(5, step_size=0.1)
    fitted, _ = heat_step(method, random.key(3), target)
    keys = random.split(random.key(3))[1]
    u = average = jnp.zeros(2)
    gradients = jax.jit(jax.vmap(jax.grad(target.energy)))
    for j in range(5):
        noise = random.normal(random.split(random.fold_in(keys, j))[1], (2,))
        points = target.reference.unwhiten(jnp.stack([u + noise, u - noise]))
        gradient = gradients(points).mean(0) * target.reference.scale
        u = u - 0.1 * (gradient + u)
        average += 2 * (u - average) / (j + 2)
    np.testing.assert_allclose(fitted.mean, target.reference.unwhiten(average), rtol=1e-6)


@pytest.mark.parametrize("method", [RobbinsMonro, long(Score)])
def test_tolerance_stops_when_the_error_is_small(method):
    target, exact = setup(*CASES["double_well"])
    scale = CASES["double_well"][2] ** 0.5
    steps = []
    for tolerance in (0.1, 0.04):
        fitted, info = repeat(method(20_000, tolerance=tolerance), target, 20)
        assert jnp.all(info.converged)
        assert jnp.all((info.num_steps >= 32) & (info.num_steps < 20_000))
        assert np.all(info.mean_error < tolerance * scale * 1.001)
        error = np.sqrt(np.mean((fitted.mean - exact) ** 2)) / scale
        assert error < 1.2 * tolerance
        steps.append(np.mean(info.num_steps))
    # The error falls as the root of the steps, or a little faster as the start is forgotten.
    assert 2 < steps[1] / steps[0] < 10
    _, info = heat_step(method(20, tolerance=1e-3), random.key(0), target)
    assert info.num_steps == 20
    assert not info.converged


def test_a_tolerance_out_of_reach_changes_nothing():
    target, _ = setup(*CASES["double_well"])
    plain = heat_step(RobbinsMonro(100), random.key(0), target)
    patient = heat_step(RobbinsMonro(100, tolerance=1e-9), random.key(0), target)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(patient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "method",
    [
        long(RobbinsMonro(7)),
        RobbinsMonro(500, tolerance=0.1),
        Score(7, step_size=0.1, antithetic=False, num_pairs=3),
        long(Score(500, tolerance=0.1, num_pairs=2)),
    ],
)
def test_evaluations_are_counted(method):
    calls = []

    def counted(x):
        jax.debug.callback(lambda x: calls.append(1), x[0])
        return jnp.sum(jnp.abs(x))

    loss = Loss.from_function(counted, np.ones(2))
    target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, 1.0))
    state = method.init(random.key(0), target)
    step = jax.jit(lambda rng_key, state: method.step(rng_key, state, target, None))
    for seed in range(2):  # the first step measures the curvature longer
        state, _, info = step(random.key(seed), state)
        jax.effects_barrier()
        assert info.num_loss + info.num_grad == len(calls)
        assert (info.num_grad if method.gradient == "score" else info.num_loss) == 0
        calls.clear()
    if method.tolerance is not None:
        assert info.converged
        assert info.num_steps < 500


def test_an_update_by_minibatches_is_its_gradients():
    history = gradients_of_batches(
        lambda loss: schemes.heat(loss, 1e-3, RobbinsMonro(5), temperature=0.01)
    )
    looked = np.asarray(history.fit.looked)
    np.testing.assert_array_equal(np.flatnonzero(looked), [0, 20, 40, 60, 80])
    np.testing.assert_array_equal(np.isnan(history.fit.residual), ~looked)
    # Κ is carried on, and losses come with the gradients: the start's is one.
    kappa = np.asarray(history.fit.curvature).reshape(-1, 20)
    assert np.all(kappa == kappa[:, :1])
    assert abs(history.loss[0] - 1.0) < 0.3


def test_natural_steps_of_minibatches_are_calibrated_where_the_loss_is_flat():
    # Curvature times tau of a tenth: what twelve gradients of single rows say of their mean.
    rows = np.random.default_rng(2).normal(1.0, 1.0, (4096, 5)).astype(np.float32)
    loss = Loss.from_function(
        lambda x, rows: 0.5 * jnp.mean(jnp.sum((x - rows) ** 2, -1)),
        np.zeros(5),
        rows,
        minibatch=Minibatch(1),
    )
    target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, 0.01), temperature=0.1)
    exact = rows.mean(0, dtype=float) * 0.1 / 1.1
    # The 0.025 points of Student's t with 11 degrees of freedom lie at 2.2, not 1.96: 0.924.
    fitted, info = check_coverage(RobbinsMonro(12), target, exact)
    assert np.all(info.curvature < 1.0)
    spread = np.sqrt(np.mean((fitted.mean - exact) ** 2, 0) / np.mean(info.mean_error**2, 0))
    # A standard deviation of 200 is known to five per cent; curvature makes errors a tenth too large.
    np.testing.assert_allclose(spread, 0.92, atol=0.17)


def test_steps_of_minibatches_are_cut_where_natural_ones_diverge():
    rows = np.ones((64, 1), np.float32)
    loss = Loss.from_function(
        lambda x, rows: jnp.mean(rows) * 0.5 * jnp.sum(jnp.array([60.0, 1.0]) * (x - 1.0) ** 2),
        np.zeros(2),
        rows,
        minibatch=Minibatch(8),
    )
    for tau, natural in ((0.5, False), (0.05, True)):
        optimizer = schemes.heat(loss, tau, RobbinsMonro(5), temperature=1.0)
        result = optimizer.run(random.key(0), 40, progress_bar=False)
        # Thirty and three: five natural steps multiply by binomials of these over five, 1.4e5 and zero.
        np.testing.assert_allclose(result.history.fit.curvature[0], 60 * tau, rtol=0.05)
        assert (result.history.fit.curvature[0] < 4) == natural
        # Standard deviations of the last iterate in the steep direction, of a_j = 1 / j and of a_j = 1 / 31.
        assert abs(result.params[0] - 1.0) < SIGMAS * (0.11 if natural else 0.7)


def test_a_rejected_step_is_followed_by_a_look():
    loss = Loss.from_function(lambda x: jnp.sum(x**2), np.ones(2))
    target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, 0.1))
    method = RobbinsMonro(5, diagnose_every=10)
    state = method.init(random.key(0), target)
    after, _, info = method.step(random.key(0), state, target, None)
    assert info.looked
    later, _, info = method.step(random.key(1), after, target, None)
    assert not info.looked
    again = method.step(random.key(2), method.after_rejection(after, later), target, None)[2]
    assert again.looked
    # Carried on, curvature is that of the tau in force.
    wider = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, 0.2))
    _, _, info = method.step(random.key(1), after, wider, None)
    np.testing.assert_allclose(info.curvature, 2 * after.curvature, rtol=1e-5)


METHODS = {
    "gradients": RobbinsMonro(40, tolerance=0.1),
    "values": Score(40, num_pairs=2, tolerance=0.1),
    "last": RobbinsMonro(40, averaging=False),
}


@pytest.mark.parametrize(
    ("method", "dim"),
    [(METHODS["gradients"], 2), long(METHODS["values"], 40), long(METHODS["last"], 40)],
)
def test_states_keep_their_types(method, dim):
    target, _ = setup(problems.double_well(dim), 0.6, 0.05, 0.1)
    state = method.init(random.key(0), target)
    after = jax.eval_shape(method.step, random.key(0), state, target, None)[0]
    assert jax.tree.structure(state) == jax.tree.structure(after)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        assert (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, b.weak_type)


@pytest.mark.parametrize("form", ["reparametrized", long("score")])
def test_one_trace_then_none(form):
    counter = Counter(problems.double_well(2).loss)
    loss = Loss.from_function(counter, np.zeros(2))

    def go(tau, temperature, tolerance):
        method = RobbinsMonro(40, gradient=form, tolerance=tolerance)
        target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, tau), temperature=temperature)
        heat_step(method, random.key(0), target)

    go(0.1, 1.0, 0.1)
    count = counter.count
    go(0.2, 1.0, 0.1)
    go(0.1, 0.5, 0.1)
    go(0.1, 1.0, 0.01)
    assert counter.count == count


@pytest.mark.parametrize("method", [METHODS["gradients"]])
def test_vmap_over_keys_is_a_loop(method):
    target, _ = setup(*CASES["double_well"])
    many, infos = repeat(method, target, 3)
    for i, rng_key in enumerate(random.split(random.key(4), 3)):
        one, info = heat_step(method, rng_key, target)
        assert info.num_steps == infos.num_steps[i]
        np.testing.assert_allclose(one.mean, many.mean[i], rtol=1e-4)
        np.testing.assert_allclose(info.mean_error, infos.mean_error[i], rtol=1e-2)


@pytest.mark.parametrize(
    "method", [METHODS["gradients"], long(METHODS["values"]), long(METHODS["last"])]
)
def test_nan_losses_are_reported(method):
    loss = Loss.from_function(lambda x: jnp.where(x[0] > 0.4, jnp.nan, jnp.sum(x**2)), np.zeros(2))
    target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, 1.0))
    _, info = heat_step(method, random.key(0), target)
    assert not info.ok
    assert not info.converged
    assert np.isinf(info.residual)
    assert np.all(np.isinf(info.mean_error))


@pytest.mark.parametrize("method", [METHODS["values"]])
def test_double_precision(method, x64):
    target, exact = setup(*CASES["double_well"])
    fitted, info = heat_step(method, random.key(0), target)
    assert fitted.mean.dtype == info.mean_error.dtype == info.residual.dtype == jnp.float64
    assert np.all(np.abs(fitted.mean - exact) < 4 * info.mean_error)


@pytest.mark.parametrize("gradient", ["reparametrized", "score"])
def test_pairs_leave_a_mirror_that_is_no_minimum(gradient):
    # Maximum, saddle and minimum are the same program.
    start = np.zeros(4)
    loss = Loss.from_function(lambda x, bend: jnp.sum(x**4 + bend * x**2), start, start)
    optimizer = schemes.heat(loss, 0.1, RobbinsMonro(20, gradient=gradient), temperature=0.3)
    for bend in (np.full(4, -2.0), np.array([-2.0, 3.0, 3.0, 3.0])):
        result = optimizer.run(random.key(0), 100, bend, progress_bar=False)
        # Minima of the smoothed loss are at sqrt(1 - 3 tau) = 0.84.
        assert np.all(np.abs(result.params[bend < 0]) > 0.5)
        assert np.all(np.abs(result.params[bend > 0]) < 0.2)
    kept = optimizer.run(random.key(0), 100, np.ones(4), progress_bar=False)
    noise = 1e-5 if gradient == "reparametrized" else 0.1
    assert np.all(np.abs(kept.params) < noise)


def test_integer_losses_take_the_score_form():
    problem = problems.zero_one(INPUTS, LABELS)
    loss = Loss.from_function(problem.loss, problem.start)
    assert loss.returns_integers
    with pytest.raises(TypeError, match="integers"):
        TwoStep(loss, 0.5, shift=shifts.Implicit(), fit=RobbinsMonro())
    optimizer = schemes.heat(loss, 0.5, fit=Score(50, num_pairs=4))
    result = optimizer.run(random.key(0), 5, progress_bar=False)
    assert np.all(result.history.ok)
    assert np.all(result.history.fit.num_grad == 0)
    assert problem.loss(result.params) < problem.loss(loss.x0)


def test_settings_print_and_compare():
    assert not Score().uses_gradient
    assert RobbinsMonro().uses_gradient
    assert RobbinsMonro(tolerance=0.1) == RobbinsMonro(tolerance=0.1)
    assert jax.tree.leaves(RobbinsMonro(tolerance=0.1)) == [np.float32(0.1)]
