# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: the same bits after any interruption, clear refusals, nothing lost."""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import QUICK_FLAGS, long
from jax import random
from test_two_step import same

import numpyro_regloss as regloss
from numpyro_regloss import (
    Arrived,
    Checkpoint,
    Gaussian,
    Loss,
    Record,
    TwoStep,
    fit,
    schemes,
    shift,
)
from numpyro_regloss.two_step import chunks
from numpyro_regloss.two_step.checkpoint import fingerprint as prints
from numpyro_regloss.two_step.checkpoint.keeper import Keeper
from numpyro_regloss.two_step.checkpoint.rows import Rows

QUIET = {"progress_bar": False}
DATA = np.arange(3.0)


def quadratic(params, data):
    return 0.5 * jnp.sum((params - data) ** 2)


def make(tau=0.1, data=DATA, start=0.0, fn=quadratic, **settings):
    loss = Loss.from_function(fn, np.full(3, start), data)
    settings = {"shift": shift.Importance(400), "fit": fit.ForwardKL(), **settings}
    return TwoStep(loss, tau, **settings)


def run(folder, num_steps=12, optimizer=None, seed=0, every=5, **settings):
    checkpoint = folder and Checkpoint(folder, every=every)
    optimizer = optimizer or make()
    return optimizer.run(random.key(seed), num_steps, checkpoint=checkpoint, **QUIET, **settings)


def steps_in(folder):
    return sorted(int(path.name) for path in (folder / "states").iterdir())


@contextlib.contextmanager
def failing_at(step, error):
    """Stops a run after some step, as a crash does: what follows it is lost."""

    def callback(state, info):
        del info
        if int(state.step) == step:
            raise error

    finish = Keeper.finish
    Keeper.finish = lambda self, state, rows, path, cause: cause
    try:
        yield callback
    finally:
        Keeper.finish = finish


@pytest.mark.both
@pytest.mark.parametrize("history", ["all", long("scalars")])
def test_a_run_that_goes_on_has_the_bits_of_a_whole_one(tmp_path, history):
    optimizer = make(record=Record(centers_every=4, verdicts=False))
    whole = run(None, 12, optimizer, history=history)
    with failing_at(8, RuntimeError("crash")) as crash, pytest.raises(RuntimeError, match="crash"):
        run(tmp_path, 12, optimizer, history=history, callback=crash)
    # Of eight steps that were done those since the last state are lost.
    assert steps_in(tmp_path) == [5]
    seen = []
    callback = {"callback": lambda state, info: seen.append(int(state.step)), "callback_every": 3}
    for history_now in (history, "auto"):
        again = run(tmp_path, 12, optimizer, history=history_now, **callback)
        assert same(again.state, whole.state)
        assert same(again.history, whole.history)
        assert same(again.params, whole.params)
        assert len(again.seconds) == 12
        np.testing.assert_array_equal(again.centers, whole.centers)
        np.testing.assert_array_equal(again.center_steps, whole.center_steps)
    # Called at the steps at which it is called of a whole run; a finished run is only read.
    assert seen == [6, 9, 12]
    assert steps_in(tmp_path) == [10, 12]
    # More steps of the same run; its files only grow.
    before = (tmp_path / "history.bin").read_bytes()
    more = run(tmp_path, 17, optimizer, history=history)
    assert same(more.state, run(None, 17, optimizer, history=history).state)
    assert (tmp_path / "history.bin").read_bytes()[: len(before)] == before
    with pytest.raises(ValueError, match="at least the 17 steps"):
        run(tmp_path, 12, optimizer, history=history)


def test_a_run_that_arrived_has_arrived(tmp_path):
    optimizer = schemes.heat(Loss.from_function(quadratic, np.zeros(3), DATA), 0.1)
    whole = optimizer.run(random.key(0), 500, until=Arrived(), **QUIET)
    results = [run(tmp_path, 500, optimizer, every=30.0, until=Arrived()) for _ in range(2)]
    for result in results:
        assert result.stopped == whole.stopped == "arrived"
        assert same(result.history, whole.history)


