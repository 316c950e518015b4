# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Data that a function reads from an object, a closure or a global: never old, and new ones compile nothing."""

import copy
import dataclasses
import functools
import pickle
import types

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from conftest import Counter
from harness import count_compiles
from jax import random

from numpyro_regloss import (
    Gaussian,
    Loss,
    Minibatch,
    RegularizedLoss,
    fit,
    reverse_kl,
    schemes,
    shift,
    to_arviz,
    to_guide,
    values,
)
from numpyro_regloss.losses.environment import Environment

OLD, NEW = jnp.array([-1.0, 0.0, 1.0]), jnp.array([48.0, 50.0, 52.0])
DATA = {"y": OLD}
SETTINGS = types.SimpleNamespace(y=OLD)
MODULE = types.ModuleType("settings_of_a_user")
CHEAP = shift.HMC(num_warmup=30, num_samples=30, num_chains=2)


def squares(x, y):
    return jnp.sum((x - y) ** 2)


def normal_model(y):
    mean = numpyro.sample("mean", dist.Normal(0.0, 10.0))
    numpyro.sample("y", dist.Normal(mean, 1.0).expand([len(y)]), obs=y)
    numpyro.deterministic("first", mean + y[0])


class Study:
    def __init__(self, y):
        self.y = y

    def model(self):
        normal_model(self.y)

    def loss(self, x):
        return squares(x, self.y)

    def __call__(self, x):
        return self.loss(x)


@dataclasses.dataclass
class Unhashable:
    y: object

    def __call__(self, x):
        return squares(x, self.y)


@dataclasses.dataclass(frozen=True)
class Frozen:
    y: object
    settings: dict = dataclasses.field(default_factory=dict)

    def __call__(self, x):
        return squares(x, self.y)


def read_global(x):
    return squares(x, DATA["y"])


def read_namespace(x):
    return squares(x, SETTINGS.y)


def read_module(x):
    return squares(x, MODULE.y)


def read_blindly(x):
    return squares(x, getattr(SETTINGS, "".join(["y"])))


@jax.jit
def read_compiled(x):
    return squares(x, DATA["y"])


def closure(y):
    return lambda x: squares(x, y)


def default(y):
    return lambda x, y=y: squares(x, y)


def set_in(holder, build):
    def give(y):
        if isinstance(holder, dict):
            holder["y"] = y
        else:
            holder.y = y
        return build()

    return give


STUDY = Study(OLD)
# What is given new data, and builds the loss anew.
SOURCES = {
    "bound method": set_in(STUDY, lambda: STUDY.loss),
    "object": set_in(STUDY, lambda: STUDY),
    "partial": lambda y: functools.partial(squares, y=y),
    "pytree": lambda y: jax.tree_util.Partial(squares, y=y),
    "closure": closure,
    "default": default,
    "dataclass": Unhashable,
    "frozen dataclass": Frozen,
    "global": set_in(DATA, lambda: read_global),
    "namespace": set_in(SETTINGS, lambda: read_namespace),
    "module": set_in(MODULE, lambda: read_module),
    "getattr": set_in(SETTINGS, lambda: read_blindly),
    "compiled": set_in(DATA, lambda: read_compiled),
}


@jax.jit
def compiled_value(loss):
    return loss.value(loss.x0)


@pytest.mark.both
@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_new_data_compile_nothing_and_are_used(source):
    first = Loss.from_function(source(OLD), 0.0)
    assert compiled_value(first) == 2.0
    with count_compiles() as compiled:
        loss = Loss.from_function(source(NEW), 0.0)
        value = compiled_value(loss)
    assert value == 48**2 + 50**2 + 52**2
    assert compiled == []


def test_what_numpy_computed_is_another_program():
    def build(y):
        return Loss.from_function(lambda x: (x - np.mean(y)) ** 2 + x * float(np.max(y)), 1.0)

    found = [float(compiled_value(build(np.asarray(y)))) for y in (OLD, NEW, OLD)]
    assert found == [2.0, 49.0**2 + 52.0, 2.0]


