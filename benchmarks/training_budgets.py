# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Experiment c of `training.py`: optimizers of training loops with equal numbers of gradients, and noisy labels.

Each is an Optax transformation in one compiled loop, all seeds (or all settings) side by side.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from flatness import noisy
from jax import lax, random
from network_price import start
from overhead import logits, network
from training_store import spread
from training_tasks import measured

from numpyro_regloss import transforms

COLD = 1e-8  # The temperature that `schemes.entropy_sgd` has by default.
TUNING_SEEDS = (1_001, 1_002)
NOISES = (0.0, 0.2, 0.4)


def sgd(rate, _, key):
    del key
    return optax.sgd(rate)


def adam(rate, _, key):
    del key
    return optax.adam(rate)


def sam(rate, rho, key):
    del key
    climb = optax.chain(optax.contrib.normalize(), optax.sgd(rho))
    return optax.contrib.sam(optax.sgd(rate), climb, opaque_mode=True)


def fsgld(rate, tau, key):
    return transforms.fsgld(rate, tau, COLD, key=key)


def entropy_sgd(rate, outer, key):
    momentum = optax.sgd(outer, momentum=0.9, nesterov=True)
    return transforms.entropy_sgd(1e-3, step_size=rate, optimizer=momentum, key=key)


def local_entropy(rate, tau, key):
    # tau / T = 5 rate: five steps of the chain go two thirds of the way to the minimum of a flat direction.
    return transforms.local_entropy(
        optax.sgd(1.0),
        tau,
        step_size=rate,
        temperature=tau / (5.0 * rate),
        num_samples=5,
        averaging_decay=0.5,
        direction="displacement",
        key=key,
    )


def heat(rate, tau, key):
    return transforms.heat(optax.sgd(rate), tau, key=key)


# Six settings of each: a rate, or a rate and one more number; and gradients per call and the share of the budget.
RATES, WIDTHS = (0.05, 0.15, 0.5), (1e-4, 1e-3)
METHODS = {
    "SGD": (sgd, (0.02, 0.05, 0.1, 0.2, 0.5, 1.0), (None,), 1, 1.0),
    "Adam": (adam, (3e-4, 1e-3, 2e-3, 4e-3, 1e-2, 2e-2), (None,), 1, 1.0),
    "SAM": (sam, RATES, (0.05, 0.2), 2, 1.0),
    "fSGLD": (fsgld, RATES, WIDTHS, 1, 1.0),
    "fSGLD, half": (fsgld, RATES, WIDTHS, 1, 0.5),
    "Entropy-SGD": (entropy_sgd, RATES, (0.3, 1.0), 1, 1.0),
    "local entropy": (local_entropy, RATES, WIDTHS, 1, 1.0),
    "heat": (heat, RATES, WIDTHS, 1, 1.0),
}


@partial(jax.jit, static_argnames=("make", "batch"))
def train(lanes, x, y, num_calls, *, make, batch):
    """Parameters of every lane: its start, key, share of wrong labels, rate and second number."""

    def one(params, rng_key, noise, rate, second):
        key_noise, key_batch, key_method = random.split(rng_key, 3)
        labels = noisy(key_noise, y, noise)
        optimizer = optax.with_extra_args_support(make(rate, second, key_method))

        def call(i, carry):
            params, state = carry
            rows = random.randint(random.fold_in(key_batch, i), (batch,), 0, len(x))

            def gradient(params, _=None):
                return jax.grad(network)(params, x[rows], labels[rows])

            # Transformations make a whole step of their own of a `grad_fn`: only SAM is to have one.
            extra = {"grad_fn": gradient} if make is sam else {}
            updates, state = optimizer.update(gradient(params), state, params, **extra)
            return optax.apply_updates(params, updates), state

        params, state = lax.fori_loop(0, num_calls, call, (params, optimizer.init(params)))
        return params if make in {sgd, adam, sam} else transforms.eval_params(state, params)

    return jax.vmap(one)(*lanes)


@jax.jit
def tested(params, x, y):
    return jax.vmap(lambda one: measured(logits(one, x), y))(params)


