# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Does every scheme train a network of a million parameters, and what does an update cost beside one of SGD?

784-1258-10 ReLUs with batches of 256 rows: MNIST (`--data mnist.npz`, with the arrays x_train, y_train, x_test and
y_test) or noise of that shape. Each scheme has a process of its own. Costs are milliseconds per update after the
first ten, over those of SGD with one gradient of the same batch in the same process, in turn; medians over rounds.
Beside them are the gradients and losses of an update, which explain most of the ratio. Memory is the peak of the
process: after the first updates, and how much higher it is after four times as many.
"""

import argparse
import json
from functools import partial

import harness
import jax
import numpy as np
from history import peak
from jax import random
from network_price import images, sgd, start
from overhead import network

from numpyro_regloss import Loss, Minibatch, fit, schemes, shift

BATCH, RATE, TAU = 256, 0.1, 1e-6
SCHEMES = {
    "heat, 5 gradients": partial(schemes.heat, fit=fit.RobbinsMonro(5), temperature=TAU / RATE),
    "local entropy, SGLD, 5 gradients": partial(
        schemes.local_entropy, shift=shift.SGLD(0.7 * RATE, 5), temperature=TAU / RATE
    ),
    "Entropy-SGD": schemes.entropy_sgd,
    "Parle, 3 replicas": schemes.parle,
    "local entropy, 64 draws": partial(schemes.local_entropy, shift=shift.Importance(64, ess=0.5)),
    "gradient_free, 64 draws": lambda loss, tau: schemes.gradient_free(loss, tau**0.5, 64),
    "anneal, 64 draws": lambda loss, tau: schemes.anneal(loss, tau**0.5, 50, num_samples=64),
}


@partial(jax.jit, static_argnums=2)
def advance(optimizer, state, num_updates):
    state, history = optimizer.scan(state, num_updates)
    return state, history.num_grad.sum(), history.num_loss.sum(), history.ok.all()


def loss_of(path, hidden):
    if path is not None:
        x, y = images(path)[:2]
    else:
        rng = np.random.default_rng(0)
        x = rng.uniform(size=(10_000, 784)).astype(np.float32)
        y = rng.integers(0, 10, len(x)).astype(np.int32)
    params = start(0, x.shape[1], hidden)
    return Loss.from_function(network, params, x, y, minibatch=Minibatch(BATCH))


def measure(name, path, hidden, num_updates, repeats):
    loss = loss_of(path, hidden)
    optimizer = SCHEMES[name](loss, TAU)
    state = optimizer.init(random.key(0))
    state, _, _, ok = jax.block_until_ready(advance(optimizer, state, num_updates))
    early = peak()
    for _ in range(3):
        state, gradients, losses, good = jax.block_until_ready(
            advance(optimizer, state, num_updates)
        )
        ok &= good
    late = peak()
    times = harness.rounds(
        {
            "ours": lambda: advance(optimizer, state, num_updates)[0],
            "SGD": lambda: sgd(random.key(0), loss.x0, loss, num_updates, RATE, BATCH),
        },
        repeats,
    )
    return {
        "scheme": name,
        "parameters": loss.dim,
        "all steps taken": bool(ok),
        "gradients / update": float(gradients) / num_updates,
        "losses / update": float(losses) / num_updates,
        "ms / update": 1e3 * float(np.median(times["ours"])) / num_updates,
        "/ SGD": harness.ratio(times["ours"], times["SGD"]),
        "25-75 %": harness.spread(times["ours"], times["SGD"]),
        "peak MB": early,
        "later + MB": late - early,
    }


def main():
    parser = harness.parser(__doc__)
    parser.add_argument("--data", help="an npz file of images; default: noise")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*json.loads(options.one))))
        return
    print(harness.environment())
    sizes = (8, 2, 2) if options.smoke else (1258, 10, 5)
    rows = []
    for name in list(SCHEMES)[: 2 if options.smoke else None]:
        case = json.dumps([name, options.data, *sizes])
        rows.append(harness.in_fresh_process(__file__, "--one", case))
        print(rows[-1], flush=True)
    title = "One million parameters" if not options.smoke else "Some parameters"
    harness.show(title, rows)
    harness.save(options.out, {title: rows})


if __name__ == "__main__":
    main()
