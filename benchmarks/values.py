# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Values of the local entropy where weights from the reference fail: every method, its errors and their coverage.

Targets: the minus log densities of mixtures of two Gaussians over a reference N(0, I), in closed form: near to
the reference; sharp (one Gaussian, a thirtieth as wide); skewed (two that overlap); bimodal (30 : 70, many widths
apart). One compiled program per dimension and method.

Columns: which method the result names; effective draws of plain importance sampling, of 10,000; bias, standard
deviation and mean stated error over repetitions; the share of 95 % intervals that hold the exact value, among
those of finite error, and the share of infinite errors; milliseconds per value once compiled. A second table
compares the moves of SMC at equal numbers of particles, with evaluations of loss and gradient.
"""

import math
import statistics
import time
from collections import Counter

import harness
import jax
import jax.numpy as jnp
import numpy as np
from jax import random

from numpyro_regloss import Gaussian, Loss, RegularizedLoss, problems, shift, values

TAU = 1.0


def two_bumps(x, weight, mean, variance):
    """Minus log of Σ_k weight_k N(x; mean_k, variance_k I)."""
    square = jnp.sum((x - mean) ** 2, -1) / variance
    log_scale = 0.5 * x.size * jnp.log(2.0 * jnp.pi * variance)
    return -jax.nn.logsumexp(jnp.log(weight) - 0.5 * square - log_scale)


def bumps(dim):
    """Per target weights, a coordinate of each mean, variances."""
    side = 2.0 / math.sqrt(dim)
    return {
        "near": ((0.5, 0.5), (-0.2, 0.3), (2.0, 1.5)),
        "sharp": ((0.5, 0.5), (0.5, 0.5), (1e-3, 1e-3)),
        "skewed": ((0.4, 0.6), (0.3 * side, 0.5 * side), (0.02, 0.03)),
        "bimodal": ((0.3, 0.7), (-side, side), (0.02, 0.02)),
    }


def build(name, dim):
    """The target and the exact local entropy at zero."""
    weight, place, variance = (np.asarray(part) for part in bumps(dim)[name])
    mean = np.outer(place, np.ones(dim))
    loss = Loss.from_function(two_bumps, np.zeros(dim), weight, mean, variance)
    covariance = np.outer(variance, np.ones(dim))
    exact = problems.gaussian_mixture(weight, mean, covariance).local_entropy(np.zeros(dim), TAU)
    return RegularizedLoss(loss, Gaussian.isotropic(loss.x0, TAU)), exact


@jax.jit
def plain_ess(rng_key, target):
    """Effective draws of 10,000 from the reference, whose weights are not smoothed."""
    return shift.Importance(10_000).step(rng_key, (), target)[2].ess


def repeat(target, exact, method, repeats, num_samples):
    estimates, times = [], []
    for seed in range(repeats):
        start = time.perf_counter()
        estimate = values.local_entropy(
            random.key(seed), target, method=method, num_samples=num_samples
        )
        estimates.append(jax.device_get(estimate))
        times.append(time.perf_counter() - start)
    value, error = (
        np.array([getattr(e, field) for e in estimates]) for field in ("value", "error")
    )
    known = np.isfinite(error)
    covered = np.abs(value - exact)[known] < 1.96 * error[known]
    return {
        "found by": ", ".join(f"{n} {k}" for n, k in Counter(e.method for e in estimates).items()),
        "bias": float(np.mean(value) - exact),
        "sd": float(np.std(value)),
        "error": float(np.mean(error[known])) if known.any() else None,
        "covered": float(np.mean(covered)) if known.any() else None,
        "no error": float(np.mean(~known)),
        "ms": 1e3 * statistics.median(times),
    }


def compare(dims, repeats, num_samples, names, methods):
    rows = []
    for dim in dims:
        for name in names:
            target, exact = build(name, dim)
            plain = float(plain_ess(random.key(0), target))
            for method in methods:
                row = {"dim": dim, "target": name, "method": method, "plain ess": plain}
                rows.append(row | repeat(target, exact, method, repeats, num_samples))
                print(rows[-1], flush=True)
    return rows


@jax.jit
def run_smc(engine, rng_key, target):
    return engine.step(rng_key, (), target)[2]


def compare_moves(dims, repeats, num_particles, names, kinds):
    rows = []
    for dim in dims:
        for moves in kinds:
            engine = shift.SMC(num_particles, num_islands=16, moves=moves)
            for name in names:
                target, exact = build(name, dim)
                infos, times = [], []
                for seed in range(repeats):
                    start = time.perf_counter()
                    infos.append(jax.device_get(run_smc(engine, random.key(seed), target)))
                    times.append(time.perf_counter() - start)
                value = np.array([info.log_evidence for info in infos])
                error = np.array([info.log_evidence_error for info in infos])
                rows.append({
                    "dim": dim,
                    "target": name,
                    "moves": moves,
                    "ok": float(np.mean([info.ok for info in infos])),
                    "stages": float(np.mean([info.num_stages for info in infos])),
                    "losses": float(np.mean([info.num_loss for info in infos])),
                    "gradients": float(np.mean([info.num_grad for info in infos])),
                    "bias": float(np.mean(value) + exact),
                    "sd": float(np.std(value)),
                    "error": float(np.median(error)) if np.isfinite(np.median(error)) else None,
                    "covered": float(np.mean(np.abs(value + exact) < 1.96 * error)),
                    "ms": 1e3 * statistics.median(times),
                })
                print(rows[-1], flush=True)
    return rows


def main():
    parser = harness.parser(__doc__)
    parser.add_argument("--dims", type=int, nargs="+", default=[10, 50])
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--samples", type=int, default=10_000)
    options = parser.parse_args()
    names, methods = list(bumps(1)), ("importance", "gaussian", "bridge", "smc", "auto")
    dims, repeats, num_samples = options.dims, options.repeats, options.samples
    if options.smoke:
        dims, repeats, num_samples, names, methods = [2], 2, 400, ["bimodal"], ("importance", "smc")
    print(harness.environment())
    particles, kinds = (
        10 * (num_samples // 160),
        ("crank_nicolson", "hmc")[: 1 if options.smoke else 2],
    )
    tables = {
        "values by method": compare(dims, repeats, num_samples, names, methods),
        "moves of SMC": compare_moves(dims, max(2, repeats // 5), particles, names[-3:], kinds),
    }
    for title, rows in tables.items():
        harness.show(title, rows)
    harness.save(options.out, tables)


if __name__ == "__main__":
    main()
