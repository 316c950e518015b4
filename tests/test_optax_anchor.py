# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Optax in place of the plain step, and the schemes that are built with it: Entropy-SGD and Parle."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from conftest import Counter
from jax import random

from numpyro_regloss import (
    Gaussian,
    Loss,
    Minibatch,
    RegularizedLoss,
    TwoStep,
    anchor,
    fit,
    schemes,
    shift,
)
from numpyro_regloss.draws import StoredDraws
from numpyro_regloss.schedules import Scoping

CLOUD = shift.Importance(200)


def bowl(x):
    return jnp.sum(jnp.array([1.0, 3.0]) * (x - 1.0) ** 2)


LOSS = Loss.from_function(bowl, np.zeros(2))


def run(step, tau):
    optimizer = TwoStep(LOSS, tau, CLOUD, fit.ForwardKL(), step, 0.5)
    return optimizer.run(random.key(0), 6, progress_bar=False)


def cold(target):
    """No draws, of half of the target's temperature."""
    empty = jnp.zeros((1, 0))
    return StoredDraws(jnp.zeros((1, 0, 2)), empty, empty, 0.5 * target.temperature)


SCOPING = Scoping(0.2, 0.1, 1e-12)


def test_displacements_at_a_rate_of_one_are_plain_steps_whatever_tau_is():
    plain = run(anchor.Proximal(), SCOPING).history
    result = run(anchor.Optax(optax.sgd(1.0), "displacement"), SCOPING).history
    np.testing.assert_allclose(result.reference.mean, plain.reference.mean, atol=1e-5)
    np.testing.assert_allclose(result.reference.scale, plain.reference.scale, rtol=1e-6)
    np.testing.assert_allclose(result.tau, 0.2 / 1.1 ** np.arange(6), rtol=1e-5)
    gradient = 0.5 * (plain.reference.mean - plain.fitted.mean) / plain.tau[:, None]
    expected = np.linalg.norm(gradient, axis=-1)
    np.testing.assert_allclose(result.anchor.gradient_norm, expected, rtol=1e-3)
    assert not result.anchor.fell_back.any()


@pytest.mark.parametrize(
    "scale",
    [np.sqrt(0.2), np.array([0.5, 0.2]), np.array([[0.5, 0.0], [0.3, 0.4]])],
    ids=["isotropic", "diagonal", "dense"],
)
def test_gradients_at_the_rate_tau_over_temperature_are_plain_steps(scale):
    scale = jnp.asarray(scale, float)
    target = RegularizedLoss(LOSS, Gaussian(jnp.array([1.0, -1.0]), scale), temperature=1.0)
    fitted = target.reference._replace(mean=jnp.array([0.5, 0.2]))
    rate = 0.2 / 0.5
    step = anchor.Optax(optax.sgd(rate))
    after = step.step(random.key(0), step.init(target), target, cold(target), fitted, None)[1]
    gradient = 0.5 * np.linalg.solve(target.reference.covariance, [0.5, -1.2])
    np.testing.assert_allclose(after.mean, target.reference.mean - rate * gradient, rtol=1e-4)
    if scale.ndim == 0:
        np.testing.assert_allclose(after.mean, fitted.mean, rtol=1e-4)


def test_optimizers_with_states_and_schedules():
    # Adam's step is its rate where gradients are all equal; its rate is a schedule here.
    rate = optax.linear_schedule(0.1, 0.05, 2)
    step = anchor.Optax(optax.adam(rate))
    target = RegularizedLoss(LOSS, Gaussian.isotropic(jnp.ones(2), 0.1))
    state = step.init(target)
    for t in range(3):
        fitted = target.reference._replace(mean=target.reference.mean - jnp.array([1.0, -2.0]))
        state, after, info = step.step(random.key(0), state, target, cold(target), fitted, None)
        expected = float(rate(t)) * jnp.array([-1.0, 1.0])
        np.testing.assert_allclose(after.mean - target.reference.mean, expected, rtol=1e-3)
        np.testing.assert_allclose(info.step_norm, np.sqrt(2) * float(rate(t)), rtol=1e-3)
        target = RegularizedLoss(LOSS, after)


class Halving:
    """An optimizer that is no pytree."""

    def init(self, params):
        return jnp.zeros((), jnp.int32)

    def update(self, gradient, state, params=None):
        return jax.tree.map(lambda g: -0.5 * g, gradient), state + 1


