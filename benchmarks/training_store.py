# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Results of `training.py`, one line of JSON for each, so that a run that was killed goes on.

A unit is one experiment, method, setting and seed. What is in the store is not run again. After Ctrl-C nothing
more is run, and what there is makes the tables.
"""

import json
import os
import pickle
import time

import harness
import numpy as np


class Store:
    """Results by unit; in memory alone without a path."""

    def __init__(self, path=None):
        self.path, self.found = path, {}
        if path is not None and path.exists():
            self._read()

    def _read(self):
        whole, newline, rest = self.path.read_bytes().rpartition(b"\n")
        if rest:
            print(f"{self.path}: the last line is not whole, dropped: {rest[:60]!r}")
            with self.path.open("rb+") as file:
                file.truncate(len(whole) + len(newline))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                self.found[key_of(*(row[name] for name in UNIT))] = row["result"]
            except (ValueError, KeyError) as error:
                raise ValueError(
                    f"{self.path}, line {number}: expected a unit as JSON, got {line[:60]!r}; take that line out, "
                    "or use another store."
                ) from error

    def add(self, rows):
        """Appends units, all of them in one write that has reached the disk."""
        if self.path is not None:
            text = "".join(json.dumps(row) + "\n" for row in rows).encode()
            with self.path.open("ab") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        for row in rows:
            self.found[key_of(*(row[name] for name in UNIT))] = row["result"]

    def partial(self, key):
        """A `Partial` of a unit that takes minutes."""
        return Partial(self.path and self.path.with_name(self.path.name + ".partial"), key)


UNIT = ("experiment", "method", "setting", "seed")


def key_of(experiment, method, setting, seed):
    return json.dumps([experiment, method, setting, seed], sort_keys=True)


class Partial:
    """What a unit under way has reached: one file, which the next long unit overwrites."""

    def __init__(self, path, key):
        self.path, self.key = path, key

    def load(self):
        if self.path is None or not self.path.exists():
            return None
        # A file of this program's own.
        key, value = pickle.loads(self.path.read_bytes())
        return value if key == self.key else None

    def save(self, value):
        if self.path is not None:
            new = self.path.with_name(self.path.name + ".new")
            new.write_bytes(pickle.dumps((self.key, value)))
            new.replace(self.path)


class Runner:
    """Runs what is missing, and hands out results."""

    def __init__(self, store, *, report_only=False):
        self.store, self.stopped = store, report_only
        self.environment = harness.environment()

    def __call__(self, experiment, method, setting, seeds, function):
        """Results of those seeds that there are; `function(seeds)` makes those that are missing."""
        keys = {seed: key_of(experiment, method, setting, seed) for seed in seeds}
        missing = [seed for seed in seeds if keys[seed] not in self.store.found]
        if missing and not self.stopped:
            start = time.perf_counter()
            try:
                results = function(missing)
            except KeyboardInterrupt:
                print("Interrupted: tables of what there is. The same command goes on from here.")
                self.stopped = True
            else:
                share = (time.perf_counter() - start) / len(missing)
                self.store.add([
                    {
                        **dict(zip(UNIT, (experiment, method, setting, seed), strict=True)),
                        "result": result,
                        "seconds": round(share, 3),
                        "environment": self.environment,
                    }
                    for seed, result in zip(missing, results, strict=True)
                ])
                varied = [setting[name] for name in ("hidden", "tau", "noise") if name in setting]
                text = (
                    f"{experiment}. {method} {varied} seeds {missing}: {share * len(missing):.1f} s"
                )
                print(text, flush=True)
        return [self.store.found[key] for key in keys.values() if key in self.store.found]

    def each(self, experiment, method, setting, num_seeds, function):
        """As a call, one seed after the other, so that each is in the store when it is done."""
        return [
            result
            for seed in range(num_seeds)
            for result in self(experiment, method, setting, [seed], function)
        ]


def spread(values, name):
    """Mean and standard deviation over seeds as columns; None where there is none."""
    values = np.asarray(values, float)
    known = np.isfinite(values).all()
    return {
        name: float(values.mean()) if known else None,
        f"± {name}": float(values.std(ddof=1)) if known and len(values) > 1 else None,
    }
