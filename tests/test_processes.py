# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Runs of several processes: the same result in each, one folder, and none is lost when one of them is."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import processes_cases as cases
import pytest
from conftest import QUICK_FLAGS, finish, start_on

from numpyro_regloss import Loss
from numpyro_regloss._core.processes import OF_A_PEER, LostProcessError, Processes, here
from numpyro_regloss.two_step.checkpoint.keeper import Saved
from numpyro_regloss.two_step.checkpoint.shared import _packed, _unpacked

SCRIPT = Path(__file__).parent / "processes_cases.py"
# Seconds within which a lost process is an error; the runtime ends the others after 100 by default.
SOON = 10


def start(folder, group):
    return start_on(SCRIPT, folder, group, processes=2)


def bits_of_one_process(num_steps, **settings):
    loss = Loss.from_function(cases.squares, cases.START, cases.INPUTS, cases.OUTPUTS)
    key = jax.random.key(cases.SEED)
    return cases.bits(cases.heat(loss).run(key, num_steps, progress_bar=False, **settings))


def steps_in(folder):
    names = [path.name for path in (folder / "states").iterdir()]
    return sorted(int(name) for name in names if name.isdigit())  # whole ones


@pytest.mark.both
def test_one_process_goes_on_where_another_was_killed(tmp_path):
    first, second = start(tmp_path, "quick")
    found = finish(first)
    second.communicate()
    assert second.returncode == -signal.SIGKILL
    kind, text, *_ = found["another key"]
    assert kind == "ValueError"
    assert "expected the same run in every process, got another one in process 1" in text
    # It was told to stop, and all of them did.
    stopped, steps, (warning,) = found["terminated"]
    assert (stopped, steps) == ("terminated", 4)
    assert "terminated by SIGTERM after 4 of 12 steps" in warning
    kind, text, lost, steps = found["killed"]
    assert (kind, lost, steps) == ("LostProcessError", [1], 8)
    assert "TwoStep.run: process 1 (" in text
    assert "left the run, or cannot be reached" in text
    assert f"steps that were done are saved in {tmp_path}" in text
    assert found["seconds"] < SOON
    assert steps_in(tmp_path) == [4, 8]
    whole = bits_of_one_process(cases.STEPS)
    assert bits_of_one_process(cases.STEPS, checkpoint=tmp_path) == whole
    assert steps_in(tmp_path) == [8, 12]


@pytest.mark.both
@pytest.mark.long
def test_all_processes_have_the_same_result(tmp_path):
    places = tmp_path / "one", tmp_path / "two"
    (one,) = start_on(SCRIPT, places[0], "together")
    one = finish(one)
    found, other = (finish(process) for process in start(places[1], "together"))
    same = (
        "entropy",
        "entropy, data of all",
        "entropy, rows apart",
        "heat",
        "gone on",
        "seen",
        "scalars",
    )
    for name in same:
        assert found[name] == other[name] == one[name], name
    assert found["entropy"] == found["entropy, data of all"]
    # No process has rows of another.
    assert one["rows"] == [32] * 4
    assert found["rows"] == other["rows"] == [32] * 2
    assert found["scalars"] is True
    assert found["apart"] == one["apart"] == one["heat"] != other["apart"]
    assert found["no mesh"] == other["no mesh"]
    assert abs(found["mean"] - other["mean"]) < 1e-6
    for each in (found, other):
        kind, text, *_ = each["another run"]
        assert kind == "ValueError"
        assert "differs in temperature" in text
        assert each["one callback"][0] == "ValueError"
        assert each["stopped"][:2] == ["callback", 4]
        assert each["interrupted"][:2] == ["interrupted", 4]
    assert "whether there is a callback is True there and False here" in other["one callback"][1]
    # One process speaks for all.
    assert "interrupted after 4 of 8 steps" in found["interrupted"][2][0]
    assert other["interrupted"][2] == []
    kind, text, lost, steps = found["failed"]
    assert (kind, lost, steps) == ("LostProcessError", [1], 4)
    assert "process 1" in text
    assert "raised an error, and its own output says which" in text
    assert other["failed"][0] == "KeyError"
    assert steps_in(places[1] / "failed") == [4]


@pytest.mark.both
@pytest.mark.long
def test_the_first_process_may_be_the_one_that_leaves(tmp_path):
    first, second = start(tmp_path, "first killed")
    first.communicate()
    assert first.returncode == -signal.SIGKILL
    out, _ = second.communicate()
    # It serves the others, whom JAX may end before they can say a word. Nothing but the last steps is lost.
    if second.returncode == 0:
        assert '"LostProcessError"' in out
        assert steps_in(tmp_path) == [8]
    whole = bits_of_one_process(cases.STEPS)
    assert bits_of_one_process(cases.STEPS, checkpoint=tmp_path) == whole


