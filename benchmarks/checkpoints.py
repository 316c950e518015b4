# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Does a run survive the end of its process, and what does that cost?

Processes that run and save ten times a second are killed at random times, from their start on: in imports, in
compilation, in steps and in saves. The next one goes on from the same folder, with warnings as errors, so that a
state that cannot be read would show. Where a run comes to its end, its state and history must have the bits of one
that nobody touched, and the next run begins in a new folder. SIGTERM likewise: the process must then end by
itself, if it had come to its run.

Overhead: steps of a million parameters, saved every second, which is 30 times as often as by default, against the
same without; ratios within rounds, and what they make of 30 seconds. `in saves` is the share of the wall time that
the loop itself waits.
"""

import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import harness
import jax
import jax.numpy as jnp
import numpy as np

from numpyro_regloss import Checkpoint, Loss, schemes
from numpyro_regloss.two_step.checkpoint.fingerprint import hash_of
from numpyro_regloss.two_step.checkpoint.keeper import Keeper

DIM, STEPS, EVERY = 20_000, 400, 0.1
# Of starts, which the steps of a run are added to.
LONGEST_START = 6.0


def square(params):
    return 0.5 * jnp.mean(params**2)


def optimizer_of(dim):
    return schemes.heat(Loss.from_function(square, jnp.ones(dim)), tau=1e-2, temperature=1 / dim)


def child(folder, dim, num_steps, every):
    """One process: what it came to, as JSON."""
    warnings.simplefilter("error")
    # The warning that it was terminated is what is wanted.
    warnings.filterwarnings("ignore", message=".*terminated by SIGTERM")
    settings = Checkpoint(folder, every=every) if folder else None
    start = time.perf_counter()
    result = optimizer_of(dim).run(
        jax.random.key(0), num_steps, progress_bar=False, checkpoint=settings
    )
    return {
        "steps": len(result.history.ok),
        "stopped": result.stopped,
        "hash": hash_of((result.state, result.history)),
        "seconds": time.perf_counter() - start,
    }


def start(*settings):
    command = [sys.executable, __file__, "--child", json.dumps(settings)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process):
    out, trouble = process.communicate()
    if process.returncode:
        raise RuntimeError(f"a process failed:\n{trouble}")
    return json.loads(out.splitlines()[-1])


def kills(number, how_many, dim, num_steps, seed=0):
    """One row: signals until so many processes were met by one, and what became of their runs."""
    rng = random.Random(seed)
    whole = ended(start(None, dim, num_steps, EVERY))
    longest = LONGEST_START + whole["seconds"]
    row = {"signal": number.name, "sent": 0, "met": 0, "runs": 0, "equal": 0, "steps": num_steps}
    base, folder = Path(tempfile.mkdtemp()), None
    try:
        while row["met"] < how_many or folder is not None:
            folder = folder or base / str(row["runs"])
            process = start(str(folder), dim, num_steps, EVERY)
            if row["met"] < how_many:
                time.sleep(rng.uniform(0.0, longest))
                process.send_signal(number)
                row["sent"] += 1
            process.wait()
            if process.returncode == -number:
                # Before Python had a handler; SIGKILL always.
                row["met"] += 1
                process.communicate()
                continue
            found = ended(process)
            if found["stopped"] is not None:
                assert found["stopped"] == "terminated", found
                row["met"] += 1
                continue
            row["runs"] += 1
            row["equal"] += found["hash"] == whole["hash"]
            folder = None
    finally:
        shutil.rmtree(base)
    return {**row, "equal, %": 100.0 * row["equal"] / row["runs"]}


def overhead(dim, num_steps, repeats, every):
    optimizer = optimizer_of(dim)
    spent = [0.0]

    def timed(method):
        def call(*args):
            begun = time.perf_counter()
            try:
                return method(*args)
            finally:
                spent[0] += time.perf_counter() - begun

        return call

    Keeper.keep, Keeper.finish = timed(Keeper.keep), timed(Keeper.finish)

    def run(*, saves):
        with tempfile.TemporaryDirectory() as folder:
            settings = Checkpoint(folder, every=every) if saves else None
            return optimizer.run(
                jax.random.key(0),
                num_steps,
                progress_bar=False,
                checkpoint=settings,
                history="scalars",
            ).state.reference.mean

    times = harness.rounds(
        {"plain": lambda: run(saves=False), "saved": lambda: run(saves=True)}, repeats
    )
    ratio = harness.ratio(times["saved"], times["plain"])
    total = sum(times["saved"])
    return {
        "dim": dim,
        "steps": num_steps,
        "s, plain": float(np.median(times["plain"])),
        "saved every s": every,
        "ratio": ratio,
        "quartiles": harness.spread(times["saved"], times["plain"]),
        "every 30 s": f"{100 * (ratio - 1) * every / 30:.2f} %",
        "in saves": f"{100 * spent[0] / total:.1f} %",
        "of 30 s": f"{100 * spent[0] / total * every / 30:.2f} %",
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(*json.loads(sys.argv[2]))))
        sys.exit()
    options = harness.arguments(__doc__)
    if options.smoke:
        sizes, cost = (2, 2_000, 100), (2_000, 40, 2, 0.2)
    else:
        sizes, cost = (50, DIM, STEPS), (1_000_000, 40, 5, 1.0)
    tables = {
        "Killed at random times": [
            kills(number, *sizes) for number in (signal.SIGKILL, signal.SIGTERM)
        ],
        "Overhead": [overhead(*cost)],
    }
    for title, rows in tables.items():
        harness.show(title, rows)
    harness.save(options.out, tables)
