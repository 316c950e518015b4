# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""How long does a run take to become ArviZ's datasets?

100 steps, 4 chains of 200 draws, 100 parameters. The promise is one second for the first conversion of given
draws; without them `to_arviz` draws at the last reference and at ten steps, and its first call compiles that.

A model of 300 scalar sites, written as a loop: the first conversion of given draws should take less than two
seconds, and three steps of importance sampling about what NumPyro's own potential of the model takes, compilation
included.
"""

import statistics
from functools import partial

import arviz as az
import harness
import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import random
from numpyro.infer.util import potential_energy

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


def loop(y):
    for i in range(len(y)):
        z = numpyro.sample(f"z{i}", (dist.Normal(0, 1), dist.HalfNormal(1))[i % 2])
        numpyro.sample(f"y{i}", dist.Normal(z, 1.0), obs=y[i])


def many_sites(options):
    y = jnp.zeros(10 if options.smoke else 300)
    loss = Loss.from_model(loop, y)
    optimizer = TwoStep(loss, 0.1, shift.Importance(1000), fit.ForwardKL())
    names = loss.names
    points = {name: jnp.zeros(1000) for name in names}
    potential = jax.jit(jax.vmap(lambda point: potential_energy(loop, (y,), {}, point)))
    result = None

    def run():
        nonlocal result
        result = optimizer.run(random.key(0), 3, progress_bar=False)

    seconds = {
        "potential of NumPyro": harness.seconds(lambda: jax.block_until_ready(potential(points))),
        "three steps": harness.seconds(run),
    }
    draws = optimizer.draw(random.key(1), result.state)
    for name, more in (("conversion", False), ("conversion with log-likelihoods", True)):
        convert = partial(to_arviz, result, optimizer, draws=draws, log_likelihood=more)
        seconds[name] = harness.seconds(convert)
        seconds[name + ", later"] = harness.seconds(convert)
    return [{"what": name, "s": value} for name, value in seconds.items()]


def main():
    options = harness.arguments(__doc__)
    print(harness.environment(), "arviz", az.__version__)
    rows = table(options)
    harness.show("Conversion", rows)
    many = many_sites(options)
    harness.show("Many sites", many)
    harness.save(options.out, {"Conversion": rows, "Many sites": many})


if __name__ == "__main__":
    main()
