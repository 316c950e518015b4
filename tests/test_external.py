# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Losses that JAX cannot trace: calls through executors, failures, interrupts, and evaluation by hand."""

import json
import multiprocessing
import os
import pickle
import re
import signal
import threading
import time
import warnings
from concurrent.futures import (
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
)

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import simulators
from conftest import ENGINES, with_long
from jax import random
from numpyro.infer import AIES, ESS, NUTS

from numpyro_regloss import (
    Gaussian,
    Loss,
    Record,
    RegularizedLoss,
    RejectedError,
    TwoStep,
    fit,
    reverse_kl,
    schemes,
    score_matching,
    shift,
    values,
)
from numpyro_regloss.losses.caller import as_reals, check_executor

KEY = random.key(0)
PARAMS = {"a": 1.0, "b": np.zeros(2)}
THREADS = ThreadPoolExecutor(3)


def distance(params):
    return (params["a"] - 0.5) ** 2 + float(np.sum((params["b"] - 1.0) ** 2))


def fails_far_out(params):
    if params["a"] > 1.2:
        raise ZeroDivisionError("no such place")
    if params["b"][0] > 0.8:
        return np.nan
    return distance(params)


def make(loss, num_samples=60):
    return schemes.local_entropy(loss, 0.1, shift.Importance(num_samples))


def run(optimizer, num_steps=4, **kwargs):
    return optimizer.run(KEY, num_steps, progress_bar=False, **kwargs)


class Inline(Executor):
    """Runs calls when they are submitted, and breaks at one of them, as a pool does whose worker dies."""

    def __init__(self, breaks_at=None):
        self.breaks_at, self.count = breaks_at, 0

    def submit(self, fn, /, *args, **kwargs):
        self.count += 1
        if self.breaks_at is not None and self.count > self.breaks_at:
            raise BrokenExecutor("a worker died")
        future = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def test_the_function_gets_what_the_user_wrote():
    seen = []

    def look(params, rows, power, *, scale):
        seen.append((params, rows, power, scale))
        return 3

    params = {"a": 1.0, "b": np.zeros((2, 3)), "c": jnp.ones(2), "d": np.float32(2.0)}
    loss = Loss.from_external(look, params, np.arange(2.0), 2, scale=0.5)
    assert not seen
    assert float(loss.value(loss.x0)) == 3.0
    ((got, rows, power, scale),) = seen
    assert type(got["a"]) is float
    assert (type(got["b"]), got["b"].dtype, got["b"].shape) == (np.ndarray, np.float64, (2, 3))
    assert (got["c"].dtype, type(got["d"])) == (np.float32, np.float32)
    assert (type(rows), power, float(scale)) == (np.ndarray, 2, 0.5)
    # New arguments in the place of the bound ones.
    loss.value(loss.x0, (np.ones(2), 5))
    assert seen[1][2] == 5
    np.testing.assert_array_equal(seen[1][1], np.ones(2))
    restored = pickle.loads(pickle.dumps(Loss.from_external(distance, PARAMS)))
    assert float(restored.value(restored.x0)) == 2.25
    assert "Loss.from_external(dim=3" in repr(restored)


@pytest.mark.parametrize("executor", [None, THREADS], ids=["alone", "threads"])
@pytest.mark.parametrize("settings", [{}, {"chunk_size": 2}, {"timeout": 60.0}], ids=str)
def test_draws_that_vary_in_all_ways(executor, settings):
    def single(params, y):
        return params["a"] * np.sum(y) + np.sum(params["b"])

    def several(params, y):
        assert params["a"].shape == (len(params["b"]),)
        return params["a"] * np.sum(y) + np.sum(params["b"], -1)

    y = jnp.arange(4.0).reshape(2, 2)
    x = random.normal(KEY, (2, 3, 3))
    # Draws that share their arguments, and draws with arguments of their own.
    expected = x[..., 0] * 6.0 + x[..., 1] + x[..., 2]
    own = x[..., 0] * y.sum(1)[:, None] + x[..., 1] + x[..., 2]
    for fn, batch in ((single, False), (several, True)):
        loss = Loss.from_external(fn, PARAMS, y, executor=executor, batch=batch, **settings)
        found = jax.vmap(jax.vmap(loss.value))(x)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        of_row = jax.vmap(loss.value, in_axes=(0, None))
        np.testing.assert_allclose(jax.vmap(of_row)(x, (y,)), own, rtol=1e-5)


