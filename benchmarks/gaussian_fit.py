# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""How near a Gaussian is to published posteriors, and for how many gradients.

Six posteriors of posteriordb, whose reference draws give means and standard deviations; these are themselves
known to 0.01 standard deviations and one percent. Every fit starts without knowledge of the posterior.

Columns: the worst error of a marginal mean, in reference standard deviations, and the worst relative error of a
marginal standard deviation, in unconstrained coordinates, where all fits are Gaussians, and in those of the
published summaries, into which Gaussians are pushed by 20,000 draws (rows "of the sites" were fitted there);
evaluations of gradient and density, warm-up and line searches included, "exact" by what the algorithm is
defined to do or "counted" while it ran (leapfrog steps of NUTS, without its searches for a first step size);
seconds of the first run with its compilations (of rivals without small operations that others compiled before),
and of another one where a program can be used again. Rivals run in single precision like all else, and in double
where that broke them or hid the mode that they start from.

Variational rivals optimize with Adam whose rate falls along a cosine, from the best of 0.01, 0.03 and 0.1 for each
over some of the posteriors. Batch and match (Cai, Modi, Pillaud-Vivien, Margossian, Gower, Blei & Saul 2024,
"Batch and Match: Black-Box Variational Inference with a Score-Based Divergence") is restated here, since neither
library has it: from the standard normal, as published, and from Laplace's approximation.

The second table is of control variates: mean squared error of the fitted means, in squared standard deviations
and averaged over coordinates, of plain averages and of corrected ones of the same draws of four chains, without
any gradient beyond those of NUTS, against the average of many runs of their own.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import blackjax
import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
from blackjax.optimizers.lbfgs import minimize_lbfgs
from blackjax.vi import multipathfinder, pathfinder
from blackjax.vi.multipathfinder import MultipathfinderState
from jax import lax, random
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from numpyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoLaplaceApproximation,
    AutoMultivariateNormal,
)
from numpyro.infer.initialization import init_to_value
from targets import breast_cancer, logistic

from numpyro_regloss import Gaussian, Loss, RegularizedLoss, forward_kl, from_guide, model, shift
from numpyro_regloss.fit.reverse_kl import reverse_kl

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from reference_posteriors import POSTERIORS  # noqa: E402

NUM_PUSHED = 20_000
# Quasi-Newton paths; blackjax stops after 30 steps, or at a relative change of 1e-5, unless told.
MOST_STEPS = 100
PATH = {"maxiter": MOST_STEPS, "ftol": 1e-9}
# What counts as near enough: errors of means in standard deviations, and of standard deviations.
NEAR_MEAN, NEAR_SD = 0.1, 0.08


class Sizes(NamedTuple):
    """How long everything runs."""

    posteriors: tuple[str, ...] = tuple(POSTERIORS)
    contestants: tuple[str, ...] | None = None  # all
    long: tuple[int, int] | None = (1000, 1000)
    short: tuple[int, int] = (200, 100)
    reverse_steps: int | None = None
    svi_steps: int = 20_000
    particles: int = 10
    paths: int = 8
    path_draws: int = 200
    bam_steps: int = 150
    bam_steps_from_laplace: int = 40
    bam_batch: int = 32
    repetitions: int = 20
    regressions: tuple[str, ...] | None = None  # all
    draws: tuple[int, ...] = (48, 200, 1000)
    warmup: int = 200
    fresh: bool = True  # first runs compile everything


SMOKE = Sizes(
    posteriors=("eight_schools-eight_schools_noncentered",),
    contestants=(
        "ours, reverse_kl, diagonal",
        "numpyro, AutoDiagonalNormal",
        "blackjax, meanfield_vi",
        "batch and match",
    ),
    fresh=False,
    long=None,
    short=(20, 20),
    reverse_steps=2,
    svi_steps=20,
    particles=2,
    paths=2,
    path_draws=20,
    bam_steps=5,
    repetitions=2,
    regressions=("breast cancer, tau = 0.1",),
    draws=(40,),
    warmup=20,
)


class Fit(NamedTuple):
    """Moments in unconstrained coordinates and what they cost; or in those of the sites."""

    mean: Any
    covariance: Any
    num_grad: int
    num_loss: int
    counts: str
    of_sites: bool = False


def forget(sizes):
    if sizes.fresh:
        jax.clear_caches()