OTHERS = {
    "tau": (lambda: make(tau=0.2), "tau: there .*0.10.*, here .*0.2"),
    "setting": (
        lambda: make(shift=shift.Importance(300)),
        "shift.num_samples: there 400, here 300",
    ),
    "engine": (lambda: make(shift=shift.SMC(100)), "shift: there .*Importance, here .*SMC"),
    "data": (lambda: make(data=DATA + 1), r"arguments of the loss\[0\]\[0\]"),
    "shape": (
        lambda: make(data=np.zeros((2, 3))),
        r"arguments .*: there float32\[3\].*here float32\[2, 3\]",
    ),
    "start": (lambda: make(start=1.0), "start"),
    "loss": (lambda: make(fn=lambda p, d: 0.25 * jnp.sum((p - d) ** 4)), "the loss .its program"),
    "temperature": (lambda: make(temperature=2.0), "temperature: there .*1.0, here .*2.0"),
    "parameters": (
        lambda: TwoStep(
            Loss.from_function(quadratic, np.zeros(4), np.zeros(4)),
            0.1,
            shift=shift.Importance(400),
            fit=fit.ForwardKL(),
        ),
        "number of parameters: there 3, here 4",
    ),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    return folder, run(folder, 12)


@pytest.mark.parametrize("what", OTHERS)
def test_another_run_is_refused_by_what_differs(finished, what):
    build, message = OTHERS[what]
    with pytest.raises(ValueError, match=f"expected the same run as in .* differs in {message}"):
        run(finished[0], 12, build())


def test_another_key_history_or_precision_is_refused(finished):
    with pytest.raises(ValueError, match="differs in rng_key"):
        run(finished[0], 12, seed=1)
    with pytest.raises(ValueError, match="differs in history: there all, here scalars"):
        run(finished[0], 12, history="scalars")
    with (
        jax.enable_x64(True),
        pytest.raises(ValueError, match="precision: there float32, here flo"),
    ):
        run(finished[0], 12)
    # Nothing of these has touched the run.
    assert same(run(finished[0], 12).state, finished[1].state)


def test_schedules_are_known_by_what_they_close_over():
    def prints_of(tau):
        return dict(prints._described("tau", tau))

    def decay(rate):
        return optax.exponential_decay(0.5, 1, rate)

    assert prints_of(decay(0.9)) == prints_of(decay(0.9))
    name, old, new = prints.first_difference(
        prints_of(decay(0.9)), prints_of(decay(0.8)), prints.versions()
    )
    assert (name, old, new) == ("tau[decay_rate]", "0.9", "0.8")
    code = prints_of(lambda step: 0.5 / (1 + step)), prints_of(lambda step: 0.5 / (2 + step))
    name, *_ = prints.first_difference(*code, prints.versions())
    assert name == "tau (its code)"
    # Code of another Python and programs of another JAX do not compare.
    assert prints.first_difference(*code, {"python": "2.7"}) is None


def test_external_losses_are_known_by_their_code_and_not_by_who_runs_it():
    def prints_of(fn, executor=None):
        optimizer = make()
        loss = Loss.from_external(fn, np.zeros(3), DATA, executor=executor)
        optimizer = TwoStep(loss, 0.1, optimizer.shift, optimizer.fit)
        found = prints.settings_text(optimizer, loss.arguments, random.key(0))
        reference = Gaussian.isotropic(loss.x0, 1.0)
        return found | {prints.PROGRAM: prints._program(optimizer, reference, loss.arguments)}

    def simulate(power):
        return lambda params, data: float(np.sum(np.abs(params - data) ** power))

    mended = lambda params, data: float(np.sum(np.abs(params - data) ** 2)) + 1.0  # noqa: E731
    mended.__qualname__ = simulate(2).__qualname__
    with ThreadPoolExecutor(1) as pool:
        alone, helped = prints_of(simulate(2)), prints_of(simulate(2), pool)
    assert prints.first_difference(alone, helped, prints.versions()) is None
    name, *_ = prints.first_difference(alone, prints_of(mended), prints.versions())
    assert name == "the loss (its code)"


def test_other_folders_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(
        ValueError, match=r"new or empty folder, .* with thesis.tex and no run.json"
    ):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    # A process that was killed while it wrote its first file is no stranger.
    folder = tmp_path / "killed"
    folder.mkdir()
    (folder / ".run.json.123.tmp").write_text("{")
    assert run(folder, 3).history.ok.all()
    for bad, error in ((3, TypeError), ("", TypeError)):
        with pytest.raises(error, match="folder"):
            make().run(random.key(0), 1, checkpoint=bad, **QUIET)
    for bad in ({"every": 0}, {"every": -1.0}, {"keep": 0}):
        with pytest.raises(ValueError, match="Checkpoint: "):
            Checkpoint("folder", **bad)


def damage(path):
    """The second half of a file is gone, as after a crash of the machine."""
    os.truncate(path, path.stat().st_size // 2)


def test_what_is_damaged_is_told_and_set_aside(finished, tmp_path):
    source, result = finished
    folder = tmp_path / "one"
    shutil.copytree(source, folder)
    for path in (folder / "states" / "12").rglob("*"):
        if path.is_file():
            damage(path)
    with pytest.warns(UserWarning, match=r"last state .* cannot be read .* after 10 steps"):
        again = run(folder, 12)
    assert same(again.state, result.state)
    assert same(again.history, result.history)
    assert len(list((folder / "unreadable").iterdir())) == 1
    assert same(run(folder, 12).state, result.state)

    folder = tmp_path / "all"
    shutil.copytree(source, folder)
    damage(folder / "history.bin")
    before = sorted(path.name for path in folder.rglob("*"))
    with pytest.raises(
        ValueError, match=r"none of its 2 states can be read .*history.bin has .* rows"
    ):
        run(folder, 12)
    assert sorted(path.name for path in folder.rglob("*")) == before

    folder = tmp_path / "settings"
    shutil.copytree(source, folder)
    damage(folder / "run.json")
    with pytest.raises(ValueError, match=r"settings of a run in .*run.json, got something else"):
        run(folder, 12)
    known = json.loads((source / "run.json").read_text())
    for strange in ({"fingerprint": None}, {"fingerprint": []}, {"versions": "1"}):
        (folder / "run.json").write_text(json.dumps({**known, **strange}))
        with pytest.raises(ValueError, match=r"run.json, got something else"):
            run(folder, 12)
    (folder / "run.json").write_text(json.dumps({**known, "format": 99}))
    with pytest.raises(ValueError, match="format 1 .* got 99"):
        run(folder, 12)


def test_rows_tell_what_is_damaged(tmp_path):
    row = {"a": jax.ShapeDtypeStruct((2,), jnp.bfloat16), "b": jax.ShapeDtypeStruct((), bool)}
    row |= {"none": jax.ShapeDtypeStruct((0,), np.float32)}
    tree = {
        "a": np.asarray(jnp.arange(10.0).reshape(5, 2), jnp.bfloat16),
        "b": np.arange(5) > 2,
        "none": np.empty((5, 0), np.float32),
    }
    rows = Rows(tmp_path / "rows", row)
    rows.write(tree, 0)
    rows.write(jax.tree.map(lambda a: a[:2], tree), 3)
    back = rows.read(5)
    np.testing.assert_array_equal(back["a"], tree["a"][[0, 1, 2, 0, 1]])
    assert back["a"].dtype == jnp.bfloat16
    assert back["b"].tolist() == [False, False, False, False, False]
    assert back["none"].shape == (5, 0)
    with pytest.raises(ValueError, match="has 5 rows and not 6"):
        rows.read(6)
    rows.close()
    data = bytearray((tmp_path / "rows").read_bytes())
    data[rows.size + 1] ^= 1
    (tmp_path / "rows").write_bytes(data)
    rows = Rows(tmp_path / "rows", row)
    with pytest.raises(ValueError, match="damaged at its row 1"):
        rows.read(5)
    rows.close()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="folder that can be written, .* is it read-only"):
        run(tmp_path / "file" / "run", 2)
    folder = tmp_path / "busy"
    busy = []

    def callback(state, info):
        del state, info
        with pytest.raises(ValueError, match="another one saves to"):
            run(folder, 2)
        busy.append(True)
        return True

    run(folder, 2, callback=callback)
    assert busy == [True]


def test_a_full_disk_loses_nothing(tmp_path):
    plain = run(None, 12)
    run(tmp_path, 5)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    # No file may grow any more.
    full = (tmp_path / "history.bin").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (full, limits[1]))
    try:
        with (
            pytest.warns(UserWarning, match=r"could not be saved in .*The run goes on"),
            pytest.raises(OSError, match="or the disk full") as caught,
        ):
            run(tmp_path, 12)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    # All steps were done, and are in the hands of the caller; the folder goes on from where it was.
    assert same(caught.value.result.history, plain.history)
    assert steps_in(tmp_path) == [5]
    assert same(run(tmp_path, 12).history, plain.history)


