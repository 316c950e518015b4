# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Options of the importance engine: Sobol noise, Pareto smoothing, a temperature that the ESS sets."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SIGMAS, Counter, long
from jax import lax, random
from scipy.stats import norm, qmc

from numpyro_regloss import (
    Gaussian,
    Loss,
    RegularizedLoss,
    TwoStep,
    fit,
    problems,
    schemes,
    shift,
    values,
)
from numpyro_regloss._core.pareto import pareto_smooth
from numpyro_regloss._core.stats import weight_ess
from numpyro_regloss.shift.importance import cloud as clouds
from numpyro_regloss.shift.importance.sobol import MAX_DIM, _direction_numbers, sobol_normal

net = jax.jit(sobol_normal, static_argnums=(1, 2))


@jax.jit
def cloud(engine, rng_key, target):
    return engine.step(rng_key, engine.init(rng_key, target), target)[1:]


def target_of(fn, x, tau=1.0, temperature=1.0):
    loss = Loss.from_function(fn, np.asarray(x, float))
    return RegularizedLoss(loss, Gaussian.isotropic(loss.x0, tau), temperature=temperature)


def steep(x):
    return 1e4 * jnp.sum(x)


# Sobol noise


def test_direction_numbers_are_those_of_scipy():
    points = np.zeros((1, 5), np.uint32)
    for number in _direction_numbers(6, 5):
        points = np.concatenate([points, points ^ number])
    expected = qmc.Sobol(5, scramble=False).random(64)
    assert set(map(tuple, points / 2.0**30)) == set(map(tuple, expected))


def test_a_scrambled_net_is_a_net():
    z = np.asarray(net(random.key(0), 256, 7), float)
    u = norm.cdf(z)
    # One draw per stratum of every coordinate, and one per cell of the first two, which form a (0, 2)-sequence.
    for j in range(7):
        assert len(np.unique(np.floor(256 * u[:, j]))) == 256
    for cells in (4, 16, 64):
        boxes = np.floor(cells * u[:, 0]) * 256 // cells + np.floor(256 // cells * u[:, 1])
        assert len(np.unique(boxes)) == 256


def test_scrambled_draws_are_standard_normal():
    z = np.asarray(
        jax.jit(jax.vmap(partial(sobol_normal, num_draws=16, dim=3)))(
            random.split(random.key(1), 2000)
        )
    )
    # The first point too, which without a shift would be the corner; the average over a net errs less.
    for draws in (z[:, 0], z[:, 7]):
        assert np.all(np.abs(draws.mean(0)) < SIGMAS / np.sqrt(2000))
        assert np.all(np.abs(draws.var(0) - 1) < SIGMAS * np.sqrt(2 / 2000))
    assert np.all(np.abs(z.mean((0, 1))) < 0.25 * SIGMAS / np.sqrt(32_000))
    correlation = np.corrcoef(z[:, 3].T) - np.eye(3)
    assert np.max(np.abs(correlation)) < SIGMAS / np.sqrt(2000)


@pytest.mark.parametrize("antithetic", [True, long(False)])
def test_errors_of_sobol_clouds_are_calibrated_and_smaller(antithetic):
    problem = problems.quadratic(np.array([[1.0, 0.3], [0.3, 0.5]]), center=np.array([1.0, -1.0]))
    target = target_of(problem.loss, [0.3, 0.3], 0.5)
    exact = problem.shift_mean([0.3, 0.3], 0.5)
    engine = shift.Importance(512, noise="sobol", antithetic=antithetic)

    @jax.jit
    @jax.vmap
    def go(rng_key):
        draws = engine.step(rng_key, (), target)[1]
        fitted, info = fit.ForwardKL().step(rng_key, (), target, draws)[1:]
        return fitted.mean - exact, info.mean_error

    deviation, error = go(random.split(random.key(2), 400))
    covered = np.mean(np.abs(deviation) < 1.96 * error)
    # With 16 nets Student's law gives 93.9 %; the standard error of 800 correlated checks is at most 1.2 %.
    assert 0.939 - 0.036 < covered < 0.98
    plain = np.sqrt(np.mean(np.diag(problem.shift_covariance([0.3, 0.3], 0.5))) / 512)
    assert np.sqrt(np.mean(deviation**2)) < plain / 2