class CountedNUTS(NUTS):
    """NUTS whose warm-up is part of the samples, so that its leapfrog steps can be counted."""

    def __init__(self, *args, num_adapted, **kwargs):
        super().__init__(*args, **kwargs)
        self.num_adapted = num_adapted

    def init(self, rng_key, num_warmup, *args, **kwargs):
        del num_warmup
        return super().init(rng_key, self.num_adapted, *args, **kwargs)


def run_nuts(rng_key, loss, num_warmup, num_samples, num_chains=4, **kwargs):
    """Chains of the plain posterior: flat draws and scores `(chain, draw, dim)`, sites, leapfrog steps."""
    mcmc = MCMC(
        CountedNUTS(model, num_adapted=num_warmup),
        num_warmup=0,
        num_samples=num_warmup + num_samples,
        num_chains=num_chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    target = RegularizedLoss(loss)
    mcmc.run(rng_key, target, extra_fields=("z_grad", "num_steps"), **kwargs)
    fields = mcmc.get_extra_fields(group_by_chain=True)
    sites = mcmc.get_samples(group_by_chain=True) | {"score": -fields["z_grad"]["x"]}
    kept = {name: value[:, num_warmup:] for name, value in sites.items()}
    x, score = kept.pop("x"), kept.pop("score")
    return x, score, {name: kept[name] for name in loss.names}, int(fields["num_steps"].sum())


def by_nuts(rng_key, loss, sizes):
    """Moment matching of long runs and of short ones: `{label: (fit, seconds)}`."""
    out = {}

    def add(label, spent, num_grad, *args, of_sites=False, **kwargs):
        start = time.perf_counter()
        gaussian = jax.block_until_ready(forward_kl(*args, **kwargs).gaussian)
        spent += time.perf_counter() - start
        fit = Fit(gaussian.mean, gaussian.covariance, num_grad, 0, "counted", of_sites)
        out[f"ours, forward_kl, {label}"] = fit, spent

    for lengths in filter(None, (sizes.long, sizes.short)):
        forget(sizes)
        start = time.perf_counter()
        x, score, sites, num_grad = run_nuts(rng_key, loss, *lengths)
        spent = time.perf_counter() - start
        label = "NUTS 4 x ({} + {})".format(*lengths)
        add(label, spent, num_grad, x)
        if lengths == sizes.short:
            add(f"{label}, with scores", spent, num_grad, x, score=score)
        add(f"{label}, of the sites", spent, num_grad, sites, group_by_chain=True, of_sites=True)
    return out


def ours_reverse(posterior, loss, sizes, **kwargs):
    del posterior

    def run(rng_key):
        gaussian, info = reverse_kl(
            rng_key, RegularizedLoss(loss), num_steps=sizes.reverse_steps, **kwargs
        )
        num_grad, num_loss = int(info.num_grad), int(info.num_loss)
        return Fit(gaussian.mean, gaussian.covariance, num_grad, num_loss, "counted")

    return run


def adam(rate, num_steps):
    return optax.adam(optax.cosine_decay_schedule(rate, num_steps))


def numpyro_svi(posterior, loss, sizes, *, guide, rate):
    def run(rng_key):
        auto = guide(posterior.model)
        svi = SVI(posterior.model, auto, adam(rate, sizes.svi_steps), Trace_ELBO(sizes.particles))
        result = svi.run(
            rng_key, sizes.svi_steps, *posterior.args, progress_bar=False, **posterior.kwargs
        )
        gaussian = from_guide(auto, result.params, loss=loss).gaussian
        num_grad = sizes.svi_steps * sizes.particles
        return Fit(gaussian.mean, gaussian.covariance, num_grad, 0, "exact")

    return run


def counting(density):
    """The same density, and a list that grows by one whenever its gradient is evaluated."""
    counts = []

    @jax.custom_vjp
    def counted(x):
        return density(x)

    def forward(x):
        jax.debug.callback(lambda: counts.append(1))
        return jax.value_and_grad(density)(x)

    counted.defvjp(forward, lambda gradient, ct: (ct * gradient,))
    return counted, counts


def laplace(loss):
    """Mode by L-BFGS, covariance there, and gradients, a Hessian counted as one for each of its columns."""
    density, counts = counting(lambda x: -loss.value(x))
    search = partial(minimize_lbfgs, maxiter=2 * MOST_STEPS, gtol=1e-8, ftol=1e-12)
    found, _ = jax.jit(partial(search, lambda x: -density(x)))(loss.x0)
    covariance = jnp.linalg.inv(jax.jit(jax.hessian(loss.value))(found.params))
    jax.effects_barrier()
    return found.params, covariance, len(counts) + loss.dim


def numpyro_laplace(posterior, loss, sizes):
    del sizes

    def run(rng_key):
        # SVI with an optimizer by steps takes thousands of gradients, and numpyro.optim.Minimize (BFGS) stops far
        # from the mode on three of the posteriors in either precision: the guide starts at the mode.
        mode, _, num_grad = laplace(loss)
        init = init_to_value(values=loss.constrain(mode))
        auto = AutoLaplaceApproximation(posterior.model, init_loc_fn=init)
        svi = SVI(posterior.model, auto, optax.sgd(0.0), Trace_ELBO())
        state = svi.init(rng_key, *posterior.args, **posterior.kwargs)
        gaussian = from_guide(auto, svi.get_params(state), loss=loss).gaussian
        return Fit(gaussian.mean, gaussian.covariance, num_grad, 0, "counted")

    return run


def quasi_newton_path(loss, num_draws):
    """A compiled path of blackjax, with its draws and their densities, and the count of gradients."""
    density, counts = counting(lambda x: -loss.value(x))

    @jax.jit
    def path(rng_key, start):
        key_fit, key_draw = random.split(rng_key)
        state, _ = pathfinder.approximate(key_fit, density, start, num_draws, **PATH)
        x, log_density = pathfinder.sample(key_draw, state, num_draws)
        return MultipathfinderState(state, x, jax.vmap(density)(x), log_density)

    return path, counts


def blackjax_pathfinder(posterior, loss, sizes):
    del posterior
    path, counts = quasi_newton_path(loss, sizes.path_draws)
    draw = jax.jit(lambda key, state: pathfinder.sample(key, state, NUM_PUSHED)[0])

    def run(rng_key):
        counts.clear()
        key_path, key_draw = random.split(rng_key)
        state = path(key_path, loss.x0).path_states
        x = np.asarray(draw(key_draw, state), float)
        jax.effects_barrier()
        num_loss = (MOST_STEPS + 1) * sizes.path_draws
        return Fit(x.mean(0), np.cov(x.T), len(counts), num_loss, "counted")

    return run


def blackjax_multipathfinder(posterior, loss, sizes):
    del posterior
    path, counts = quasi_newton_path(loss, sizes.path_draws)
    starts = random.uniform(random.key(7), (sizes.paths, loss.dim), loss.x0.dtype, -2.0, 2.0)

    def run(rng_key):
        # One path after the other: its own vmap over paths can block JAX's threads for ever where cores are few.
        counts.clear()
        keys = random.split(rng_key, sizes.paths)
        paths = [path(key, start) for key, start in zip(keys, starts, strict=True)]
        state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *paths)
        weight = np.exp(np.asarray(multipathfinder.psis_weights(state)[0], float))
        weight, x = weight / weight.sum(), np.asarray(state.samples, float).reshape(-1, loss.dim)
        jax.effects_barrier()
        num_loss = (MOST_STEPS + 2) * sizes.path_draws * sizes.paths
        covariance = np.cov(x.T, aweights=weight, ddof=0)
        return Fit(weight @ x, covariance, len(counts), num_loss, "counted")

    return run


