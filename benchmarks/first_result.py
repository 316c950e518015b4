# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""How long until a first result, with compilation?

Eight schools in fresh processes, one after another in turn: NumPyro's MCMC of 500 + 500 iterations in four
vectorized chains, 40 steps of `schemes.local_entropy` with default settings, and the same with JAX's persistent
compilation cache filled by an earlier process. Imports are not counted. The promise is that the second takes no
longer than the first.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import harness

ROOT = str(Path(__file__).parent.parent)
MODEL = """
import time
import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import random
from numpyro.infer import MCMC, NUTS
from numpyro_regloss import Loss, schemes

def model(sigma, y):
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("school", len(sigma)):
        z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(mu + tau * z, sigma), obs=y)

sigma = jnp.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
y = jnp.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
start = time.perf_counter()
"""
MCMC = """
mcmc = MCMC(
    NUTS(model), num_warmup={n}, num_samples={n}, num_chains=4, chain_method="vectorized", progress_bar=False
)
mcmc.run(random.key(0), sigma, y)
jax.block_until_ready(mcmc.get_samples())
print(time.perf_counter() - start)
"""
STEPS = """
optimizer = schemes.local_entropy(Loss.from_model(model, sigma, y), tau=1.0)
optimizer.run(random.key(0), {n}, progress_bar=False)
print(time.perf_counter() - start)
"""


def seconds(code, cache):
    environment = {**os.environ, "PYTHONPATH": ROOT}
    if cache is not None:
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    return float(done.stdout.splitlines()[-1])


def table(options):
    iterations, steps, repeats = (5, 2, 2) if options.smoke else (500, 40, 5)
    mcmc, ours = MODEL + MCMC.format(n=iterations), MODEL + STEPS.format(n=steps)
    with tempfile.TemporaryDirectory() as cache:
        seconds(ours, cache)
        calls = {
            "MCMC of NumPyro": (mcmc, None),
            "40 steps": (ours, None),
            "40 steps, with the cache": (ours, cache),
        }
        times = {name: [] for name in calls}
        for _ in range(repeats):
            for name, call in calls.items():
                times[name].append(seconds(*call))
    base = times["MCMC of NumPyro"]
    return [
        {
            "what": name,
            "median s": statistics.median(taken),
            "ratio": harness.ratio(taken, base),
            "25-75 %": harness.spread(taken, base),
        }
        for name, taken in times.items()
    ]


def main():
    options = harness.arguments(__doc__)
    print(harness.environment())
    rows = table(options)
    harness.show("First result", rows)
    harness.save(options.out, {"First result": rows})


if __name__ == "__main__":
    main()
