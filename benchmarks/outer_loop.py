# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Outer steps of the local-entropy scheme by NUTS: what users write today, and this package.

20 outer steps at tau = 0.1, 100 warm-up iterations and 200 draws each, on two losses. Rivals: a Python loop
over numpyro.infer.MCMC.run (a new object per step; one object with jit_model_args=True, progress bar off and
on), and one compiled blackjax scan (window adaptation at every step; once, its step size and mass matrix
shared). `error` is the squared error of the next centre, summed over coordinates, against a long run at the
same centre, averaged over some steps.
"""

import os
import statistics

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
        return jnp.stack([jnp.asarray(x0, float), *centers])

    return run


def blackjax_scan(loss, x0, data, num_steps, *, share_warmup):
    import blackjax  # noqa: PLC0415

    def log_density(x, center, *data):
        return -loss(x, *data) - jnp.sum((x - center) ** 2) / (2 * TAU)

    def draws(key, kernel_step, state):
        def body(carry, key):
            state, total = carry
            state, _ = kernel_step(key, state)
            return (state, total + state.position), None

        (state, total), _ = lax.scan(
            body, (state, jnp.zeros_like(state.position)), random.split(key, NUM_SAMPLES)
        )
        return state, total / NUM_SAMPLES

    def warm_up(key, density, position):
        adaptation = blackjax.window_adaptation(blackjax.nuts, density)
        (state, parameters), _ = adaptation.run(key, position, num_steps=NUM_WARMUP)
        return state, parameters

    @jax.jit
    def run(key, start, *data):
        def density_at(center):
            return lambda x: log_density(x, center, *data)

        key, key_warm = random.split(key)
        _, shared = warm_up(key_warm, density_at(start), start) if share_warmup else (None, None)

        def outer(carry, key):
            center, position = carry
            density = density_at(center)
            key_warm, key_draw = random.split(key)
            if share_warmup:
                kernel = blackjax.nuts(density, **shared)
                state = kernel.init(position)
            else:
                state, parameters = warm_up(key_warm, density, center)
                kernel = blackjax.nuts(density, **parameters)
            state, mean = draws(key_draw, kernel.step, state)
            return (mean, state.position), mean

        _, centers = lax.scan(outer, (start, start), random.split(key, num_steps))
        return jnp.concatenate([start[None], centers])

    start = jnp.asarray(x0, float)
    return lambda seed: run(random.key(seed), start, *data)


def ours(loss, x0, data, num_steps, engine):
    optimizer = schemes.local_entropy(Loss.from_function(loss, x0, *data), TAU, shift=engine)

    def run(seed):
        history = optimizer.run(random.key(seed), num_steps, progress_bar=False).history
        return np.concatenate([history.reference.mean, history.fitted.mean[-1:]])

    return run


def contestants(loss, x0, data, num_steps):
    """Functions of a seed that return all centres, by name."""
    common = (loss, x0, data, num_steps)
    settings = {"num_warmup": NUM_WARMUP}
    runs = {
        "numpyro, new MCMC each step": numpyro_loop(*common, one_object=False),
        "numpyro, one MCMC, jit_model_args": numpyro_loop(*common, one_object=True),
        "blackjax scan, cold adaptation": blackjax_scan(*common, share_warmup=False),
        "blackjax scan, shared warm-up": blackjax_scan(*common, share_warmup=True),
        "ours, NUTS 1 x 200": ours(*common, shift.NUTS(num_samples=200, num_chains=1, **settings)),
        "ours, NUTS 4 x 50": ours(*common, shift.NUTS(num_samples=50, num_chains=4, **settings)),
        "ours, HMC 4 x 50": ours(*common, shift.HMC(num_samples=50, num_chains=4, **settings)),
    }
    if "CI" not in os.environ:  # where NumPyro turns its bar off
        runs["numpyro, one MCMC, jit_model_args, bar on"] = numpyro_loop(
            *common, one_object=True, progress_bar=True
        )
    return runs


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
        errors.append(float(jnp.sum((centers[k + 1] - exact) ** 2)))
    return statistics.fmean(errors)


def compare(name, *, smoke):
    loss, x0, data = TARGETS[name]()
    num_steps = 2 if smoke else 20
    runs = contestants(loss, x0, data, num_steps)
    totals, compiles, results = {}, {}, {}
    for label, run in runs.items():
        with harness.count_compiles() as compiled:
            totals[label] = harness.seconds(
                lambda run=run, label=label: results.setdefault(label, run(0))
            )
        compiles[label] = len(compiled)
    # The loops over MCMC take half a minute each and recompile at every step: fewer rounds are enough.
    slow = {label: run for label, run in runs.items() if label.startswith("numpyro")}
    fast = {label: run for label, run in runs.items() if label not in slow}
    warm = {label: harness.seconds(lambda run=run: run(1)) for label, run in slow.items()}
    warm |= harness.interleave(
        {label: (lambda run=run: run(1)) for label, run in fast.items()}, repeats=1 if smoke else 7
    )
    base = warm["ours, NUTS 4 x 50"]
    return [
        {
            "contestant": label,
            "warm ms / step": 1e3 * warm[label] / num_steps,
            "ratio to ours 4 x 50": warm[label] / base,
            "total s": totals[label],
            "compiles": compiles[label],
            "error": squared_error(loss, x0, data, results[label], 100 if smoke else 2500),
        }
        for label in runs
    ]


def main():
    options = harness.arguments(__doc__)
    tables = {}
    print(harness.environment())
    for name in TARGETS:
        tables[name] = compare(name, smoke=options.smoke)
        harness.show(f"{name}: {'2' if options.smoke else '20'} outer steps", tables[name])
    harness.save(options.out, tables)


if __name__ == "__main__":
    main()