def blackjax_vi(posterior, loss, sizes, *, algorithm, scale, rate):
    del posterior

    @jax.jit
    def compiled(rng_key, loss):
        rule = adam(rate, sizes.svi_steps)
        vi = algorithm(partial(_log_density, loss), rule, num_samples=sizes.particles)
        keys = random.split(rng_key, sizes.svi_steps)
        return lax.scan(lambda state, key: (vi.step(key, state)[0], None), vi.init(loss.x0), keys)[
            0
        ]

    def run(rng_key):
        state = compiled(rng_key, loss)
        root = np.asarray(scale(state), float)
        num_grad = sizes.svi_steps * sizes.particles
        return Fit(state.mu, root @ root.T, num_grad, 0, "exact")

    return run


def _full_scale(state):
    # The diagonal's logarithms, then the lower triangle by rows.
    dim = len(state.mu)
    lower = np.zeros((dim, dim))
    lower[np.tril_indices(dim, -1)] = state.chol_params[dim:]
    return lower + np.diag(np.exp(state.chol_params[:dim]))


def _diagonal_scale(state):
    return np.diag(np.exp(state.rho))


def batch_and_match(posterior, loss, sizes, *, from_laplace):
    del posterior
    batch, dim = sizes.bam_batch, loss.dim
    num_steps = sizes.bam_steps_from_laplace if from_laplace else sizes.bam_steps

    @jax.jit
    def compiled(rng_key, loss, start_mean, start_root):
        def step(carry, inputs):
            mean, root = carry
            key, count = inputs
            rate = batch * dim / (count + 1.0)
            x = mean + random.normal(key, (batch, dim), mean.dtype) @ root.T
            score = -jax.vmap(jax.grad(loss.value))(x)
            center, slope = x.mean(0), score.mean(0)
            part, off = rate / (1.0 + rate), mean - center
            u = rate * jnp.cov(score.T, bias=True) + part * jnp.outer(slope, slope)
            v = root @ root.T + rate * jnp.cov(x.T, bias=True) + part * jnp.outer(off, off)
            # The covariance that solves S u S + S = v is L M Lᵀ, with L Lᵀ = v and M in the basis of Lᵀ u L.
            lower = jnp.linalg.cholesky(v)
            values, vectors = jnp.linalg.eigh(lower.T @ u @ lower)
            shrunk = jnp.sqrt(2.0 / (1.0 + jnp.sqrt(1.0 + 4.0 * jnp.maximum(values, 0.0))))
            root = lower @ vectors * shrunk
            new = mean / (1.0 + rate) + part * (root @ (root.T @ slope) + center)
            return (new, root), None

        keys = random.split(rng_key, num_steps)
        start = start_mean, start_root
        return lax.scan(step, start, (keys, jnp.arange(num_steps)))[0]

    def run(rng_key):
        start, covariance, num_grad = loss.x0, jnp.eye(dim, dtype=loss.x0.dtype), 0
        if from_laplace:
            start, covariance, num_grad = laplace(loss)
        found = compiled(rng_key, loss, start, jnp.linalg.cholesky(covariance))
        mean, root = (np.asarray(a, float) for a in found)
        num_grad += batch * num_steps
        return Fit(mean, root @ root.T, num_grad, 0, "counted" if from_laplace else "exact")

    return run


