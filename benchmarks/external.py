# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Losses that JAX cannot trace: what do workers gain, and what happens when one of them dies?

First table: wall time of a step of 41 calls of a simulator that sleeps for 50 milliseconds, by threads and by
processes, against one call after the other in the same round. Four workers take eleven turns: a ratio of 0.27.

Second: the calibration of an epidemic (an SIR model by SciPy's `solve_ivp`, and 20 milliseconds of sleep) by
`schemes.anneal`, with four processes and, with the extra `dask`, on a `LocalCluster` of two workers, one of
which is killed during the run. Columns: wall seconds, with the start of the workers; draws that failed (the
simulator refuses infections faster than any) and were rejected; the distance of the answer from the truth; the
largest difference of any centre from that of the serial run, which should be zero.
"""

import importlib.util
import logging
import multiprocessing
import os
import signal
import threading
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import harness
import numpy as np
import simulators
from jax import random

from numpyro_regloss import Loss, schemes, shift

NUM_WORKERS = 4
START = {"log_infection": -1.5, "log_recovery": -1.5}


def processes(count):
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))


def speed(num_draws, repeats):
    """Seconds per step of a simulator that sleeps."""
    with processes(NUM_WORKERS) as pool, ThreadPoolExecutor(NUM_WORKERS) as threads:
        calls = {}
        for name, executor in {"serial": None, "threads": threads, "processes": pool}.items():
            loss = Loss.from_external(simulators.sleep, np.zeros(2), executor=executor)
            optimizer = schemes.local_entropy(loss, 0.1, shift.Importance(num_draws))
            state = optimizer.init(random.key(0))
            calls[name] = lambda optimizer=optimizer, state=state: optimizer.step(state)
        # Processes start at their first calls.
        for _ in range(2):
            calls["processes"]()
        times = harness.rounds(calls, repeats)
    return [
        {
            "executor": name,
            "workers": 1 if name == "serial" else NUM_WORKERS,
            "seconds per step": float(np.median(found)),
            "ratio to serial": float(harness.ratio(found, times["serial"])),
        }
        for name, found in times.items()
    ]


def calibrate(executor, num_steps, num_samples):
    """A run and its wall seconds."""
    loss = Loss.from_external(simulators.slow_misfit, START, simulators.OBSERVED, executor=executor)
    optimizer = schemes.anneal(loss, 0.6, num_steps, last_width=0.01, num_samples=num_samples)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Loss.from_external: .*rejected draws")
        result = optimizer.run(random.key(0), num_steps, progress_bar=False)
    return result, time.perf_counter() - start


def row(name, result, seconds, serial):
    errors = [float(result.params[k]) - value for k, value in simulators.TRUTH.items()]
    return {
        "executor": name,
        "seconds": seconds,
        "rejected draws": int(result.history.shift.num_rejected.sum()),
        "distance from the truth": float(np.linalg.norm(errors)),
        "difference from serial": float(np.abs(result.centers - serial.centers).max()),
    }


def with_dask(num_steps, num_samples, after):
    """The same on two workers of Dask, one of which is killed after some seconds of the run."""
    from distributed import Client, LocalCluster

    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    # Workers log every exception of a simulator, too.
    options |= {"host": "127.0.0.1", "silence_logs": logging.CRITICAL}
    with LocalCluster(**options) as cluster, Client(cluster) as client:
        before = client.run(os.getpid)
        victim = next(iter(before.values()))
        timer = threading.Timer(after, os.kill, (victim, signal.SIGKILL))
        timer.start()
        found = calibrate(client.get_executor(), num_steps, num_samples)
        timer.join()
        survivors = set(client.run(os.getpid).values())
        assert victim not in survivors
        return found


def main():
    options = harness.arguments(__doc__)
    num_draws, repeats = (8, 1) if options.smoke else (40, 5)
    num_steps, num_samples = (3, 20) if options.smoke else (20, 60)
    tables = {"A simulator of 50 ms": speed(num_draws, repeats)}
    serial, seconds = calibrate(None, num_steps, num_samples)
    rows = [row("serial", serial, seconds, serial)]
    with processes(NUM_WORKERS) as pool:
        found = calibrate(pool, num_steps, num_samples)
    rows.append(row(f"{NUM_WORKERS} processes", *found, serial))
    if importlib.util.find_spec("distributed") is not None:
        found = with_dask(num_steps, num_samples, 1.0 if options.smoke else 6.0)
        rows.append(row("Dask, 1 of 2 workers killed", *found, serial))
    tables["Calibration of an epidemic"] = rows
    for title, table in tables.items():
        harness.show(title, table)
    harness.save(options.out, tables)


if __name__ == "__main__":
    main()