@pytest.mark.long
def test_nets_are_the_blocks_and_survive_chunks(monkeypatch):
    problem = problems.double_well(3)
    target = target_of(problem.loss, [0.2, 0.2, 0.2], 0.5)
    engine = shift.Importance(1000, noise="sobol", chunk_size=130)
    kept, _ = cloud(engine, random.key(0), target)
    assert kept.block_size == 32  # 1000 / 16 = 62 draws leave room for 32
    assert kept.layout.chunk_size % 32 == 0
    # Of noise that is made again the draws, the losses and the folds must fit together.
    monkeypatch.setattr(clouds, "KEPT_ELEMENTS", 0)
    jax.clear_caches()
    made, _ = cloud(engine, random.key(0), target)
    assert made.offset is None
    np.testing.assert_allclose(jax.vmap(target.value)(made.x[0]), made.loss[0], rtol=1e-4)

    def add(total, chunk):
        assert len(chunk.pair_log_weight) % 16 == 0  # rows of 2: whole nets
        return total + jnp.exp(chunk.log_weight) @ chunk.x

    expected = jnp.exp(made.log_weight[0]) @ made.x[0]
    np.testing.assert_allclose(made.fold(add, jnp.zeros(3)), expected, rtol=1e-4, atol=1e-3)
    # Pairs: x + x' = 2 mean.
    np.testing.assert_allclose(made.x[0, ::2] + made.x[0, 1::2], 0.4, atol=1e-5)
    jax.clear_caches()


class Simulator:
    """A loss in Python that writes down how many points each of its calls gets."""

    def __init__(self):
        self.calls = []

    def __call__(self, x):
        out = jax.ShapeDtypeStruct((), x.dtype)
        return jax.pure_callback(self.simulate, out, x, vmap_method="expand_dims")

    def simulate(self, x):
        x = np.asarray(x)
        self.calls.append(x[..., 0].size)
        return np.sum((x - 1.0) ** 2, -1).astype(x.dtype)


@pytest.mark.parametrize(
    "options",
    [
        long(dict()),
        dict(num_samples=33),
        long(dict(num_samples=33, antithetic=False, ess=0.4)),
        dict(num_samples=100, noise="sobol", num_scrambles=8, chunk_size=1000),
    ],
    ids=["pairs", "odd", "ess", "sobol"],
)
def test_a_cloud_is_one_call_where_chunks_have_room(options):
    options = {"num_samples": 40, "chunk_size": 100, **options}
    simulator, count = Simulator(), options["num_samples"] + 1
    loss = Loss.from_function(simulator, np.zeros(2))
    optimizer = TwoStep(loss, 0.5, shift.Importance(**options), fit.ForwardKL())
    result = optimizer.run(random.key(0), 3, progress_bar=False)
    jax.block_until_ready(result)
    history = result.history
    assert simulator.calls == [1] + 3 * [count]
    assert history.num_loss.tolist() == 3 * [count]
    expected = np.sum((history.reference.mean - 1.0) ** 2, -1)
    np.testing.assert_allclose(history.loss, expected, rtol=1e-5)
    assert history.loss[-1] < 0.5 < history.loss[0]


def test_chunks_with_room_change_no_number():
    target = target_of(lambda x: jnp.sum((x - 1.0) ** 2), np.zeros(3))
    whole, halves = (
        cloud(shift.Importance(40, chunk_size=size), random.key(0), target)[0]
        for size in (40, None)
    )
    assert whole.center_loss == 3.0
    assert halves.center_loss is None
    np.testing.assert_allclose(whole.loss, halves.loss, rtol=1e-6)
    np.testing.assert_array_equal(whole.x, halves.x)


