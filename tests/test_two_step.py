# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""The driver: steps, scans, chunks, continuation, trouble."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from conftest import Counter, long
from harness import count_compiles
from jax import random
from test_engines import random_quadratic
from test_loss import SIGMA, Y, eight_schools

from numpyro_regloss import (
    Gaussian,
    Loss,
    Minibatch,
    RegularizedLoss,
    RejectedError,
    TwoStep,
    fit,
    problems,
    reverse_kl,
    schemes,
    shift,
    values,
)

PROBLEM = random_quadratic(3, seed=20)
CHEAP = shift.Importance(num_samples=400)


def make(engine=CHEAP, tau=0.3, temperature=1.0, start=0.0, **kwargs):
    loss = Loss.from_function(PROBLEM.loss, np.full(3, start))
    return TwoStep(loss, tau, shift=engine, fit=fit.ForwardKL(), temperature=temperature, **kwargs)


def same(a, b):
    def value(leaf):
        return random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf

    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    # NaN is what was not looked at.
    return all(np.array_equal(value(x), value(y), equal_nan=True) for x, y in leaves)


ENGINES = {
    "importance": CHEAP,
    "nuts": shift.NUTS(num_warmup=50, num_samples=20, num_chains=2),
}


# The driver is the subject: with an engine that has a state as well, where there is time.
CASES = ["importance", long("nuts")]


@pytest.mark.both
@pytest.mark.parametrize("engine", CASES)
def test_a_chunked_run_equals_a_whole_one_bit_for_bit(engine):
    optimizer = make(ENGINES[engine])
    whole = optimizer.run(random.key(0), 12, progress_bar=False)
    first = optimizer.run(random.key(0), 5, progress_bar=False)
    rest = optimizer.run(random.key(9), 7, init_state=first.state, progress_bar=False)
    assert same(whole.state, rest.state)
    parts = jax.tree.map(lambda a, b: np.concatenate([a, b]), first.history, rest.history)
    assert same(whole.history, parts)
    one_by_one = optimizer.run(random.key(0), 12, progress_bar=False, callback=lambda *_: False)
    assert same(whole.history, one_by_one.history)


