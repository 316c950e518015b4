# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Three directions and plain batch and match: how near their dense Gaussians come, and for how many gradients.

Targets: a Gaussian in 10 dimensions with random axes and a condition number of 100; sinh-arcsinh targets as in
the paper on batch and match, skewed and of heavier or lighter tails; two posteriors of posteriordb, mesquite and
eight schools. Double precision, since plain batch and match needs it; medians over seeds.

Columns: the worst error of a marginal mean, in standard deviations of the target; the worst relative error of a
marginal standard deviation; by how much KL(target || Gaussian) is above the least possible, from the target's
moments; gradients. Batch and match (Cai et al. 2024) starts at the standard normal, as published, with batches of
32, and gets as many gradients as `score_matching` took. `forward_kl` and `score_matching` of draws have those of
NUTS, warm-up counted.
"""

import statistics
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import harness
import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from numpyro.infer import MCMC, NUTS

from numpyro_regloss import (
    Loss,
    RegularizedLoss,
    forward_kl,
    model,
    reverse_kl,
    score_matching,
)

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from reference_posteriors import POSTERIORS  # noqa: E402
from score_targets import (  # noqa: E402
    DIM,
    batch_and_match,
    forward_divergence,
    normal,
    sinh_arcsinh,
)

SINH_ARCSINH = ((0.2, 1.1), (1.0, 1.1), (1.8, 1.1), (0.2, 0.9), (0.0, 1.7))
NAMES = ("mesquite-logmesquite", "eight_schools-eight_schools_noncentered")


class Sizes(NamedTuple):
    """How long everything runs."""

    seeds: int = 3
    num_warmup: int = 200
    num_samples: int = 100
    num_steps: int | None = None
    every: int = 1  # of the targets


def bowl(x, mean, precision):
    return 0.5 * (x - mean) @ precision @ (x - mean)


def targets():
    """`{name: (loss, mean, covariance)}`."""
    mean, covariance = normal()
    precision = np.linalg.inv(covariance)
    yield "Gaussian", (Loss.from_function(bowl, np.zeros(DIM), mean, precision), mean, covariance)
    for skew, tail in SINH_ARCSINH:
        fn, x = sinh_arcsinh(skew, tail)
        moments = x.mean(0), np.cov(x.T)
        yield f"sinh-arcsinh {skew}, {tail}", (Loss.from_function(fn, np.zeros(DIM)), *moments)
    for name in NAMES:
        posterior = POSTERIORS[name]
        loss = Loss.from_model(posterior.model, *posterior.args, **posterior.kwargs)
        summary = posterior.unconstrained
        yield name.partition("-")[0], (loss, summary.mean, summary.covariance)


def by_chains(seed, loss, sizes):
    """Both fits to draws of NUTS: `{label: (mean, covariance, gradients)}`."""
    mcmc = MCMC(
        NUTS(model),
        num_warmup=sizes.num_warmup,
        num_samples=sizes.num_samples,
        num_chains=4,
        chain_method="vectorized",
        progress_bar=False,
    )
    fields = ("z_grad", "num_steps")
    key_warmup, key_draws = random.split(random.key(seed))
    mcmc.warmup(key_warmup, RegularizedLoss(loss), extra_fields=fields, collect_warmup=True)
    spent = int(mcmc.get_extra_fields()["num_steps"].sum())
    mcmc.run(key_draws, RegularizedLoss(loss), extra_fields=fields)
    spent += int(mcmc.get_extra_fields()["num_steps"].sum())
    for label, fit in (("forward_kl, NUTS", forward_kl), ("score_matching, NUTS", score_matching)):
        gaussian = fit(mcmc).gaussian
        yield label, (gaussian.mean, gaussian.covariance, spent)


def fits(seed, loss, gradients, sizes):
    """All Gaussians: `{label: (mean, covariance, gradients)}`."""
    found, info = score_matching(loss, rng_key=random.key(seed), num_steps=sizes.num_steps)
    yield "score_matching", (found.mean, found.covariance, int(info.num_grad))
    steps = max(1, int(info.num_grad) // 32)
    plain = batch_and_match(seed, lambda x: np.asarray(gradients(x)), loss.x0, steps)
    yield "batch and match, plain", (*plain, 32 * steps)
    found, info = reverse_kl(random.key(seed), RegularizedLoss(loss), num_steps=sizes.num_steps)
    yield "reverse_kl", (found.mean, found.covariance, int(info.num_grad))
    yield from by_chains(seed, loss, sizes)


def negative(loss, x):
    return -loss.value(x)


def rows(sizes):
    for name, (loss, mean, covariance) in list(targets())[:: sizes.every]:
        gradients = jax.jit(jax.vmap(jax.grad(partial(negative, loss))))
        sd, seen = np.sqrt(np.diag(covariance)), {}
        for seed in range(sizes.seeds):
            for label, (m, c, spent) in fits(seed, loss, gradients, sizes):
                m, c = np.asarray(m, float), np.asarray(c, float)
                far = forward_divergence(m, c, mean, covariance)
                errors = np.max(np.abs(m - mean) / sd), np.max(np.abs(np.sqrt(np.diag(c)) / sd - 1))
                seen.setdefault(label, []).append((*errors, max(far, 0.0), spent))
        for label, found in seen.items():
            of_mean, of_sd, far, spent = map(statistics.median, zip(*found, strict=True))
            yield {
                "target": name,
                "fit": label,
                "mean": float(of_mean),
                "sd": float(of_sd),
                "forward KL": float(far),
                "gradients": int(spent),
            }


def main():
    args = harness.arguments(__doc__.splitlines()[0])
    sizes = (
        Sizes(seeds=1, num_warmup=20, num_samples=20, num_steps=3, every=8)
        if args.smoke
        else Sizes()
    )
    with jax.enable_x64(True):
        assert jnp.zeros(()).dtype == jnp.float64
        table = list(rows(sizes))
    title = "Dense Gaussians in three directions"
    harness.show(title, table)
    harness.save(args.out, {title: table})


if __name__ == "__main__":
    main()
