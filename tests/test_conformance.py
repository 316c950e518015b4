# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""The rules that all engines follow, over the whole table: one program per engine, all else is data."""

import pickle
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ENGINES, SIGMAS, Counter, scheme
from jax import random

from numpyro_regloss import Checkpoint, Loss
from numpyro_regloss._core.pytree import all_finite
from numpyro_regloss.fit import FitInfo
from numpyro_regloss.two_step import outer_step
from numpyro_regloss.two_step.checkpoint.fingerprint import fingerprint
from numpyro_regloss.two_step.checkpoint.keeper import Keeper

CURVATURE = np.array([[2.0, 0.3], [0.3, 0.8]])
CENTER, START, TAU, TEMPERATURE = np.array([0.7, -0.4]), np.zeros(2), 0.3, 0.8
STEPS = 3
# The same code as another row, with another choice that test_engines.py, or the file of kernels or anchors, checks
# against exact answers.
REPEATED = {
    "importance",
    "importance_iid",
    "importance_sobol",
    "nuts",
    "nuts_dense",
    "kernel_ensemble",
    "robbins_monro_single",
    "proximal",
    "newton_diagonal",
}
MOST = ENGINES.keys() - REPEATED
# A new engine has no tests of its own yet, and each rule is tried on it.
NEW = "page_shift"


def rows(rule, chosen=MOST):
    """The table as parameters: exempt rows with their reason, and rows that only `--everything` tries.

    These are what repeats another row, and, of rules whose programs are others than the one that all rules share,
    engines whose own tests look at that rule.
    """
    found = []
    for name, row in ENGINES.items():
        marks = []
        if rule in row.exempt:
            marks.append(pytest.mark.skip(reason=row.exempt[rule]))
        if row.long or name not in chosen | {NEW}:
            marks.append(pytest.mark.long)
        found.append(pytest.param(name, marks=marks))
    return found


def bowl(x, center, factor, offset):
    gap = x - center
    return 0.5 * factor * gap @ jnp.asarray(CURVATURE, x.dtype) @ gap + offset


def data(center=CENTER, factor=1.0, offset=0.0):
    return jnp.asarray(center, float), jnp.asarray(factor, float), jnp.asarray(offset, float)


def build(name, loss=bowl):
    loss = Loss.from_function(loss, START, *data())
    return scheme(name, loss, TAU, TEMPERATURE)


@cache
def known(name):
    """The engine's scheme, whose loss counts its traces, its state after some steps, and what they did."""
    counter = Counter(bowl)
    optimizer = build(name, counter)
    first = state = optimizer.init(random.key(0))
    infos = []
    for _ in range(STEPS):
        state, info = optimizer.step(state)
        infos.append(info)
    return optimizer, counter, first, state, infos


def exact_mean(reference, temperature, center=CENTER):
    """Of q, and of the heat step as well: both Gaussians are the posterior of a conjugate model."""
    precision = np.linalg.inv(np.asarray(reference.covariance, float))
    pull = precision @ np.asarray(reference.mean, float) + CURVATURE @ center / temperature
    return np.linalg.solve(precision + CURVATURE / temperature, pull)


def assert_exact(info, center=CENTER):
    assert info.ok
    exact = exact_mean(info.reference, TEMPERATURE, center)
    error = FitInfo.of(info.fit).mean_error
    sd = np.sqrt(np.asarray(info.reference.variance))
    # Fits that know no error, and the bias of Langevin steps, come within a tenth of the reference's width.
    bound = 0.1 * sd + (0.0 if error is None else SIGMAS * np.asarray(error))
    assert np.all(np.abs(np.asarray(info.fitted.mean) - exact) < bound)


def is_weak(leaf):
    return not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) and leaf.weak_type


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = random.key_data(x), random.key_data(y)
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", rows("types"))
def test_states_keep_their_types(name):
    optimizer, _, first, state, _ = known(name)
    after = jax.eval_shape(lambda state: optimizer.step(state)[0], first)
    assert jax.tree.structure(first) == jax.tree.structure(after) == jax.tree.structure(state)
    for a, b, c in zip(*map(jax.tree.leaves, (first, after, state)), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype) == (c.shape, c.dtype)
        assert not (is_weak(a))
        assert not (is_weak(c))


@pytest.mark.parametrize("name", rows("exact"))
def test_exact_at_a_first_and_at_moved_centres(name):
    optimizer, _, _, state, infos = known(name)
    for info in infos:
        assert_exact(info)
    far = np.array([4.0, 3.0])
    for _ in range(2):
        state, info = optimizer.step(state, *data(far))
    # The step before followed the data; this one starts elsewhere than it was tuned.
    assert np.isfinite(info.fitted.mean).all()


@pytest.mark.parametrize("name", rows("one trace"))
def test_one_trace_then_none(name):
    optimizer, counter, first, state, _ = known(name)
    count = counter.count
    for start, values in ((first, data(offset=2.0)), (state, data(np.ones(2), 0.5))):
        optimizer.step(start, *values)
    other = scheme(name, Loss.from_function(counter, np.ones(2), *data()), 2 * TAU, 1.5)
    other.step(first)
    assert counter.count - count <= 2  # those that build another Loss, and no step


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("name", rows("undefined"))
def test_an_undefined_loss_keeps_the_reference(name, value):
    optimizer, _, _, state, _ = known(name)
    after, info = optimizer.step(state, *data(offset=value))
    assert not info.ok
    np.testing.assert_array_equal(after.reference.mean, info.reference.mean)
    assert all_finite(after)
    # Once the loss is what it was, the run goes on.
    assert optimizer.step(after)[1].ok