def test_scan_and_step_do_the_same():
    optimizer = make()
    state = optimizer.init(random.key(0))
    scanned, history = optimizer.scan(state, 6)
    run = optimizer.run(random.key(0), 6, progress_bar=False)
    assert same(history, run.history)
    for _ in range(6):
        state, info = optimizer.step(state)
    np.testing.assert_allclose(state.reference.mean, scanned.reference.mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(info.loss, history.loss[-1], rtol=1e-5)
    np.testing.assert_allclose(optimizer.get_params(state), run.params, rtol=1e-5, atol=1e-6)


@pytest.mark.both
@pytest.mark.parametrize("engine", CASES)
def test_new_values_trace_nothing_and_compile_nothing(engine):
    counter = Counter(lambda x, data, weight: weight * jnp.mean((x - data) ** 2))

    def build(start, tau, temperature, data, weight):
        loss = Loss.from_function(counter, np.full(3, start), np.full((5, 3), data), weight)
        return TwoStep(
            loss, tau, shift=ENGINES[engine], fit=fit.ForwardKL(), temperature=temperature
        )

    build(0.0, 0.3, 1.0, 1.0, 2.0).run(random.key(0), 4, progress_bar=False)
    count = counter.count
    weakly_typed = jnp.asarray(2.0)
    with count_compiles() as compiled:
        other = build(1.0, 0.2, 0.5, -1.0, 0.5)
        other.run(random.key(1), 9, progress_bar=False)
        other.run(random.key(1), 3, np.zeros((5, 3)), 1.0, progress_bar=False)
        other.run(random.key(1), 3, np.zeros((5, 3)), weakly_typed, progress_bar=False)
        dataclasses.replace(other, tau=0.7).run(random.key(2), 2, progress_bar=False)
    assert counter.count == count
    assert compiled == []


def test_new_data_of_a_model_trace_nothing():
    counter = Counter(eight_schools)

    def run(effects, seed):
        loss = Loss.from_model(counter, 8, SIGMA, effects, rng_key=random.key(seed))
        return schemes.local_entropy(loss, 0.1, shift=CHEAP).run(
            random.key(0), 3, progress_bar=False
        )

    run(Y, 0)
    count = counter.count
    with count_compiles() as compiled:
        result = run(Y + 1, 1)
    assert counter.count == count
    assert compiled == []
    assert {name: np.shape(v) for name, v in result.params.items()} == {
        "mu": (),
        "tau": (),
        "theta": (8,),
        "twice": (8,),
    }
    assert result.params["tau"] > 0


def test_vmap_over_keys_tau_and_temperature():
    optimizer = make()

    @jax.jit
    @jax.vmap
    def many(rng_key, tau, temperature):
        changed = dataclasses.replace(optimizer, tau=tau, temperature=temperature)
        return changed.scan(changed.init(rng_key), 5)[1]

    keys, tau = random.split(random.key(0), 3), jnp.array([0.1, 0.2, 0.3])
    temperature = jnp.array([1.0, 0.5, 2.0])
    history = many(keys, tau, temperature)
    for i in range(3):
        single = make(tau=float(tau[i]), temperature=float(temperature[i]))
        expected = single.scan(single.init(keys[i]), 5)[1]
        # Batched sums are ordered differently: rounding, amplified by the weights.
        np.testing.assert_allclose(history.fitted.mean[i], expected.fitted.mean, atol=1e-4)


def test_tau_schedules():
    schedule = optax.exponential_decay(0.5, 1, 0.9)
    history = make(tau=schedule).run(random.key(0), 20, progress_bar=False).history
    expected = 0.5 * 0.9 ** np.arange(20)
    np.testing.assert_allclose(history.tau, expected, rtol=1e-5)
    np.testing.assert_allclose(history.reference.scale, np.sqrt(expected), rtol=1e-5)


def test_tau_per_group_of_parameters():
    def fn(params):
        return 0.5 * jnp.sum(params["a"] ** 2) + 0.5 * jnp.sum(params["b"] ** 2)

    loss = Loss.from_function(fn, {"a": jnp.ones(2), "b": jnp.ones((2, 1))})
    optimizer = schemes.heat(loss, {"a": 0.25, "b": 1.0}, fit=fit.RobbinsMonro(2000))
    params = optimizer.run(random.key(0), 1, progress_bar=False).params
    # One proximal step contracts each group by 1 / (1 + tau).
    np.testing.assert_allclose(params["a"], np.full(2, 0.8), atol=2e-3)
    np.testing.assert_allclose(params["b"], np.full((2, 1), 0.5), atol=2e-3)
    assert same(dataclasses.replace(optimizer, temperature=1.0), optimizer)
    model_loss = Loss.from_model(eight_schools, 8, SIGMA, Y)
    groups = schemes.local_entropy(model_loss, {"mu": 1.0, "tau": 0.1, "theta": 0.5}, shift=CHEAP)
    state = groups.init(random.key(0))
    np.testing.assert_allclose(state.reference.scale**2, [1.0, 0.1] + [0.5] * 8, rtol=1e-6)


def test_callback_sees_every_step_and_stops():
    seen = []

    def callback(state, info):
        seen.append((int(state.step), float(info.loss)))
        return len(seen) == 4

    result = make().run(random.key(0), 10, progress_bar=False, callback=callback)
    assert [step for step, _ in seen] == [1, 2, 3, 4]
    np.testing.assert_allclose(result.history.loss, [loss for _, loss in seen], rtol=1e-6)


def test_ctrl_c_returns_what_there_is():
    def interrupt(state, info):
        del info
        if state.step == 3:
            raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="interrupted after 3 of 10"):
        result = make().run(random.key(0), 10, progress_bar=False, callback=interrupt)
    assert result.history.loss.shape == (3,)
    assert int(result.state.step) == 3


def test_progress_bar(capsys):
    make().run(random.key(0), 5)
    shown = capsys.readouterr().err
    for word in ("two-step", "5/5", "loss=", "tau=0.3", "ess="):
        assert word in shown


def test_draw_and_get_params():
    optimizer = make()
    result = optimizer.run(random.key(0), 5, progress_bar=False)
    draws = optimizer.draw(random.key(1), result.state)
    assert draws.x.shape == (1, 400, 3)
    np.testing.assert_allclose(optimizer.get_params(result.state), result.params)


def test_history_counts_evaluations():
    history = make().run(random.key(0), 3, progress_bar=False).history
    assert history.num_loss.tolist() == [401, 401, 401]
    assert history.num_grad.tolist() == [0, 0, 0]