def test_an_optimizer_may_be_any_object_with_its_two_methods():
    wanted = run(anchor.Optax(optax.sgd(0.5), "displacement"), 0.1)
    found = run(anchor.Optax(Halving(), "displacement"), 0.1)
    np.testing.assert_allclose(found.params, wanted.params, rtol=1e-5)
    assert int(found.state.anchor) == 6
    several = run(anchor.Optax(optax.MultiSteps(optax.sgd(0.5), 2), "displacement"), 0.1)
    moved = several.history.anchor.step_norm > 0
    np.testing.assert_array_equal(moved, [False, True] * 3)


def broken(at):
    def update(gradient, state, params=None):
        return jnp.where(state == at, jnp.nan, -gradient), state + 1

    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)


def test_updates_that_are_not_finite_fall_back_to_the_plain_step():
    step = anchor.Optax(broken(2), "displacement")
    plain, result = run(anchor.Proximal(), SCOPING), run(step, SCOPING)
    # The state is kept, so the optimizer stays broken.
    assert result.history.anchor.fell_back.tolist() == [False, False, True, True, True, True]
    assert result.history.ok.all()
    np.testing.assert_allclose(result.params, plain.params, atol=1e-5)
    target = RegularizedLoss(LOSS, Gaussian.isotropic(jnp.ones(2), 0.1))
    fitted = target.reference._replace(mean=jnp.zeros(2))
    for safeguard in (True, False):
        step = anchor.Optax(broken(0), safeguard=safeguard)
        info = step.step(random.key(0), step.init(target), target, cold(target), fitted, None)[2]
        assert bool(info.ok) == bool(info.fell_back) == safeguard


def blobs(count=600):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, count)
    centers = np.array([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]])
    # Inner and outer rings: no linear classifier does it.
    sign = rng.choice([-1.0, 1.0], count)
    inputs = sign[:, None] * centers[labels] + 0.4 * rng.normal(size=(count, 2))
    return inputs.astype(np.float32), labels


def network(params, inputs, labels):
    hidden = jnp.tanh(inputs @ params["w"] + params["b"])
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ params["v"], labels).mean()


def start():
    rng = np.random.default_rng(1)
    return {
        "w": rng.normal(size=(2, 16)).astype(np.float32),
        "b": np.zeros(16, np.float32),
        "v": rng.normal(size=(16, 3)).astype(np.float32) / 4,
    }


INPUTS, LABELS = blobs()
NETWORK = Loss.from_function(
    network, start(), INPUTS, LABELS.astype(np.int32), minibatch=Minibatch(32)
)


@pytest.mark.long
def test_entropy_sgd_trains_a_network_by_minibatches():
    # T / gamma = 1e-8 / 1e-3.
    optimizer = schemes.entropy_sgd(NETWORK, Scoping(1e-5, 1e-3, 1e-12), step_size=0.2)
    result = optimizer.run(random.key(0), 150, progress_bar=False)
    assert result.history.ok.all()
    # From log(3) and more; a loss of 0.1 is 97 % of the labels or better.
    assert network(start(), INPUTS, LABELS) > 1.0
    assert network(result.params, INPUTS, LABELS) < 0.1
    np.testing.assert_allclose(result.history.tau, 1e-5 / 1.001 ** np.arange(150), rtol=1e-4)
    assert np.median(result.history.shift.stability) < 2


@pytest.mark.long
def test_parle_trains_replicas_that_stay_together():
    inner = {"step_size": 0.2, "num_samples": 10}
    spreads, losses = [], []
    for coupling in (0.0, 0.3):
        optimizer = schemes.parle(NETWORK, 1e-5, num_replicas=3, coupling=coupling, **inner)
        result = optimizer.run(random.key(0), 150, progress_bar=False)
        assert result.params["w"].shape == (3, 2, 16)
        mean = jax.tree.map(lambda a: a.mean(0), result.params)
        apart = jax.tree.map(lambda a, m: np.sum((a - m) ** 2), result.params, mean)
        spreads.append(np.sqrt(sum(jax.tree.leaves(apart))))
        losses.append(network(mean, INPUTS, LABELS))
        single = [
            network(jax.tree.map(lambda a, i=i: a[i], result.params), INPUTS, LABELS)
            for i in range(3)
        ]
        assert max(single) < 0.15
    # Independent batches drive replicas apart, and the coupling holds them.
    assert spreads[0] > 0
    assert spreads[1] < 0.5 * spreads[0]
    assert losses[1] < 0.1