def test_values_and_rounds_are_one_call_each_where_chunks_have_room():
    simulator = Simulator()
    target = target_of(simulator, np.zeros(2), 0.5)
    settings = dict(num_samples=40, chunk_size=40)
    values.heat(random.key(0), target, **settings)
    values.local_entropy(random.key(0), target, method="importance", **settings)
    jax.effects_barrier()
    assert simulator.calls == [40, 40]
    simulator.calls.clear()
    engine = shift.Adaptive(shift.Importance(40, chunk_size=40), max_rounds=2)
    optimizer = TwoStep(target.loss, 0.5, engine, fit.ForwardKL())
    state, info = optimizer.step(optimizer.init(random.key(0)))
    jax.block_until_ready(state)
    assert simulator.calls == [1] + int(info.shift.num_rounds) * [41]
    assert info.num_loss == sum(simulator.calls) - 1
    np.testing.assert_allclose(info.loss, 2.0, rtol=1e-6)
    simulator.calls.clear()
    settings = dict(tau=0.5, directions=[0], num_points=3, num_samples=20)
    values.landscape(random.key(0), target.loss, chunk_size=20, **settings)
    jax.effects_barrier()
    assert simulator.calls == 3 * [21]


def test_dense_covariance_of_nets_and_its_error():
    problem = problems.quadratic(np.array([[1.0, 0.6], [0.6, 2.0]]))
    target = target_of(problem.loss, [0.1, -0.2], 0.5)
    draws, _ = cloud(shift.Importance(2048, noise="sobol"), random.key(3), target)
    gaussian, info = jax.jit(fit.ForwardKL("dense").step)(random.key(0), (), target, draws)[1:]
    exact = problem.shift_covariance([0.1, -0.2], 0.5)
    assert np.all(np.abs(gaussian.covariance - exact) < SIGMAS * info.covariance_error)
    # Less than that of as many independent draws, which would be sqrt(2 / n) of the variance.
    assert np.all(np.diag(info.covariance_error) < np.sqrt(2 / 2048) * np.diag(exact))


def test_more_dimensions_than_sobol_are_refused():
    target = target_of(jnp.sum, np.zeros(MAX_DIM + 1))
    engine = shift.Importance(64, noise="sobol")
    for call in (engine.init, lambda key, target: engine.step(key, (), target)):
        with pytest.raises(ValueError, match=f"at most {MAX_DIM} parameters.*got {MAX_DIM + 1}"):
            call(random.key(0), target)


# Pareto smoothing


def test_smoothed_weights_are_those_of_psis():
    target = target_of(lambda x: jnp.sum(x), np.zeros(3))
    plain, plain_info = cloud(shift.Importance(500), random.key(0), target)
    smooth, info = cloud(shift.Importance(500, pareto_smoothing=True), random.key(0), target)
    expected, khat = pareto_smooth(plain.log_weight[0])
    np.testing.assert_allclose(smooth.log_weight[0], expected, rtol=1e-5)
    np.testing.assert_allclose([info.khat, plain_info.khat], [khat, khat], rtol=1e-4)
    assert np.any(smooth.log_weight != plain.log_weight)
    assert np.all(smooth.loss == plain.loss)


# A temperature that the effective sample size sets

LOSSES = {
    "linear": lambda x: jnp.sum(x),
    "steep": steep,
    "far from zero": lambda x: 1e6 + jnp.sum(x),
    "heavy tails": lambda x: jnp.sum(jnp.exp(8.0 * jnp.abs(x))),
    "tiny": lambda x: 1e-30 * jnp.sum(x**2),
    "walls": lambda x: jnp.where(x[0] > 0, 100.0 * jnp.sum(x**2), jnp.inf),
    "failures": lambda x: jnp.where(x[0] > 0, 100.0 * jnp.sum(x**2), jnp.nan),
    "steps": lambda x: jnp.floor(5.0 * jnp.sum(jnp.abs(x))),
}


