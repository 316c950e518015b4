# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""What does importing this library cost over importing NumPyro?

Processor seconds of processes of their own, interleaved, with bytecode in place as after an installation: the
first round, which writes it, does not count. The promise is a ratio of at most 1.1.
"""

import os
import statistics
import subprocess
import sys
from pathlib import Path

import harness

MODULES = ("numpyro", "numpyro_regloss")
ROOT = str(Path(__file__).parent.parent)


def import_seconds(module):
    # The interpreter's own start is not what is asked for; what it has to read before is in memory after a round.
    code = (
        "import time; start = time.process_time(); "
        f"import {module}; print(time.process_time() - start)"
    )
    environment = {**os.environ, "PYTHONPATH": ROOT}
    # Without bytecode every import parses the sources anew, which is most of its time.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def main():
    options = harness.arguments(__doc__)
    # Before them rounds that do not count.
    before, repeats = (0, 2) if options.smoke else (1, 15)
    print(harness.environment())
    times = {module: [] for module in MODULES}
    for round_ in range(before + repeats):
        for module in MODULES:
            seconds = import_seconds(module)
            if round_ >= before:
                times[module].append(seconds)
    base = times["numpyro"]
    rows = [
        {
            "module": module,
            "median CPU s": statistics.median(taken),
            "ratio to numpyro": harness.ratio(taken, base),
            "25-75 %": harness.spread(taken, base),
        }
        for module, taken in times.items()
    ]
    tables = {"Importing": rows}
    harness.show("Importing", rows)
    harness.save(options.out, tables)


if __name__ == "__main__":
    main()
