# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""What does an update of a network cost beside its gradients, and what is it worth against SGD?

A network with 32 hidden units, 784-32-10 on MNIST (`--data mnist.npz`, with the arrays x_train, y_train, x_test
and y_test) and 64-32-10 on scikit-learn's digits. Updates of heat and SGLD local entropy take five gradients, each
of a fifth of a batch of 256 or each of a batch of 256.

Price: gradients per update, counted by the engines over a whole run, and time per update over that of a bare loop
of five gradients of as many rows, each with its batch and its normal noise. All are timed in turn; ratios are
medians over rounds of the ratio within a round.

Accuracy on the test images after 100, 200, ... updates from equal starts: SGD takes one step per update, with the
rate tau / T of the others and all the rows that these see in an update. Rows of `entropy_sgd` see more: 20 batches
of 256 in an update.
"""

from functools import partial

import harness
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from overhead import logits, milliseconds, network

from numpyro_regloss import Loss, Minibatch, TwoStep, fit, schemes, shift

INNER_STEPS, HIDDEN, CLASSES = 5, 32, 10


def images(path):
    """Inputs in [0, 1] and labels, of training and test."""
    if path is not None:
        with np.load(path) as data:
            found = [data[name] for name in ("x_train", "y_train", "x_test", "y_test")]
        largest = 255.0
    else:
        from sklearn.datasets import load_digits  # noqa: PLC0415

        inputs, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(labels))
        train, test = order[360:], order[:360]
        found = [inputs[train], labels[train], inputs[test], labels[test]]
        largest = 16.0
    x, y, x_test, y_test = found
    flat = [np.asarray(a.reshape(len(a), -1) / largest, np.float32) for a in (x, x_test)]
    return flat[0], y.astype(np.int32), flat[1], y_test.astype(np.int32)


def start(seed, width, hidden=HIDDEN):
    rng = np.random.default_rng(seed)
    return {
        "w": np.float32(rng.normal(size=(width, hidden)) * np.sqrt(2 / width)),
        "b": np.zeros(hidden, np.float32),
        "v": np.float32(rng.normal(size=(hidden, CLASSES)) * np.sqrt(1 / hidden)),
        "c": np.zeros(CLASSES, np.float32),
    }


def heat(loss, tau, rate):
    """At the rate tau / T."""
    return schemes.heat(loss, tau, fit.RobbinsMonro(INNER_STEPS), temperature=tau / rate)


def langevin(loss, tau, rate):
    """At the rate tau / T."""
    # Most of the way to the minimum of a flat direction in each step, and more weight on later draws.
    chain = shift.SGLD(0.7 * rate, INNER_STEPS, averaging_decay=0.5)
    return schemes.local_entropy(loss, tau, chain, temperature=tau / rate)


def methods(data, seed, rate, batch):
    """Optimizers of one start; T is one over the number of rows."""
    x, y = data[:2]
    loss = Loss.from_function(network, start(seed, x.shape[1]), x, y, minibatch=batch)
    tau = rate / len(x)
    return {"heat": heat(loss, tau, rate), "SGLD": langevin(loss, tau, rate)}


@partial(jax.jit, static_argnames=("num_updates", "num_gradients"))
def bare(rng_key, target, num_updates, num_gradients):
    """Gradients of fresh batches, each with its normals, and a small step."""

    def body(i, x):
        key_batch, key_noise = random.split(random.fold_in(rng_key, i))
        value, gradient = jax.value_and_grad(target.on_batch(key_batch).value)(x)
        x = x - 1e-3 * (gradient + 1e-30 * value)
        return x + 1e-4 * random.normal(key_noise, x.shape)

    return lax.fori_loop(0, num_updates * num_gradients, body, target.loss.x0)


@partial(jax.jit, static_argnames=("num_updates", "rate", "rows"))
def sgd(rng_key, x, loss, num_updates, rate, rows):
    """Plain SGD, one step of all rows of an update."""
    minibatch = Minibatch(rows)

    def body(i, x):
        batch = minibatch.draw(random.fold_in(rng_key, i), loss.arguments)
        return x - rate * jax.grad(loss.evaluate)(x, batch)

    return lax.fori_loop(0, num_updates, body, x)


def price(data, num_updates, repeats):
    rows = []
    scan = jax.jit(TwoStep.scan, static_argnums=2)
    for batch in (Minibatch(256, split=True), Minibatch(256)):
        optimizers = methods(data, 0, 0.5, batch)
        loss = optimizers["heat"].loss
        target = loss_target(optimizers["heat"])
        calls = {
            "five gradients": lambda t=target: bare(random.key(0), t, num_updates, INNER_STEPS)
        }
        counts = {"five gradients": float(INNER_STEPS)}
        for name, optimizer in optimizers.items():
            state = optimizer.init(random.key(0))
            state, history = scan(optimizer, state, num_updates)
            counts[name] = float(np.mean(history.num_grad))
            assert not np.any(history.num_loss)
            calls[name] = lambda o=optimizer, s=state: scan(o, s, num_updates)
        times = harness.rounds(calls, repeats)
        share = target.loss.minibatch.batch_size
        rows += [
            {
                "update": name,
                "rows / gradient": share,
                "parameters": loss.dim,
                "gradients / update": counts[name],
                "ms / update": milliseconds(values) / num_updates,
                "/ five gradients": harness.ratio(values, times["five gradients"]),
                "25-75 %": harness.spread(values, times["five gradients"]),
            }
            for name, values in times.items()
        ]
    return rows


def loss_target(optimizer):
    from numpyro_regloss import Gaussian, RegularizedLoss  # noqa: PLC0415

    loss = optimizer.loss
    target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, 1e-4), temperature=1e-3)
    return target.split_over(INNER_STEPS)


def accuracy(data, seeds, rates, num_hundreds, length):
    inputs, labels = map(jnp.asarray, data[2:])

    @jax.jit
    def test(loss, x):
        return 100.0 * jnp.mean(logits(loss.constrain(x), inputs).argmax(-1) == labels)

    split = Minibatch(256, split=True)
    used = INNER_STEPS * (256 // INNER_STEPS)
    found = {}
    for seed in range(seeds):
        key = random.key(seed)
        for rate in rates:
            optimizers = methods(data, seed, rate, split)
            loss = optimizers["heat"].loss
            x, path = loss.x0, []
            for i in range(num_hundreds):
                x = sgd(random.fold_in(key, i), x, loss, length, rate, used)
                path.append(float(test(loss, x)))
            found.setdefault(("SGD", rate, used), []).append(path)
            for name, optimizer in optimizers.items():
                path = follow(optimizer, key, num_hundreds, length, test)
                found.setdefault((name, rate, used), []).append(path)
        full = methods(data, seed, rates[0], Minibatch(256))["heat"].loss
        optimizer = schemes.entropy_sgd(full, tau=1e-3)
        path = follow(optimizer, key, num_hundreds, length, test)
        found.setdefault(("entropy_sgd, defaults", None, 20 * 256), []).append(path)
    return [
        {
            "method": name,
            "rate tau / T": rate,
            "rows / update": rows,
            **{f"{length * (i + 1)}": float(np.mean(paths, 0)[i]) for i in range(num_hundreds)},
            "sd": float(np.std(np.asarray(paths)[:, -1])),
        }
        for (name, rate, rows), paths in found.items()
    ]


def follow(optimizer, key, num_hundreds, length, test):
    state, path = None, []
    for _ in range(num_hundreds):
        result = optimizer.run(key, length, init_state=state, progress_bar=False, history="scalars")
        state = result.state
        path.append(float(test(optimizer.loss, state.reference.mean)))
    return path


def main():
    parser = harness.parser(__doc__)
    parser.add_argument("--data", help="an npz file of images; default: scikit-learn's digits")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=11)
    options = parser.parse_args()
    smoke = options.smoke
    print(harness.environment())
    data, tables = images(options.data), {}

    def report(title, rows):
        tables[title] = rows
        harness.show(title, rows)

    updates = 20 if smoke else 100
    report("Price of an update", price(data, updates, 2 if smoke else options.repeats))
    hundreds, length, rates = (2, 5, (0.5,)) if smoke else (5, 100, (0.1, 0.5))
    title = f"Test accuracy in per cent after so many updates, {options.seeds} seeds"
    report(title, accuracy(data, 1 if smoke else options.seeds, rates, hundreds, length))
    harness.save(options.out, tables)


if __name__ == "__main__":
    main()