# Of chains, `test_hostile.py` has the least and the most.
@pytest.mark.long
def test_history_counts_gradients_of_a_warm_up():
    nuts = make(ENGINES["nuts"]).run(random.key(0), 3, progress_bar=False).history
    # 40 transitions of at least one leapfrog step, two chains and the centre; warm-up comes on top once.
    assert nuts.num_grad[0] > nuts.num_grad[1] >= 43


def nan_beyond(limit):
    return lambda x: jnp.where(jnp.sum(x**2) > limit, jnp.nan, jnp.sum((x - 1.0) ** 2))


@pytest.mark.parametrize("engine", CASES)
def test_nan_for_good_keeps_the_reference_and_raises(engine):
    # Finite at the start only: no cloud and no path ever finds another finite value.
    loss = Loss.from_function(lambda x: jnp.where(jnp.all(x == 0), 0.0, jnp.nan), np.zeros(3))
    optimizer = TwoStep(loss, 0.1, shift=ENGINES[engine], fit=fit.ForwardKL())
    with pytest.raises(RejectedError, match="No step succeeded") as caught:
        optimizer.run(random.key(0), 3, progress_bar=False)
    result = caught.value.result
    assert not result.history.ok.any()
    np.testing.assert_array_equal(result.params, np.zeros(3))


@pytest.mark.parametrize("engine", CASES)
def test_a_nan_region_is_survived(engine):
    loss = Loss.from_function(nan_beyond(9.0), np.zeros(3))
    optimizer = TwoStep(loss, 0.1, shift=ENGINES[engine], fit=fit.ForwardKL())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TwoStep.run: .* rejected")
        result = optimizer.run(random.key(0), 40, progress_bar=False)
    assert np.isfinite(result.params).all()
    assert np.all(np.abs(result.params - 1.0) < 0.4)


@pytest.mark.parametrize("engine", CASES)
def test_a_bad_batch_is_rejected_and_the_run_recovers(engine):
    # Row 0 of the data is NaN: batches that hold it fail, the others go on.
    data = np.ones((8, 3))
    data[0] = np.nan
    loss = Loss.from_function(
        lambda x, d: jnp.mean((x - d) ** 2), np.zeros(3), data, minibatch=Minibatch(1)
    )
    optimizer = TwoStep(loss, 0.3, shift=ENGINES[engine], fit=fit.ForwardKL())
    state = optimizer.init(random.key(0), np.ones((8, 3)))
    with pytest.warns(UserWarning, match="steps were rejected"):
        result = optimizer.run(random.key(0), 60, init_state=state, progress_bar=False)
    ok = result.history.ok
    assert 0 < np.sum(~ok) < 30
    kept = np.flatnonzero(~ok[:-1])
    np.testing.assert_array_equal(
        result.history.reference.mean[kept], result.history.reference.mean[kept + 1]
    )
    assert np.all(np.abs(result.params - 1.0) < 0.3)


def test_minibatches_of_heat_steps():
    rows = np.random.default_rng(0).normal(size=(200, 3)) + 2.0
    loss = Loss.from_function(
        lambda x, d: 0.5 * jnp.mean(jnp.sum((x - d) ** 2, -1)),
        np.zeros(3),
        rows,
        minibatch=Minibatch(20),
    )
    optimizer = schemes.heat(loss, 0.5, temperature=1.0, fit=fit.RobbinsMonro(40))
    result = optimizer.run(random.key(0), 30, progress_bar=False)
    # Each step averages 40 batches of 20 rows of sd 1, and contracts earlier errors: sd about 0.03.
    assert np.all(np.abs(result.params - rows.mean(0)) < 0.12)


def test_minimize_in_one_call():
    rosenbrock = problems.rosenbrock()
    result = schemes.minimize(
        random.key(0), rosenbrock.loss, np.array([0.8, 0.6]), num_steps=50, tau=0.01, shift=CHEAP
    )
    assert rosenbrock.loss(jnp.asarray(result.params)) < 0.3
    heat = schemes.minimize(
        random.key(0), PROBLEM.loss, np.zeros(3), num_steps=60, tau=2.0, scheme=schemes.heat
    )
    assert PROBLEM.loss(jnp.asarray(heat.params)) < 0.05 * PROBLEM.loss(jnp.zeros(3))