SPECIAL = {
    "equal": lambda x: 0.0 * x[0] + 7.0,
    "ties": lambda x: jnp.where(x[0] < 0.253, 2.0, 5.0 + x[0]),
    "undefined": lambda x: jnp.nan * x[0],
}


def any_loss(x, code):
    return lax.switch(code.astype(int), [*LOSSES.values(), *SPECIAL.values()], x)


def any_target(name, temperature=1.0):
    """Which loss it is is data, so that all are one program."""
    code = np.float32([*LOSSES, *SPECIAL].index(name))
    loss = Loss.from_function(any_loss, np.zeros(4), code)
    return RegularizedLoss(loss, Gaussian.isotropic(loss.x0, 1.0), temperature=temperature)


@pytest.mark.parametrize("name", LOSSES)
def test_the_effective_sample_size_is_reached(name):
    target = any_target(name)
    for share in (0.05, 0.5, 0.95):
        draws, info = cloud(shift.Importance(1000, ess=share), random.key(0), target)
        finite = np.isfinite(draws.loss[0])
        wanted = share * finite.sum()
        # Losses near 1e6 have a spacing of 0.06 in float32; otherwise weights are continuous in T.
        slack = 0.02 if name == "far from zero" else 1e-3
        np.testing.assert_allclose(info.ess, wanted, rtol=slack)
        np.testing.assert_allclose(weight_ess(draws.log_weight), info.ess, rtol=1e-5)
        assert info.ok
        # The label is what the weights are made of.
        assert draws.temperature == info.temperature > 0
        exact = -(draws.loss[0] - draws.loss[0][finite].min()) / draws.temperature
        np.testing.assert_allclose(draws.log_weight[0][finite], exact[finite], rtol=1e-4, atol=1e-4)


def test_equal_losses_keep_the_temperature():
    draws, info = cloud(shift.Importance(1000, ess=0.5), random.key(0), any_target("equal", 0.3))
    np.testing.assert_allclose([draws.temperature, info.ess], [0.3, 1000.0], rtol=1e-6)


def test_more_ties_than_wanted_weigh_alike():
    # 60 % of the draws share the lowest loss: no temperature gives less than they are.
    draws, info = cloud(shift.Importance(1000, ess=0.2), random.key(0), any_target("ties"))
    lowest = draws.loss[0] == 2.0
    np.testing.assert_allclose(info.ess, lowest.sum(), rtol=1e-5)
    assert np.ptp(draws.log_weight[0][lowest]) == 0
    assert np.isfinite(draws.temperature)


def test_a_loss_that_is_nowhere_finite_is_rejected():
    draws, info = cloud(shift.Importance(1000, ess=0.2), random.key(0), any_target("undefined"))
    assert not info.ok
    assert np.isfinite(draws.temperature)


def test_a_new_share_does_not_retrace():
    counter = Counter(steep)
    target = target_of(counter, np.zeros(2))
    cloud(shift.Importance(64, ess=0.5), random.key(0), target)
    count = counter.count
    cloud(shift.Importance(64, ess=0.3), random.key(0), target)
    assert counter.count == count
    sizes = jax.vmap(
        lambda ess: cloud(shift.Importance(64, ess=ess), random.key(0), target)[1].ess
    )(jnp.array([0.25, 0.5]))
    np.testing.assert_allclose(sizes, [16.0, 32.0], rtol=1e-3)


def test_steps_go_on_where_fixed_weights_degenerate():
    # Weights of exp(-10,000 x) hang on one draw, and a step that hangs on one draw is rejected.
    loss = Loss.from_function(steep, np.full(3, 5.0))
    optimizer = TwoStep(loss, 0.1, shift.Importance(64, ess=0.25), fit.ForwardKL())
    history = optimizer.scan(optimizer.init(random.key(0)), 5)[1]
    assert history.ok.all()
    assert np.all(np.diff(history.loss) < 0)
    np.testing.assert_allclose(history.shift.ess, 16.0, rtol=1e-3)
    # The history tells which objective each step had.
    assert np.all(history.shift.temperature > 100.0)


