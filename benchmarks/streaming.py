# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Does the memory of a cloud grow with the number of its draws?

One outer step of importance sampling and moment matching, of a quadratic loss in 25,000 dimensions. The noise of
a cloud is made from keys when the loss is evaluated, chunk by chunk, and again when the mean is fitted. `cloud
GiB` is what the draws would take if they were kept; `above baseline MiB` is by how much the peak of the process's
memory rose from before the first step, compilation included. `step / exact` compares the step along the gradient
with its exact value.
"""

import json
import resource
import sys
import time

import harness
import jax
import jax.numpy as jnp
from jax import random

from numpyro_regloss import Loss, TwoStep, fit, shift

TAU, TEMPERATURE = 1e-4, 2.0


def half_square(x):
    return 0.5 * jnp.sum(x**2)


def peak():
    """Of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(num_samples, dim):
    loss = Loss.from_function(half_square, jnp.ones(dim))
    optimizer = TwoStep(
        loss, TAU, shift.Importance(num_samples), fit.ForwardKL(), temperature=TEMPERATURE
    )
    jax.block_until_ready(random.normal(random.key(0), (dim,)))
    baseline, start = peak(), time.perf_counter()
    result = optimizer.run(random.key(0), 1, progress_bar=False)
    seconds = time.perf_counter() - start
    # The shifted density of a quadratic is Gaussian, its mean shrunk by T / (T + tau).
    step = float(jnp.mean(1.0 - result.params, dtype=float))
    return {
        "particles": num_samples,
        "dim": dim,
        "cloud GiB": num_samples * dim * 4 / 2**30,
        "above baseline MiB": peak() - baseline,
        "baseline MiB": baseline,
        "seconds": seconds,
        "evaluations per s": num_samples / seconds,
        "ess": float(result.history.shift.ess[0]),
        "step / exact": step / (TAU / (TEMPERATURE + TAU)),
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(*json.loads(sys.argv[2]))))
        sys.exit()
    options = harness.arguments(__doc__)
    cases = (
        [(400, 2_500), (4_000, 2_500)]
        if options.smoke
        else [(10_000, 25_000), (100_000, 25_000), (1_000_000, 25_000)]
    )
    rows = [harness.in_fresh_process(__file__, "--one", json.dumps(case)) for case in cases]
    tables = {"Importance and ForwardKL, one step": rows}
    for title, rows in tables.items():
        harness.show(title, rows)
    harness.save(options.out, tables)
