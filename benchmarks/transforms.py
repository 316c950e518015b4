# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""What do the Optax transformations cost over the gradients of a training loop?

A network of 784-32-10 (25,450 parameters) on batches of noise, in a loop that is compiled as a whole. Each
transformation is timed in turn with bare loops of as many gradients: with plain steps, and with as many normal
numbers (or signs) as the transformation takes. Ratios are medians over rounds of the ratio within a round.
"""

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax, random
from overhead import milliseconds, network

from numpyro_regloss import transforms

TAU = 1e-6


def contestants():
    return {
        "heat, one draw": (transforms.heat(optax.sgd(0.05), TAU), "normal"),
        "heat, five draws": (transforms.heat(optax.sgd(0.05), TAU, num_samples=5), "normal"),
        "entropy_sgd": (transforms.entropy_sgd(TAU), "normal"),
        "entropy_sgd, two-point noise": (transforms.entropy_sgd(TAU, noise="two_point"), "signs"),
        "fsgld": (transforms.fsgld(0.05, TAU, 1e-8), "two normals"),
    }


def bare(noise):
    """Plain steps of gradient descent, with noise that somebody looks at."""

    def init(params):
        return random.key(0)

    def update(gradient, key, params):
        key, *keys = random.split(key, 3)
        updates = jax.tree.map(lambda g: -0.05 * g, gradient)
        kinds = {"none": [], "normal": [random.normal], "signs": [random.rademacher]}
        for draw, one in zip(kinds.get(noise, [random.normal] * 2), keys, strict=False):
            leaves, structure = jax.tree.flatten(updates)
            some = random.split(one, len(leaves))
            updates = structure.unflatten([
                u + 1e-6 * draw(k, u.shape, u.dtype) for k, u in zip(some, leaves, strict=True)
            ])
        return updates, key

    return optax.GradientTransformation(init, update)


def training(optimizer, inputs, labels, num_steps, batch):
    """A compiled loop over batches, from given parameters."""

    def step(i, carry):
        params, state = carry
        rows = i * batch % (len(inputs) - batch)
        taken = (lax.dynamic_slice_in_dim(a, rows, batch) for a in (inputs, labels))
        gradient = jax.grad(network)(params, *taken)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def run(params):
        return lax.fori_loop(0, num_steps, step, (params, optimizer.init(params)))

    return run


def main():
    args = harness.arguments(__doc__)
    num_steps, repeats, batches = (3, 2, (16,)) if args.smoke else (200, 21, (128, 256))
    rng = np.random.default_rng(0)
    params = {
        "w": jnp.asarray(rng.normal(size=(784, 32)) / 28, jnp.float32),
        "b": jnp.zeros(32),
        "v": jnp.asarray(rng.normal(size=(32, 10)) / 6, jnp.float32),
        "c": jnp.zeros(10),
    }
    inputs = jnp.asarray(rng.random((4_096, 784)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 10, 4_096))
    rows = []
    for batch in batches:
        runs = {
            f"bare, {noise}": training(bare(noise), inputs, labels, num_steps, batch)
            for noise in ("none", "normal", "signs", "two normals")
        }
        for name, (optimizer, _) in contestants().items():
            runs[name] = training(optimizer, inputs, labels, num_steps, batch)
        times = harness.rounds(
            {name: (lambda run=run: run(params)) for name, run in runs.items()}, repeats
        )
        for name, (_, noise) in contestants().items():
            floor = times[f"bare, {noise}"]
            rows.append({
                "transformation": name,
                "batch": batch,
                "us per gradient": 1e3 * milliseconds(times[name]) / num_steps,
                "over plain steps": harness.ratio(times[name], times["bare, none"]),
                "over steps with its noise": harness.ratio(times[name], floor),
                "25-75 %": harness.spread(times[name], floor),
            })
    title = f"Optax transformations, {num_steps} gradients"
    harness.show(title, rows)
    harness.save(args.out, {title: rows})


if __name__ == "__main__":
    main()
