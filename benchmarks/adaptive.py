# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Evaluations until the gradient of F_tau has fallen: adaptive effort against fixed numbers of draws.

A loss with exact answers, so that the norm of the gradient at every centre is known and not estimated. Contestants
draw a fixed number at every step; the rest is `shift.Adaptive` over the smallest number, by confidence.
Medians and quartiles over seeds, of evaluations (gradients of NUTS, warm-up included; losses of a cloud) at the
first step from which on the norm stays below the tolerance at three steps in a row; a run that never gets there
counts as infinite.
"""

import harness
import jax
import numpy as np
from jax import random

from numpyro_regloss import Loss, TwoStep, fit, problems, shift

PROBLEM = problems.double_well(10)
IN_A_ROW = 3
TOLERANCE = 1e-2
CONFIDENCES = (0.5, 0.95)


def contestants(name, smallest, cap, confidences):
    def engine(count):
        if name == "cloud":
            return shift.Importance(count)
        return shift.NUTS(num_warmup=100, num_samples=count // 4, num_chains=4)

    fixed = {f"{smallest * 2**k} draws": engine(smallest * 2**k) for k in range(cap)}
    adaptive = {
        f"adaptive, {level:.0%}": shift.Adaptive(engine(smallest), 2 ** (cap - 1), level)
        for level in confidences
    }
    return fixed, adaptive


def spent(tau, engine, control, num_steps, num_seeds):
    """Evaluations until the tolerance, one number per seed."""
    loss = Loss.from_function(PROBLEM.loss, np.full(PROBLEM.dim, 1.2))
    method = fit.ForwardKL(control_variates=control)
    optimizer = TwoStep(loss, tau, engine, method)

    @jax.jit
    @jax.vmap
    def go(key):
        _, history = optimizer.scan(optimizer.init(key), num_steps)
        return history.reference.mean, history.num_loss + history.num_grad - 1

    centers, cost = jax.tree.map(np.asarray, go(random.split(random.key(0), num_seeds)))
    exact = _exact_mean(centers, tau)
    norm = np.linalg.norm(centers - exact, axis=-1) / tau
    below = norm < TOLERANCE * norm[:, :1]
    stays = np.ones_like(below[:, : num_steps - IN_A_ROW + 1])
    for k in range(IN_A_ROW):
        stays &= below[:, k : num_steps - IN_A_ROW + 1 + k]
    before = np.cumsum(cost, 1) - cost
    first = np.argmax(stays, 1)
    reached = stays.any(1)
    return np.where(reached, before[np.arange(num_seeds), first], np.inf), first


def _exact_mean(centers, tau):
    # The double well is separable: one table, by the trapezoid rule, serves every coordinate of every centre.
    z = np.linspace(-4.0, 4.0, 2001)
    grid = np.linspace(-2.5, 2.5, 1001)
    log_q = -((z**2 - 1) ** 2) - (z - grid[:, None]) ** 2 / (2 * tau)
    weight = np.exp(log_q - log_q.max(1, keepdims=True))
    return np.interp(centers, grid, weight @ z / weight.sum(1))


def compare(tau, name, control, smallest, cap, num_steps, num_seeds, confidences):
    rows = []
    fixed, adaptive = contestants(name, smallest, cap, confidences)
    for label, engine in (fixed | adaptive).items():
        total, first = spent(tau, engine, control, num_steps, num_seeds)
        low, middle, high = np.quantile(total, [0.25, 0.5, 0.75], method="nearest")
        finite = bool(np.isfinite(middle))
        rows.append({
            "draws": label,
            "evaluations": float(middle) if finite else None,
            "quartiles": f"{low:,.0f} - {high:,.0f}",
            "steps": float(np.median(first)),
            "arrived": float(np.mean(np.isfinite(total))),
        })
    best = min((r["evaluations"] for r in rows[: len(fixed)] if r["evaluations"]), default=None)
    for row in rows:
        known = best and row["evaluations"]
        row["of the best fixed"] = row["evaluations"] / best if known else None
    return rows


def main():
    options = harness.arguments(__doc__)
    # Doublings, steps and seeds: under vmap all seeds wait for the longest trajectory of any.
    cloud, chains = (8, 60, 20), (5, 40, 8)
    if options.smoke:
        cloud = chains = (1, 4, 2)
    confidences = CONFIDENCES[: 1 if options.smoke else None]
    print(harness.environment())
    tables = {}
    # Late steps go a seventh of the way that is left at tau = 0.5, and half of it at 0.2.
    jobs = {
        "tau = 0.5, cloud": (0.5, "cloud", "none", 256, cloud),
        "tau = 0.2, cloud": (0.2, "cloud", "none", 256, cloud),
        "tau = 0.2, NUTS": (0.2, "nuts", "auto", 24, chains),
        "tau = 0.2, NUTS without control variates": (0.2, "nuts", "none", 96, chains),
    }
    for title, (tau, name, control, smallest, size) in jobs.items():
        if options.smoke and name == "nuts":
            continue
        rows = compare(tau, name, control, smallest, *size, confidences)
        tables[title] = rows
        harness.show(f"{title}: to {TOLERANCE:g} of the first gradient", rows)
    harness.save(options.out, tables)


if __name__ == "__main__":
    main()
