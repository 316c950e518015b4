# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Where does adaptive importance sampling serve, and what does `shift.Auto` do where it does not?

Runs of 20 steps on posteriors, each started at its default, at two widths of the regularizer. At the last
reference the fitted mean is compared with that of a long run of NUTS, of SMC for the mixture. Distances are in
standard deviations of q, the largest over the parameters. Two tables have the accuracy at one centre: how often
95 % intervals of F_tau cover, and what the error is, where q is Gaussian and where it is a product of simple laws
in few dimensions; and the intervals of the fitted mean and of F_tau, with 256 draws, of models. There the truth is
the mean of 20 steps of 16,384 draws. The last one compares a proposal of low rank with a diagonal one where there
are more parameters than a dense one is for: five steps at one centre, rounds and effective sample size of the
last, milliseconds of a round there, both in turn.
"""

import itertools
import sys
import warnings
from pathlib import Path

import harness
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import lax, random
from network_price import images, start
from overhead import network
from targets import TARGETS

from numpyro_regloss import (
    Gaussian,
    Loss,
    RegularizedLoss,
    RejectedError,
    TwoStep,
    fit,
    shift,
)

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from reference_posteriors import POSTERIORS

TAUS = (1.0, 0.01)


def centred_schools(y, sigma):
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    theta = numpyro.sample("theta", dist.Normal(mu, tau).expand([len(y)]).to_event(1))
    numpyro.sample("obs", dist.Normal(theta, sigma), obs=y)


def poisson(x, y):
    beta = numpyro.sample("beta", dist.Normal(0, 1).expand([x.shape[1]]).to_event(1))
    numpyro.sample("obs", dist.Poisson(jnp.exp(x @ beta)), obs=y)


def negative_binomial(x, y):
    beta = numpyro.sample("beta", dist.Normal(0, 1).expand([x.shape[1]]).to_event(1))
    concentration = numpyro.sample("concentration", dist.Gamma(2.0, 0.5))
    numpyro.sample("obs", dist.NegativeBinomial2(jnp.exp(x @ beta), concentration), obs=y)


def gaussian_process(x, y):
    length = numpyro.sample("length", dist.LogNormal(0.0, 0.3))
    covariance = jnp.exp(-0.5 * ((x[:, None] - x) / length) ** 2) + 1e-2 * jnp.eye(len(x))
    latent = numpyro.sample(
        "latent", dist.MultivariateNormal(jnp.zeros(len(x)), covariance_matrix=covariance)
    )
    numpyro.sample("obs", dist.Poisson(jnp.exp(latent)), obs=y)


def mixture(x):
    return -jnp.logaddexp(-2.0 * jnp.sum((x - 1.5) ** 2), -2.0 * jnp.sum((x + 1.5) ** 2))


def funnel(x):
    return x[0] ** 2 / 18 + jnp.sum(0.5 * x[1:] ** 2 * jnp.exp(-x[0]) + 0.5 * x[0])


def banana(x):
    u, v = (x[0] + x[1]) / np.sqrt(2), (x[0] - x[1]) / np.sqrt(2)
    return 0.5 * (u**2 / 4 + (v - 0.5 * u**2) ** 2 / 0.25)


def losses():
    rng = np.random.default_rng(0)
    x = np.column_stack([np.ones(200), rng.normal(size=(200, 5))]).astype(np.float32)
    rate = np.exp(x @ np.array([1.0, 0.5, -0.5, 0.3, 0.0, 0.2]))
    counts, wide = rng.poisson(rate), rng.negative_binomial(2, 2 / (2 + rate))
    grid = np.linspace(0, 4, 40).astype(np.float32)
    found = {
        name: Loss.from_model(posterior.model, *posterior.args, **posterior.kwargs)
        for name, posterior in POSTERIORS.items()
    }
    schools = POSTERIORS["eight_schools-eight_schools_noncentered"]
    return found | {
        "eight schools, centred": Loss.from_model(centred_schools, *schools.args),
        "Poisson regression": Loss.from_model(poisson, x, counts),
        "negative-binomial regression": Loss.from_model(negative_binomial, x, wide),
        "Gaussian process, 40 values": Loss.from_model(
            gaussian_process, grid, rng.poisson(np.exp(np.sin(grid)))
        ),
        "mixture of two": Loss.from_function(mixture, np.full(2, 0.3, np.float32)),
        "funnel": Loss.from_function(funnel, np.zeros(5, np.float32)),
        "banana": Loss.from_function(banana, np.ones(2, np.float32)),
    }


def targets(options):
    rows = []
    chosen = list(losses().items())
    num_steps, long = (3, shift.NUTS(20, 20)) if options.smoke else (20, shift.NUTS(500, 1500))
    for name, loss in chosen[-1:] if options.smoke else chosen:
        for tau in TAUS:
            optimizer = TwoStep(loss, tau, shift.Auto(), fit.ForwardKL("diagonal"))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                try:
                    result = optimizer.run(random.key(0), num_steps, progress_bar=False)
                except RejectedError as error:
                    result = error.result
            history = result.history
            engine = shift.SMC(20_000) if "mixture" in name and not options.smoke else long
            last = jax.tree.map(lambda a: jnp.asarray(a[-1]), history.reference)
            truth = _moments(engine, loss, last)
            off = np.abs(np.asarray(history.fitted.mean[-1]) - truth.mean) / truth.scale
            row = {
                "target": name,
                "dim": loss.dim,
                "tau": tau,
                "refused": int((~history.ok & ~history.shift.sampled).sum()),
                "sampled": int(history.shift.sampled.sum()),
                "last ok": bool(history.ok[-1]),
                "off, sd": float(off.max()),
                "ess": float(history.shift.ess[-1]),
                "gradients a step": float(np.median(history.num_grad)),
            }
            print(row, flush=True)
            rows.append(row)
    return rows


def _moments(engine, loss, reference):
    target, moments = RegularizedLoss(loss, reference), fit.ForwardKL("diagonal")

    @jax.jit
    def run(key):
        state = engine.init(key, target)
        _, draws, _ = engine.step(key, state, target)
        return moments.step(key, moments.init(key, target), target, draws)[1]

    return run(random.key(1))


# Coefficients of `simple`: in units of 1, of x⁴, and of the logistic loss.
SIMPLE = {
    "Gaussian, sd 1": (1.0, 0.0, 0.0),
    "Gaussian, sd 0.03": (1e3, 0.0, 0.0),
    "quartic": (0.5, 1.0, 0.0),
    "logistic": (0.5, 0.0, 12.0),
}


def simple(x, square, quartic, logistic):
    steep = logistic * jnp.logaddexp(0.0, 3.0 * (x - 0.3))
    return jnp.sum(0.5 * square * (x - 0.5) ** 2 + quartic * x**4 + steep)


def value_of_simple(coefficients, tau, temperature):
    """F_tau at zero in one dimension."""
    square, quartic, logistic = coefficients
    x = np.linspace(-8.0, 8.0, 200_001)
    loss = 0.5 * square * (x - 0.5) ** 2 + quartic * x**4
    loss += logistic * np.logaddexp(0.0, 3.0 * (x - 0.3))
    log_density = -loss / temperature - 0.5 * x**2 / tau
    total = np.sum(np.exp(log_density - log_density.max())) * (x[1] - x[0])
    log_normalizer = np.log(total) + log_density.max() - 0.5 * np.log(2 * np.pi * tau)
    return -temperature * log_normalizer


def coverage(options):
    rows = []
    repetitions = 20 if options.smoke else 1000
    for dim in (1, 2, 3, 10)[: 1 if options.smoke else None]:
        engine = shift.AdaptiveImportance()
        loss = Loss.from_function(simple, np.zeros(dim, np.float32), 1.0, 0.0, 0.0)

        @jax.jit
        def run(key, coefficients, tau, temperature, engine=engine, loss=loss):
            reference = Gaussian.isotropic(loss.x0, tau)
            target = RegularizedLoss(loss, reference, args=coefficients, temperature=temperature)
            state = engine.init(key, target)
            state, _ = lax.scan(
                lambda s, k: (engine.step(k, s, target)[0], None), state, random.split(key, 4)
            )

            def one(key):
                info = engine.step(key, state, target)[2]
                return info.local_entropy, info.local_entropy_error, info.ess, info.ok

            return lax.map(one, random.split(random.fold_in(key, 1), repetitions))

        for name, coefficients in SIMPLE.items():
            for tau, temperature in itertools.product((1.0, 0.1), repeat=2):
                found = jax.device_get(run(random.key(0), coefficients, tau, temperature))
                value, error, ess, ok = found
                away = (value - dim * value_of_simple(coefficients, tau, temperature))[ok]
                rows.append({
                    "dim": dim,
                    "loss": name,
                    "tau": tau,
                    "T": temperature,
                    "taken": float(ok.mean()),
                    "covers": float(np.mean(np.abs(away) < 1.96 * error[ok])),
                    "error": float(np.mean(error[ok])),
                    "rmse": float(np.sqrt(np.mean(away**2))),
                    "ess": float(np.median(ess)),
                })
    return rows


def repeated(engine, target, repetitions):
    """Fitted means and F_tau of independent steps from one state, with their errors, and which steps are ok."""

    def run(key):
        state = engine.init(key, target)
        for i in range(3):
            state, _, _ = engine.step(random.fold_in(key, i), state, target)

        def one(key):
            _, draws, info = engine.step(key, state, target)
            _, fitted, fit_info = fit.ForwardKL().step(key, (), target, draws)
            of_mean = fitted.mean, fit_info.mean_error
            return of_mean, (info.local_entropy, info.local_entropy_error), info.ok

        return lax.map(one, random.split(random.fold_in(key, 3), repetitions))

    return jax.device_get(jax.jit(run)(random.key(0)))


def intervals(options):
    rows = []
    repetitions = 20 if options.smoke else 200
    for name, make in list(TARGETS.items())[: 1 if options.smoke else None]:
        fn, x0, data = make()
        loss = Loss.from_function(fn, x0, *data)
        for temperature in (1.0,) if options.smoke else (1.0, 0.1):
            engine = shift.AdaptiveImportance(512)
            optimizer = TwoStep(loss, 0.1, engine, fit.ForwardKL(), temperature=temperature)
            result = optimizer.run(random.key(1), 2 if options.smoke else 20, progress_bar=False)
            target = RegularizedLoss(loss, result.state.reference, temperature=temperature)
            many = shift.AdaptiveImportance(1024 if options.smoke else 16_384)
            exact = [found[0].mean(0) for found in repeated(many, target, 20)[:2]]
            for family in ("dense", "diagonal"):
                engine = shift.AdaptiveImportance(covariance=family)
                *found, ok = repeated(engine, target, repetitions)
                row = {
                    "target": name,
                    "T": temperature,
                    "proposal": family,
                    "taken": float(ok.mean()),
                }
                for what, (value, error), known in zip(
                    ("centre", "F_tau"), found, exact, strict=True
                ):
                    away = (value - known)[ok]
                    row[f"{what} covers"] = (
                        float(np.mean(np.abs(away) < 1.96 * error[ok])) if ok.any() else None
                    )
                away = (found[0][0] - exact[0])[ok]
                row["squared error"] = float(np.mean(np.sum(away**2, -1))) if ok.any() else None
                rows.append(row)
    return rows


def wide_losses():
    """Losses of more parameters than a dense proposal is for, with a temperature and widths for each."""
    rng = np.random.default_rng(0)

    def rows_of(number, dim):
        return jnp.asarray(rng.normal(size=(number, dim)), jnp.float32)

    def least_squares(x, rows):
        return 0.5 * jnp.sum((rows @ (x - 1.0)) ** 2)

    def logistic(x, rows):
        return jnp.sum(jnp.logaddexp(0.0, rows @ (x - 0.1)) + jnp.logaddexp(0.0, rows @ (0.1 - x)))

    x, y, _, _ = images(None)
    digits = Loss.from_function(network, start(0, x.shape[1], hidden=8), x, y)
    return {
        "least squares, 20 rows": (
            Loss.from_function(least_squares, np.zeros(10_000), rows_of(20, 10_000)),
            1.0,
            (0.1,),
        ),
        "logistic, 25 rows": (
            Loss.from_function(logistic, np.zeros(2_000), rows_of(25, 2_000)),
            1.0,
            (0.003,),
        ),
        "digits, 64-8-10": (digits, 1e-3, (1e-4, 1e-3)),
    }


def families(options):
    rows = []
    chosen = wide_losses().items()
    for name, (loss, temperature, taus) in list(chosen)[-1:] if options.smoke else chosen:
        for tau in taus[:1] if options.smoke else taus:
            target = RegularizedLoss(
                loss, Gaussian.isotropic(loss.x0, tau), temperature=temperature
            )
            calls, found = {}, {}
            for family in ("diagonal", "low_rank"):
                engine = shift.AdaptiveImportance(covariance=family)
                state, steps = engine.init(random.key(0), target), []
                step = jax.jit(engine.step)
                for i in range(5):
                    state, _, info = step(random.key(i), state, target)
                    steps.append(info)
                found[family] = steps
                calls[family] = lambda f=step, s=state, t=target: f(random.key(5), s, t)
            repeats = 2 if options.smoke else 11
            times = harness.interleave(calls, repeats)
            for family, steps in found.items():
                count = calls[family]()[2].num_rounds
                rows.append({
                    "target": name,
                    "dim": loss.dim,
                    "tau": tau,
                    "proposal": family,
                    "refused": sum(not info.ok for info in steps),
                    "rounds": int(steps[-1].num_rounds),
                    "ess": float(steps[-1].ess),
                    "ms a round": 1e3 * times[family] / int(count),
                })
    return rows


def main():
    options = harness.arguments(__doc__)
    print(harness.environment())
    tables = {
        "Targets": targets(options),
        "F_tau of simple losses": coverage(options),
        "Intervals where q is no Gaussian": intervals(options),
        "Beyond dense proposals": families(options),
    }
    for title, rows in tables.items():
        harness.show(title, rows)
    harness.save(options.out, tables)


if __name__ == "__main__":
    main()
