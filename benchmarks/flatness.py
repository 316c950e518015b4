# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Does `values.flatness_verdict` have the sign of SAM's gain over SGD right, and what does it cost?

Networks 64-h-10 of ReLUs on scikit-learn's digits, 1000 rows for training and 797 for tests. Labels of training
are replaced at random, as many as the setting says. SGD takes batches of 50 at a constant rate. SAM
(`optax.contrib.sam`, rho 0.1) has the same starts, batches, rates and number of updates, which are twice the
gradients. The gain is that of test accuracy; its error is over seeds, which draw starts, batches and noise.
Verdicts are on networks of SGD, on their noisy training data alone.

The limits of the verdict were chosen on the settings "seen"; nothing was chosen on the "new" ones. Where the gain
is within two standard errors it has no sign to speak of: the table counts all settings, and the others again.
"""

import itertools
import time
from functools import partial

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jax import lax, random

from numpyro_regloss import Loss, Minibatch, values

NUM_TRAIN, BATCH, CLASSES, RHO = 1000, 50, 10, 0.1
ANSWERS = ("pays", "does not pay", "cannot tell")


def network(params, inputs):
    hidden = jax.nn.relu(inputs @ params["first"]["kernel"] + params["first"]["bias"])
    return hidden @ params["second"]["kernel"] + params["second"]["bias"]


def cross_entropy(params, inputs, labels):
    logits = network(params, inputs)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def start(rng_key, width, num_inputs=64):
    first, second = random.split(rng_key)
    return {
        "first": {
            "kernel": random.normal(first, (num_inputs, width)) * np.sqrt(2 / num_inputs),
            "bias": jnp.zeros(width),
        },
        "second": {
            "kernel": random.normal(second, (width, CLASSES)) * np.sqrt(1 / width),
            "bias": jnp.zeros(CLASSES),
        },
    }


def digits():
    from sklearn.datasets import load_digits  # noqa: PLC0415

    inputs, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x, y = np.float32(inputs[order] / 16.0), np.int32(labels[order])
    return x[:NUM_TRAIN], y[:NUM_TRAIN], x[NUM_TRAIN:], y[NUM_TRAIN:]


def noisy(rng_key, labels, share):
    """Labels of which a share was replaced by others, drawn uniformly."""
    key_which, key_what = random.split(rng_key)
    shift = random.randint(key_what, labels.shape, 1, CLASSES)
    wrong = random.uniform(key_which, labels.shape) < share
    return jnp.where(wrong, (labels + shift) % CLASSES, labels)


@partial(jax.jit, static_argnames=("width", "steps", "sam"))
@partial(jax.vmap, in_axes=(0, None, None, None, None, None, None, None))
def train(rng_key, x, y, noise, rate, width, steps, sam):
    """Parameters and labels of one seed, after as many updates of batches."""
    key_start, key_noise, key_batch = random.split(rng_key, 3)
    labels = noisy(key_noise, y, noise)
    optimizer = optax.sgd(rate)
    if sam:
        climb = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
        optimizer = optax.contrib.sam(optimizer, climb, opaque_mode=True)
    params = start(key_start, width)

    def update(i, carry):
        params, state = carry
        rows = random.randint(random.fold_in(key_batch, i), (BATCH,), 0, len(x))

        def gradient(params, _=None):
            return jax.grad(cross_entropy)(params, x[rows], labels[rows])

        extra = {"grad_fn": gradient} if sam else {}
        updates, state = optimizer.update(gradient(params), state, params, **extra)
        return optax.apply_updates(params, updates), state

    params, _ = lax.fori_loop(0, steps, update, (params, optimizer.init(params)))
    return params, labels


@jax.jit
def tested(params, x, y):
    """Test accuracy in per cent and cross-entropy, of every seed."""

    def one(params):
        right = network(params, x).argmax(-1) == y
        return 100.0 * jnp.mean(right), cross_entropy(params, x, y)

    return jax.vmap(one)(params)


def settings(smoke):
    """Those that the limits of the verdict were chosen on, and others that nothing was chosen on."""
    if smoke:
        return {"seen": [(8, 1, 0.0, 0.5), (8, 4, 0.4, 0.5)], "new": [(8, 2, 0.4, 0.5)]}
    seen = itertools.product((16, 64, 256), (5, 100), (0.0, 0.2, 0.4), (0.05, 0.5))
    new = itertools.product((32, 128), (10, 30, 60), (0.0, 0.3), (0.1, 0.3))
    return {"seen": list(seen), "new": list(new)}


def judge(setting, seeds, num_judged, data):
    """SAM's gain over SGD in one setting, and verdicts on some of the networks of SGD."""
    width, epochs, noise, rate = setting
    x, y, x_test, y_test = data
    keys, steps = random.split(random.key(0), seeds), epochs * NUM_TRAIN // BATCH
    found, labels = train(keys, x, y, noise, rate, width, steps, False)
    flat, _ = train(keys, x, y, noise, rate, width, steps, True)
    before, after = tested(found, x_test, y_test), tested(flat, x_test, y_test)
    gain = np.asarray(after[0] - before[0], float)
    error = float(np.std(gain, ddof=1) / np.sqrt(seeds))
    answers, ratios, rises, shares = [], [], [], []
    for i in range(num_judged):
        params = jax.tree.map(lambda a: a[i], found)  # noqa: B023
        loss = Loss.from_function(cross_entropy, params, x, labels[i])
        verdict = values.flatness_verdict(random.key(i), loss)
        answers.append(verdict.answer)
        ratios.append(verdict.ratio)
        rises.append(float(verdict.rise.value))
        shares.append(rises[-1] / verdict.loss)
    return {
        "hidden": width,
        "epochs": epochs,
        "label noise": noise,
        "rate": rate,
        "SGD, %": float(np.mean(before[0])),
        "SAM's gain, %": float(np.mean(gain)),
        "± se": error,
        "rise": float(np.mean(rises)),
        "rise / loss": float(np.mean(shares)),
        "ratio": float(np.mean(ratios)),
        "first verdict": answers[0],
        **{name: answers.count(name) for name in ANSWERS},
    }


