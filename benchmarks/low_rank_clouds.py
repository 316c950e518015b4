# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""What would clouds of low-rank perturbations of weight matrices save? A prototype, no engine.

A draw of a matrix is W + width A B'/sqrt(rank), with independent standard normal entries of A and B: its mean
and covariance are those of the Gaussian N(W, width²), its law is not. The loss sees an object in the matrix's
place, of which `x @ W` is x W + (x A) B', so that x W is shared by the cloud and no matrix is formed, nor for the
weighted mean. `dense` is one step of `shift.Importance` and `fit.ForwardKL`. All clouds are antithetic, of 64
draws, with a temperature that an effective sample size of a half sets; 784-256-256-10 relu, random images.

Columns: draws per second, all in turn, median over rounds; the median of the ratio to dense within a round; and
the cosine of the step with the exact gradient, mean over keys.
"""

import math

import harness
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from jax.flatten_util import ravel_pytree

from numpyro_regloss import Gaussian, Loss, RegularizedLoss, fit, shift
from numpyro_regloss.shift.importance.engine import _temperature_of_ess

SIZES, NUM_DRAWS, WIDTH, ESS = (784, 256, 256, 10), 64, 0.02, 0.5


@jax.tree_util.register_pytree_node_class
class Perturbed:
    """A weight matrix plus A B', known by its products."""

    def __init__(self, weight, a, b):
        self.leaves = (weight, a, b)

    def tree_flatten(self):
        return self.leaves, None

    @classmethod
    def tree_unflatten(cls, _, leaves):
        return cls(*leaves)

    def __rmatmul__(self, x):
        weight, a, b = self.leaves
        return x @ weight + (x @ a) @ b.T


def cross_entropy(params, inputs, labels):
    hidden, last = inputs, len(params) - 1
    for i, (weight, bias) in enumerate(params):
        hidden = hidden @ weight + bias
        hidden = hidden if i == last else jax.nn.relu(hidden)
    picked = jnp.take_along_axis(hidden, labels[:, None], 1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(hidden, -1) - picked)


def start(rng, sizes):
    layers = zip(sizes, sizes[1:], strict=False)
    return [
        (np.float32(rng.normal(size=(a, b)) * np.sqrt(2 / a)), np.zeros(b, np.float32))
        for a, b in layers
    ]


def dense(loss):
    target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, WIDTH**2))
    engine = shift.Importance(NUM_DRAWS, ess=ESS)

    @jax.jit
    def step(key, params):
        del params
        _, draws, _ = engine.step(key, (), target)
        fitted = fit.ForwardKL().step(key, (), target, draws)[1]
        return loss.constrain(fitted.mean - loss.x0)

    return step


def low_rank(rank, inputs, labels, chunk_size):
    def perturbed(params, noise, sign):
        return [
            (Perturbed(w, sign * WIDTH * a, b), bias + sign * WIDTH * e)
            for (w, bias), (a, b, e) in zip(params, noise, strict=True)
        ]

    @jax.jit
    def step(key, params):
        def normal(i, *shape):
            return random.normal(random.fold_in(key, i), (NUM_DRAWS // 2, *shape))

        noise = [
            (
                normal(3 * i, w.shape[0], rank),
                normal(3 * i + 1, w.shape[1], rank) / math.sqrt(rank),
                normal(3 * i + 2, *bias.shape),
            )
            for i, (w, bias) in enumerate(params)
        ]
        noise = lax.optimization_barrier(noise)

        def of_pair(row):
            pair = [cross_entropy(perturbed(params, row, s), inputs, labels) for s in (1.0, -1.0)]
            return jnp.stack(pair)

        chunks = jax.tree.map(lambda a: a.reshape(-1, chunk_size // 2, *a.shape[1:]), noise)
        loss = lax.map(jax.vmap(of_pair), chunks).reshape(-1)
        temperature, lowest = _temperature_of_ess(loss, ESS, jnp.asarray(1.0))
        weight = jax.nn.softmax(-(loss - lowest) / temperature).reshape(-1, 2)
        weight = WIDTH * (weight[:, 0] - weight[:, 1])
        return [(jnp.einsum("j,jar,jbr->ab", weight, a, b), weight @ e) for a, b, e in noise]

    return step


def cosine(first, second):
    a, b = (ravel_pytree(tree)[0] for tree in (first, second))
    return float(a @ b / (jnp.linalg.norm(a) * jnp.linalg.norm(b)))


def measure(num_rows, sizes, ranks, repeats, num_keys):
    rng = np.random.default_rng(0)
    params = jax.tree.map(jnp.asarray, start(rng, sizes))
    inputs = jnp.asarray(rng.random((num_rows, sizes[0])), jnp.float32)
    labels = jnp.asarray(rng.integers(0, sizes[-1], num_rows))
    steps = {"dense": dense(Loss.from_function(cross_entropy, params, inputs, labels))}
    for rank in ranks:
        steps[f"rank {rank}"] = low_rank(rank, inputs, labels, chunk_size=8)
    calls = {name: lambda s=s: s(random.key(0), params) for name, s in steps.items()}
    times = harness.rounds(calls, repeats)
    downhill = jax.tree.map(jnp.negative, jax.grad(cross_entropy)(params, inputs, labels))
    rows = []
    for name, step in steps.items():
        found = [cosine(step(random.key(k), params), downhill) for k in range(num_keys)]
        rows.append({
            "cloud": name,
            "images": num_rows,
            "draws / s": NUM_DRAWS / float(np.median(times[name])),
            "/ dense": harness.ratio(times["dense"], times[name]),
            "25-75 %": harness.spread(times["dense"], times[name]),
            "cosine": float(np.mean(found)),
        })
    return rows


if __name__ == "__main__":
    options = harness.arguments(__doc__)
    print(harness.environment())
    images, *settings = (64, 256, 1024), SIZES, (1, 4), 9, 5
    if options.smoke:
        images, *settings = (8,), (6, 4, 3), (1,), 2, 2
    rows = [row for count in images for row in measure(count, *settings)]
    tables = {f"Clouds of {NUM_DRAWS} draws": rows}
    for title, rows in tables.items():
        harness.show(title, rows)
    harness.save(options.out, tables)
