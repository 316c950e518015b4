# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""How much time does SGLD take beyond the gradients, minibatches and random numbers that it must have?

A 784-32-10 network of 25,450 parameters, batches of 128 of 60,000 rows of noise, 1,000 inner steps. The engine,
alone and with its fit, is timed in turn with bare loops ("floors") of as many gradients of as many batches, with
normals or without noise. Ratios are medians over rounds of the ratio within a round.
"""

from functools import partial

import harness
import jax
import numpy as np
from jax import lax, random
from overhead import milliseconds, network

from numpyro_regloss import Gaussian, Loss, Minibatch, RegularizedLoss, fit, shift


def digits(rows):
    rng = np.random.default_rng(0)
    params = {
        "w": rng.normal(size=(784, 32)).astype(np.float32) / 28,
        "b": np.zeros(32, np.float32),
        "v": rng.normal(size=(32, 10)).astype(np.float32) / 6,
        "c": np.zeros(10, np.float32),
    }
    inputs = rng.random(size=(rows, 784), dtype=np.float32)
    labels = rng.integers(0, 10, rows)
    loss = Loss.from_function(network, params, inputs, labels, minibatch=Minibatch(128))
    return RegularizedLoss(loss, Gaussian.isotropic(loss.x0, 1e-4), temperature=1 / 60_000)


@partial(jax.jit, static_argnames=("num_steps", "noise"))
def bare(rng_key, target, num_steps, *, noise):
    """Gradients of fresh batches, each with its normals (or without), and a small step."""

    def body(i, x):
        key_batch, key_noise = random.split(random.fold_in(rng_key, i))
        value, gradient = jax.value_and_grad(target.on_batch(key_batch).value)(x)
        x = x - 1e-3 * (gradient + 1e-30 * value)
        if noise:
            x = x + 1e-4 * random.normal(key_noise, x.shape)
        return x

    return lax.fori_loop(0, num_steps, body, target.reference.mean)


@jax.jit
def take(engine, rng_key, state, target):
    """One shift, of which all that it returns is needed."""
    return engine.step(rng_key, state, target)


@jax.jit
def shift_and_fit(engine, rng_key, state, target):
    state, draws, info = engine.step(rng_key, state, target)
    _, fitted, fit_info = fit.ForwardKL().step(rng_key, (), target, draws)
    return state, fitted.mean, fit_info.mean_error, info


def main():
    options = harness.arguments(__doc__)
    steps, rows, repeats = (50, 1_000, 2) if options.smoke else (1_000, 60_000, 11)
    print(harness.environment())
    target, key = digits(rows), random.key(0)
    settings = {"step_size": 1e-3, "num_samples": steps, "keep": "batch_means"}
    engines = {
        "normal": shift.SGLD(**settings),
        "two_point": shift.SGLD(**settings, noise="two_point"),
        "normal, exponential average": shift.SGLD(**settings, averaging_decay=0.99),
        "normal, RMSprop": shift.SGLD(**settings, preconditioner=shift.RMSprop()),
        "normal, draws stored": shift.SGLD(**settings | {"keep": "draws"}),
    }
    if options.smoke:
        engines = {name: engines[name] for name in ("normal", "two_point")}
    # Leaf for leaf what a run carries: a look at the curvature takes ten gradients at the first step only.
    states = {
        name: jax.block_until_ready(take(engine, key, engine.init(key, target), target)[0])
        for name, engine in engines.items()
    }
    calls = {
        "floor": lambda: bare(key, target, steps, noise=True),
        "gradients only": lambda: bare(key, target, steps, noise=False),
    }
    for name, engine in engines.items():
        calls[name] = partial(take, engine, key, states[name], target)
        calls[f"{name} + fit"] = partial(shift_and_fit, engine, key, states[name], target)
    times = harness.rounds(calls, repeats)
    table = [
        {
            "program": name,
            "ms": milliseconds(values),
            "us / step": 1e3 * milliseconds(values) / steps,
            "/ floor": harness.ratio(values, times["floor"]),
            "25-75 %": harness.spread(values, times["floor"]),
        }
        for name, values in times.items()
    ]
    harness.show("SGLD: one shift", table)
    harness.save(options.out, {"SGLD: one shift": table})


if __name__ == "__main__":
    main()