@pytest.mark.both
def test_a_whole_cloud_with_its_center_is_one_callback():
    clouds = []

    def many(params):
        clouds.append(len(params["a"]))
        return (params["a"] - 0.5) ** 2 + np.sum((params["b"] - 1.0) ** 2, -1)

    result = run(make(Loss.from_external(many, PARAMS, batch=True)))
    assert clouds == [61] * 4
    assert (result.history.num_loss == 61).all()
    # The same steps as those of a loss that JAX sees, at the same points.
    traced = Loss.from_function(lambda p: (p["a"] - 0.5) ** 2 + jnp.sum((p["b"] - 1) ** 2), PARAMS)
    once = schemes.local_entropy(traced, 0.1, shift.Importance(60, chunk_size=60))
    np.testing.assert_allclose(result.centers, run(once).centers, rtol=1e-5)


@pytest.mark.both
def test_failures_are_rejected_draws_with_one_warning():
    found = []
    for executor in (None, THREADS):
        loss = Loss.from_external(fails_far_out, PARAMS, executor=executor)
        with pytest.warns(UserWarning, match="rejected draws") as caught:
            found.append(run(make(loss)))
        (warning,) = caught
        assert warning.filename == __file__
        count, total = map(int, re.findall(r"(\d+) of (\d+) calls", str(warning.message))[0])
        assert total == 4 * 61
        assert count == found[-1].history.shift.num_rejected.sum() > 0
        raised, undefined = re.search(
            r"(\d+) raised, (\d+) returned NaN", str(warning.message)
        ).groups()
        assert int(raised) + int(undefined) == count
        assert 'raise ZeroDivisionError("no such place")' in str(warning.message)
        assert "caller.py" not in str(warning.message)
    assert found[0].history.ok.all()
    np.testing.assert_array_equal(found[0].centers, found[1].centers)


@pytest.mark.parametrize("executor", [None, THREADS], ids=["alone", "threads"])
def test_an_exception_can_end_the_run_and_keeps_it(executor):
    calls = []

    def later(params):
        calls.append(1)
        if len(calls) > 100:
            raise ZeroDivisionError("no such place")
        return distance(params)

    loss = Loss.from_external(later, PARAMS, executor=executor, on_error="raise")
    with pytest.raises(ZeroDivisionError, match="no such place") as caught:
        run(make(loss), callback=lambda *_: None)
    assert len(caught.value.result.history.ok) == 1
    assert "interrupted after 1 of 4 steps" in caught.value.__notes__[0]
    with pytest.raises(ZeroDivisionError, match="no such place"):
        loss.value(loss.x0)


def test_a_start_that_fails_says_why():
    def broken(params):
        raise ZeroDivisionError("forgot the data")

    with pytest.raises(
        ValueError, match="start, got nan; mend what the first(.|\n)*forgot the data"
    ):
        run(make(Loss.from_external(broken, PARAMS)))
    no_number = Loss.from_external(lambda params: params["b"], PARAMS)
    with pytest.raises(ValueError, match="expected one real number, got ndarray: .*shape"):
        make(no_number).init(KEY)
    for found, kind in ((None, "NoneType"), ("3.5", "str"), (np.array(3.5 + 1j), "ndarray")):
        no_number = Loss.from_external(lambda params, found=found: found, PARAMS)
        with pytest.raises(
            ValueError, match=f"expected one real number, got {kind}: not a real number"
        ):
            make(no_number).init(KEY)
    assert np.isnan(as_reals(np.ma.masked))  # a missing value, whose number NumPy says is zero
    # Of a double no more than infinity is left in single precision, and no warning of NumPy comes from within.
    huge = Loss.from_external(lambda params: 1e300, PARAMS)
    with pytest.raises(
        ValueError, match=r"got inf, which any number beyond 3.4e\+38 is in float32"
    ):
        make(huge).init(KEY)
    few = Loss.from_external(lambda params: params["b"][0], PARAMS, batch=True)
    with pytest.raises(ValueError, match="expected an array of 1 losses, one per draw"):
        make(few).init(KEY)


