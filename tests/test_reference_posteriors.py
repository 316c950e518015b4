# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""The reference posteriors: ports against a transcription of the Stan files, draws against exact moments."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SIGMAS
from reference_posteriors import PATH, POSTERIORS
from scipy import stats
from scipy.special import softmax

from numpyro_regloss import Loss

DATA = {
    name: {key: np.asarray(value) for key, value in entry["data"].items()}
    for name, entry in json.loads(PATH.read_text(encoding="utf-8"))["posteriors"].items()
}
# The logarithm of the scale runs over this many standard deviations either way: that of tau in eight schools
# has a tail as slow as exp(x). The trapezoidal rule is then as good as exact.
WIDTH, NODES = 14.0, 401
DRAWS = 10_000


@pytest.fixture(autouse=True, scope="module")
def forget_single_precision():
    """JAX keeps an array of NumPy that a program has taken in, and hands it out in that precision later."""
    jax.clear_caches()


def stan_blr(d, x):
    beta, sigma = x[:5], np.exp(x[5])
    target = stats.norm.logpdf(beta, 0, 10).sum() + stats.norm.logpdf(sigma, 0, 10)
    return target + stats.norm.logpdf(d["y"], d["X"] @ beta, sigma).sum() + x[5]


def stan_ark(d, x):
    alpha, beta, sigma = x[0], x[1:6], np.exp(x[6])
    target = stats.norm.logpdf(x[:6], 0, 10).sum() + stats.cauchy.logpdf(sigma, 0, 2.5)
    # Stan's loops with Stan's indices, which count from one.
    for t in range(d["K"] + 1, len(d["y"]) + 1):
        mu = alpha
        for k in range(1, d["K"] + 1):
            mu += beta[k - 1] * d["y"][t - k - 1]
        target += stats.norm.logpdf(d["y"][t - 1], mu, sigma)
    return target + x[6]


def stan_kidscore(d, x):
    b, sigma = x[:3], np.exp(x[3])
    mean = b[0] + b[1] * d["mom_hs"] + b[2] * d["mom_iq"]
    target = stats.cauchy.logpdf(sigma, 0, 2.5)
    return target + stats.norm.logpdf(d["kid_score"], mean, sigma).sum() + x[3]


def stan_logmesquite(d, x):
    b, sigma = x[:7], np.exp(x[7])
    mean = b[0] + b[1] * np.log(d["diam1"]) + b[2] * np.log(d["diam2"])
    mean += b[3] * np.log(d["canopy_height"]) + b[4] * np.log(d["total_height"])
    mean += b[5] * np.log(d["density"]) + b[6] * d["group"]
    return stats.norm.logpdf(np.log(d["weight"]), mean, sigma).sum() + x[7]


def stan_nes(d, x):
    b, sigma = x[:9], np.exp(x[9])
    age30_44, age45_64, age65up = (1.0 * (d["age_discrete"] == code) for code in (2, 3, 4))
    mean = b[0] + b[1] * d["real_ideo"] + b[2] * d["race_adj"]
    mean += b[3] * age30_44 + b[4] * age45_64 + b[5] * age65up
    mean += b[6] * d["educ1"] + b[7] * d["gender"] + b[8] * d["income"]
    return stats.norm.logpdf(d["partyid7"], mean, sigma).sum() + x[9]


def stan_eight_schools(d, x):
    mu, tau, theta_trans = x[0], np.exp(x[1]), x[2:]
    theta = theta_trans * tau + mu
    target = (
        stats.norm.logpdf(theta_trans).sum() + stats.norm.logpdf(d["y"], theta, d["sigma"]).sum()
    )
    return target + stats.norm.logpdf(mu, 0, 5) + stats.cauchy.logpdf(tau, 0, 5) + x[1]


STAN = {
    "sblrc-blr": stan_blr,
    "arK-arK": stan_ark,
    "kidiq-kidscore_momhsiq": stan_kidscore,
    "mesquite-logmesquite": stan_logmesquite,
    "nes2000-nes": stan_nes,
    "eight_schools-eight_schools_noncentered": stan_eight_schools,
}


