# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Six posteriors of posteriordb: their Stan models as NumPyro models, and moments of their reference draws.

Arguments have the names of Stan's data. Arrays are NumPy's, in double precision, so that the same posterior
serves both precisions. Where the numbers come from, and under which licence, is in the data file.
"""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints

PATH = Path(__file__).parent / "data" / "reference_posteriors.json"


def flat(size):
    return dist.ImproperUniform(constraints.real_vector, (), (size,))


def linear_regression(X, y):
    # Stan's normal prior of a positive parameter is half normal up to a constant; Cauchy below, likewise.
    beta = numpyro.sample("beta", dist.Normal(0.0, 10.0).expand([X.shape[1]]).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfNormal(10.0))
    numpyro.sample("obs", dist.Normal(X @ beta, sigma), obs=y)


def autoregression(y, K):
    alpha = numpyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = numpyro.sample("beta", dist.Normal(0.0, 10.0).expand([K]).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    lags = jnp.stack([y[K - lag : len(y) - lag] for lag in range(1, K + 1)], axis=-1)
    numpyro.sample("obs", dist.Normal(alpha + lags @ beta, sigma), obs=y[K:])


def kid_scores(kid_score, mom_iq, mom_hs):
    beta = numpyro.sample("beta", flat(3))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    mean = beta[0] + beta[1] * mom_hs + beta[2] * mom_iq
    numpyro.sample("obs", dist.Normal(mean, sigma), obs=kid_score)


def mesquite_leaves(weight, diam1, diam2, canopy_height, total_height, density, group):
    beta = numpyro.sample("beta", flat(7))
    sigma = numpyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
    sizes = jnp.log(jnp.stack([diam1, diam2, canopy_height, total_height, density], axis=-1))
    mean = beta[0] + sizes @ beta[1:6] + beta[6] * group
    numpyro.sample("obs", dist.Normal(mean, sigma), obs=jnp.log(weight))


def party_identification(partyid7, real_ideo, race_adj, educ1, gender, income, age_discrete):
    beta = numpyro.sample("beta", flat(9))
    sigma = numpyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
    ages = [age_discrete == group for group in (2, 3, 4)]
    columns = jnp.stack([real_ideo, race_adj, *ages, educ1, gender, income], axis=-1)
    numpyro.sample("obs", dist.Normal(beta[0] + columns @ beta[1:], sigma), obs=partyid7)


def eight_schools(y, sigma):
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    theta_trans = numpyro.sample("theta_trans", dist.Normal().expand([len(y)]).to_event(1))
    theta = numpyro.deterministic("theta", mu + tau * theta_trans)
    numpyro.sample("obs", dist.Normal(theta, sigma), obs=y)


MODELS = {
    "sblrc-blr": linear_regression,
    "arK-arK": autoregression,
    "kidiq-kidscore_momhsiq": kid_scores,
    "mesquite-logmesquite": mesquite_leaves,
    "nes2000-nes": party_identification,
    "eight_schools-eight_schools_noncentered": eight_schools,
}


class Summary(NamedTuple):
    """Moments of the reference draws and the standard errors of the means and standard deviations."""

    names: tuple[str, ...]
    mean: np.ndarray
    covariance: np.ndarray
    mean_standard_error: np.ndarray
    sd_standard_error: np.ndarray

    @property
    def sd(self):
        return np.sqrt(np.diag(self.covariance))


class ReferencePosterior(NamedTuple):
    """A model, the arguments that make it the posterior, and what its parameters should be.

    Parameters are flat: sites sorted by name, row-major, indices from zero. Unconstrained, the positive one
    (sigma or tau) is its logarithm. `derived` has the deterministic sites, where there are any.
    """

    name: str
    model: Callable
    args: tuple
    kwargs: dict
    constrained: Summary
    unconstrained: Summary
    derived: Summary | None


def read_posteriors():
    entries = json.loads(PATH.read_text(encoding="utf-8"))["posteriors"]
    return {name: read_posterior(name, entry) for name, entry in entries.items()}


def read_posterior(name, entry):
    data, model = entry["data"], MODELS[name]
    arguments = {key: data[key] for key in inspect.signature(model).parameters}
    # Integers are sizes: by name and not as arrays, so that they stay static under jit.
    args = tuple(np.asarray(v) for v in arguments.values() if isinstance(v, list))
    kwargs = {key: v for key, v in arguments.items() if isinstance(v, int)}
    summaries = (
        read_summary(entry.get(key)) for key in ("constrained", "unconstrained", "derived")
    )
    return ReferencePosterior(name, model, args, kwargs, *summaries)


def read_summary(entry):
    if entry is None:
        return None
    arrays = (np.asarray(entry[field]) for field in Summary._fields[1:])
    return Summary(tuple(entry["names"]), *arrays)


POSTERIORS = read_posteriors()