@pytest.mark.both
@pytest.mark.long
def test_a_process_that_is_killed_within_a_step(tmp_path):
    first, second = start(tmp_path, "slow")
    while not (tmp_path / "states").exists() or not steps_in(tmp_path):
        time.sleep(0.05)
        assert first.poll() is None
    second.kill()
    second.communicate()
    begun = time.monotonic()
    kind, _, lost, steps = finish(first)["killed"]
    assert time.monotonic() - begun < SOON
    assert (kind, lost) == ("LostProcessError", [1])
    assert steps_in(tmp_path)[-1] == steps < cases.LONG
    (again,) = start_on(SCRIPT, tmp_path, "resumed slow")
    found = finish(again)
    assert found["again"] == found["whole"]


def told_by_slurm(number, port):
    # Its job number says the port.
    job = {"SLURM_JOB_ID": str(port - 61440), "SLURM_STEP_NODELIST": "127.0.0.1"}
    mine = {"SLURM_NTASKS": "2", "SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)}
    return [], job | mine


def told_by_skypilot(number, port):
    return [f"127.0.0.1:{port}", "2", str(number)], {}


@pytest.mark.long
@pytest.mark.parametrize("told", [told_by_slurm, told_by_skypilot])
def test_the_script_of_the_page(tmp_path, told):
    page = (SCRIPT.parent.parent / "docs" / "scale.md").read_text()
    text = page.partition("This is `train.py`:")[2].partition("```python\n")[2].partition("```")[0]
    (tmp_path / "train.py").write_text(text)
    ports = iter(range(61500, 65500))
    port = next(port for port in ports if is_free(port))
    started = []
    for number in range(2):
        where, variables = told(number, port)
        command = [sys.executable, tmp_path / "train.py", tmp_path / "run", *where]
        variables |= {"JAX_NUM_CPU_DEVICES": "2", "XLA_FLAGS": QUICK_FLAGS}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=os.environ | variables, **pipes))
    found = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0], found
    assert "after 100 steps" in found[0][0]
    assert steps_in(tmp_path / "run")[-1] == 100


def is_free(port):
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) != 0


def test_a_process_by_itself_asks_nobody():
    mesh = jax.make_mesh((1,), ("draws",))
    for processes in (Processes(None, np.ones(2)), Processes(mesh, jax.numpy.ones(2))):
        assert processes.alone
        assert processes.leads
        assert processes.led(lambda: b"data") == b"data"
        processes.check_same("run", lambda: 1 / 0)
        with pytest.raises(ValueError, match="Gloo"), processes.watched():
            raise ValueError("UNKNOWN: Gloo all-reduce failed")
    tree = {"a": np.ones(2), "b": jax.random.key(0)}
    assert here(tree) == tree


def test_what_all_say_is_had_by_all():
    processes = Processes(None, ())
    processes.devices = tuple(jax.devices()[:1])
    assert {p: list(v) for p, v in processes.agree((3, 5)).items()} == {0: [3, 5]}
    for size in (0, 1, 5000):
        data = np.random.default_rng(size).bytes(size)
        assert processes._from_first(data, failed=False) == b"." + data


@pytest.mark.parametrize(
    "text",
    [
        "UNKNOWN: Gloo all-reduce failed: Connection closed by peer",
        "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats)",
        "INTERNAL: NCCL operation ncclAllGather failed: remote process exited",
    ],
)
def test_a_lost_peer_is_an_error_of_our_own(text):
    processes = Processes(None, ())
    processes.numbers = [0, 1]
    match = "process 1 left the run, or cannot"
    with pytest.raises(LostProcessError, match=match) as found, processes.watched():
        raise RuntimeError(text)
    assert found.value.processes == (1,)
    assert processes.broken


@pytest.mark.parametrize(
    "text", ["RESOURCE_EXHAUSTED: Out of memory", "INTERNAL: Generated function failed"]
)
def test_other_errors_of_a_program_stay(text):
    processes = Processes(None, ())
    processes.numbers = [0, 1]
    assert not OF_A_PEER.search(text)
    with pytest.raises(RuntimeError, match=text), processes.watched():
        raise RuntimeError(text)
    assert not processes.broken


def test_a_saved_run_is_sent_whole():
    optimizer = cases.heat(
        Loss.from_function(cases.squares, cases.START, cases.INPUTS, cases.OUTPUTS)
    )
    state = optimizer.init(jax.random.key(3))
    row = {"loss": np.float32(1), "mean": np.ones(3, np.float32), "ok": np.bool_(True)}
    infos = jax.tree.map(lambda a: np.stack([a, a]), row)
    centers = np.array([0, 2]), np.arange(6, dtype=np.float32).reshape(2, 3)
    saved = Saved(state, infos, np.array([1.0, 2.0]), centers)
    found = _unpacked(_packed(saved), state, row)
    assert cases.hash_of(found) == cases.hash_of(saved)