def _log_density(loss, x):
    return -loss.value(x)


# Each builds, from posterior, loss and sizes, a function of a key.
OURS = {
    "ours, reverse_kl, dense": partial(ours_reverse, covariance="dense"),
    "ours, reverse_kl, dense, natural": partial(ours_reverse, covariance="dense", method="natural"),
    "ours, reverse_kl, dense, natural, 64 draws": partial(
        ours_reverse, covariance="dense", method="natural", num_particles=64
    ),
    "ours, reverse_kl, low rank 2": partial(ours_reverse, covariance="low_rank", rank=2),
    "ours, reverse_kl, diagonal": partial(ours_reverse, covariance="diagonal"),
}
RIVALS = {
    "numpyro, AutoMultivariateNormal": partial(
        numpyro_svi, guide=AutoMultivariateNormal, rate=0.01
    ),
    "numpyro, AutoDiagonalNormal": partial(numpyro_svi, guide=AutoDiagonalNormal, rate=0.01),
    "numpyro, AutoLaplaceApproximation": numpyro_laplace,
    "blackjax, pathfinder": blackjax_pathfinder,
    "blackjax, multipathfinder": blackjax_multipathfinder,
    "blackjax, fullrank_vi": partial(
        blackjax_vi, algorithm=blackjax.fullrank_vi, scale=_full_scale, rate=0.03
    ),
    "blackjax, meanfield_vi": partial(
        blackjax_vi, algorithm=blackjax.meanfield_vi, scale=_diagonal_scale, rate=0.01
    ),
    "batch and match": partial(batch_and_match, from_laplace=False),
    "batch and match, from Laplace": partial(batch_and_match, from_laplace=True),
}
# In single precision the search for a mode stops where rounding hides what is left.
IN_DOUBLE = ("numpyro, AutoLaplaceApproximation", "batch and match, from Laplace")
# These compile at every run.
NEVER_WARM = ("numpyro", "batch and match, from Laplace")


