# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Losses of thousands of operations: how often Python runs them, and how often programs hold them."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from conftest import Counter, long, with_long
from harness import count_compiles
from jax import random

from numpyro_regloss import Loss, Minibatch, schemes, shift, to_arviz
from numpyro_regloss._core.pytree import replace_fields
from numpyro_regloss.losses import fence, long_losses
from numpyro_regloss.losses.factorizations import equations
from numpyro_regloss.two_step import outer_step

# Here a loss is long from a fifth of the operations on: nothing else depends on the number, and programs compile
# sooner.
NUM_SITES, LESS = 9, 5
Y = jnp.linspace(-1.0, 1.0, NUM_SITES)
KEY = random.key(0)
ENGINES = {
    "pairs": shift.Importance(400),
    "many chunks, odd": shift.Importance(401, antithetic=False, chunk_size=101),
    "Sobol": shift.Importance(512, noise="sobol", ess=0.3),
    "four chunks": shift.Importance(400, chunk_size=100),
}


def model(y):
    total = 0.0
    for i in range(len(y)):
        prior = dist.HalfNormal(1.0) if i % 2 else dist.Normal(0.0, 1.0)
        m = numpyro.sample(f"m{i}", prior)
        numpyro.sample(f"y{i}", dist.Normal(m, 1.0), obs=y[i])
        total = total + m
    # The only arctangent of the program: by it copies of the loss are counted.
    numpyro.factor("mark", 0.01 * jnp.arctan(total))


def optimizer(loss, engine=ENGINES["pairs"], tau=0.1):
    return schemes.local_entropy(loss, tau, engine)


