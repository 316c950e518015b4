# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""How long do runs of NumPyro's `MCMC` on four devices take, from one data set to the next?

Three runs of NUTS with new data of the same shapes, and one of a new `MCMC` of the same model, by NumPyro's own
methods and by `sharded`, each in a process of its own with four simulated devices. All have
`jit_model_args=True`. NumPyro's "parallel" has a chain per device; the others are shown with as many chains, and
with four times as many. `compiled` counts the compilations of the last run.
"""

import json
import os
import sys
import time

import harness
import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import random
from numpyro.infer import MCMC, NUTS

from numpyro_regloss import sharded

DEVICES = 4


def regression(x, y):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
    sd = numpyro.sample("sd", dist.HalfNormal(1.0))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(x @ w, sd), obs=y)


def measure(method, num_chains, num_samples, num_rows):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(num_rows, 5)).astype(np.float32)

    def make():
        devices = jax.make_mesh((DEVICES,), ("draws",))
        return MCMC(
            NUTS(regression),
            num_warmup=num_samples,
            num_samples=num_samples,
            num_chains=num_chains,
            chain_method=sharded(devices) if method == "sharded" else method,
            jit_model_args=True,
            progress_bar=False,
        )

    seconds, mcmc = [], make()
    for run in range(4):
        mcmc = make() if run == 3 else mcmc
        y = (x.sum(-1) + 0.3 * rng.normal(size=num_rows)).astype(np.float32)
        start = time.perf_counter()
        with harness.count_compiles() as compiled:
            mcmc.run(random.key(run), x, y)
            draws = jax.block_until_ready(mcmc.get_samples())
        seconds.append(time.perf_counter() - start)
    names = ("first run, s", "second", "third", "another MCMC")
    mean = {"mean of w": float(np.mean(jax.device_get(draws["w"])))}
    row = {"method": method, "chains": num_chains} | dict(zip(names, seconds, strict=True))
    return row | {"compiled": len(compiled)} | mean


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(*json.loads(sys.argv[2]))))
        sys.exit()
    options = harness.arguments(__doc__)
    sizes = (20, 50) if options.smoke else (500, 1_000)
    os.environ["JAX_NUM_CPU_DEVICES"] = str(DEVICES)
    cases = [
        ("parallel", DEVICES),
        ("vectorized", DEVICES),
        ("sharded", DEVICES),
        ("vectorized", 4 * DEVICES),
        ("sharded", 4 * DEVICES),
    ]
    rows = [
        harness.in_fresh_process(__file__, "--one", json.dumps([*case, *sizes])) for case in cases
    ]
    tables = {f"NUTS, 2 x {sizes[0]} steps, {sizes[1]} rows": rows}
    for title, rows in tables.items():
        harness.show(title, rows)
    harness.save(options.out, tables)