class Rows:
    """Rows for training, for the choice of settings, and for the report."""

    def __init__(self, task, num_train, num_chosen):
        order = np.random.default_rng(0).permutation(len(task.x))
        train, chosen = order[:num_train], order[num_train : num_train + num_chosen]
        self.train = task.x[train], task.y[train]
        self.validation = task.x[chosen], task.y[chosen]
        self.test = task.x_test, task.y_test


def ends(task, rows, lanes, judged, *, method, hidden, num_gradients, batch):
    """What is measured of every lane: `(seed, noise, rate, second)`."""
    make, _, _, per_call, share = METHODS[method]
    starts = [start(seed, task.num_inputs, hidden) for seed, *_ in lanes]
    seeds, *numbers = zip(*lanes, strict=True)
    columns = (
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts),
        jax.vmap(random.key)(jnp.asarray(seeds)),
        *(jnp.asarray([0.0 if a is None else a for a in column]) for column in numbers),
    )
    num_calls = int(num_gradients * share) // per_call
    params = train(columns, *rows.train, num_calls, make=make, batch=batch)
    found = tested(params, *judged)
    return [{name: float(found[name][i]) for name in found} for i in range(len(lanes))]


def at_equal_gradients(task, run, num_seeds, *, smoke):
    if smoke:
        hidden, num_train, num_chosen, num_gradients, batch = 8, 200, 100, 40, 20
        noises, tuning = (0.2,), TUNING_SEEDS[:1]
    else:
        large = len(task.x) > 20_000
        hidden, num_gradients, batch = 32, 4_000, 100 if large else 50
        num_train, num_chosen = (10_000, 5_000) if large else (1_100, 337)
        noises, tuning = NOISES, TUNING_SEEDS
    rows = Rows(task, num_train, num_chosen)
    about = {
        "data": task.name,
        "hidden": hidden,
        "rows": num_train,
        "gradients": num_gradients,
        "batch": batch,
    }
    options = {"hidden": hidden, "num_gradients": num_gradients, "batch": batch}
    found, choices = [], []
    for noise in noises:
        for method, (_, rates, seconds, _, share) in METHODS.items():
            points = list(itertools.product(rates, seconds))[: num_seeds if smoke else None]

            def tune(seeds, method=method, noise=noise, points=points):
                lanes = [(seed, noise, *point) for point in points for seed in seeds]
                judged = ends(task, rows, lanes, rows.validation, method=method, **options)
                by_point = [judged[i :: len(seeds)] for i in range(len(seeds))]
                return [{"accuracy": [one["accuracy"] for one in some]} for some in by_point]

            setting = {**about, "noise": noise, "settings": points}
            tuned = run("c, tuning", method, setting, tuning, tune)
            if len(tuned) < len(tuning):
                continue
            means = np.mean([one["accuracy"] for one in tuned], 0)
            rate, second = points[int(means.argmax())]
            choices.append({
                "label noise": noise,
                "method": method,
                "rate": rate,
                "second": second,
                "validation accuracy": float(means.max()),
                "± over seeds": float(
                    np.std([one["accuracy"][int(means.argmax())] for one in tuned])
                ),
                "worst setting": float(means.min()),
            })

            def report(seeds, method=method, noise=noise, rate=rate, second=second):
                lanes = [(seed, noise, rate, second) for seed in seeds]
                return ends(task, rows, lanes, rows.test, method=method, **options)

            setting = {**about, "noise": noise, "rate": rate, "second": second}
            results = run("c", method, setting, range(num_seeds), report)
            if results:
                measures = {}
                for name in ("accuracy", "NLL", "ECE"):
                    measures |= spread([result[name] for result in results], name)
                found.append({
                    "label noise": noise,
                    "method": method,
                    "gradients": int(num_gradients * share),
                    "seeds": len(results),
                    **measures,
                })
    title = f"c. After {num_gradients:,} gradients at most; test images, ECE in per cent"
    return {title: found, "c. Settings, of six each, by validation accuracy": choices}