def test_a_run_without_a_draw_left_has_the_traceback():
    def at_the_start(params):
        if params["a"] != 1.0:
            raise ZeroDivisionError("only there")
        return 0.0

    with pytest.raises(RejectedError, match="No step succeeded(.|\n)*only there"):
        run(make(Loss.from_external(at_the_start, PARAMS)))


def test_a_broken_executor_loses_nothing():
    whole = run(make(Loss.from_external(distance, PARAMS)))
    broken = Loss.from_external(distance, PARAMS, executor=Inline(breaks_at=150))
    with pytest.raises(RuntimeError, match="takes no more calls: BrokenExecutor") as caught:
        run(make(broken), callback=lambda *_: None)
    result = caught.value.result
    assert len(result.history.ok) == 2
    state = pickle.loads(pickle.dumps(result.state))
    resumed = run(
        make(Loss.from_external(distance, PARAMS, executor=Inline())), 2, init_state=state
    )
    np.testing.assert_array_equal(resumed.state.reference.mean, whole.state.reference.mean)


def test_a_call_that_takes_too_long_is_given_up():
    release = threading.Event()

    def hangs(params):
        if params["a"] > 0:
            release.wait(60.0)
        return 1.0

    start = time.perf_counter()
    for executor in (None, THREADS):
        loss = Loss.from_external(hangs, PARAMS, executor=executor, timeout=0.05)
        with loss.watch() as watch:
            found = jax.vmap(loss.value)(jnp.array([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]]))
        np.testing.assert_array_equal(found, [np.nan, 1.0])
        assert (watch.num_calls, watch.num_rejected, watch.num_late) == (2, 1, 1)
        assert "1 took longer than the timeout" in watch.report()
    assert time.perf_counter() - start < 30.0
    release.set()


@pytest.mark.parametrize("executor", [None, THREADS], ids=["alone", "threads"])
def test_ctrl_c_keeps_the_steps_and_cancels_the_calls(executor):
    calls = []

    def slow(params):
        calls.append(1)
        time.sleep(0.01)
        if len(calls) == 90:
            os.kill(os.getpid(), signal.SIGINT)
        return distance(params)

    optimizer = make(Loss.from_external(slow, PARAMS, executor=executor))
    with pytest.warns(UserWarning, match="interrupted after 1 of 4 steps"):
        result = run(optimizer)
    assert result.stopped == "interrupted"
    assert len(calls) < 2 * 61
    assert np.isfinite(result.state.reference.mean).all()


@pytest.mark.both
def test_ctrl_c_is_heard_on_other_threads():
    calls = []

    def slow(params):
        calls.append(1)
        time.sleep(0.01)
        return distance(params)

    loss = Loss.from_external(slow, PARAMS, executor=THREADS)
    x = jnp.zeros((500, 3))
    found = []

    def work():
        found.append(np.asarray(jax.vmap(loss.value)(x)))

    with loss.watch() as watch:
        thread = threading.Thread(target=work)
        thread.start()
        while len(calls) < 5 and thread.is_alive():
            time.sleep(0.01)
        try:
            os.kill(os.getpid(), signal.SIGINT)
            thread.join()
        except KeyboardInterrupt:
            thread.join()
        assert np.isnan(found[0]).all()
        assert len(calls) < 500
        with pytest.raises(KeyboardInterrupt):
            watch.check()


