# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Timing that can be trusted on a noisy machine: interleaved repetitions, medians, ratios in one run."""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import jax

PACKAGES = (
    "numpyro_regloss",
    "numpyro",
    "jax",
    "jaxlib",
    "blackjax",
    "optax",
    "scikit-learn",
    "cbx",
    "cma",
    "evosax",
)


def environment():
    """Versions, device and cores, so that a table says where it comes from."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "dtype": str(jax.numpy.zeros(()).dtype),
        "versions": versions,
    }


def seconds(call):
    """Wall time of one call, its result ready."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def rounds(calls, repeats):
    """Seconds per call, A B C A B C …, so that a drift of the machine meets all alike.

    Args:
        calls: `{name: function without arguments}`, each called once before, for compilation.
        repeats: number of rounds.

    Returns:
        `{name: seconds of each round}`.
    """
    for call in calls.values():
        jax.block_until_ready(call())
    times = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(seconds(call))
    return times


def interleave(calls, repeats):
    """Median of `rounds`, `{name: median seconds}`."""
    return {name: statistics.median(values) for name, values in rounds(calls, repeats).items()}


def ratio(times, base):
    """Median over rounds of the ratio of two calls (or sums of calls) timed in the same round."""
    return statistics.median(a / b for a, b in zip(times, base, strict=True))


def spread(times, base):
    """Lower and upper quartile of the ratio, as text."""
    ratios = [a / b for a, b in zip(times, base, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{low:.2f}-{high:.2f}"


@contextlib.contextmanager
def count_compiles():
    """Yields a list that grows by one name per XLA compilation."""
    compiled = []

    def listen(event, duration, **kwargs):
        del duration
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(kwargs.get("fun_name", ""))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def in_fresh_process(script, *args):
    """What a script prints last, as JSON, when run alone: nothing that was compiled before helps it."""
    command = [sys.executable, str(script), *args]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def parser(description):
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--smoke", action="store_true", help="smallest sizes: does it run at all?")
    parser.add_argument("--out", type=Path, help="also write the table as JSON to this file")
    return parser


def arguments(description):
    """Command line of a benchmark without options of its own."""
    return parser(description).parse_args()


def show(title, rows):
    """Prints rows (dicts of equal keys) as a table."""
    header = list(rows[0])
    cells = [[_text(row[key]) for key in header] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    print(f"\n{title}")
    for line in (header, ["-" * width for width in widths], *cells):
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        )


def save(path, tables):
    """Writes tables with the environment as JSON."""
    if path is not None:
        path.write_text(
            json.dumps({"environment": environment(), "tables": tables}, indent=1, allow_nan=False)
            + "\n"
        )


def _text(value):
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
