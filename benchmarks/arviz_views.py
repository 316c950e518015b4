# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""How long does a run take to become ArviZ's datasets?

100 steps, 4 chains of 200 draws, 100 parameters. The promise is one second for the first conversion of given
draws; without them `to_arviz` draws at the last reference and at ten steps, and its first call compiles that.
"""

import statistics

import arviz as az
import harness
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import random

from numpyro_regloss import Loss, TwoStep, fit, shift, to_arviz


def model(dim):
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    with numpyro.plate("row", dim - 1):
        numpyro.sample("cell", dist.Normal(0.0, scale))


def bowl(params):
    return 0.5 * jnp.sum(params["cell"] ** 2)


def table(options):
    dim, num_steps, num_chains, num_samples = (5, 6, 2, 20) if options.smoke else (100, 100, 4, 200)
    losses = {
        "model": Loss.from_model(model, dim),
        "function": Loss.from_function(bowl, {"cell": jnp.ones(dim)}),
    }
    rows = []
    for name, loss in list(losses.items())[: 1 if options.smoke else None]:
        engine = shift.HMC(num_warmup=50, num_samples=num_samples, num_chains=num_chains)
        optimizer = TwoStep(loss, 0.1, engine, fit.ForwardKL())
        result = optimizer.run(random.key(0), num_steps, progress_bar=False)
        draws = optimizer.draw(random.key(1), result.state)
        for what, given in (("given", draws), ("made anew, with those of ten steps", None)):

            def convert(given=given, optimizer=optimizer, result=result):
                to_arviz(result, optimizer, draws=given)

            first = harness.seconds(convert)
            later = [harness.seconds(convert) for _ in range(1 if options.smoke else 7)]
            rows.append({
                "loss": name,
                "draws": what,
                "first s": first,
                "later s": statistics.median(later),
            })
    return rows


def main():
    options = harness.arguments(__doc__)
    print(harness.environment(), "arviz", az.__version__)
    rows = table(options)
    harness.show("Conversion", rows)
    harness.save(options.out, {"Conversion": rows})


if __name__ == "__main__":
    main()