LOSS = Loss.from_external(distance, PARAMS)
TARGET = RegularizedLoss(LOSS, Gaussian.isotropic(LOSS.x0, 0.1))
FOLLOWERS = {
    "default": lambda: schemes.local_entropy(LOSS, 0.1),
    "NUTS": lambda: schemes.local_entropy(LOSS, 0.1, shift.NUTS(10, 10)),
    "SGLD": lambda: schemes.entropy_sgd(LOSS, 0.1),
    "replicas": lambda: schemes.parle(LOSS, 0.1),
    "SMC": lambda: schemes.local_entropy(LOSS, 0.1, shift.SMC(50, moves="hmc")),
    "Kernel": lambda: schemes.local_entropy(LOSS, 0.1, shift.Kernel(NUTS)),
    "adaptive": lambda: schemes.local_entropy(LOSS, 0.1, shift.AdaptiveImportance()),
    "heat": lambda: schemes.heat(LOSS, 0.1),
    "reverse_kl": lambda: reverse_kl(KEY, TARGET),
    "score_matching": lambda: score_matching(TARGET, rng_key=KEY),
    "shift alone": lambda: shift.NUTS(10, 10).init(KEY, TARGET),
    "SGLD alone": lambda: shift.SGLD(0.1, 10).init(KEY, TARGET),
    "value_and_grad": lambda: values.value_and_grad(LOSS, 0.1, kind="heat"),
    "bridge": lambda: values.local_entropy(KEY, TARGET, method="bridge"),
    "grad": lambda: jax.grad(LOSS.value)(LOSS.x0),
}


@pytest.mark.parametrize("build", FOLLOWERS.values(), ids=FOLLOWERS)
def test_gradients_are_refused_by_name(build):
    expected = "an external loss .* has none|JAX cannot differentiate|has none, or is zero"
    with pytest.raises(TypeError, match=expected):
        build()


ENGINES_WITHOUT = {
    "score form": (
        fit.RobbinsMonro(10, gradient="score", num_pairs=8),
        lambda loss, heat: schemes.heat(loss, 0.1, fit=heat),
    ),
    "SMC": (shift.SMC(20, num_islands=4), lambda loss, smc: schemes.local_entropy(loss, 0.1, smc)),
    "AdaptiveImportance": (
        shift.AdaptiveImportance(64, gradient=False),
        lambda loss, engine: schemes.local_entropy(loss, 0.1, engine),
    ),
    "AIES": (
        shift.Kernel(AIES, num_warmup=10, num_samples=20, num_chains=8),
        lambda loss, kernel: schemes.local_entropy(loss, 0.1, kernel),
    ),
    "ESS": (
        shift.Kernel(ESS, num_warmup=10, num_samples=20, num_chains=8),
        lambda loss, kernel: schemes.local_entropy(loss, 0.1, kernel),
    ),
    "anneal": (None, lambda loss, _: schemes.anneal(loss, 1.0, 3, num_samples=60)),
}
LONG = ("AdaptiveImportance", "AIES", "ESS")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.long] if name in LONG else [])
        for name in ENGINES_WITHOUT
    ],
)
def test_engines_without_gradients_go_on_after_failures(name):
    engine, build = ENGINES_WITHOUT[name]
    optimizer = build(Loss.from_external(fails_far_out, PARAMS, executor=THREADS), engine)
    with pytest.warns(UserWarning, match="rejected draws(.|\n)*no such place"):
        result = run(optimizer, 3)
    assert result.history.ok.all()
    before, after = (
        distance(jax.tree.map(np.asarray, LOSS.constrain(x)))
        for x in jnp.asarray(result.centers[[0, -1]])
    )
    assert after < before


def test_values_of_an_external_loss():
    loss = Loss.from_external(distance, PARAMS, executor=THREADS)
    traced = Loss.from_function(lambda p: (p["a"] - 0.5) ** 2 + jnp.sum((p["b"] - 1) ** 2), PARAMS)
    reference = Gaussian.isotropic(loss.x0, 0.1)
    for estimate in (values.heat, values.local_entropy):
        found, known = (
            estimate(KEY, RegularizedLoss(some, reference), num_samples=2000)
            for some in (loss, traced)
        )
        # Of chunks of other sizes, and so other draws.
        assert abs(found.value - known.value) < 4 * np.hypot(found.error, known.error)
    fails = RegularizedLoss(Loss.from_external(fails_far_out, PARAMS), reference)
    with pytest.warns(UserWarning, match=r"values.heat: Loss.from_external: \d+ of 100 calls"):
        assert np.isnan(values.heat(KEY, fails, num_samples=100).value)


@pytest.fixture
def processes():
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        yield pool