@pytest.mark.both
def test_numpy_arrays_changed_in_place():
    data = np.zeros(3, np.float32)
    study = Study(data)
    before = Loss.from_function(study.loss, 1.0)
    assert compiled_value(before) == 3.0
    data += 1.0
    assert compiled_value(Loss.from_function(study.loss, 1.0)) == 0.0
    with pytest.raises(ValueError, match=r"Study.loss.*changed since the Loss was built.*argument"):
        before.value(before.x0)


def test_arrays_of_equal_values_are_told_apart_later():
    first, second = np.ones(3, np.float32), np.ones(3, np.float32)

    def fn(x):
        return jnp.sum(first * x) + 10 * jnp.sum(second * x)

    assert compiled_value(Loss.from_function(fn, 1.0)) == 33.0
    second[:] = 2.0
    assert compiled_value(Loss.from_function(fn, 1.0)) == 63.0
    first[:] = 2.0
    assert compiled_value(Loss.from_function(fn, 1.0)) == 66.0


@pytest.mark.both
def test_rules_of_gradients_and_callbacks_read_new_data():
    def build(y):
        @jax.custom_vjp
        def fn(x):
            return squares(x, y)

        fn.defvjp(lambda x: (fn(x), x), lambda x, g: (2 * g * jnp.sum(x - y),))

        def host(x):
            shape = jax.ShapeDtypeStruct((), jnp.float32)
            return jax.pure_callback(lambda x: np.float32(np.sum(x - np.asarray(y))), shape, x)

        return Loss.from_function(fn, 1.0), Loss.from_function(host, 1.0)

    gradient = jax.jit(jax.grad(lambda x, loss: loss.value(x)))
    for y, expected in ((OLD, 3.0), (NEW, -147.0)):
        with_rule, with_callback = build(y)
        assert gradient(with_rule.x0, with_rule)[0] == 2 * expected
        assert compiled_value(with_callback) == expected


def test_a_function_runs_again_only_when_what_it_reads_has_changed():
    counter = Counter(STUDY.loss)
    STUDY.y = OLD
    loss = Loss.from_function(counter, 0.0)
    compiled_value(loss)
    count = counter.count
    compiled_value(Loss.from_function(counter, 2.0))
    loss.check_captured()
    assert counter.count == count
    STUDY.y = NEW
    compiled_value(Loss.from_function(counter, 2.0))
    assert counter.count == count + 1


# From zero the first step towards fifty may be too far for the sampler.
@pytest.mark.filterwarnings("ignore:TwoStep.run")
def test_everything_about_a_model_follows_its_data():
    study, key = Study(OLD), random.key(0)

    def answers():
        loss = Loss.from_model(study.model)
        target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, 1.0))
        optimizer = schemes.local_entropy(loss, 1.0, shift=CHEAP)
        result = optimizer.run(key, 15, progress_bar=False)
        data = to_arviz(result, optimizer, observed=True)
        guide = to_guide(Gaussian(loss.x0, jnp.asarray(1e-6)), loss)
        with numpyro.handlers.seed(rng_seed=0):
            trace = numpyro.handlers.trace(guide).get_trace()
        return {
            "run": result.params["mean"],
            "constrain": loss.constrain(loss.x0)["first"],
            "value": loss.value(loss.x0),
            "heat": values.heat(key, target, num_samples=8).value,
            "reverse_kl": reverse_kl(key, RegularizedLoss(loss), "isotropic").gaussian.mean[0],
            "observed": np.asarray(data.constant_data["y"]).mean(),
            "guide": trace["first"]["value"],
        }

    answers()
    study.y = NEW
    with count_compiles() as compiled:
        found = answers()
    minus_log = -dist.Normal(0.0, 10.0).log_prob(0.0) - dist.Normal(0.0, 1.0).log_prob(NEW).sum()
    # The exact mean of the posterior; the run is within some standard errors of 60 draws.
    posterior = 150.0 / 3.01
    np.testing.assert_allclose(found["run"], posterior, atol=0.5)
    np.testing.assert_allclose(found["reverse_kl"], posterior, rtol=1e-3)
    np.testing.assert_allclose([found["constrain"], found["guide"]], 48.0, atol=0.01)
    np.testing.assert_allclose(found["value"], minus_log, rtol=1e-5)
    # Half the curvature 3.01 times four squared normals, which come in pairs: 4 x 1.06.
    np.testing.assert_allclose(found["heat"], minus_log + 3.01 / 2, atol=4.3)
    np.testing.assert_allclose(found["observed"], 50.0)
    assert not any("step" in name or "advance" in name or "_fit" in name for name in compiled)