@pytest.mark.parametrize("before", [False, True])
def test_x64_switched_after_a_loss_was_built(before):
    def build():
        loss = Loss.from_function(lambda x: jnp.sum((x - 1.0) ** 2), np.zeros(2))
        optimizer = TwoStep(loss, 0.1, shift.Importance(20), fit.ForwardKL())
        target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, 0.1))
        return loss, optimizer, target, optimizer.init(random.key(0))

    with jax.enable_x64(before):
        loss, optimizer, target, state = build()
    with jax.enable_x64(not before):
        key = random.key(0)
        doors = {
            "TwoStep.init": lambda: optimizer.init(key),
            "TwoStep.run": lambda: optimizer.run(key, 2, progress_bar=False),
            "TwoStep.step": lambda: optimizer.step(state),
            "TwoStep.scan": lambda: optimizer.scan(state, 2),
            "TwoStep.draw": lambda: optimizer.draw(key, state),
            "RegularizedLoss": lambda: RegularizedLoss(loss),
            "Loss": lambda: loss.value(loss.x0),
            "values.heat": lambda: values.heat(key, target),
            "values.local_entropy": lambda: values.local_entropy(key, target),
            "reverse_kl": lambda: reverse_kl(key, target),
        }
        for door, call in doors.items():
            with pytest.raises(ValueError, match=f"{door}.*x64.*Build the Loss and the optimizer"):
                call()
        again = build()[1]
        with pytest.raises(ValueError, match="expected a state in JAX's default float.*start anew"):
            again.run(key, 2, init_state=state, progress_bar=False)
        assert again.run(key, 2, progress_bar=False).history.ok.all()
        # What was found before can still be looked at; in less precision JAX itself warns.
        if not before:
            np.testing.assert_array_equal(optimizer.get_params(state), np.zeros(2))


@pytest.mark.both
def test_raw_keys_are_accepted():
    optimizer = make()
    a = optimizer.run(random.PRNGKey(0), 2, progress_bar=False)
    b = optimizer.run(random.key(0), 2, progress_bar=False)
    assert same(a.state, b.state)


class Keyed(shift.Shift):
    """An engine of two verbs that is no pytree and keeps a random key in its state."""

    def init(self, rng_key, target):
        del target
        return {"key": rng_key, "calls": jnp.array(0)}

    def step(self, rng_key, state, target):
        _, draws, info = CHEAP.step(rng_key, (), target)
        failed = state["calls"] == 1
        state = {"key": random.fold_in(state["key"], 1), "calls": state["calls"] + 1}
        return state, draws, info._replace(ok=info.ok & ~failed)


def test_a_rejected_step_keeps_every_state():
    optimizer = make(Keyed())
    with pytest.warns(UserWarning, match="2 of 3 steps were rejected"):
        result = optimizer.run(random.key(0), 3, progress_bar=False)
    # The second step fails, is rolled back, and so the third is the second again.
    assert result.history.ok.tolist() == [True, False, False]
    assert int(result.state.shift["calls"]) == 1
    np.testing.assert_array_equal(
        result.history.reference.mean[1], result.history.reference.mean[2]
    )


def test_tau_is_the_optimizers_and_not_the_states():
    state = make(tau=0.3).run(random.key(0), 2, progress_bar=False).state
    history = make(tau=0.01).run(random.key(0), 2, init_state=state, progress_bar=False).history
    np.testing.assert_allclose(history.reference.scale, 0.1, rtol=1e-6)
    draws = make(tau=0.01).draw(random.key(0), state)
    # 200 antithetic pairs of sd 0.1 in three dimensions: within a fifth.
    assert abs(np.std(draws.x - state.reference.mean) - 0.1) < 0.02


def test_a_rejected_step_of_a_schedule_leaves_a_usable_state():
    optimizer = make(tau=optax.linear_schedule(0.1, 0.0, 3))
    state, history = optimizer.scan(optimizer.init(random.key(0)), 5)
    assert history.ok.tolist() == [True, True, True, False, False]
    again = make(tau=0.1).run(random.key(0), 2, init_state=state, progress_bar=False)
    assert again.history.ok.all()


def test_params_at_other_data():
    def model(y):
        m = numpyro.sample("m", dist.Normal(0.0, 1.0))
        numpyro.deterministic("sum", jnp.sum(y))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Normal(m, 1.0), obs=y)

    optimizer = schemes.local_entropy(Loss.from_model(model, np.zeros(3)), 0.1, shift=CHEAP)
    result = optimizer.run(random.key(0), 1, np.ones(3), progress_bar=False)
    assert result.params["sum"] == 3.0
    assert optimizer.get_params(result.state, np.ones(3))["sum"] == 3.0
    assert optimizer.get_params(result.state)["sum"] == 0.0
