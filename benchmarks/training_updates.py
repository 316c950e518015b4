# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Experiments a, b and e of `training.py`: updates from a random start, after SGD, and for eight taus at once."""

import dataclasses
import statistics
from functools import partial

import harness
import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from network_price import INNER_STEPS, heat, langevin, sgd
from overhead import logits
from training_store import spread

from numpyro_regloss import Minibatch, fit, schemes, shift, values

BATCH, RATE = 256, 0.5
USED = INNER_STEPS * (BATCH // INNER_STEPS)
TAUS = (1e-6, 1e-5, 1e-4)


def importance(loss, tau):
    # The temperature that tau / T = RATE asks for would leave all the weight on one draw: the weights set it.
    return schemes.local_entropy(loss, tau, shift.Importance(32, ess=0.5))


def hmc(loss, tau):
    engine = shift.HMC(100, 2, num_chains=1, trajectory_length=1.0)
    return schemes.local_entropy(loss, tau, engine, temperature=tau / RATE)


def is_too_dear(name, hidden, tau):
    """Hundreds of gradients for each draw: HMC has the small networks, one tau, one seed and small batches."""
    return name == "HMC" and (hidden > 32 or tau != TAUS[1])


SPLIT, WHOLE = Minibatch(BATCH, split=True), Minibatch(BATCH)
# With the batch of each, and the rows that an update sees.
METHODS = {
    "importance": (importance, WHOLE, BATCH),
    "SGLD local entropy": (partial(langevin, rate=RATE), SPLIT, USED),
    "Robbins-Monro heat": (partial(heat, rate=RATE), SPLIT, USED),
    "HMC": (hmc, Minibatch(64), 64),
    "Entropy-SGD": (schemes.entropy_sgd, WHOLE, 20 * BATCH),
}


@partial(jax.jit, static_argnums=2)
def advance(optimizer, state, num_updates):
    """Later state, and how many gradients and losses it took."""
    state, history = optimizer.scan(state, num_updates)
    return state, history.num_grad.sum(), history.num_loss.sum()


def follow_sgd(task, loss, seed, hundreds, length, x=None):
    x, path = loss.x0 if x is None else x, []
    for i in range(hundreds):
        x = sgd(random.fold_in(random.key(seed), i), x, loss, length, RATE, USED)
        path.append(task.tested(loss.constrain(x)))
    return path, 1.0, 0.0, x


def follow(task, optimizer, seed, hundreds, length):
    """Measures after every hundred of updates, gradients and losses per update, and the last centre."""
    state, path, counts = optimizer.init(random.key(seed)), [], np.zeros(2)
    for _ in range(hundreds):
        state, *new = advance(optimizer, state, length)
        counts += [float(number) for number in new]
        path.append(task.tested(optimizer.loss.constrain(state.reference.mean)))
    return path, *(counts / (hundreds * length)), state.reference.mean


# a. From a random start


def settings(task, hidden, length, tau=None):
    about = {"data": task.name, "hidden": hidden, "batch": BATCH, "rate": RATE, "length": length}
    return about if tau is None else {**about, "tau": tau}


def from_start(task, run, num_seeds, *, smoke):
    widths, taus = ((8,), TAUS[1:2]) if smoke else ((32, 128), TAUS)
    hundreds, length = (2, 3) if smoke else (5, 100)
    rows, prices = [], []

    def row(name, hidden, tau, seen, found):
        if not found:
            return
        paths = np.asarray([result["accuracy"] for result in found])
        columns = {}
        for i in range(hundreds):
            columns |= spread(paths[:, i], f"{length * (i + 1)}")
        rows.append({
            "method": name,
            "hidden": hidden,
            "tau": tau,
            "rows / update": seen,
            "seeds": len(found),
            **columns,
            "gradients / update": float(np.mean([result["gradients"] for result in found])),
            "losses / update": float(np.mean([result["losses"] for result in found])),
        })

    def shown(path, gradients, losses, x):
        del x
        return {
            "accuracy": [step["accuracy"] for step in path],
            "gradients": float(gradients),
            "losses": float(losses),
        }

    for hidden in widths:

        def plain(seeds, hidden=hidden):
            return [
                shown(*follow_sgd(task, task.loss(s, hidden), s, hundreds, length)) for s in seeds
            ]

        found = run.each("a", "SGD", settings(task, hidden, length), num_seeds, plain)
        row("SGD", hidden, None, USED, found)
        for name, (make, batch, seen) in METHODS.items():
            for tau in taus:
                if is_too_dear(name, hidden, tau):
                    continue

                def ours(seeds, hidden=hidden, make=make, batch=batch, tau=tau):
                    return [
                        shown(
                            *follow(
                                task, make(task.loss(s, hidden, batch), tau), s, hundreds, length
                            )
                        )
                        for s in seeds
                    ]

                setting = settings(task, hidden, length, tau)
                some = 1 if name == "HMC" else num_seeds
                row(name, hidden, tau, seen, run.each("a", name, setting, some, ours))

    for hidden in widths:
        repeats = 2 if smoke else 7
        setting = {**settings(task, hidden, length, TAUS[1]), "repeats": repeats}

        def timed(seeds, hidden=hidden, repeats=repeats):
            return [price(task, hidden, seed, repeats, smoke=smoke) for seed in seeds]

        for result in run("a", "time of all", setting, [0], timed):
            prices += [{"hidden": hidden, **one} for one in result]
    tables = {"a. Test accuracy in per cent after so many updates from a random start": rows}
    tables["a. Time per update, all methods in turn; medians and quartiles over rounds"] = prices
    return tables


def price(task, hidden, seed, repeats, *, smoke):
    """Time per update over that of SGD, in the same round."""
    loss = task.loss(seed, hidden)
    numbers = {"SGD": 200, "SGLD local entropy": 40, "Robbins-Monro heat": 40}
    if smoke:
        numbers = dict.fromkeys(numbers, 3)
    calls = {
        "SGD": lambda: sgd(random.key(seed), loss.x0, loss, numbers["SGD"], RATE, USED),
    }
    for name, (make, batch, _) in METHODS.items():
        if is_too_dear(name, hidden, TAUS[1]):
            continue
        optimizer = make(task.loss(seed, hidden, batch), TAUS[1])
        number = numbers.setdefault(name, 3 if smoke else 10)
        state, *_ = advance(optimizer, optimizer.init(random.key(seed)), number)
        calls[name] = lambda o=optimizer, s=state, n=number: advance(o, s, n)[0]
    found = {
        name: [seconds / numbers[name] for seconds in times]
        for name, times in harness.rounds(calls, repeats).items()
    }
    return [
        {
            "method": name,
            "ms / update": 1e3 * statistics.median(times),
            "/ SGD": harness.ratio(times, found["SGD"]),
            "25-75 %": harness.spread(times, found["SGD"]),
        }
        for name, times in found.items()
    ]


# b. After SGD

WIDE = 1e-4  # Its root is a fifth of the first layer's weights at the start, on MNIST.


def measured_widely(task, loss, seed, x, num_samples):
    """Test measures and flatness on the training images."""
    found = values.profile(
        random.key(seed),
        loss,
        loss.constrain(x),
        taus=[0.01],
        method="importance",
        num_samples=num_samples,
        scale="filter",
        batches=True,
    )
    return {
        **task.tested(loss.constrain(x)),
        "training loss": float(found.loss),
        "heat rise": float(found.heat_rise[0]),
        "its error": float(found.heat.error[0]),
    }


def after_sgd(task, run, num_seeds, *, smoke):
    hidden, first, more = (8, 3, 3) if smoke else (128, 2_000, 200)
    num_samples = 20 if smoke else 1_000
    names = ("Robbins-Monro heat", "SGLD local entropy", "Entropy-SGD")
    setting = {
        **settings(task, hidden, first, WIDE),
        "more": more,
        "num_samples": num_samples,
        "methods": ["SGD", *names],
    }

    def trained(seeds):
        results = []
        for seed in seeds:
            loss = task.loss(seed, hidden, WHOLE)
            plain = task.loss(seed, hidden)
            *_, x = follow_sgd(task, plain, seed, 1, first)
            ends = {"before": x}
            *_, ends["SGD"] = follow_sgd(task, plain, 10_000 + seed, 1, more, x)
            for name in names:
                make, batch, _ = METHODS[name]
                # An optimizer begins at its loss's start.
                optimizer = make(task.loss(seed, hidden, batch, params=plain.constrain(x)), WIDE)
                *_, ends[name] = follow(task, optimizer, 10_000 + seed, 1, more)
            results.append({
                name: measured_widely(task, loss, seed, end, num_samples)
                for name, end in ends.items()
            })
        return results

    found = run.each("b", "all", setting, num_seeds, trained)
    rows, changes = [], []
    columns = ("accuracy", "NLL", "ECE", "training loss", "heat rise", "its error")
    for name in ("before", "SGD", *names) if found else ():
        of_name = [one[name] for one in found]
        base = {"then": name, "seeds": len(found)}
        rows.append(
            base | _columns(columns, lambda column, some=of_name: [one[column] for one in some])
        )
        if name != "before":

            def change(column, name=name):
                return [one[name][column] - one["before"][column] for one in found]

            changes.append(base | _columns(columns[:-1], change))
    title = (
        f"b. {first:,} updates of SGD, and {more} more of each method; test images, ECE in per cent"
    )
    return {title: rows, "b. Changes by the further updates, seed by seed": changes}


def _columns(names, values_of):
    columns = {}
    for name in names:
        columns |= spread(values_of(name), name)
    return columns


# e. Eight taus at once


def sweep(task, run, num_seeds, *, smoke):
    hidden, updates = (8, 3) if smoke else (32, 500)
    taus = np.geomspace(1e-6, 1e-2, 3 if smoke else 8)
    setting = {**settings(task, hidden, updates), "taus": [float(f"{tau:.3g}") for tau in taus]}

    def optimizer_of(seed, tau):
        loss = task.loss(seed, hidden, SPLIT)
        # Natural steps by name: under vmap a look at the curvature, now and then, would be one at every update.
        engine = fit.RobbinsMonro(INNER_STEPS, averaging=False, step_size=natural)
        return schemes.heat(loss, tau, engine, temperature=tau / RATE)

    def one(optimizer, rng_key, tau, num_updates):
        # Tau and temperature are leaves of the optimizer: a program serves all of them.
        optimizer = dataclasses.replace(optimizer, tau=tau, temperature=tau / RATE)
        state, _ = optimizer.scan(optimizer.init(rng_key), num_updates)
        return state.reference.mean

    def all_taus():
        return jax.jit(jax.vmap(one, (None, None, 0, None)), static_argnums=3)

    many, of_one = all_taus(), jax.jit(one, static_argnums=3)
    evaluate = jax.jit(
        jax.vmap(
            lambda loss, x: (
                logits(loss.constrain(x), task.x_test).argmax(-1) == task.y_test
            ).mean(),
            (None, 0),
        )
    )

    def swept(seeds):
        results = []
        for seed in seeds:
            optimizer = optimizer_of(seed, taus[0])
            ends = many(optimizer, random.key(seed), jnp.asarray(taus), updates)
            results.append([100.0 * float(a) for a in evaluate(optimizer.loss, ends)])
        return results

    def timed(seeds):
        num_updates, repeats = (3, 2) if smoke else (100, 7)
        optimizer = optimizer_of(seeds[0], taus[0])
        arrays = [jnp.asarray(taus * factor) for factor in (1.0, 3.0)]
        many = all_taus()  # Not compiled before.
        others = optimizer_of(seeds[0] + 1, taus[0])
        counts = []
        for start, some in ((optimizer, arrays[0]), (optimizer, arrays[1]), (others, arrays[0])):
            with harness.count_compiles() as compiled:
                jax.block_until_ready(many(start, random.key(0), some, num_updates))
            counts.append(sum("one" in name for name in compiled))
        calls = {
            "eight": lambda: many(optimizer, random.key(0), arrays[0], num_updates),
            "one": lambda: of_one(optimizer, random.key(0), arrays[0][0], num_updates),
        }
        times = harness.rounds(calls, repeats)
        return [
            {
                "taus": len(taus),
                "programs for them": counts[0],
                "for other taus": counts[1],
                "for another start": counts[2],
                "ms / update": 1e3 * statistics.median(times["eight"]) / num_updates,
                "/ one run": harness.ratio(times["eight"], times["one"]),
                "25-75 %": harness.spread(times["eight"], times["one"]),
            }
        ]

    found = run.each("e", "heat", setting, num_seeds, swept)
    accuracy = [
        {
            "tau": float(tau),
            "seeds": len(found),
            **spread([accuracies[i] for accuracies in found], "accuracy"),
        }
        for i, tau in enumerate(taus if found else ())
    ]
    costs = run("e", "time", setting, [0], timed)
    return {
        f"e. Test accuracy in per cent after {updates} updates of heat, all taus at once": accuracy,
        "e. Programs that XLA compiled, and time; medians and quartiles over rounds": costs,
    }


def natural(step):
    return 1.0 / (step + 1.0)
