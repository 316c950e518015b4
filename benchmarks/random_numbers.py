# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Do the unrolled rounds of Threefry still pay?

First normal numbers within a compiled loop, by JAX's own key and by `unrolled`, in the shapes that engines draw: a
step of four chains, the cloud of a small importance sample, and one of many parameters. A product consumes them.
Then a step of the engines that use `unrolled`, on a loss that costs nearly nothing. Rounds are interleaved.

Programs of chains are many small operations, and wait for threads where other processes keep all cores busy:
`taskset -c 0` shows what the operations themselves take.
"""

import statistics
import time
from functools import partial
from unittest import mock

import harness
import jax
import jax.numpy as jnp
from jax import lax, random

from numpyro_regloss import Gaussian, Loss, RegularizedLoss, shift
from numpyro_regloss._core.threefry import unrolled
from numpyro_regloss.shift.hmc import transitions
from numpyro_regloss.shift.importance import cloud

# Shape, and how often the loop draws it.
SHAPES = {"chains": ((4, 30), 3000), "cloud": ((4000, 30), 30), "long cloud": ((2000, 1000), 3)}
# Engine and number of parameters.
ENGINES = {
    "Importance 4000": (shift.Importance(4000), 30),
    "Importance 2000": (shift.Importance(2000), 1000),
    "HMC 4 x 200": (shift.HMC(100, 200, num_chains=4), 10),
    "NUTS 1 x 200": (shift.NUTS(100, 200, num_chains=1), 10),
    "NUTS 4 x 200": (shift.NUTS(100, 200, num_chains=4), 10),
}
KEYS = {"JAX": lambda key: key, "unrolled": unrolled}


def program(form, shape, length):
    """A new function every time, so that its compilation is not remembered."""

    def run(key, weights):
        def body(i, total):
            return total + random.normal(random.fold_in(KEYS[form](key), i), shape) @ weights

        return lax.fori_loop(0, length, body, jnp.zeros(shape[0]))

    return jax.jit(run)


def compiled(program, *args):
    start = time.perf_counter()
    return program.lower(*args).compile(), time.perf_counter() - start


def timed(label, form_of, args, repeats):
    """A row: one compiled program per key, timed in turn."""
    made = {form: form_of(form) for form in KEYS}
    calls = {form: partial(run, *args) for form, (run, _) in made.items()}
    times = harness.rounds(calls, repeats)
    return {
        "drawn": label,
        **{f"{form} ms": statistics.median(times[form]) * 1e3 for form in KEYS},
        "ratio": harness.ratio(times["unrolled"], times["JAX"]),
        "25-75 %": harness.spread(times["unrolled"], times["JAX"]),
        **{f"{form} compiles s": seconds for form, (_, seconds) in made.items()},
    }


def numbers(label, shape, length, repeats):
    args = random.key(0), jnp.ones(shape[1])
    label = f"{label}, {length} times {shape[0]} x {shape[1]}"
    return timed(label, lambda form: compiled(program(form, shape, length), *args), args, repeats)


def step(label, engine, dim, repeats):
    loss = Loss.from_function(lambda x: jnp.sum(jnp.cos(x)) + 0.5 * jnp.sum(x**2), jnp.zeros(dim))
    target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, 0.1))
    key, state = random.key(1), engine.init(random.key(0), target)
    # Past the warm-up.
    state = jax.jit(engine.step)(key, state, target)[0]
    args = random.key(2), state, target

    def form_of(form):
        jax.clear_caches()  # a step is compiled within, and remembered with the keys of the other form
        with (
            mock.patch.object(transitions, "unrolled", KEYS[form]),
            mock.patch.object(cloud, "unrolled", KEYS[form]),
        ):
            return compiled(jax.jit(lambda *args: _sum_of_draws(engine, *args)), *args)

    return timed(f"{label}, {dim} parameters", form_of, args, repeats)


def _sum_of_draws(engine, key, state, target):
    state, draws, info = engine.step(key, state, target)
    return state, info, draws.fold(lambda total, chunk: total + chunk.x.sum(), jnp.zeros(()))


def main():
    options = harness.arguments(__doc__)
    print(harness.environment())
    repeats = 2 if options.smoke else 41
    tables = {
        "Unrolled Threefry over JAX's": [
            numbers(label, shape, 2 if options.smoke else length, repeats)
            for label, (shape, length) in SHAPES.items()
        ],
        "Steps of engines": [
            step(label, engine, dim, repeats)
            for label, (engine, dim) in ENGINES.items()
            if not options.smoke or label == "Importance 4000"
        ],
    }
    for title, rows in tables.items():
        harness.show(title, rows)
    harness.save(options.out, tables)


if __name__ == "__main__":
    main()