@pytest.mark.parametrize("name", rows("hostile", MOST - {"smc"}))
def test_hostile_values_leave_a_state_to_go_on_from(name):
    optimizer, _, _, state, _ = known(name)
    for values in (
        data(offset=np.inf),
        data(offset=1e30),
        data(factor=0.0),
        data(factor=1e12),
        data(factor=-1e3),
        data(np.full(2, 1e20)),
    ):
        after, _ = optimizer.step(state, *values)
        assert all_finite(after), values
        later, info = optimizer.step(after)
        assert all_finite(later), values
        assert np.isfinite(info.loss)


@pytest.mark.parametrize("name", rows("pickles"))
def test_engines_and_states_pickle(name):
    optimizer, _, _, state, _ = known(name)
    for part in (optimizer.shift, optimizer.fit, optimizer.anchor):
        assert repr(part).startswith(f"{type(part).__name__}(")
        assert repr(pickle.loads(pickle.dumps(part))) == repr(part)
    back = pickle.loads(pickle.dumps(state))
    assert_equal(back, state)
    assert_equal(optimizer.step(back), optimizer.step(state))


@pytest.mark.parametrize("name", rows("checkpoint"))
def test_states_and_infos_survive_a_checkpoint(name, tmp_path):
    optimizer, counter, _, state, infos = known(name)
    arguments, start = optimizer.loss.bind(), random.key(0)
    shapes, row = jax.eval_shape(lambda: (state, infos[0]))
    text = fingerprint(optimizer, arguments, start, shapes, row)
    assert "0x" not in str(text)
    history = jax.tree.map(lambda *a: np.stack(a), *infos)
    with Keeper(Checkpoint(tmp_path), text, shapes, row) as keeper:
        assert keeper.load(STEPS) is None
        assert keeper.finish(state, (history, np.zeros(STEPS)), None, None) is None
    # Built anew, it is the same optimizer.
    text = fingerprint(build(name, counter), arguments, start, shapes, row)
    with Keeper(Checkpoint(tmp_path), text, shapes, row) as keeper:
        saved = keeper.load(STEPS)
    assert jax.tree.structure(saved.state) == jax.tree.structure(state)
    assert_equal(saved.state, state)
    assert_equal(saved.infos, history)
    assert_equal(optimizer.step(saved.state), optimizer.step(state))


@pytest.mark.parametrize("name", rows("no leaks", MOST - {"nuts_dense"}))
def test_no_tracer_leaks(name):
    optimizer, _, _, state, _ = known(name)
    with jax.checking_leaks():
        jax.make_jaxpr(
            lambda state: outer_step.step.__wrapped__(optimizer, state, optimizer.loss.bind())
        )(state)


@pytest.mark.parametrize("name", rows("vmap", {"hmc", "reverse_kl", "newton"}))
def test_runs_side_by_side_are_the_runs(name):
    optimizer, *_ = known(name)
    keys = random.split(random.key(3), 2)

    @jax.jit
    def run(key):
        return optimizer.step(optimizer.init(key))[1]

    several = jax.jit(jax.vmap(run))(keys)
    for i, key in enumerate(keys):
        info = optimizer.step(optimizer.init(key))[1]
        # Other programs round in another order, which chains amplify.
        np.testing.assert_allclose(several.fitted.mean[i], info.fitted.mean, rtol=0.02, atol=0.02)
        assert several.ok[i]


@pytest.mark.parametrize("name", rows("eager", {"robbins_monro"}))
def test_eager_is_jitted(name):
    optimizer, _, _, state, _ = known(name)
    eager = outer_step.step.__wrapped__(optimizer, state, optimizer.loss.bind())[1]
    info = optimizer.step(state)[1]
    np.testing.assert_allclose(eager.fitted.mean, info.fitted.mean, rtol=0.02, atol=0.02)
    np.testing.assert_allclose(eager.loss, info.loss, rtol=1e-5)


@pytest.mark.parametrize("name", rows("x64", {"importance_chunked", "hmc", "newton"}))
def test_double_precision(name, x64):
    optimizer = build(name)
    state, info = optimizer.step(optimizer.init(random.key(0)))
    assert_exact(info)
    floats = [a for a in jax.tree.leaves((state, info)) if jnp.issubdtype(a.dtype, jnp.floating)]
    assert {a.dtype for a in floats} == {jnp.dtype("float64")}


def test_a_new_engine_is_one_line_and_meets_every_rule():
    rules = [rule for rule in globals().values() if hasattr(rule, "pytestmark")]
    assert rules
    for rule in rules:
        (table,) = (mark.args[1] for mark in rule.pytestmark if mark.args[0] == "name")
        assert NEW in [row.values[0] for row in table if not row.marks], rule.__name__
