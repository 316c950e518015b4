# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""The first example of README beside NumPyro's own tools, as a table and a figure: `python docs/wide_mode.py`."""

import re
from pathlib import Path

import numpy as np
import optax
from jax import random
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta

HERE = Path(__file__).parent


def example():
    """The names of README's first example, which prints its report."""
    code = re.search(r"```python\n(.*?)```", (HERE.parent / "README.md").read_text(), re.DOTALL)[1]
    names = {}
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102
    return names


def plain_tools(names):
    """The mode, and draws of the posterior, by site."""
    model, data = names["eight_schools"], (names["sigma"], names["y"])
    guide = AutoDelta(model)
    svi = SVI(model, guide, optax.adam(0.01), Trace_ELBO())
    found = svi.run(random.key(0), 3_000, *data, progress_bar=False)
    mcmc = MCMC(
        NUTS(model), num_warmup=500, num_samples=1_000, num_chains=4,
        chain_method="vectorized", progress_bar=False,
    )  # fmt: skip
    mcmc.run(random.key(0), *data)
    return guide.median(found.params), mcmc.get_samples()


def effects(sites):
    """Of the schools, from standardized ones."""
    return np.asarray(sites["mu"])[..., None] + np.asarray(sites["tau"])[..., None] * np.asarray(
        sites["z"]
    )


def draw(centre, mode, draws, path):
    """`tau` on the left, the effects on the right."""
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.0), layout="constrained")
    bins = np.geomspace(0.05, 50, 40)
    left.hist(np.asarray(draws["tau"]), bins, color="0.75")
    for sites, color in ((mode, "C3"), (centre, "C0")):
        left.axvline(float(sites["tau"]), color=color)
        right.plot(range(8), effects(sites), "o", color=color)
    left.set(xscale="log", xlabel="tau", ylabel="draws of NUTS")
    low, middle, high = np.quantile(effects(draws), [0.25, 0.5, 0.75], axis=0)
    place, error = np.arange(8) + 0.2, [middle - low, high - middle]
    right.errorbar(place, middle, error, fmt="s", color="0.5", markersize=4)
    right.set(xlabel="school", ylabel="effect", xticks=range(8), xticklabels="ABCDEFGH")
    labels = "mode", "centre", "NUTS, median and quartiles"
    handles = [*right.lines[:2], right.containers[0]]
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    names = example()
    mode, draws = plain_tools(names)
    centre = names["result"].params
    for name, sites in (("mode", mode), ("mean of NUTS", draws), ("centre", centre)):
        tau, schools = np.mean(sites["tau"]), effects(sites).reshape(-1, 8).mean(0)
        print(f"{name:12}  tau {tau:.2f}  effects {schools.min():.1f} to {schools.max():.1f}")
    draw(centre, mode, draws, HERE / "wide_mode.png")