def test_ctrl_c_and_sigterm_save_and_return(tmp_path):
    whole = run(None, 12)

    def sent(number):
        def callback(state, info):
            del info
            if int(state.step) == 7:
                os.kill(os.getpid(), number)

        return callback

    for number, stopped in ((signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")):
        folder = tmp_path / stopped
        before = signal.getsignal(number)
        with pytest.warns(UserWarning, match=f"TwoStep.run: {stopped}.* after 7 of 12 steps"):
            result = run(folder, 12, every=30.0, callback=sent(number))
        assert result.stopped == stopped
        assert len(result.history.ok) == 7
        assert steps_in(folder) == [7]
        assert signal.getsignal(number) is before
        again = run(folder, 12)
        assert again.stopped is None
        assert same(again.history, whole.history)
    # An exception of the callback: what there is is saved, and handed out with it.
    with pytest.raises(ZeroDivisionError) as caught:
        run(tmp_path / "error", 12, callback=lambda state, info: 1 // (7 - int(state.step)) > 1)
    assert len(caught.value.result.history.ok) == 7
    assert steps_in(tmp_path / "error") == [5, 7]


def test_signals_are_left_alone_outside_of_the_main_thread(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(run(tmp_path, 6)))
    thread.start()
    thread.join()
    assert same(results[0].state, run(None, 6).state)


def test_a_run_that_continues_a_state(tmp_path):
    optimizer = make()
    first = optimizer.run(random.key(0), 4, **QUIET)
    rest = optimizer.run(random.key(0), 6, init_state=first.state, **QUIET)
    half = run(tmp_path, 3, init_state=first.state)
    again = run(tmp_path, 6, init_state=first.state)
    assert len(half.history.ok) == 3
    assert same(again.state, rest.state)
    assert same(again.history, rest.history)
    with pytest.raises(ValueError, match="differs in init_state"):
        run(tmp_path, 6, init_state=rest.state)


def test_seconds_between_states_and_slow_disks(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "SECONDS_PER_CHUNK", 0.0)
    monkeypatch.setattr(chunks, "MOST_SECONDS", 0.0)
    saved = []
    save = Keeper._save

    def noted(self, state, rows, done, path):
        saved.append(done)
        save(self, state, rows, done, path)

    monkeypatch.setattr(Keeper, "_save", noted)
    run(tmp_path / "seldom", 12, every=100.0)
    assert saved == [12]
    saved.clear()
    run(tmp_path / "often", 12, every=1e-6)
    # One that is under way is waited for at the end alone.
    assert saved[0] == 1
    assert saved[-1] == 12
    assert len(list((tmp_path / "often" / "states").iterdir())) == min(2, len(saved))


def test_results_as_files(tmp_path, finished):
    _, result = finished
    optimizer = make()
    regloss.save(result, tmp_path / "result")
    again = regloss.load(tmp_path / "result", optimizer)
    assert same(again, result)
    assert jax.tree.structure(again) == jax.tree.structure(result)
    thin = make(record=Record(centers_every=2, verdicts=False))
    kept = thin.run(random.key(0, impl="rbg"), 5, history="scalars", **QUIET)
    regloss.save(kept, str(tmp_path / "result"))
    again = regloss.load(tmp_path / "result", thin)
    assert same(again.history, kept.history)
    np.testing.assert_array_equal(again.centers, kept.centers)
    more = [thin.run(random.key(0), 2, init_state=r.state, **QUIET) for r in (kept, again)]
    assert same(more[0].history, more[1].history)
    with pytest.raises(ValueError, match=r"differs in state.*: there .*, here"):
        regloss.load(tmp_path / "result", schemes.heat(optimizer.loss, 0.1))
    with pytest.raises(TypeError, match="expected the TwoStep"):
        regloss.load(tmp_path / "result", optimizer.loss)
    with pytest.raises(TypeError, match="expected the result"):
        regloss.save(kept.history, tmp_path / "other")
    damage(tmp_path / "result")
    with pytest.raises(ValueError, match="damaged or something else"):
        regloss.load(tmp_path / "result", thin)
    with pytest.raises(FileNotFoundError):
        regloss.load(tmp_path / "nothing", thin)
    assert not (tmp_path / "other").exists()


# Another number of devices, in another process: what is saved says nothing of where it was.
OTHER_PROCESS = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
from jax import random
from checkpoints import optimizer_of
from numpyro_regloss.two_step.checkpoint.fingerprint import hash_of
result = optimizer_of(500).run(random.key(0), 20, checkpoint=sys.argv[1], progress_bar=False)
print(jax.device_count(), hash_of((result.state, result.history)))
"""


@pytest.mark.both
def test_another_process_with_other_devices_goes_on_to_the_same_bits(tmp_path):
    optimizer = checkpoints.optimizer_of(500)
    whole = optimizer.run(random.key(0), 20, **QUIET)
    optimizer.run(random.key(0), 7, checkpoint=tmp_path, **QUIET)
    # The program as this process compiles it.
    environment = {**os.environ, "XLA_FLAGS": QUICK_FLAGS}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", OTHER_PROCESS, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["4", prints.hash_of((whole.state, whole.history))]


@pytest.mark.parametrize("name", [long("SIGKILL"), long("SIGTERM")])
def test_killed_at_random_times(name):
    row = checkpoints.kills(getattr(signal, name), 5, 2_000, 200)
    assert row["met"] == 5
    assert row["runs"] == row["equal"] >= 1


def test_orbax_is_asked_for_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match=r"numpyro_regloss\[checkpoint\]"):
        run(tmp_path, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make().run(random.key(0), 2, **QUIET).history.ok.all()