def score(name, rows):
    """How often the sign was right, of networks and of settings by their first network."""
    clear = [row for row in rows if abs(row["SAM's gain, %"]) > 2 * row["± se"]]
    summary = []
    for which, some in (("all", rows), ("gain beyond 2 se", clear)):
        right = wrong = unsure = first_right = first_wrong = 0
        for row in some:
            good, bad = ANSWERS[:2] if row["SAM's gain, %"] > 0 else ANSWERS[1::-1]
            right, wrong, unsure = right + row[good], wrong + row[bad], unsure + row[ANSWERS[2]]
            first_right += row["first verdict"] == good
            first_wrong += row["first verdict"] == bad
        total = max(right + wrong + unsure, 1)
        summary.append({
            "settings": name,
            "of them": which,
            "number": len(some),
            "SAM gains in": sum(row["SAM's gain, %"] > 0 for row in some),
            "right by first network": first_right,
            "wrong": first_wrong,
            "cannot tell": len(some) - first_right - first_wrong,
            "networks right, %": 100.0 * right / total,
            "wrong, %": 100.0 * wrong / total,
            "cannot tell, %": 100.0 * unsure / total,
        })
    return summary


def price(num_rows, widths):
    """Seconds of a verdict on a large network, compilation included."""
    rng = np.random.default_rng(0)
    sizes = (784, *widths, CLASSES)
    params = [
        np.float32(rng.normal(size=pair) * np.sqrt(2 / pair[0]))
        for pair in itertools.pairwise(sizes)
    ]

    def deep(params, inputs, labels):
        hidden = inputs
        for kernel in params[:-1]:
            hidden = jax.nn.relu(hidden @ kernel)
        logits = hidden @ params[-1]
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    x = np.float32(rng.uniform(size=(num_rows, 784)))
    y = np.int32(rng.integers(CLASSES, size=num_rows))
    loss = Loss.from_function(deep, params, x, y, minibatch=Minibatch(256))
    start_time = time.perf_counter()
    verdict = values.flatness_verdict(random.key(0), loss)
    seconds = time.perf_counter() - start_time
    return [{"parameters": loss.dim, "rows": num_rows, "seconds": seconds, "ratio": verdict.ratio}]


def main():
    parser = harness.parser(__doc__)
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--judged", type=int, default=4, help="networks per setting with a verdict")
    options = parser.parse_args()
    smoke, data, tables = options.smoke, digits(), {}
    print(harness.environment())

    def report(title, rows):
        tables[title] = rows
        harness.show(title, rows)

    rows, widths = (512, (16,)) if smoke else (60_000, (800, 400))
    report("Price of a verdict", price(rows, widths))
    seeds, judged = (2, 1) if smoke else (options.seeds, options.judged)
    scores = []
    for name, some in settings(smoke).items():
        found = []
        for setting in some:
            found.append(judge(setting, seeds, judged, data))
            print(setting, found[-1]["first verdict"], flush=True)
        report(f"Settings, {name}: {seeds} seeds", found)
        scores += score(name, found)
    report("Was the sign right?", scores)
    harness.save(options.out, tables)


if __name__ == "__main__":
    main()