def test_the_loss_of_replicas():
    data = np.arange(12.0, dtype=np.float32)
    loss = Loss.from_function(
        lambda p, rows, power: jnp.mean(jnp.abs(rows - p["m"]) ** power) + p["f"](p["m"]),
        {"m": 1.0, "f": jnp.tanh},
        data,
        2,
        minibatch=Minibatch(2, argnums=0),
    )
    both = schemes.parle(loss, 0.1, num_replicas=3).loss
    x = jnp.array([0.5, 1.0, 2.0])
    single = [float(loss.value(m[None])) for m in x]
    np.testing.assert_allclose(both.value(x), sum(single), rtol=1e-6)
    assert both.minibatch.batch_size == 6
    assert both.constrain(x)["m"].shape == (3,)
    np.testing.assert_array_equal(both.unconstrain(both.constrain(x)), x)
    assert both.flat_names == ("m@0", "m@1", "m@2")
    # Each replica has its own two rows of six.
    arguments, scale = both.draw_batch(random.key(0), both.arguments)
    rows = np.asarray(arguments.tree[0][0]).reshape(3, 2)
    expected = sum(np.mean((r - m) ** 2) + np.tanh(m) for r, m in zip(rows, x, strict=True))
    np.testing.assert_allclose(both.evaluate(x, arguments, scale), expected, rtol=1e-5)


def test_gradient_free_is_its_parts_with_the_gradient_of_the_temperature_that_the_weights_set():
    widths, loss = (
        np.array([0.1, 0.2]),
        Loss.from_function(lambda p: bowl(p["x"]), {"x": np.zeros(2)}),
    )
    scheme = schemes.gradient_free(loss, {"x": widths}, 50, rate=0.5, ess=0.3)
    history = scheme.run(random.key(0), 4, progress_bar=False).history
    temperature = history.shift.temperature[:, None]
    assert np.ptp(temperature) > 0.1 * np.mean(temperature)
    mean = history.reference.mean
    gradient = temperature * (mean - history.fitted.mean) / widths**2
    found = history.anchor.gradient_norm
    np.testing.assert_allclose(found, np.linalg.norm(gradient, axis=-1), rtol=1e-4)
    adam = optax.adam(1.0, b2=0.99, eps=1e-30)
    state = adam.init(jnp.zeros(2))
    for k in range(3):
        step, state = adam.update(jnp.asarray(gradient[k]), state)
        np.testing.assert_allclose(mean[k + 1] - mean[k], 0.5 * widths * step, rtol=1e-3)


def test_new_numbers_of_gradient_free_are_no_new_program():
    first, second = (
        schemes.gradient_free(LOSS, w, rate=r, ess=e)
        for w, r, e in ((0.1, 1.0, 0.5), (0.2, 2.0, 0.4))
    )
    assert jax.tree.structure(first) == jax.tree.structure(second)


def normal(y):
    m = numpyro.sample("m", dist.Normal(0.0, 1.0))
    s = numpyro.sample("s", dist.HalfNormal(1.0))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(m, s), obs=y)


def test_replicas_of_a_model():
    y = np.linspace(-1.0, 2.0, 12).astype(np.float32)
    loss = Loss.from_model(normal, y, minibatch=Minibatch(3))
    optimizer = schemes.parle(loss, {"m": 1e-6, "s": 1e-6}, num_replicas=2, step_size=1e-3)
    both, x = optimizer.loss, jnp.array([0.1, 0.2, 0.3, 0.4])
    np.testing.assert_allclose(both.value(x), loss.value(x[:2]) + loss.value(x[2:]), rtol=1e-5)
    # The loss of batches estimates that of all rows without bias.
    keys = random.split(random.key(0), 4000)
    batches = jax.jit(
        jax.vmap(lambda key: both.evaluate(x, *both.draw_batch(key, both.arguments)))
    )(keys)
    error = np.std(batches) / np.sqrt(len(keys))
    assert abs(np.mean(batches) - both.value(x)) < 4 * error
    result = optimizer.run(random.key(0), 3, progress_bar=False)
    assert result.params["s"].shape == (2,)
    assert (result.params["s"] > 0).all()


def test_new_numbers_do_not_recompile():
    counter = Counter(bowl)
    loss = Loss.from_function(counter, np.zeros(2))
    counts = []
    for tau, rate, coupling, step_size, temperature in (
        (1e-6, 1e-3, 0.1, 0.1, 1e-8),
        (1e-5, 1e-2, 0.2, 0.05, 1e-6),
    ):
        optimizer = schemes.parle(
            loss,
            Scoping(tau, rate, 1e-12),
            coupling=coupling,
            step_size=step_size,
            temperature=temperature,
        )
        optimizer.run(random.key(0), 2, progress_bar=False)
        counts.append(counter.count)
    assert counts[1] == counts[0]


