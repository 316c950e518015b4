# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Experiment d of `training.py`: networks that are trained from values of their loss alone."""

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import random
from overhead import logits
from training_store import key_of, spread

from numpyro_regloss import Minibatch, TwoStep, anchor, fit, shift

# Of `--free`, by default.
WIDTH, NUM_SAMPLES, RATE = 0.02, 128, 0.3
NUM_LOOKS = 40


def int8(params, inputs):
    # Weights are integers of 8 bits, in units of 1/64.
    rounded = {n: jnp.clip(jnp.round(64 * params[n]), -127, 127) / 64 for n in "wv"}
    return logits(params | rounded, inputs)


def staircase(params, inputs):
    hidden = jnp.floor(4 * jnp.clip(inputs @ params["w"] + params["b"], 0, 2)) / 4
    return hidden @ params["v"] + params["c"]


NETWORKS = {"relu": logits, "int8 weights": int8, "staircase activations": staircase}


def cross_entropy(params, inputs, labels, *, outputs):
    logs = jax.nn.log_softmax(outputs(params, inputs))
    return -jnp.mean(jnp.take_along_axis(logs, labels[:, None], 1))


# One function for each network, so that all seeds have one program.
LOSSES = {name: partial(cross_entropy, outputs=outputs) for name, outputs in NETWORKS.items()}


@partial(jax.jit, static_argnums=4)
def accuracy(loss, x, inputs, labels, name):
    return 100.0 * jnp.mean(NETWORKS[name](loss.constrain(x), inputs).argmax(-1) == labels)


@partial(jax.jit, static_argnums=2)
def advance(optimizer, state, num_steps):
    state, history = optimizer.scan(state, num_steps)
    return state, history.num_loss.sum()


def train(
    task, partial_result, *, name, seed, hidden, batch, width, num_samples, rate, evaluations
):
    """Curve of test accuracy over evaluations and seconds, those of tests and compilation not counted."""
    loss = task.loss(seed, hidden, Minibatch(batch), LOSSES[name])
    num_steps = evaluations // (num_samples + 1)
    chunk = max(1, num_steps // NUM_LOOKS)
    # As `schemes.gradient_free`, with a rate that falls to zero: noise of batches and clouds averages out.
    optimizer = TwoStep(
        loss,
        width**2,
        shift.Importance(num_samples, ess=0.5),
        fit.ForwardKL(),
        anchor.Optax(optax.adam(optax.cosine_decay_schedule(rate * width, num_steps))),
    )

    def tested(x):
        return float(accuracy(loss, x, task.x_test, task.y_test, name))

    state = optimizer.init(random.key(seed))
    jax.block_until_ready(advance(optimizer, state, chunk))
    curve = [[0, 0.0, tested(loss.x0)]]
    saved = partial_result.load()
    if saved is not None:
        state, curve = saved
        print(f"{name}, seed {seed}: goes on after {curve[-1][1]:.0f} s")
    while len(curve) <= NUM_LOOKS:
        begun = time.perf_counter()
        state, count = jax.block_until_ready(advance(optimizer, state, chunk))
        spent = time.perf_counter() - begun
        evaluations, seconds, _ = curve[-1]
        now = tested(state.reference.mean)
        curve.append([evaluations + int(count), seconds + spent, now])
        partial_result.save((state, curve))
    return curve


def without_gradients(task, run, num_seeds, *, smoke, evaluations, point):
    """Accuracy at the end and along the way, for each kind of network."""
    width, num_samples, rate = point
    setting = {
        "hidden": 8 if smoke else 128,
        "batch": 64 if smoke else 512,
        "width": width,
        "num_samples": int(num_samples),
        "rate": rate,
        "evaluations": 50 * (int(num_samples) + 1) if smoke else evaluations,
    }
    about = {"data": task.name, **setting}
    rows, curves = [], []
    for name in NETWORKS:

        def trained(seeds, name=name):
            return [
                train(
                    task,
                    run.store.partial(key_of("d", name, about, s)),
                    name=name,
                    seed=s,
                    **setting,
                )
                for s in seeds
            ]

        found = run.each("d", name, about, num_seeds, trained)
        if not found:
            continue
        found = [np.asarray(curve, float).T for curve in found]
        rows.append({
            "network": name,
            "seeds": len(found),
            **spread([accuracy[-1] for _, _, accuracy in found], "accuracy"),
            **spread([seconds[-1] for _, seconds, _ in found], "seconds"),
            **spread([count[-1] / seconds[-1] for count, seconds, _ in found], "evaluations / s"),
            "evaluations": float(np.mean([count[-1] for count, _, _ in found])),
        })
        # At the same numbers of evaluations in all seeds.
        for i in range(NUM_LOOKS // 10, NUM_LOOKS + 1, NUM_LOOKS // 10):
            curves.append({
                "network": name,
                "evaluations": int(found[0][0, i]),
                **spread([seconds[i] for _, seconds, _ in found], "seconds"),
                "seeds": len(found),
                **spread([accuracy[i] for _, _, accuracy in found], "accuracy"),
            })
    title = f"d. Test accuracy in per cent of {setting['hidden']} hidden units, from values of the loss alone"
    return {title: rows, "d. Along the way; test accuracy in per cent": curves}