def loss_of(posterior):
    return Loss.from_model(posterior.model, *posterior.args, **posterior.kwargs)


def attempt(label, build, posterior, sizes, *, double):
    """Fit, seconds of the first run and of another one."""
    with jax.enable_x64(double):
        if label in OURS:
            forget(sizes)
        run = build(posterior, loss_of(posterior), sizes)
        start = time.perf_counter()
        fit = run(random.key(1))
        first = time.perf_counter() - start
        warm = None
        if not label.startswith(NEVER_WARM):
            start = time.perf_counter()
            run(random.key(2))
            warm = time.perf_counter() - start
    return fit, first, warm


def is_finite(fit):
    mean, covariance = np.asarray(fit.mean), np.asarray(fit.covariance)
    return np.isfinite(mean).all() and np.isfinite(covariance).all()


def errors(mean, covariance, summary):
    sd = np.sqrt(np.diagonal(covariance))
    worst_mean = np.max(np.abs(mean - summary.mean) / summary.sd)
    return float(worst_mean), float(np.max(np.abs(sd / summary.sd - 1.0)))


def push(loss, mean, covariance):
    """Mean and covariance of the sites, from draws of the Gaussian."""
    sd = np.sqrt(np.diagonal(covariance))
    values, vectors = np.linalg.eigh(covariance / np.outer(sd, sd))
    root = sd[:, None] * vectors * np.sqrt(np.maximum(values, 0.0))
    noise = np.random.default_rng(5).normal(size=(NUM_PUSHED // 2, len(mean)))
    x = mean + np.concatenate([noise, -noise]) @ root.T
    sites = _constrain(loss, jnp.asarray(x, loss.x0.dtype))
    columns = [np.asarray(sites[name], float).reshape(NUM_PUSHED, -1) for name in loss.names]
    flat = np.concatenate(columns, -1)
    return flat.mean(0), np.cov(flat.T)


@jax.jit
def _constrain(loss, x):
    return jax.vmap(loss.constrain)(x)


def row_of(label, posterior, loss, fit, first, warm, dtype):
    row = {"contestant": label}
    keys = ("mean", "sd", "mean (sites)", "sd (sites)")
    row |= dict.fromkeys(keys)
    if is_finite(fit):
        mean, covariance = np.asarray(fit.mean, float), np.asarray(fit.covariance, float)
        if fit.of_sites:
            found = (None, None, *errors(mean, covariance, posterior.constrained))
        else:
            pushed = push(loss, mean, covariance)
            found = (
                *errors(mean, covariance, posterior.unconstrained),
                *errors(*pushed, posterior.constrained),
            )
        finite = (None if value is None or not np.isfinite(value) else value for value in found)
        row |= dict(zip(keys, finite, strict=True))
    return row | {
        "gradients": fit.num_grad,
        "densities": fit.num_loss,
        "counts": fit.counts,
        "first s": first,
        "warm s": warm,
        "precision": dtype,
    }


def compare(posterior, sizes):
    loss = loss_of(posterior)
    rows = [
        row_of(label, posterior, loss, fit, spent, None, "single")
        for label, (fit, spent) in by_nuts(random.key(1), loss, sizes).items()
    ]
    for label, build in {**OURS, **RIVALS}.items():
        if label not in (sizes.contestants or (label,)):
            continue
        double = label in IN_DOUBLE
        result = attempt(label, build, posterior, sizes, double=double)
        if not is_finite(result[0]) and not double and label in RIVALS:
            double = True
            result = attempt(label, build, posterior, sizes, double=True)
        dtype = "double" if double else "single"
        rows.append(row_of(label, posterior, loss, *result, dtype))
    return rows


def cheapest(rows):
    """Who gets near for the fewest evaluations, in words."""
    near = [
        row
        for row in rows
        if row["mean"] is not None and row["mean"] <= NEAR_MEAN and row["sd"] <= NEAR_SD
    ]
    rule = f"cheapest within {NEAR_MEAN} sd and {NEAR_SD:.0%} (unconstrained)"
    if not near:
        return f"{rule}: none"
    best = min(near, key=lambda row: row["gradients"] + row["densities"])
    return (
        f"{rule}: {best['contestant']}, {best['gradients']} gradients and {best['densities']} densities; "
        f"{len(near)} of {len(rows)} are"
    )


def posterior_draws(name, repeats, num_samples, sizes):
    """Draws and scores `(repetition, chain, draw, dim)` of a posterior by NUTS."""
    loss = loss_of(POSTERIORS[name])
    start = jnp.asarray(POSTERIORS[name].unconstrained.mean, loss.x0.dtype)
    x, score, _, _ = run_nuts(
        random.key(3),
        loss,
        sizes.warmup,
        num_samples,
        4 * repeats,
        init_params={"x": jnp.tile(start, (4 * repeats, 1))},
    )
    return (np.asarray(a).reshape(repeats, 4, *a.shape[1:]) for a in (x, score))


def shift_draws(problem, tau, repeats, num_samples, sizes):
    """The same of a shifted density, by this package's engine."""
    fn, x0, data = problem
    loss = Loss.from_function(fn, jnp.asarray(x0, float), *data)
    target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, tau))
    engine = shift.NUTS(num_warmup=sizes.warmup, num_samples=num_samples, num_chains=4)
    draws = [_shift(engine, key, target) for key in random.split(random.key(3), repeats)]
    return (np.stack([np.asarray(getattr(d, name)) for d in draws]) for name in ("x", "score"))


