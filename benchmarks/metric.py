# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Gradients per effective draw of NUTS and HMC on the reference posteriors, by mass matrix.

Each posterior is taken twice: times a regularizer about as wide as its parameters (tau = 1), and times one so wide
that it does not matter. One shift from the posterior's mean, which warms up. Medians over seeds of the gradients
of the draws per effective draw, of the mean and of the second moment of the coordinate that has fewest, and of
all gradients, warm-up included. Kernels of NumPyro take the metric of their first step in later ones: all
gradients of the third step, burn-in included, per effective draw. Counts, not seconds.
"""

import statistics
import sys
from pathlib import Path

import harness
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from numpyro.infer import NUTS, BarkerMH

from numpyro_regloss import Gaussian, Loss, RegularizedLoss, shift
from numpyro_regloss._core.stats import effective_sample_size

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from reference_posteriors import POSTERIORS  # noqa: E402

METRICS = {
    "variance": {"metric": "variance"},
    "variance, dense": {"metric": "variance", "dense_mass": True},
    "scores": {"metric": "scores"},
    "low rank": {"metric": "low_rank"},
}
# What NUTS of NumPyro and Stan do by default.
BASE = "variance"
# As tau: in units of the square of the largest standard deviation where it should not matter.
REGULARIZED, WIDE = 1.0, 100.0**2


def targets(name):
    """The posterior at each tau, by title."""
    posterior = POSTERIORS[name]
    loss = Loss.from_model(posterior.model, *posterior.args, **posterior.kwargs)
    mean, sd = posterior.unconstrained.mean, posterior.unconstrained.sd
    center = jnp.asarray(mean, loss.x0.dtype)
    taus = {"tau = 1": REGULARIZED, "tau wide": float(WIDE * np.max(sd) ** 2)}
    return {
        title: RegularizedLoss(loss, Gaussian.isotropic(center, tau=tau))
        for title, tau in taus.items()
    }


def counts(engine, targets, num_seeds):
    """By title: gradients of the draws, all gradients, effective draws of both moments, and ok, per seed."""

    @jax.jit
    def go(target, keys):
        def one(key):
            key_init, key_step = random.split(key)
            _, draws, info = engine.step(key_step, engine.init(key_init, target), target)
            centered = draws.x - jnp.mean(draws.x, (0, 1))
            number = draws.x.shape[0] * draws.x.shape[1]
            squares = jnp.min(effective_sample_size(centered**2))
            return info.num_steps * number, info.num_grad, info.ess, squares, info.ok

        return lax.map(one, keys)

    keys = random.split(random.key(0), num_seeds)
    return {title: jax.tree.map(np.asarray, go(target, keys)) for title, target in targets.items()}


def compare(make, names, metrics, num_seeds):
    """Rows by tau, posterior and metric, and for each tau the medians over posteriors of ratios to the base."""
    found = {}
    for name in names:
        for metric, settings in metrics.items():
            for title, count in counts(make(**settings), targets(name), num_seeds).items():
                of_draws, total, ess, squares, ok = count
                found[title, name, metric] = {
                    "per effective draw": float(np.median(of_draws / ess)),
                    "of squares": float(np.median(of_draws / squares)),
                    "with warm-up": float(np.median(total / ess)),
                    "ok": float(np.mean(ok)),
                }
                print(title, name, metric, found[title, name, metric], flush=True)
    tables = {}
    for title in dict.fromkeys(title for title, _, _ in found):
        rows = [
            {"posterior": name, "metric": metric} | row
            for (where, name, metric), row in found.items()
            if where == title
        ]
        for metric in metrics:
            ratios = {
                column: statistics.median(
                    found[title, name, metric][column] / found[title, name, BASE][column]
                    for name in names
                )
                for column in ("per effective draw", "of squares", "with warm-up")
            }
            oks = [row["ok"] for row in rows if row["metric"] == metric]
            rows.append(
                {"posterior": f"median of ratios to {BASE}", "metric": metric}
                | ratios
                | {"ok": float(np.mean(oks))}
            )
        tables[title] = rows
    return tables


def dense_nuts(model):
    """NUTS of NumPyro with a dense mass matrix."""
    return NUTS(model, dense_mass=True)


def later_steps(make_kernel, sizes, names, num_seeds):
    """Rows by tau and posterior: gradients per effective draw in the third step of a kernel, by metric."""
    rows = []
    for name in names:
        found = {}
        for metric in ("variance", "scores"):
            engine = shift.Kernel(make_kernel, *sizes, num_chains=4, metric=metric)

            def price(target, key, engine=engine):
                key_init, *keys = random.split(key, 4)
                state = engine.init(key_init, target)
                for key in keys:
                    state, _, info = engine.step(key, state, target)
                return info.num_grad / info.ess

            go = jax.jit(
                lambda target, keys, price=price: lax.map(lambda k: price(target, k), keys)
            )
            keys = random.split(random.key(0), num_seeds)
            for title, target in targets(name).items():
                found[title, metric] = float(np.median(go(target, keys)))
        for title in dict.fromkeys(title for title, _ in found):
            of_draws, of_scores = (found[title, metric] for metric in ("variance", "scores"))
            rows.append({
                "tau": title,
                "posterior": name,
                "variance": of_draws,
                "scores": of_scores,
                "ratio": of_scores / of_draws,
            })
            print(rows[-1], flush=True)
    columns = ("variance", "scores", "ratio")
    middle = {column: statistics.median(row[column] for row in rows) for column in columns}
    return [*rows, {"tau": "both", "posterior": "median"} | middle]


def main():
    options = harness.arguments(__doc__)
    print(harness.environment())
    names, num_seeds, sizes = list(POSTERIORS), 7, (200, 250)
    engines = {"NUTS": shift.NUTS, "HMC": shift.HMC}
    metrics = METRICS
    if options.smoke:
        names, num_seeds, sizes = names[-1:], 1, (20, 20)
        engines.pop("HMC")
        metrics = {BASE: METRICS[BASE], "low rank": METRICS["low rank"]}
    tables = {}
    for label, engine in engines.items():

        def make(engine=engine, **settings):
            return engine(*sizes, num_chains=4, **settings)

        for title, rows in compare(make, names, metrics, num_seeds).items():
            tables[f"{label}, {title}"] = rows
            harness.show(f"{label}, {title}: gradients", rows)
    kernels = {"NUTS": (NUTS, 1), "NUTS, dense": (dense_nuts, 1), "BarkerMH": (BarkerMH, 4)}
    if options.smoke:
        kernels = {"BarkerMH": (BarkerMH, 1)}
    for label, (make_kernel, longer) in kernels.items():
        # A random walk takes more iterations for as many effective draws.
        lengths = [longer * size for size in sizes]
        rows = later_steps(make_kernel, lengths, names, num_seeds)
        tables[f"Kernel({label})"] = rows
        harness.show(f"Kernel({label}), third step: gradients per effective draw", rows)
    harness.save(options.out, tables)


if __name__ == "__main__":
    main()