def test_calibration_of_a_solver_by_processes_equals_the_serial_one(processes):
    start = {"log_infection": -1.5, "log_recovery": -1.5}
    found = []
    for executor in (None, processes):
        loss = Loss.from_external(simulators.misfit, start, simulators.OBSERVED, executor=executor)
        optimizer = schemes.anneal(loss, 0.6, 12, last_width=0.01, num_samples=40)
        with pytest.warns(UserWarning, match="an infection faster than any"):
            found.append(run(optimizer, 12))
    np.testing.assert_array_equal(found[0].centers, found[1].centers)
    for name, value in simulators.TRUTH.items():
        # The last cloud is 0.01 wide.
        assert abs(float(found[0].params[name]) - value) < 0.05
    here = Loss.from_external(simulators.process, PARAMS, executor=processes)
    assert float(here.value(here.x0)) != float(np.float32(os.getpid()))


class Sent(ProcessPoolExecutor):
    """A pool that starts no process: calls of it run here, or fail as those of a broken one."""

    def __init__(self, method="spawn", error=None):
        super().__init__(1, mp_context=multiprocessing.get_context(method))
        self.error = error

    def submit(self, fn, /, *args, **kwargs):
        future = Future()
        if self.error is None:
            future.set_result(fn(*args, **kwargs))
        else:
            future.set_exception(self.error)
        return future


class Client:
    def submit(self, fn):
        return fn

    def get_executor(self):
        return THREADS


BAD = {
    "no function": ({"fn": 3}, TypeError, "expected a function of"),
    "arguments": ({"fn": lambda: 1.0}, TypeError, "got one that does not take them"),
    "own name": (
        {"fn": lambda params, timeout=1.0: timeout, "timeout": 3.0},
        TypeError,
        "has an argument 'timeout'",
    ),
    "params": ({"params": {"a": 1}}, TypeError, "Loss.from_external: expected floating-point"),
    "executor": ({"executor": 4}, TypeError, "pass such as ThreadPoolExecutor"),
    "client": ({"executor": Client()}, TypeError, "get_executor"),
    "on_error": ({"on_error": "ignore"}, ValueError, "on_error"),
    "timeout": ({"timeout": 0.0}, ValueError, "timeout"),
    "chunk_size": ({"chunk_size": 0}, ValueError, "chunk_size"),
    "batch": ({"batch": 1}, TypeError, "batch"),
    "lambda": ({"fn": lambda p: 1.0, "executor": Sent()}, TypeError, "top level of a module"),
    "not loaded": ({"executor": Sent(error=BrokenExecutor())}, ValueError, "__main__"),
}


@pytest.mark.parametrize(("settings", "error", "message"), BAD.values(), ids=BAD)
def test_what_is_refused(settings, error, message):
    settings = {"fn": distance, "params": PARAMS, **settings}
    fn, params = settings.pop("fn"), settings.pop("params")
    with pytest.raises(error, match=message):
        Loss.from_external(fn, params, **settings)