# Of `schemes.minimize`, `test_two_step.py`.
@pytest.mark.long
def test_minimize_by_entropy_sgd():
    result = schemes.minimize(
        random.key(0), bowl, np.zeros(2), num_steps=30, tau=1e-6, scheme=schemes.entropy_sgd
    )
    np.testing.assert_allclose(result.params, 1.0, atol=0.01)


BAD = {
    "optimizer that was not built": (lambda: anchor.Optax(optax.adam), TypeError, "optax.adam"),
    "optimizer a number": (lambda: anchor.Optax(0.1), TypeError, "init and update"),
    "unknown direction": (
        lambda: anchor.Optax(optax.sgd(1.0), "down"),
        ValueError,
        "displacement",
    ),
    "safeguard a number": (
        lambda: anchor.Optax(optax.sgd(1.0), safeguard=1),
        TypeError,
        "safeguard",
    ),
    "one replica": (lambda: schemes.parle(LOSS, 0.1, num_replicas=1), ValueError, "num_replicas"),
    "coupling above one": (lambda: schemes.parle(LOSS, 0.1, coupling=2.0), ValueError, "coupling"),
    "coupling a word": (lambda: schemes.parle(LOSS, 0.1, coupling="weak"), TypeError, "coupling"),
    "replicas of a function": (lambda: schemes.parle(bowl, 0.1), TypeError, "Loss.from_function"),
    "more replicas than rows": (
        lambda: schemes.parle(NETWORK, 0.1, num_replicas=20),
        ValueError,
        "fewer replicas",
    ),
    "gradient-free a function": (
        lambda: schemes.gradient_free(bowl, 0.1),
        TypeError,
        "schemes.gradient_free: expected a Loss",
    ),
    "a mask of other parameters": (
        lambda: run(anchor.Optax(optax.masked(optax.sgd(0.1), {"a": True})), 0.1),
        ValueError,
        "masks and labels must fit these",
    ),
    "an optimizer that asks for values": (
        lambda: run(anchor.Optax(optax.lbfgs()), 0.1),
        TypeError,
        "are not for this anchor",
    ),
    "no width": (
        lambda: schemes.gradient_free(LOSS, 0.0),
        ValueError,
        "schemes.gradient_free: width",
    ),
    "rate below zero": (
        lambda: schemes.gradient_free(LOSS, 0.1, rate=-1.0),
        ValueError,
        "schemes.gradient_free: rate",
    ),
    "tau missing": (lambda: schemes.entropy_sgd(LOSS), TypeError, "tau"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, exception, words = BAD[name]
    with pytest.raises(exception, match=words):
        call()


def test_the_optimizer_sees_the_parameters_as_the_user_wrote_them():
    def loss_fn(params):
        return jnp.sum((params["body"]["w"] - 1.0) ** 2) + jnp.sum((params["head"] - 1.0) ** 2)

    params = {
        "head": np.zeros(2, np.float32),
        "body": {"w": np.zeros((2, 3), np.float32)},
        "f": jnp.tanh,
    }
    loss = Loss.from_function(loss_fn, params)
    rates = optax.multi_transform(
        {"slow": optax.sgd(0.1), "frozen": optax.set_to_zero()},
        {"head": "frozen", "body": {"w": "slow"}, "f": None},
    )
    decayed = optax.masked(
        optax.add_decayed_weights(10.0), {"head": False, "body": {"w": True}, "f": None}
    )
    step = anchor.Optax(optax.chain(rates, decayed))
    optimizer = TwoStep(loss, 0.1, shift.Importance(2_000), fit.ForwardKL(), step)
    result = optimizer.run(random.key(0), 1, progress_bar=False)
    np.testing.assert_array_equal(result.params["head"], 0.0)
    assert (result.params["body"]["w"] > 0.05).all()


def test_the_optimizer_of_a_model_sees_its_sites():
    def model():
        numpyro.sample("free", dist.Normal(jnp.ones(2), 1.0).to_event(1))
        numpyro.sample("held", dist.LogNormal(1.0, 1.0))

    seen = []

    def init(params):
        seen.append(jax.tree.map(jnp.shape, params))
        return ()

    def update(gradient, state, params):
        return gradient | {"free": -0.1 * gradient["free"], "held": jnp.zeros(())}, state

    loss = Loss.from_model(model)
    step = anchor.Optax(optax.GradientTransformation(init, update))
    result = TwoStep(loss, 0.1, CLOUD, fit.ForwardKL(), step).run(
        random.key(0), 3, progress_bar=False
    )
    assert seen[-1] == {"free": (2,), "held": ()}
    start = loss.constrain(loss.x0)
    np.testing.assert_array_equal(result.params["held"], start["held"])
    assert (result.params["free"] != start["free"]).all()