LOSS = Loss.from_function(jnp.sum, np.zeros(2))


Y = np.random.default_rng(3).normal(size=(4, 2)) @ np.random.default_rng(4).normal(size=(2, 3))
RAYS = np.random.default_rng(5).normal(size=(30, 4)).astype(np.float32)
SQUARES = (RAYS @ np.array([1.0, -2.0, 0.5, 1.5], np.float32)) ** 2


def wells(x, double, center):
    """Of every coordinate two wells, or one."""
    x = x - center
    return jnp.sum(jnp.where(double > 0, (x**2 - 1.0) ** 2, 5.0 * x**2))


# Each even about its start, which is no minimum.
MIRRORS = {
    "wells": (wells, np.zeros(3), np.ones(3), 0.0),
    "wells far from zero": (wells, np.full(3, 20.0), np.ones(3), 20.0),
    "saddle": (wells, np.zeros(3), np.array([1.0, 0.0, 0.0]), 0.0),
    "factors": (
        lambda p: jnp.mean((p["u"] @ p["v"] - Y) ** 2),
        {"u": np.zeros((4, 2)), "v": np.zeros((2, 3))},
    ),
    "phases": (lambda x: jnp.mean(((RAYS @ x) ** 2 - SQUARES) ** 2), np.zeros(4)),
}
MIRROR_CASES = [
    ("cloud", "wells"),
    long("cloud", "wells far from zero"),
    long("cloud", "saddle"),
    long("cloud", "factors"),
    long("sobol", "wells"),
    ("anneal", "phases"),
]


@pytest.mark.parametrize(("scheme", "name"), MIRROR_CASES)
def test_pairs_leave_a_mirror_that_is_no_minimum(scheme, name):
    loss = Loss.from_function(*MIRRORS[name])
    engine = shift.Importance(512, noise="sobol") if scheme == "sobol" else shift.Importance(600)
    optimizer = schemes.local_entropy(loss, 0.05, engine, temperature=0.2)
    if scheme == "anneal":
        optimizer = schemes.anneal(loss, 2.0, 50, num_samples=500)
    history = optimizer.run(random.key(0), 50, progress_bar=False).history
    assert history.ok.all()
    assert history.loss[-1] < 0.1 * history.loss[0]


def test_errors_at_a_mirror_are_those_of_single_draws():
    loss = Loss.from_function(*MIRRORS["wells"])
    target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, 0.05))
    engine = shift.Importance(1000)

    def fitted(key):
        _, draws, _ = engine.step(key, (), target)
        _, gaussian, info = fit.ForwardKL().step(key, (), target, draws)
        return gaussian.mean, info.mean_error

    count = 300
    means, errors = jax.jit(jax.vmap(fitted))(random.split(random.key(0), count))
    left = np.any(np.abs(means) > 1e-6, 1)
    assert np.mean(left) > 0.9  # the others have draws that do not tell
    z = (means / errors)[left]
    # Of independent draws of variance one; their fourth moment is about three.
    assert abs(np.mean(z)) < SIGMAS / np.sqrt(z.size)
    assert abs(np.mean(z**2) - 1.0) < SIGMAS * np.sqrt(2.0 / z.size) + 0.05


@jax.jit
@partial(jax.vmap, in_axes=(None, 0, None))
def means_of(engine, rng_key, target):
    draws = engine.step(rng_key, (), target)[1]
    return fit.ForwardKL().step(rng_key, (), target, draws)[1].mean


def even(x, size):
    return size * jnp.sum(x**2 + x**4)


@pytest.mark.parametrize("noise", ["normal", "sobol"])
@pytest.mark.parametrize("size", [0.01, 1.0, 100.0])
def test_pairs_keep_a_mirror_that_is_a_minimum(noise, size):
    loss = Loss.from_function(even, np.zeros(4), size)
    target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, 0.5))
    means = means_of(shift.Importance(512, noise=noise), random.split(random.key(0), 50), target)
    np.testing.assert_allclose(means, 0.0, atol=1e-6)


