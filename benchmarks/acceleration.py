# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Accelerated anchors against the paper's plain step: outer steps, gradients, and where they end.

Three questions. Breast-cancer logistic regression at tau = 0.1, which has flat directions: how many steps and
gradients, warm-up included, until the estimated gradient of F_tau has norm 0.2, and what is its norm there by a
long run? A double well in 20 dimensions: until it has 1 % of its first norm? The zoo, of which all but `absolute`
are not convex, by NUTS and by importance sampling: how does F_tau at the end, which is known exactly, compare
with that of the plain scheme with the same seed, and what is the norm of the last gradients? Counts are medians
and worst cases over seeds; a dash means that some seed did not arrive.
"""

import statistics

import harness
import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from targets import breast_cancer

from numpyro_regloss import (
    Gaussian,
    Loss,
    RegularizedLoss,
    TwoStep,
    anchor,
    fit,
    problems,
    shift,
)

TAU = 0.1
# Of gradients in all, by adaptive importance sampling.
BUDGET = 4000
ANCHORS = {"plain": anchor.Proximal(), "Newton": anchor.Newton(), "Anderson": anchor.Anderson()}
MIXTURE = problems.gaussian_mixture(
    [0.3, 0.7], [[-1.0, 0.0], [1.0, 1.0]], [0.3 * np.eye(2), [[0.5, 0.2], [0.2, 0.4]]]
)
# Problem, start and tau.
ZOO = {
    "double well, 20-d": (problems.double_well(20), np.linspace(-0.5, 0.7, 20), 0.1),
    "mixture, 2-d": (MIXTURE, np.array([-2.0, 1.0]), 0.3),
    "absolute, 3-d": (problems.absolute(3), np.array([3.0, -2.0, 0.5]), 0.3),
    "Rastrigin, 5-d": (problems.rastrigin(5), np.full(5, 2.2), 0.1),
    "Rosenbrock": (problems.rosenbrock(), np.array([-1.2, 1.0]), 0.01),
}
SMOKE = "mixture, 2-d"
ENGINES = {
    "NUTS 4 x 50": shift.NUTS(num_warmup=100, num_samples=50, num_chains=4),
    "importance 4000": shift.Importance(4000),
}


@jax.jit
def long_run(engine, rng_key, target):
    draws = engine.step(rng_key, engine.init(rng_key, target), target)[1]
    return fit.ForwardKL().step(rng_key, (), target, draws)[1].mean


def norms(history, tau):
    """Estimated norm of the gradient of F_tau at every centre."""
    return np.linalg.norm(history.fitted.mean - history.reference.mean, axis=1) / tau


def arrival(loss, tau, engine, step, *, tolerance, num_steps, seeds, relative=False, exact=None):
    """Steps and gradients until the norm is below the tolerance, over seeds."""
    optimizer = TwoStep(loss, tau, engine, fit.ForwardKL(), step)
    steps, gradients, true, last = [], [], [], []
    for seed in range(seeds):
        history = optimizer.run(random.key(seed), num_steps, progress_bar=False).history
        norm = norms(history, tau)
        last.append(float(np.median(norm[-num_steps // 4 :])))
        below = np.flatnonzero(norm < tolerance * (norm[0] if relative else 1.0))
        if below.size:
            k = int(below[0])
            steps.append(k)
            # The draws at the centre itself are those that tell that it is near enough.
            gradients.append(int(history.num_grad[: k + 1].sum()))
            if exact is not None:
                center = jnp.asarray(history.reference.mean[k])
                target = RegularizedLoss(loss, Gaussian.isotropic(center, tau))
                mean = long_run(exact, random.key(1000 + seed), target)
                true.append(float(jnp.linalg.norm(mean - center)) / tau)
    arrived = len(steps) == seeds
    row = {
        "steps": float(statistics.median(steps)) if arrived else None,
        "worst": max(steps) if arrived else None,
        "gradients": float(statistics.median(gradients)) if arrived else None,
        "most": max(gradients) if arrived else None,
    }
    if exact is not None:
        row["norm by a long run"] = statistics.fmean(true) if arrived else None
    return row | {"last norms": statistics.fmean(last)}


def regression(*, smoke):
    fn, x0, data = breast_cancer()
    loss = Loss.from_function(fn, x0, *data)
    exact = shift.NUTS(100, 20 if smoke else 1000, 4)
    rows = []
    for count in (25,) if smoke else (25, 50):
        engine = shift.NUTS(num_warmup=60, num_samples=count, num_chains=4)
        for name, step in ANCHORS.items():
            if smoke and name != "Newton":
                continue
            num_steps = 2 if smoke else (800 if name == "plain" else 60)
            seeds = 1 if smoke else (2 if name == "plain" else 12)
            settings = {"tolerance": 50.0 if smoke else 0.2, "num_steps": num_steps, "seeds": seeds}
            row = arrival(loss, TAU, engine, step, exact=exact, **settings)
            rows.append({"anchor": name, "draws": f"4 x {count}", **row})
    return rows


def in_one_batch(*, smoke):
    """Newton's steps from adaptive importance sampling, to a true gradient of norm 0.2."""
    fn, x0, data = breast_cancer()
    loss = Loss.from_function(fn, x0, *data)
    exact = shift.AdaptiveImportance(512 if smoke else 8192)

    @jax.jit
    def true_norms(centers):
        def norm(center):
            target = RegularizedLoss(loss, Gaussian.isotropic(center, TAU))
            return jnp.linalg.norm(long_run(exact, random.key(1), target) - center) / TAU

        return jax.lax.map(norm, centers)

    rows = []
    longer = anchor.Newton(floor=0.01, max_step=4.0)
    for count, most, step in [
        (128, 1, longer),
        (128, 2, longer),
        (128, 4, longer),
        (192, 1, anchor.Newton()),
        (192, 1, longer),
        (256, 1, longer),
    ][-1 if smoke else 0 :]:
        engine = shift.AdaptiveImportance(count)
        if most > 1:
            engine = shift.Adaptive(engine, max_rounds=most)
        optimizer = TwoStep(loss, TAU, engine, fit.ForwardKL(), step)
        steps, gradients, at_budget, refused = [], [], [], 0
        for seed in range(1 if smoke else 20):
            run = optimizer.run(random.key(seed), 2 if smoke else 20, progress_bar=False)
            norm = np.asarray(true_norms(jnp.asarray(run.history.reference.mean)))
            spent = np.concatenate([[0], np.cumsum(run.history.num_grad)])
            below = np.flatnonzero(norm < (50.0 if smoke else 0.2))
            steps.append(int(below[0]) if below.size else None)
            gradients.append(int(spent[below[0]]) if below.size else None)
            at_budget.append(float(norm[np.flatnonzero(spent[:-1] <= BUDGET)[-1]]))
            refused += int(np.sum(run.history.anchor.reason == 2))
        arrived = [count for count in gradients if count is not None]
        rows.append({
            "draws": count,
            "most batches": most,
            "floor": float(step.floor),
            "seeds": len(gradients),
            "arrived": len(arrived),
            "within budget": sum(count <= BUDGET for count in arrived),
            "median steps": statistics.median(k for k in steps if k is not None),
            "median gradients": statistics.median(arrived),
            "most": max(arrived),
            "norm at budget": statistics.median(at_budget),
            "largest there": max(at_budget),
            "refused steps": refused,
        })
    return rows