@pytest.fixture(scope="module", autouse=True)
def fewer_operations_are_many():
    with pytest.MonkeyPatch.context() as patch:
        for module in (long_losses, fence):
            patch.setattr(module, "MANY_OPERATIONS", module.MANY_OPERATIONS // LESS)
        yield


def test_which_losses_are_long(monkeypatch):
    monkeypatch.setattr(long_losses, "MANY_OPERATIONS", LESS * long_losses.MANY_OPERATIONS)
    assert Loss.from_model(model, jnp.linspace(-1.0, 1.0, LESS * NUM_SITES)).is_long
    assert not Loss.from_model(model, Y).is_long


@pytest.fixture(scope="module")
def loss():
    return Loss.from_model(model, Y)


def copies(jaxpr):
    return sum(eqn.primitive.name == "atan" for eqn in equations(jaxpr.jaxpr))


@pytest.mark.both
def test_python_runs_a_long_model_a_few_times_and_draws_compile_it_no_more():
    counter = Counter(model)
    loss = Loss.from_model(counter, Y)
    assert loss.is_long
    # What it reads, and its loss.
    assert counter.count == 2
    some = optimizer(loss)
    result = some.run(KEY, 3, progress_bar=False)
    # The sites of the last centre.
    assert counter.count == 3
    with count_compiles() as compiled:
        data = to_arviz(result, some)
        again = some.draw(None, result.state)
    # The labels of the sites.
    assert counter.count == 4
    assert not {"draw", "advance", "jit_draw", "jit_advance"} & set(compiled)
    assert data["shift_posterior"]["x"].shape[0] == 3
    np.testing.assert_array_equal(
        np.sort(data["sample_stats"]["loss"].values.ravel()),
        np.sort(np.asarray(again.loss)[0, data["sample_stats"]["draw_index"].values.ravel()]),
    )


@pytest.mark.parametrize("engine", with_long(ENGINES, {"Sobol", "four chunks"}))
def test_a_step_holds_a_long_loss_once(loss, engine):
    some = optimizer(loss, ENGINES[engine])
    arguments = loss.bind()
    state = some.init(KEY)
    one = outer_step.step.trace(some, state, arguments).jaxpr
    assert copies(one) == 1
    assert copies(outer_step.first_state.trace(some, KEY, arguments).jaxpr) == 0
    # A short loss is evaluated at the center apart.
    short = optimizer(replace_fields(loss, is_long=False), ENGINES[engine])
    assert copies(outer_step.step.trace(short, state, arguments).jaxpr) == 2


def test_small_chunks_leave_the_center_out(loss):
    some = optimizer(loss, shift.Importance(400, chunk_size=20))
    assert copies(outer_step.step.trace(some, some.init(KEY), loss.bind()).jaxpr) == 2


@pytest.mark.parametrize("engine", ["many chunks, odd", long("pairs"), long("Sobol")])
def test_a_long_loss_has_the_numbers_of_a_short_one(loss, engine):
    whole = optimizer(loss, ENGINES[engine])
    short = optimizer(replace_fields(loss, is_long=False, fenced=False), ENGINES[engine])
    a, b = (some.run(KEY, 3, progress_bar=False) for some in (whole, short))
    for name in ("loss", "reference", "fitted"):
        for x, y in zip(*(jax.tree.leaves(getattr(r.history, name)) for r in (a, b)), strict=True):
            np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5)
    centers = a.history.reference.mean
    np.testing.assert_allclose(a.history.loss, jax.vmap(loss.value)(centers), rtol=1e-5)
    # One more evaluation per chunk than draws, in place of one per step.
    chunks = a.history.num_loss - b.history.num_loss + 1
    assert (chunks >= 1).all()
    assert (chunks <= 4).all()
    key = outer_step.draw_key(a.state.rng_key, a.state.step)
    x, y = whole.draw(None, a.state), whole.draw(key, a.state)
    np.testing.assert_allclose(x.x, y.x, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(x.loss, y.loss, rtol=1e-5)


@pytest.mark.both
def test_runs_of_a_long_loss_are_equal_in_parts_and_again(loss):
    some = optimizer(loss)
    whole, again = (some.run(KEY, 5, progress_bar=False) for _ in range(2))
    part = some.run(KEY, 2, progress_bar=False)
    # NumPy's numbers become JAX's by a small program of JAX's own.
    other = Loss.from_model(model, np.asarray(Y) + 1.0)
    with count_compiles() as compiled:
        rest = some.run(KEY, 3, init_state=part.state, progress_bar=False)
        optimizer(other, tau=0.2).run(KEY, 3, progress_bar=False)
    assert compiled == []
    for other in (again, rest):
        np.testing.assert_array_equal(whole.state.reference.mean, other.state.reference.mean)
        np.testing.assert_array_equal(whole.history.loss[-3:], other.history.loss[-3:])
    called = []
    some.run(KEY, 5, progress_bar=False, callback=lambda _, info: called.append(info.loss))
    np.testing.assert_allclose(called, whole.history.loss, rtol=1e-6)


def test_a_start_without_a_finite_loss_is_refused_before_any_callback(loss):
    called = []
    for start in ("run", "init"):
        call = getattr(optimizer(loss), start)
        more = (2,) if start == "run" else ()
        given = {"progress_bar": False, "callback": lambda *_: called.append(1)}
        with pytest.raises(ValueError, match="expected a finite loss at the start"):
            call(KEY, *more, Y.at[3].set(jnp.nan), **(given if start == "run" else {}))
    assert not called


def test_gradients_of_a_long_loss(loss):
    # It also reads its data one by one, which `test_arviz.py` sees in the program.
    assert loss.fenced
    x = 0.1 * jnp.arange(loss.dim) / loss.dim
    short = replace_fields(loss, is_long=False, fenced=False)
    wanted = jax.jit(jax.grad(short.value))(x)
    for derived in (jax.grad(loss.value), jax.jit(jax.grad(loss.value))):
        np.testing.assert_allclose(derived(x), wanted, rtol=1e-4, atol=1e-5)


def test_of_minibatches_the_center_has_its_own():
    def plated(y):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    loss = Loss.from_model(plated, Y, minibatch=Minibatch(9))
    some = optimizer(replace_fields(loss, is_long=True))
    other = optimizer(replace_fields(loss, is_long=False))
    a, b = (one.run(KEY, 2, progress_bar=False).history.loss for one in (some, other))
    np.testing.assert_allclose(a, b, rtol=1e-5)