def test_annealing_takes_a_width_per_group_of_parameters():
    # Units apart by a million.
    loss = Loss.from_function(
        lambda p: (p["far"] / 1e6 - 0.3) ** 2 + jnp.sum((p["near"] - 0.2) ** 2),
        {"far": 0.0, "near": np.zeros(2)},
    )
    optimizer = schemes.anneal(loss, {"far": 1e6, "near": 1.0}, 30, num_samples=200)
    params = optimizer.run(random.key(0), 30, progress_bar=False).params
    np.testing.assert_allclose(params["far"], 3e5, rtol=1e-3)
    np.testing.assert_allclose(params["near"], 0.2, rtol=1e-3)
    flat = schemes.anneal(loss, np.array([1e6, 1.0, 1.0]), 30, num_samples=200)
    for step in (0, 29, 40):
        tau = optimizer.tau_at(jnp.asarray(step))
        np.testing.assert_array_equal(tau, flat.tau_at(jnp.asarray(step)))


@pytest.mark.long
def test_widths_of_annealing_may_be_traced():
    loss = Loss.from_function(lambda p: jnp.sum((p["near"] - 0.2) ** 2), {"near": np.zeros(2)})

    def last(width):
        traced = schemes.anneal(loss, {"near": width}, 30, num_samples=200)
        state, _ = traced.scan(traced.init(random.key(0)), 30)
        return traced.get_params(state)["near"]

    near = jax.vmap(last)(jnp.array([0.5, 1.0]))
    np.testing.assert_allclose(near, 0.2, rtol=1e-3)


def test_annealing_narrows_the_cloud_as_told():
    optimizer = schemes.anneal(LOSS, width=2.0, num_steps=5, last_width=0.02, num_samples=10)
    widths = [float(jnp.sqrt(optimizer.tau_at(jnp.asarray(k)))) for k in (0, 2, 4, 9)]
    np.testing.assert_allclose(widths, [2.0, 0.2, 0.02, 0.02], rtol=1e-5)


BAD = {
    "noise": (lambda: shift.Importance(100, noise="halton"), ValueError, "one of"),
    "few scrambles": (
        lambda: shift.Importance(100, num_scrambles=4),
        ValueError,
        "num_scrambles: expected an integer >= 8",
    ),
    "few draws for the scrambles": (
        lambda: shift.Importance(20, noise="sobol"),
        ValueError,
        "at least 32 draws",
    ),
    "smoothing a number": (
        lambda: shift.Importance(100, pareto_smoothing=1),
        TypeError,
        "pareto_smoothing as True or False",
    ),
    "ess of all draws": (lambda: shift.Importance(100, ess=1.0), ValueError, "share of the draws"),
    "ess as a number of draws": (lambda: shift.Importance(100, ess=50), ValueError, "below 1"),
    "ess of one draw": (lambda: shift.Importance(100, ess=0.01), ValueError, "above one draw"),
    "ess negative": (lambda: shift.Importance(100, ess=-0.5), ValueError, "positive"),
    "cloud that widens": (
        lambda: schemes.anneal(LOSS, width=1.0, num_steps=10, last_width=2.0),
        ValueError,
        "last_width <= width",
    ),
    "cloud without width": (
        lambda: schemes.anneal(LOSS, width=0.0, num_steps=10),
        ValueError,
        "schemes.anneal: width",
    ),
    "annealing in no steps": (
        lambda: schemes.anneal(LOSS, width=1.0, num_steps=0),
        ValueError,
        "num_steps",
    ),
    "ess a word": (lambda: shift.Importance(100, ess="half"), TypeError, "positive number"),
}


@pytest.mark.parametrize("row", BAD)
def test_bad_input(row):
    call, error, words = BAD[row]
    with pytest.raises(error, match=words):
        call()
