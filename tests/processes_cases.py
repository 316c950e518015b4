# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Runs on one process or on several, which have four devices together, for `test_processes.py`.

    python tests/processes_cases.py FOLDER GROUP [PROCESS PROCESSES PORT]

Every process runs this script. One line of JSON says what it found: results by a hash of all their bits.
"""

import json
import os
import signal
import sys
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

from numpyro_regloss import Checkpoint, Loss, Record, TwoStep, fit, shift
from numpyro_regloss.two_step.checkpoint.fingerprint import hash_of

SEED, STEPS, QUIET = 0, 12, {"progress_bar": False}
INPUTS = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
OUTPUTS = INPUTS @ np.array([1.0, -1.0, 0.5], np.float32)
LONG = 8_000
START = np.zeros(3, np.float32)


def squares(w, x, y):
    return jnp.mean((x @ w - y) ** 2)


def mesh():
    return jax.make_mesh((jax.device_count(),), ("draws",))


def heat(loss, **settings):
    parts = shift.Implicit(), fit.RobbinsMonro(10, num_pairs=4)
    return TwoStep(loss, 0.1, *parts, mesh=mesh(), **settings)


def entropy(loss, mesh):
    return TwoStep(loss, 0.1, shift.Importance(100), fit.ForwardKL(), temperature=0.1, mesh=mesh)


def by_rows():
    """A mesh whose halves of the rows are on devices of different processes, where there are two."""
    devices = np.array(jax.devices()).reshape(2, 2).T
    return jax.sharding.Mesh(devices, ("draws", "rows"))


def divided(array, mesh=None):
    """The same array, of which each process has given its own rows."""
    mesh = mesh or jax.make_mesh((jax.device_count(),), ("rows",))
    rows = jax.NamedSharding(mesh, jax.P("rows"))
    first, count = jax.process_index(), len(array) // jax.process_count()
    return jax.make_array_from_process_local_data(rows, array[first * count : (first + 1) * count])


def bits(result):
    return hash_of((result.params, result.state, result.history))


def said(call):
    """What a call raises or warns, and what else is known of the error."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            result = call()
        except Exception as error:  # noqa: BLE001
            left = [*getattr(error, "processes", ())]
            notes = " ".join(getattr(error, "__notes__", ()))
            steps = len(error.result.history.ok) if hasattr(error, "result") else None
            return [type(error).__name__, f"{error} {notes}", left, steps]
    return [result.stopped, len(result.history.ok), [str(w.message) for w in heard]]


def at(step, process, what):
    """A callback that does something at one step of one process."""

    def callback(state, info):
        here = jax.process_index() == process
        return what() if here and int(state.step) == step else None

    return callback


