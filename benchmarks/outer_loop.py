# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Outer steps of the local-entropy scheme by NUTS: what users write today, and this package.

20 outer steps at tau = 0.1, 100 warm-up iterations and 200 draws each, on two losses. Rivals: a Python loop
over numpyro.infer.MCMC.run (a new object per step; one object with jit_model_args=True, progress bar off and
on); one compiled blackjax scan (window adaptation at every step; once, its step size and mass matrix shared; the
same with four chains of 50 draws), also with its low-rank adaptation and with adjusted microcanonical dynamics
(MAMS); and its late-adjusted parallel sampler (LAPS), which cannot be compiled as a whole.

Columns: warm milliseconds per outer step and their ratio to ours with four chains, medians over seeds, since a
short warm-up may end with a good or a bad step size (the loops over MCMC and LAPS run alone and once, LAPS for one
step: they compile at every step); seconds of the first run with its compilations, median over fresh processes,
without imports; programs compiled; gradients per outer step over all chains, warm-up included and spread over the
steps; squared error of the next centre, summed over coordinates, against a long run at the same centre, averaged
over some steps; the ratio at equal error, of times multiplied by errors.
"""

import argparse
import itertools
import json
import os
import statistics
from functools import partial

import harness
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import lax, random
from numpyro.infer import MCMC, NUTS
from targets import TARGETS

from numpyro_regloss import Gaussian, Loss, RegularizedLoss, fit, schemes, shift

TAU, NUM_WARMUP, NUM_SAMPLES = 0.1, 100, 200


def numpyro_loop(loss, x0, data, num_steps, *, one_object, progress_bar=False):
    def model(center, *data):
        x = numpyro.sample("x", dist.Normal(center, TAU**0.5).to_event(1))
        numpyro.factor("loss", -loss(x, *data))

    def build():
        return MCMC(
            NUTS(model),
            num_warmup=NUM_WARMUP,
            num_samples=NUM_SAMPLES,
            progress_bar=progress_bar,
            jit_model_args=one_object,
        )

    shared = build()

    def run(seed):
        center, centers = jnp.asarray(x0, float), []
        for key in random.split(random.key(seed), num_steps):
            mcmc = shared if one_object else build()
            mcmc.run(key, center, *data, init_params={"x": center})
            center = mcmc.get_samples()["x"].mean(0)
            centers.append(center)
        return jnp.stack([jnp.asarray(x0, float), *centers]), None

    return run


def blackjax_scan(loss, x0, data, num_steps, *, share_warmup, num_chains=1, kind="window"):
    import blackjax  # noqa: PLC0415

    adapted = {
        "window": blackjax.window_adaptation,
        "low rank": blackjax.window_adaptation_low_rank,
    }.get(kind)
    per_step = 1 if adapted else 2
    mams = blackjax.adjusted_mclmc_dynamic.build_kernel(_num_integration_steps)

    def log_density(x, center, *data):
        return -loss(x, *data) - jnp.sum((x - center) ** 2) / (2 * TAU)

    def warm_up(key, density, position):
        if adapted is None:
            return tune(key, density, position)
        adaptation = adapted(blackjax.nuts, density)
        (_, parameters), info = adaptation.run(key, position, num_steps=NUM_WARMUP)
        return parameters, jnp.sum(info.info.num_integration_steps)

    def tune(key, density, position):
        def kernel(
            rng_key, state, logdensity_fn, step_size, inverse_mass_matrix, integration_steps_params
        ):
            settings = (step_size, jnp.inf, inverse_mass_matrix, integration_steps_params)
            return mams(rng_key, state, logdensity_fn, *settings)

        key_init, key = random.split(key)
        state = blackjax.adjusted_mclmc_dynamic.init(position, density, key_init)
        # A tenth of these steps each for the step size and for the scales.
        found = blackjax.adjusted_mclmc_find_L_and_step_size(
            kernel, density, num_steps=5 * NUM_WARMUP, state=state, rng_key=key, target=0.9
        )
        settings, spent = found[1], jnp.asarray(found[2]) if len(found) > 2 else NUM_WARMUP
        how_long = (settings.L / settings.step_size,)
        return (settings.step_size, settings.inverse_mass_matrix, how_long), per_step * spent

    def kernel_of(density, parameters):
        if adapted is not None:
            return blackjax.nuts(density, **parameters)
        step_size, inverse_mass_matrix, how_long = parameters
        return blackjax.adjusted_mclmc_dynamic(
            density,
            step_size,
            inverse_mass_matrix=inverse_mass_matrix,
            integration_steps_fn=_num_integration_steps,
            integration_steps_params=how_long,
        )

    def draws(key, kernel, position):
        def body(carry, key):
            state, total, spent = carry
            state, info = kernel.step(key, state)
            spent += per_step * info.num_integration_steps
            return (state, total + state.position, spent), None

        count = NUM_SAMPLES // num_chains
        initial = kernel.init(position) if adapted else kernel.init(position, key)
        start = (initial, jnp.zeros_like(position), jnp.asarray(0))
        (state, total, spent), _ = lax.scan(body, start, random.split(key, count))
        return state.position, total / count, spent

    @jax.jit
    def run(key, start, *data):
        def density_at(center):
            return lambda x: log_density(x, center, *data)

        key, key_warm = random.split(key)
        shared, spent = warm_up(key_warm, density_at(start), start) if share_warmup else (None, 0)

        def outer(carry, key):
            center, positions, spent = carry
            density = density_at(center)
            key_warm, key_draw = random.split(key)
            parameters, warming = (
                (shared, 0) if share_warmup else warm_up(key_warm, density, center)
            )
            kernel = kernel_of(density, parameters)
            chain = partial(draws, kernel=kernel)
            if num_chains == 1:
                positions, mean, counts = chain(key_draw, position=positions)
            else:
                keys = random.split(key_draw, num_chains)
                positions, means, counts = jax.vmap(lambda k, x: chain(k, position=x))(
                    keys, positions
                )
                mean = jnp.mean(means, 0)
            return (mean, positions, spent + warming + jnp.sum(counts)), mean

        positions = start if num_chains == 1 else jnp.tile(start, (num_chains, 1))
        carry = (start, positions, jnp.asarray(spent))
        (_, _, spent), centers = lax.scan(outer, carry, random.split(key, num_steps))
        return jnp.concatenate([start[None], centers]), spent / num_steps

    start = jnp.asarray(x0, float)
    return lambda seed: run(random.key(seed), start, *data)


def _num_integration_steps(key, mean):
    from blackjax.mcmc.adjusted_mclmc_dynamic import rescale  # noqa: PLC0415

    return jnp.ceil(random.uniform(key) * rescale(mean)).astype(int)


def laps_loop(loss, x0, data, num_steps, *, num_chains=64):
    from blackjax.adaptation.laps import laps  # noqa: PLC0415

    mesh = jax.sharding.Mesh(jax.devices()[:1], "chains")

    def run(seed):
        center = jnp.asarray(x0, float)
        centers = [center]
        for key in random.split(random.key(seed), num_steps):

            def log_density(x, center=center):
                return -loss(x, *data) - jnp.sum((x - center) ** 2) / (2 * TAU)

            def draw(key, center=center):
                return center + TAU**0.5 * random.normal(key, center.shape)

            # It reads numbers back between its two phases, and so cannot be compiled as a whole.
            *_, state = laps(
                log_density, draw, len(x0), NUM_WARMUP, NUM_SAMPLES, num_chains, mesh, key
            )
            center = jnp.mean(state.position, 0)
            centers.append(center)
        return jnp.stack(centers), None

    return run


def chains(engine, num_chains):
    return engine(
        num_warmup=NUM_WARMUP, num_samples=NUM_SAMPLES // num_chains, num_chains=num_chains
    )


def ours(loss, x0, data, num_steps, *, engine):
    optimizer = schemes.local_entropy(Loss.from_function(loss, x0, *data), TAU, shift=engine)

    def run(seed):
        history = optimizer.run(random.key(seed), num_steps, progress_bar=False).history
        centers = np.concatenate([history.reference.mean, history.fitted.mean[-1:]])
        return centers, history.num_grad.mean()

    return run


BASE = "ours, NUTS 4 x 50"
# One run of each: they compile again and again, LAPS for a minute per step.
LAPS = "blackjax, LAPS, 64 chains, 1 step"
LOOPS = ("numpyro", LAPS)
CONTESTANTS = {
    "numpyro, new MCMC each step": partial(numpyro_loop, one_object=False),
    "numpyro, one MCMC, jit_model_args": partial(numpyro_loop, one_object=True),
    "numpyro, one MCMC, jit_model_args, bar on": partial(
        numpyro_loop, one_object=True, progress_bar=True
    ),
    "blackjax, cold adaptation": partial(blackjax_scan, share_warmup=False),
    "blackjax, shared warm-up": partial(blackjax_scan, share_warmup=True),
    "blackjax, shared warm-up, 4 x 50": partial(blackjax_scan, share_warmup=True, num_chains=4),
    "blackjax, low-rank adaptation, cold": partial(
        blackjax_scan, share_warmup=False, kind="low rank"
    ),
    "blackjax, low-rank adaptation, shared, 4 x 50": partial(
        blackjax_scan, share_warmup=True, num_chains=4, kind="low rank"
    ),
    "blackjax, MAMS, cold": partial(blackjax_scan, share_warmup=False, kind="MAMS"),
    "blackjax, MAMS, shared, 4 x 50": partial(
        blackjax_scan, share_warmup=True, num_chains=4, kind="MAMS"
    ),
    LAPS: laps_loop,
    "ours, NUTS 1 x 200": partial(ours, engine=chains(shift.NUTS, 1)),
    BASE: partial(ours, engine=chains(shift.NUTS, 4)),
    "ours, HMC 4 x 50": partial(ours, engine=chains(shift.HMC, 4)),
    "ours, Auto, 128 draws": partial(ours, engine=shift.Auto(shift.AdaptiveImportance(128))),
    "ours, Auto": partial(ours, engine=shift.Auto()),
}
# One of each kind and one target, which tells whether everything runs.
SMOKE = ("numpyro, one MCMC, jit_model_args", "blackjax, shared warm-up", BASE)
# NumPyro turns its progress bar off where this is set, and recompiles at every step without it.
NO_BAR = "CI" in os.environ


def first_run(target, label, num_steps):
    """Total seconds, compilations and centres of the first run in this process, and a warm one if slow."""
    num_steps = 1 if label == LAPS else num_steps
    loss, x0, data = TARGETS[target]()
    jax.block_until_ready(jnp.zeros(1) + 1)  # starts the back end
    out = {}

    def build_and_run():
        out["run"] = CONTESTANTS[label](loss, x0, data, num_steps)
        out["centers"], _ = out["run"](0)
        return out["centers"]

    with harness.count_compiles() as compiled:
        total = harness.seconds(build_and_run)
    report = {
        "total": total,
        "compiles": len(compiled),
        "centers": np.asarray(out["centers"]).tolist(),
    }
    if label.startswith(LOOPS):
        report["warm"] = harness.seconds(lambda: out["run"](1))
    return report


@jax.jit
def long_run(engine, rng_key, target):
    """The next centre from one long shift."""
    draws = engine.step(rng_key, engine.init(rng_key, target), target)[1]
    return fit.ForwardKL().step(rng_key, (), target, draws)[1].mean


def squared_error(loss, x0, data, centers, num_reference):
    """Mean over some steps of the squared error of the next centre."""
    bound = Loss.from_function(loss, x0, *data)
    engine = shift.NUTS(num_warmup=300, num_samples=num_reference, num_chains=4)
    last = len(centers) - 2
    errors = []
    for k in np.unique(np.linspace(min(2, last), last, 6).astype(int)):
        target = RegularizedLoss(bound, Gaussian.isotropic(jnp.asarray(centers[k]), TAU))
        exact = long_run(engine, random.key(int(k)), target)
        errors.append(float(jnp.sum((jnp.asarray(centers[k + 1]) - exact) ** 2)))
    return statistics.fmean(errors)


def _each_seed(run, spent):
    seeds = itertools.count()

    def call():
        centers, gradients = run(next(seeds))
        spent.append(gradients)
        return centers

    return call


def compare(target, only, *, smoke):
    problem = TARGETS[target]()
    num_steps, rounds, repeats = (2, 1, 1) if smoke else (20, 3, 11)
    labels = [label for label in CONTESTANTS if not (NO_BAR and label.endswith("bar on"))]
    labels = [label for label in labels if label in (SMOKE if smoke else only)]
    # The loops over MCMC compile dozens of programs: one run of each is enough, and as much as one process bears.
    slow = [label for label in labels if label.startswith(LOOPS)]
    first = {label: [] for label in labels}
    for i in range(rounds):
        for label in labels:
            if i == 0 or label not in slow:
                command = ("--first", target, label, str(num_steps))
                first[label].append(harness.in_fresh_process(__file__, *command))
    warm = {label: first[label][0]["warm"] for label in slow}
    gradients = {label: [] for label in labels if label not in slow}
    calls = {
        label: _each_seed(CONTESTANTS[label](*problem, num_steps), spent)
        for label, spent in gradients.items()
    }
    warm |= harness.interleave(calls, repeats)

    def count(label):
        return 1 if label == LAPS else num_steps

    rows = [
        {
            "contestant": label,
            "warm ms / step": 1e3 * warm[label] / count(label),
            "ratio": warm[label] / count(label) * num_steps / warm[BASE],
            "total s": statistics.median(report["total"] for report in first[label]),
            "compiles": first[label][0]["compiles"],
            "gradients / step": float(statistics.median(gradients[label]))
            if label in gradients
            else None,
            "error": squared_error(*problem, first[label][0]["centers"], 100 if smoke else 2500),
        }
        for label in labels
    ]
    (base,) = (row for row in rows if row["contestant"] == BASE)
    for row in rows:
        # Squared errors fall with the number of draws, and so with time.
        row["ratio at equal error"] = row["ratio"] * row["error"] / base["error"]
    return rows


def main():
    parser = harness.parser(__doc__)
    parser.add_argument("--first", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument(
        "--only", nargs="+", choices=list(CONTESTANTS), help=f"contestants, {BASE!r} among them"
    )
    options = parser.parse_args()
    if options.first:
        target, label, num_steps = options.first
        print(json.dumps(first_run(target, label, int(num_steps))))
        return
    if options.only and BASE not in options.only:
        parser.error(f"expected --only with {BASE!r}, to which all are compared")
    tables = {}
    print(harness.environment())
    for name in list(TARGETS)[1 if options.smoke else 0 :]:
        tables[name] = compare(name, options.only or list(CONTESTANTS), smoke=options.smoke)
        harness.show(f"{name}: {'2' if options.smoke else '20'} outer steps", tables[name])
    harness.save(options.out, tables)


if __name__ == "__main__":
    main()
