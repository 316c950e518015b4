# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Does a long run of a large network grow, and how often does it go to the device?

Heat steps with their default settings at a million parameters, of a plain quadratic: the least that a loss can
compute, so that what the driver does weighs most. The peak of the process's memory is read at every dispatch, and
compared at the end with that after the first steps; the first chunks, in which the program is compiled, are among
these. `dispatches` counts calls of the compiled chunk, `on device` the bytes of all arrays that are alive
at the end.

The second table has shorter runs, in processes of their own, that keep what they are told to.
"""

import json
import resource
import sys

import harness
import jax
import jax.numpy as jnp
from jax import random

from numpyro_regloss import Loss, Record, schemes
from numpyro_regloss.two_step import outer_step

FIRST_STEPS = 20
MEGA = 1e6


def square(params):
    return 0.5 * jnp.mean(params**2)


def peak():
    """Of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MEGA


def measure(dim, num_steps, history, centers_every=0):
    plain, seen = outer_step.advance, []

    def advance(*args):
        done = jax.block_until_ready(plain(*args))
        seen.append((int(done[0].step), peak()))
        return done

    outer_step.advance = advance
    loss = Loss.from_function(square, jnp.ones(dim))
    record = Record(centers_every=centers_every, verdicts=False) if centers_every else None
    optimizer = schemes.heat(loss, tau=1e-2, temperature=1 / dim, record=record)
    result = optimizer.run(random.key(0), num_steps, history=history, progress_bar=False)
    early = max(memory for step, memory in seen if step <= FIRST_STEPS)
    return {
        "dim": dim,
        "steps": num_steps,
        "history": history + (f", every {centers_every}th centre" if centers_every else ""),
        "s per step": float(result.seconds[1:].mean()),
        "dispatches per step": len(seen) / num_steps,
        f"peak MB, {FIRST_STEPS} steps": early,
        "at the end": peak(),
        "growth": peak() - early,
        "history MB": sum(leaf.nbytes for leaf in jax.tree.leaves(result.history)) / MEGA,
        "on device MB": sum(array.nbytes for array in jax.live_arrays()) / MEGA,
        "loss": float(result.history.loss[-1]),
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(*json.loads(sys.argv[2]))))
        sys.exit()
    options = harness.arguments(__doc__)
    dim, num_steps = (20_000, 60) if options.smoke else (1_000_000, 2_000)
    short = min(num_steps, 60)
    cases = {
        "A long run": [(dim, num_steps, "auto" if not options.smoke else "scalars")],
        "Short ones": [(dim, short, "scalars"), (dim, short, "scalars", 20), (dim, short, "all")],
    }
    tables = {
        title: [harness.in_fresh_process(__file__, "--one", json.dumps(case)) for case in rows]
        for title, rows in cases.items()
    }
    for title, rows in tables.items():
        harness.show(title, rows)
    harness.save(options.out, tables)