def double_well(*, smoke):
    problem = problems.double_well(20)
    engine = shift.NUTS(num_warmup=100, num_samples=25, num_chains=4)
    if smoke:
        engine = shift.Importance(400)
    rows = []
    for start in (2.0,) if smoke else (2.0, 0.8, 0.6, 0.3):
        loss = Loss.from_function(problem.loss, np.full(20, start))
        for name, step in ANCHORS.items():
            if smoke and name != "Anderson":
                continue
            settings = {"num_steps": 2 if smoke else 40, "seeds": 1 if smoke else 8}
            row = arrival(loss, TAU, engine, step, tolerance=0.01, relative=True, **settings)
            rows.append({"start": start, "anchor": name, **row})
    return rows


def zoo(*, smoke):
    rows = []
    for problem_name in (SMOKE,) if smoke else ZOO:
        problem, start, tau = ZOO[problem_name]
        loss = Loss.from_function(problem.loss, start)
        for engine_name, engine in ENGINES.items():
            if smoke and engine_name != "importance 4000":
                continue
            ends = {}
            for name, step in ANCHORS.items():
                optimizer = TwoStep(loss, tau, engine, fit.ForwardKL(), step)
                ends[name], taken, wander = [], [], []
                for seed in range(2 if smoke else 12):
                    result = optimizer.run(random.key(seed), 2 if smoke else 40, progress_bar=False)
                    center = np.asarray(result.params, float)
                    ends[name].append(problem.local_entropy(center, tau))
                    wander.append(float(np.median(norms(result.history, tau)[-10:])))
                    if name != "plain":
                        taken.append(float(result.history.anchor.accelerated.mean()))
                rise = np.asarray(ends[name]) - np.asarray(ends["plain"])
                rows.append({
                    "problem": problem_name,
                    "engine": engine_name,
                    "anchor": name,
                    "F_tau": statistics.fmean(ends[name]),
                    "minus plain": float(rise.mean()),
                    "error": float(rise.std(ddof=1) / len(rise) ** 0.5),
                    "last norms": statistics.fmean(wander),
                    "accelerated": statistics.fmean(taken) if taken else 0.0,
                })
    return rows


QUESTIONS = {
    "logistic regression, 30-d, to gradient norm 0.2": regression,
    "the same by adaptive importance sampling and Newton, to a true norm of 0.2": in_one_batch,
    "double well, 20-d, to 1 % of the first gradient": double_well,
    "zoo: F_tau after 40 steps": zoo,
}


def main():
    options = harness.arguments(__doc__)
    tables = {}
    print(harness.environment())
    for title, question in QUESTIONS.items():
        tables[title] = question(smoke=options.smoke)
        harness.show(title, tables[title])
    harness.save(options.out, tables)


if __name__ == "__main__":
    main()