def check_density(posterior, tolerance):
    loss = Loss.from_model(posterior.model, *posterior.args, **posterior.kwargs)
    mean, sd = posterior.unconstrained.mean, posterior.unconstrained.sd
    steps = np.random.default_rng(3).normal(size=(12, len(mean)))
    points = np.concatenate([mean + sd * steps[:6], mean + 5 * sd * steps[6:10], 0.5 * steps[10:]])
    port = -np.asarray(jax.jit(jax.vmap(loss.value))(jnp.asarray(points)), float)
    stan = np.array([STAN[posterior.name](DATA[posterior.name], x) for x in points])
    constant = port[0] - stan[0]
    # log(2) where a half distribution stands for a whole one, zero elsewhere.
    assert abs(constant) < 1.0
    np.testing.assert_allclose(port - constant, stan, rtol=tolerance)


def exact_moments(posterior):
    """Means and covariances by quadrature over the scale: given it, all six are Gaussian in the rest."""
    loss = Loss.from_model(posterior.model, *posterior.args, **posterior.kwargs)
    names, mean, sd = (getattr(posterior.unconstrained, key) for key in ("names", "mean", "sd"))
    scale = next(i for i, name in enumerate(names) if name in {"sigma", "tau"})
    start = np.delete(mean, scale)

    @jax.jit
    @jax.vmap
    def expand(value):
        def energy(rest):
            return loss.value(jnp.insert(rest, scale, value))

        return energy(start), jax.grad(energy)(start), jax.hessian(energy)(start)

    grid = mean[scale] + sd[scale] * np.linspace(-WIDTH, WIDTH, NODES)
    energies, slopes, hessians = map(np.asarray, expand(jnp.asarray(grid)))
    covariances = np.linalg.inv(hessians)
    moves = -np.einsum("nij,nj->ni", covariances, slopes)
    centers = start + moves
    # The integral of the Gaussian with this energy, slope and curvature at the start.
    log_weights = -energies - 0.5 * (slopes * moves).sum(-1) - 0.5 * np.linalg.slogdet(hessians)[1]
    weights = softmax(log_weights)
    assert max(weights[0], weights[-1]) < 1e-7  # the grid is wide enough
    within = np.insert(
        np.insert(np.tensordot(weights, covariances, 1), scale, 0.0, 0), scale, 0.0, 1
    )
    for values in (np.exp(grid), grid):
        points = np.insert(centers, scale, values, 1)
        yield weights @ points, within + np.cov(points.T, aweights=weights, ddof=0)


@pytest.mark.parametrize("posterior", POSTERIORS.values(), ids=POSTERIORS)
class TestPosterior:
    def test_names_follow_the_flat_vector(self, posterior):
        loss = Loss.from_model(posterior.model, *posterior.args, **posterior.kwargs)
        for summary in (posterior.constrained, posterior.unconstrained):
            assert len(summary.names) == loss.dim
            assert tuple(dict.fromkeys(n.split("[")[0] for n in summary.names)) == loss.names

    def test_density_in_single_precision(self, posterior):
        check_density(posterior, 1e-4)

    def test_density_in_double_precision(self, posterior, x64):
        check_density(posterior, 1e-10)

    def test_draws_against_exact_moments(self, posterior, x64):
        summaries = posterior.constrained, posterior.unconstrained
        for summary, (mean, covariance) in zip(summaries, exact_moments(posterior), strict=True):
            sd = np.sqrt(np.diag(covariance))
            assert np.all(np.abs(summary.mean - mean) < SIGMAS * summary.mean_standard_error)
            assert np.all(np.abs(summary.sd - sd) < SIGMAS * summary.sd_standard_error)
            drawn = summary.covariance / np.outer(summary.sd, summary.sd)
            error = np.abs(drawn - covariance / np.outer(sd, sd))
            # No standard error of a correlation of Gaussians exceeds this.
            assert error.max() < SIGMAS / np.sqrt(DRAWS)