def quick(folder):
    """One scheme and its folder: told to stop in one process, gone on with, and at last without one of them."""
    loss = Loss.from_function(squares, START, divided(INPUTS), divided(OUTPUTS))
    optimizer, save = heat(loss), {"checkpoint": Checkpoint(folder, every=1000)}
    key, other = random.key(SEED), random.key(jax.process_index())
    terminate = at(4, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    found = {
        "another key": said(lambda: optimizer.run(other, STEPS, **save, **QUIET)),
        "terminated": said(
            lambda: optimizer.run(key, STEPS, callback=terminate, **save, **QUIET),
        ),
    }
    return found | killed(folder, optimizer)


def killed(folder, optimizer=None, process=1):
    """A run of which one process is killed, and what another one finds."""
    times = []
    kill = at(8, process, lambda: os.kill(os.getpid(), signal.SIGKILL))

    def callback(state, info):
        times.append(time.monotonic())
        kill(state, info)

    optimizer = optimizer or heat(Loss.from_function(squares, START, INPUTS, OUTPUTS))
    # Nothing is saved before the end, but when the run cannot go on.
    save = Checkpoint(folder, every=1000)
    run = partial(optimizer.run, random.key(SEED), STEPS, checkpoint=save, **QUIET)
    found = {"killed": said(lambda: run(callback=callback))}
    return found | {"seconds": time.monotonic() - times[-1]}


def together(folder):
    """What all processes find alike."""
    here, key = jax.process_index(), random.key(SEED)
    local = Loss.from_function(squares, START, INPUTS, OUTPUTS)
    given = Loss.from_function(squares, START, divided(INPUTS), divided(OUTPUTS))
    found = {}

    seen = []
    callback = {"callback": lambda state, info: seen.append(float(jnp.sum(state.reference.mean)))}
    result = entropy(local, mesh()).run(key, 5, **callback, **QUIET)
    # One process may use what it got by itself.
    found["mean"] = float(jnp.sum(result.params)) if not here else seen[-1]
    found["entropy"], found["seen"] = bits(result), len(seen)
    found["entropy, data of all"] = bits(entropy(given, mesh()).run(key, 5, **QUIET))
    apart = Loss.from_function(squares, START, *(divided(a, by_rows()) for a in (INPUTS, OUTPUTS)))
    rows = jax.tree.leaves(apart.arguments)[0]
    found["rows"] = [len(shard.data) for shard in rows.addressable_shards]
    found["entropy, rows apart"] = bits(entropy(apart, by_rows()).run(key, 5, **QUIET))
    more = entropy(given, mesh()).run(key, 2, init_state=result.state, **QUIET)
    found["gone on"] = len(more.history.ok)

    found["heat"] = bits(heat(local).run(key, STEPS, **QUIET))
    scalars = heat(local, record=Record(centers_every=2, verdicts=False))
    settings = dict(checkpoint=Checkpoint(folder / "whole", every=5), history="scalars")
    scalars.run(key, 7, **settings, **QUIET)
    again = scalars.run(key, STEPS, **settings, **QUIET)
    whole = scalars.run(key, STEPS, history="scalars", **QUIET)
    found["scalars"] = bits(again) == bits(whole) and hash_of(again.path) == hash_of(whole.path)
    other = heat(local, temperature=2.0)
    found["another run"] = said(lambda: other.run(key, STEPS, **settings, **QUIET))
    # A mesh of its own devices is a run of its own, in which no other takes part.
    own = jax.make_mesh((len(jax.local_devices()),), ("draws",), devices=jax.local_devices())
    mine = replace(heat(local), mesh=own)
    apart = folder / f"of process {here}"
    found["apart"] = bits(mine.run(key, STEPS - 3 * here, checkpoint=apart, **QUIET))
    alone = TwoStep(given, 0.1, shift.Implicit(), fit.RobbinsMonro(10))
    found["no mesh"] = bits(alone.run(key, 2, **QUIET))
    if jax.process_count() > 1:
        run = partial(heat(local).run, key, 8, **QUIET)
        one = dict(callback=lambda state, info: None) if not here else {}
        found["one callback"] = said(lambda: run(**one))
        found["stopped"] = said(lambda: run(callback=at(4, 1, lambda: True)))
        stop = at(4, 1, lambda: os.kill(os.getpid(), signal.SIGINT))
        found["interrupted"] = said(lambda: run(callback=stop))
        fail = at(4, 1, lambda: {}["boom"])
        found["failed"] = said(lambda: run(callback=fail, checkpoint=folder / "failed"))
    return found


def slow(folder):
    """A run that is killed from outside, whenever."""
    optimizer = heat(Loss.from_function(squares, START, INPUTS, OUTPUTS))
    run = partial(optimizer.run, random.key(SEED), LONG, checkpoint=Checkpoint(folder, every=0.5))
    return {"killed": said(lambda: run(**QUIET))}


def resumed(folder, num_steps=STEPS):
    """The same run, gone on with and whole."""
    optimizer = heat(Loss.from_function(squares, START, INPUTS, OUTPUTS))
    run = partial(optimizer.run, random.key(SEED), num_steps, **QUIET)
    return {"again": bits(run(checkpoint=folder)), "whole": bits(run())}


GROUPS = {
    "quick": quick,
    "together": together,
    "first killed": partial(killed, process=0),
    "slow": slow,
    "resumed": resumed,
    "resumed slow": partial(resumed, num_steps=LONG),
}


if __name__ == "__main__":
    place, group, *where = sys.argv[1:]
    process, processes, port = map(int, where or (0, 1, 0))
    jax.config.update("jax_num_cpu_devices", max(1, 4 // processes))
    if processes > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, process)
    print(json.dumps(GROUPS[group](Path(place))), flush=True)
    if group in ("quick", "first killed", "slow"):
        # JAX would wait for the process that is not there.
        os._exit(0)