def test_a_loss_whose_data_changed_is_refused_everywhere():
    study, key = Study(OLD), random.key(0)
    loss = Loss.from_model(study.model)
    target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, 1.0))
    optimizer = schemes.local_entropy(loss, 1.0, shift=shift.Importance(16))
    state = optimizer.init(key)
    study.y = NEW
    for call in (
        lambda: optimizer.run(key, 2),
        lambda: optimizer.init(key),
        lambda: optimizer.step(state),
        lambda: optimizer.draw(key, state),
        lambda: optimizer.get_params(state),
        lambda: loss.constrain(loss.x0),
        lambda: loss.unconstrain({"mean": 0.0}),
        lambda: RegularizedLoss(loss),
        lambda: values.local_entropy(key, target),
        lambda: values.heat(key, target),
        lambda: values.profile(key, loss, taus=[1.0]),
        lambda: reverse_kl(key, target),
    ):
        with pytest.raises(ValueError, match="changed since the Loss was built"):
            call()
    study.y = OLD
    assert optimizer.run(key, 2, progress_bar=False).state.step == 2


def test_minibatches_of_rows_beside_captured_data():
    weights = np.arange(1.0, 5.0, dtype=np.float32)

    def fn(x, rows):
        return jnp.mean((x - rows) ** 2) * weights.sum() + jnp.sum(jnp.asarray(weights) * x)

    loss = Loss.from_function(fn, 2.0, jnp.ones(12), minibatch=Minibatch(4))
    optimizer = schemes.heat(loss, 0.1, fit=fit.RobbinsMonro(5))
    optimizer.run(random.key(0), 2, progress_bar=False)
    weights *= 2
    again = Loss.from_function(fn, 2.0, jnp.ones(12), minibatch=Minibatch(4))
    batch, scale = again.draw_batch(random.key(0), again.arguments)
    assert jax.jit(lambda loss: loss.evaluate(loss.x0, batch, scale))(again) == 20.0 + 40.0


@pytest.mark.both
def test_within_transformations_captured_tracers_are_leaves():
    def centre(y):
        loss = Loss.from_function(lambda x: squares(x, y), jnp.zeros(3))
        return jax.jit(jax.grad(lambda x, loss: loss.value(x)))(loss.x0, loss)

    np.testing.assert_allclose(jax.jit(centre)(NEW), -2 * NEW)
    np.testing.assert_allclose(jax.vmap(centre)(jnp.stack([OLD, NEW])), -2 * np.stack([OLD, NEW]))


@pytest.mark.both
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])  # noqa: S301
def test_copies_keep_their_data(copied):
    loss = Loss.from_function(Frozen(OLD), 0.0)
    again = copied(loss)
    assert compiled_value(again) == again.value(again.x0) == 2.0


@pytest.mark.both
def test_what_an_environment_sees():
    nested = {"a": [OLD, {"b": (np.zeros(2), "text")}]}

    def fn(x):
        return x + nested["a"][1]["b"][0].sum()

    seen = Environment(fn)
    assert seen.complete
    assert seen.unchanged
    assert seen.tokens == Environment(fn).tokens
    nested["a"][1]["b"][0][1] = 3.0
    assert not seen.unchanged
    # A generator of random numbers is nothing that can be looked into.
    generator = np.random.default_rng(0)
    assert not Environment(lambda: generator.normal()).complete