def test_forks_are_warned_of_and_executors_do_not_pickle():
    with pytest.warns(UserWarning, match="forks of this one"):
        check_executor(distance, Sent("fork"))
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(Loss.from_external(distance, PARAMS, executor=THREADS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_executor(distance, Sent())


def test_a_loss_built_anew_is_the_same_program():
    one, other = (Loss.from_external(distance, PARAMS, executor=THREADS) for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
    assert one != Loss.from_external(distance, PARAMS)


# Chunks that hold the whole cloud, and several.
CLOUDS = {"at once": shift.Importance(61), "chunks": shift.Importance(120, chunk_size=30)}


@pytest.mark.parametrize("name", with_long(CLOUDS, {"at once"}))
def test_a_told_step_is_the_step(name):
    cloud = CLOUDS[name]
    optimizer = schemes.local_entropy(Loss.from_external(fails_far_out, PARAMS), 0.1, cloud)
    by_hand = schemes.local_entropy(Loss.from_external(None, PARAMS), 0.1, cloud)
    state, told = optimizer.init(KEY), by_hand.init(KEY)
    for _ in range(2):
        with pytest.warns(UserWarning, match="TwoStep.step: Loss.from_external"):
            state, info = optimizer.step(state)
        points = by_hand.ask(told)
        again = by_hand.ask(told)
        jax.tree.map(np.testing.assert_array_equal, points, again)
        assert points["b"].shape == (cloud.num_samples + 1, 2)
        np.testing.assert_array_equal(points["a"][-1], told.reference.mean[0])
        # Both go through files.
        told = pickle.loads(pickle.dumps(told))
        points = json.loads(json.dumps({name: value.tolist() for name, value in points.items()}))
        found = []
        for a, b in zip(points["a"], points["b"], strict=True):
            try:
                found.append(fails_far_out({"a": a, "b": np.array(b)}))
            except ZeroDivisionError:
                found.append(np.nan)
        # Lists are points too, as they come out of a file.
        told, info_told = by_hand.tell(told, points, found)
        np.testing.assert_array_equal(told.reference.mean, state.reference.mean)
        assert info.shift.num_rejected == info_told.shift.num_rejected > 0
        for a, b in zip(
            jax.tree.leaves((info.draws, info.fitted, info.loss)),
            jax.tree.leaves((info_told.draws, info_told.fitted, info_told.loss)),
            strict=True,
        ):
            np.testing.assert_array_equal(a, b)
        assert info_told.num_loss == cloud.num_samples + 1


def test_a_model_is_asked_for_its_sites():
    def model(y):
        import numpyro
        import numpyro.distributions as dist

        sd = numpyro.sample("sd", dist.HalfNormal(1.0))
        numpyro.sample("y", dist.Normal(0.0, sd), obs=y)

    loss = Loss.from_model(model, jnp.array([0.5, -0.5]))
    points = make(loss, 10).ask(make(loss, 10).init(KEY))
    assert points["sd"].shape == (11,)
    assert (points["sd"] > 0).all()


def test_asking_refuses_what_cannot_be_asked():
    told = Loss.from_external(None, PARAMS)
    optimizer = make(told, 10)
    state = optimizer.init(KEY)
    points = optimizer.ask(state)
    moved = {**points, "a": points["a"] + 0.5}
    with pytest.raises(ValueError, match="the points of TwoStep.ask for this state"):
        optimizer.tell(state, moved, np.zeros(11))
    with pytest.raises(ValueError, match="the points of TwoStep.ask for this state"):
        optimizer.tell(state, {"a": points["a"]}, np.zeros(11))
    with pytest.raises(ValueError, match=r"shape \(11,\), got \(10,\)"):
        optimizer.tell(state, points, np.zeros(10))
    for wrong in ({**points, "a": ["x"] * 11}, {**points, "b": [[0.0]] * 10 + [[]]}, None):
        with pytest.raises(ValueError, match="the points of TwoStep.ask for this state"):
            optimizer.tell(state, wrong, np.zeros(11))
    for wrong in (["x"] * 11, ["1.5"] * 11, np.ones(11, complex), [10**400] * 11):
        with pytest.raises(ValueError, match="expected 11 real numbers"):
            optimizer.tell(state, points, wrong)
    with pytest.raises(RuntimeError, match="no function to call"):
        run(optimizer)
    with pytest.raises(RuntimeError, match="no function to call"):
        optimizer.step(state)
    recorded = TwoStep(told, 0.1, shift.Importance(10), fit.ForwardKL(), record=Record())
    heat = schemes.heat(told, 0.1, fit=fit.RobbinsMonro(5, gradient="score"))
    for other, message in (
        (recorded, "record=None"),
        (heat, "RobbinsMonro, which evaluates the loss"),
        (schemes.local_entropy(told, 0.1, shift.SMC(50)), "SMC, whose later points depend"),
    ):
        with pytest.raises(TypeError, match=message):
            other.ask(other.init(KEY))


def test_every_shift_says_whether_it_can_be_asked():
    target = RegularizedLoss(
        Loss.from_function(jnp.sum, jnp.zeros(2)), Gaussian.isotropic(jnp.zeros(2), 0.1)
    )
    for row in ENGINES.values():
        engine = row.make()
        if isinstance(engine, shift.Shift) and not isinstance(engine, shift.Importance):
            for call in (engine.ask, lambda *a, e=engine: e.tell(*a, jnp.zeros(1))):
                with pytest.raises(TypeError, match=type(engine).__name__):
                    call(KEY, (), target)
