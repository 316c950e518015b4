# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Global optimization without gradients: how often is the global minimum found within a number of evaluations?

Shifted (and, where it says so, rotated) test functions on their usual boxes |x_i| <= b. The minimizer is
uniform in 0.6 of the box and the start in all of it, one draw of both per seed, the same for all contestants;
nobody is told the box but by the start and a first width. A run is a success when the loss at its answer is
within 0.001 of the global minimum; every other local minimum is higher (the lowest are Griewank's, 0.0074).
Budgets are counted in evaluations of the loss.

Ours: `schemes.anneal`, importance clouds whose temperature the effective sample size sets, moment matching,
and a tau that falls geometrically; the answer is the last centre. Rivals answer with the best point that they
ever evaluated, which is to their advantage:
- HJ-Prox (Osher, Heaton & Wu Fung 2023), restated: the same softmax mean with 1,000 samples, delta = 0.1 and
  alpha = 2, which is shrunk by 0.631 while over 90 % of the weights are below 1e-6. In the original a smaller
  alpha also widens the cloud, without end on functions that grow like these; here the width stays, and samples
  are weighted anew at no cost. Once with a fixed width, once annealed like ours, so that only the rule for the
  temperature differs;
- CBXpy's consensus-based optimization of 200 particles with its scheduler of the effective sample size on, at 0.1,
  with isotropic and with anisotropic noise (which knows the axes);
- CMA-ES of pycma with restarts of doubled population (IPOP) until the budget is spent or the minimum is found, and
  without restarts.

Columns: share of successes; median excess of the loss; evaluations per run (mean; fewer where a contestant stops
by itself); wall seconds for all seeds, with compilation.
"""

import contextlib
import time
import warnings
from functools import partial

import harness
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random

from numpyro_regloss import Loss, problems, schemes

TOLERANCE = 1e-3
# Half-widths of the usual boxes.
BOXES = {
    "rastrigin": 5.12,
    "ackley": 32.768,
    "griewank": 600.0,
    "levy": 10.0,
    "alpine": 10.0,
    "drop_wave": 5.12,
}
BUDGET_PER_DIM = 20_000
# Of `schemes.anneal`, by dimension; these and the widths were tuned on these functions, with other seeds.
NUM_STEPS = {2: 100, 10: 200, 20: 400}
ESS = {2: 0.5}
FIRST_WIDTH, LAST_WIDTH = 0.5, 5e-5


class Case:
    """One function in one dimension, shifted and rotated anew for every seed."""

    def __init__(self, name, dim, *, rotated, num_seeds):
        self.problem, self.box = getattr(problems, name)(dim), BOXES[name]
        self.name, self.dim, self.num_seeds = name, dim, num_seeds
        rng = np.random.default_rng([dim, rotated, *name.encode()])
        self.shift = rng.uniform(-0.6, 0.6, (num_seeds, dim)) * self.box
        self.start = rng.uniform(-1.0, 1.0, (num_seeds, dim)) * self.box
        # Where the minimizer is not the origin, it goes where the shift says all the same.
        turns = [np.linalg.qr(rng.normal(size=(dim, dim)))[0] for _ in range(num_seeds)]
        self.turn = np.stack(turns) if rotated else np.tile(np.eye(dim), (num_seeds, 1, 1))
        self.data = tuple(jnp.asarray(a, jnp.float32) for a in (self.shift, self.turn))
        self.x0 = jnp.asarray(self.start, jnp.float32)

    def loss(self, x, shift, turn):
        return self.problem.loss((x - shift) @ turn + self.problem.minimizer.astype(x.dtype))

    def excess(self, values):
        return np.asarray(values, float) - self.problem.minimum


def ours(case, budget):
    num_steps = min(NUM_STEPS.get(case.dim, 200), budget // 20)
    # One evaluation per step is that of the centre.
    num_samples = max(4, (budget // num_steps - 1) // 4 * 4)
    bound = Loss.from_function(case.loss, case.x0[0], *(a[0] for a in case.data))
    optimizer = schemes.anneal(
        bound,
        FIRST_WIDTH * case.box,
        num_steps,
        last_width=LAST_WIDTH * case.box,
        num_samples=num_samples,
        ess=ESS.get(case.dim, 0.4),
    )

    @jax.jit
    @jax.vmap
    def run(rng_key, start, shift, turn):
        state = optimizer.init(rng_key, shift, turn)
        state = state._replace(reference=state.reference._replace(mean=start))
        state, history = optimizer.scan(state, num_steps, shift, turn)
        value = case.loss(state.reference.mean, shift, turn)
        return value, jnp.sum(history.num_loss)

    values, spent = run(random.split(random.key(1), case.num_seeds), case.x0, *case.data)
    return case.excess(values), np.mean(spent)


def hj_prox(case, budget, *, annealed):
    num_samples, delta, shrink = min(1000, budget // 4), 0.1, 0.631
    num_steps = budget // num_samples
    widths = np.geomspace(FIRST_WIDTH, LAST_WIDTH if annealed else FIRST_WIDTH, num_steps)

    @jax.jit
    @jax.vmap
    def run(rng_key, start, shift, turn):
        def step(carry, item):
            x, best = carry
            key, width = item
            z = x + width * case.box * random.normal(key, (num_samples, case.dim))
            value = jax.vmap(case.loss, (0, None, None))(z, shift, turn)

            def weights(alpha):
                return jax.nn.softmax(-alpha * value / delta)

            def underflows(alpha):
                return (jnp.mean(weights(alpha) < 1e-6) > 0.9) & (alpha > 1e-30)

            alpha = lax.while_loop(underflows, lambda alpha: shrink * alpha, jnp.asarray(2.0))
            return (weights(alpha) @ z, jnp.minimum(best, jnp.min(value))), None

        items = random.split(rng_key, num_steps), jnp.asarray(widths, jnp.float32)
        (x, best), _ = lax.scan(step, (start, jnp.asarray(jnp.inf)), items)
        return jnp.minimum(best, case.loss(x, shift, turn))

    values = run(random.split(random.key(2), case.num_seeds), case.x0, *case.data)
    return case.excess(values), num_steps * num_samples + 1


def batched(case):
    """The loss of `(seed, draw, dim)` in NumPy."""
    of_cloud = jax.vmap(case.loss, (0, None, None))
    call = jax.jit(jax.vmap(of_cloud))
    return lambda x: np.asarray(call(jnp.asarray(x, jnp.float32), *case.data), float)


def cbx(case, budget, *, noise):
    from cbx.dynamics import CBO  # noqa: PLC0415
    from cbx.scheduler import effective_sample_size, scheduler  # noqa: PLC0415

    num_particles = min(200, budget // 4)
    num_steps = budget // num_particles
    rng = np.random.default_rng(3)
    spread = rng.uniform(-1.0, 1.0, (case.num_seeds, num_particles, case.dim)) * case.box
    # Of the settings tried these are the best; with isotropic noise the drift must win in every dimension.
    sigma, dt = (5.1, 0.01) if noise == "anisotropic" else ((1.5 / case.dim) ** 0.5, 0.1)
    dynamics = CBO(
        batched(case),
        f_dim="3D",
        x=spread,
        noise=noise,
        dt=dt,
        sigma=sigma,
        max_it=num_steps,
        seed=3,
        verbosity=0,
        check_f_dims=False,
    )
    with np.errstate(all="ignore"):
        dynamics.optimize(sched=scheduler([effective_sample_size(eta=0.1)]))
    return case.excess(dynamics.best_energy), num_steps * num_particles


def cma_es(case, budget, *, restarts):
    import cma  # noqa: PLC0415

    of_cloud = jax.jit(jax.vmap(case.loss, (0, None, None)))
    values, spent = [], []
    for seed in range(case.num_seeds):
        data = [a[seed] for a in case.data]

        def losses(points, data=data):
            # Populations padded to powers of two, so that few programs are compiled.
            size = 1 << (len(points) - 1).bit_length()
            x = np.zeros((size, case.dim), np.float32)
            x[: len(points)] = points
            return np.asarray(of_cloud(x, *data), float)[: len(points)].tolist()

        options = {
            "maxfevals": budget,
            "ftarget": case.problem.minimum + TOLERANCE,
            "verbose": -9,
            "seed": seed + 1,
            "verb_disp": 0,
            "verb_log": 0,
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = cma.fmin2(
                lambda x, losses=losses: losses([x])[0],
                case.start[seed],
                FIRST_WIDTH * case.box,
                options,
                restarts=restarts,
                parallel_objective=losses,
            )[1]
        values.append(result.result.fbest)
        spent.append(result.result.evaluations)
    return case.excess(values), np.mean(spent)


CONTESTANTS = {
    "ours": ours,
    "HJ-Prox, fixed width": partial(hj_prox, annealed=False),
    "HJ-Prox, annealed": partial(hj_prox, annealed=True),
    "CBXpy, isotropic": partial(cbx, noise="isotropic"),
    "CBXpy, anisotropic": partial(cbx, noise="anisotropic"),
    "CMA-ES, restarts": partial(cma_es, restarts=20),
    "CMA-ES, no restarts": partial(cma_es, restarts=0),
}


def table(case, budget, contestants):
    rows = []
    for label in contestants:
        start = time.perf_counter()
        try:
            excess, spent = CONTESTANTS[label](case, budget)
        except ModuleNotFoundError as error:
            print(
                f"{label}: left out, since {error.name} is not installed (it is in the bench extra)"
            )
            continue
        rows.append({
            "contestant": label,
            "success": float(np.mean(excess <= TOLERANCE)),
            "median excess": float(np.median(np.maximum(excess, 0.0))),
            "evaluations": float(spent),
            "seconds": time.perf_counter() - start,
        })
    return rows


def main():
    parser = harness.parser(__doc__)
    parser.add_argument("--dims", type=int, nargs="*", default=[2, 10, 20])
    parser.add_argument("--functions", nargs="*", default=list(BOXES), choices=list(BOXES))
    parser.add_argument(
        "--contestants", nargs="*", default=list(CONTESTANTS), choices=list(CONTESTANTS)
    )
    parser.add_argument("--seeds", type=int, default=30)
    options = parser.parse_args()
    print(harness.environment())
    cases = [(name, dim, True) for dim in options.dims for name in options.functions]
    if "rastrigin" in options.functions:
        cases += [("rastrigin", dim, False) for dim in options.dims]
    seeds, contestants = options.seeds, options.contestants
    if options.smoke:
        cases, seeds = [("rastrigin", 2, True)], 2
    tables = {}
    for name, dim, rotated in cases:
        budget = 400 if options.smoke else BUDGET_PER_DIM * dim
        case = Case(name, dim, rotated=rotated, num_seeds=seeds)
        title = (
            f"{name}, {dim}-d, shifted{' and rotated' if rotated else ''}, {budget:,} evaluations"
        )
        tables[title] = table(case, budget, contestants)
        harness.show(title, tables[title])
        with contextlib.suppress(AttributeError):
            jax.clear_caches()
    harness.save(options.out, tables)


if __name__ == "__main__":
    main()