@jax.jit
def _shift(engine, rng_key, target):
    return engine.step(rng_key, engine.init(rng_key, target), target)[1]


def synthetic_logistic():
    """208 rows of 20 correlated inputs."""
    rng = np.random.default_rng(4)
    inputs = rng.normal(size=(208, 20)) @ (rng.normal(size=(20, 20)) / 20**0.5 + 0.5 * np.eye(20))
    chance = 1.0 / (1.0 + np.exp(-inputs @ rng.normal(size=20)))
    signs = 2.0 * (rng.uniform(size=208) < chance) - 1.0
    return logistic, np.zeros(20), (inputs.astype(np.float32), signs.astype(np.float32))


REGRESSIONS: dict[str, Callable] = {
    "sblrc": partial(posterior_draws, "sblrc-blr"),
    "kidiq": partial(posterior_draws, "kidiq-kidscore_momhsiq"),
    "mesquite": partial(posterior_draws, "mesquite-logmesquite"),
    "nes": partial(posterior_draws, "nes2000-nes"),
    "breast cancer, tau = 0.1": lambda *args: shift_draws(breast_cancer(), 0.1, *args),
    "synthetic logistic, tau = 1": lambda *args: shift_draws(synthetic_logistic(), 1.0, *args),
}


def control_variates(sizes):
    rows = []
    repeats, longest = sizes.repetitions, max(sizes.draws)
    for name in sizes.regressions or REGRESSIONS:
        forget(sizes)
        # Half of the runs are the reference of the others.
        x, score = REGRESSIONS[name](2 * repeats, longest // 4, sizes)
        sd = x.reshape(-1, x.shape[-1]).std(0, dtype=float)
        means = [corrected(*run) for run in zip(x[repeats:], score[repeats:], strict=True)]
        reference = np.mean(means, 0)

        def mean_square(means, reference=reference, sd=sd):
            return float(np.mean(((np.asarray(means) - reference) / sd) ** 2))

        for count in sizes.draws:
            kept_x, kept_score = x[:repeats, :, : count // 4], score[:repeats, :, : count // 4]
            plain = mean_square(kept_x.mean((1, 2), dtype=float))
            runs = zip(kept_x, kept_score, strict=True)
            better = mean_square([corrected(*run) for run in runs])
            rows.append({
                "posterior": name,
                "dim": x.shape[-1],
                "draws": f"4 x {count // 4}",
                "repetitions": repeats,
                "plain": plain,
                "corrected": better,
                "plain / corrected": plain / better,
                "gradients extra": 0,
            })
    return rows


def corrected(x, score):
    return np.asarray(forward_kl(x, "diagonal", score=score).gaussian.mean, float)


def main():
    options = harness.arguments(__doc__)
    sizes = SMOKE if options.smoke else Sizes()
    tables = {}
    print(harness.environment())
    for name in sizes.posteriors:
        tables[name] = compare(POSTERIORS[name], sizes)
        harness.show(name, tables[name])
        print(cheapest(tables[name]), flush=True)
    title = "control variates, mean squared error of the mean"
    tables[title] = control_variates(sizes)
    harness.show(title, tables[title])
    harness.save(options.out, tables)


if __name__ == "__main__":
    main()
