# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""How did a run go (`summary`), and how good is a Gaussian (`gaussian_fit`)?

A Gaussian is judged by its distance from q in both directions, and by where it differs.

The normalizing constant of q is estimated by bridge sampling between draws of q and of the Gaussian N. With
l = log(q / N) normalized, both

    KL(q || N) = E_q[l] = E_q[l + exp(-l) - 1],   KL(N || q) = -E_N[l] = E_N[-l + exp(l) - 1]

hold; the second form is positive and less noisy where N is near. It is taken where its standard error is the
smaller one and can be trusted: a k-hat of its weights below 0.4, and weights that average to one, which they do
not where draws of N miss a mode of q.

References: Meng & Wong (1996), "Simulating Ratios of Normalizing Constants via a Simple Identity"; Frühwirth-
Schnatter (2004), "Estimating Marginal Likelihoods for Mixture and Markov Switching Models Using Bridge Sampling
Techniques"; Yao, Vehtari, Simpson & Gelman (2018), "Yes, but Did It Work?: Evaluating Variational Inference".
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from numpyro_regloss._core.checks import check_count, check_key
from numpyro_regloss._core.html import as_html
from numpyro_regloss._core.pareto import MAX_KHAT, pareto_khat
from numpyro_regloss._core.settings import own_settings
from numpyro_regloss._core.stats import normalize_log_weight, weight_ess
from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.draws.agreement import chains_rhat, disagreement
from numpyro_regloss.draws.base import BatchMeans
from numpyro_regloss.draws.bridge import bridge
from numpyro_regloss.draws.control_variates import Chains, series_error
from numpyro_regloss.draws.moments import standardized
from numpyro_regloss.draws.samples import as_draws
from numpyro_regloss.gaussians.gaussian import AnyGaussian, check_gaussian
from numpyro_regloss.losses.regularized import RegularizedLoss
from numpyro_regloss.values.estimate import Estimate

__all__ = ["GaussianFit", "gaussian_fit"]

LEAST_REACHED = 0.95
# The largest k-hat of weights whose average and error are both reliable at a few hundred draws.
RELIABLE_KHAT = 0.4
# And a mean that is known to be zero may be off by so many of its errors: more is a tail that no draw has shown.
CENTERED = 2.0
# Deviations are findings when they exceed four standard errors and are of practical size: a fifth of a standard
# deviation, a factor of 1.15, a skewness of 0.5, an excess kurtosis of 1.
SIGMAS = 4.0
LEAST_SHIFT, LEAST_RATIO, LEAST_SKEWNESS, LEAST_KURTOSIS = 0.2, 1.15, 0.5, 1.0
# Nats: nearly every use of a Gaussian survives this.
SMALL_DIVERGENCE = 0.05
MOST_NAMES = 3


class GaussianFit(NamedTuple):
    """Distances and deviations of a Gaussian N from q.

    Attributes:
        forward_kl: KL(q || N) in nats, or None without a target.
        reverse_kl: KL(N || q) in nats, or None without a target.
        khat: Pareto shape of the weights q / N at draws of N, or None without a target: below 0.7 averages
            over N can be corrected by these weights, if they reach all of q.
        reached: average of the weights q / N: the share of q that draws of N reach, one where N covers q; or
            None without a target.
        mean_shift: mean of N less that of the draws, in standard deviations of the draws, `(dim,)`.
        mean_shift_error: standard error of it.
        sd_ratio: standard deviations of N over those of the draws, `(dim,)`.
        sd_ratio_error: standard error of it.
        skewness: of the draws' marginals, `(dim,)`.
        skewness_error: standard error of it.
        excess_kurtosis: of the draws' marginals, `(dim,)`.
        excess_kurtosis_error: standard error of it.
        names: of the coordinates.
        findings: one sentence each. With a target the first sentence is the verdict, and the others explain it.
    """

    forward_kl: Estimate | None
    reverse_kl: Estimate | None
    khat: Array | None
    reached: Estimate | None
    mean_shift: Array
    mean_shift_error: Array
    sd_ratio: Array
    sd_ratio_error: Array
    skewness: Array
    skewness_error: Array
    excess_kurtosis: Array
    excess_kurtosis_error: Array
    names: tuple[str, ...]
    findings: tuple[str, ...]

    def __str__(self) -> str:
        """The findings, one per line."""
        return "\n".join(self.findings)

    def _repr_html_(self) -> str:
        return as_html(str(self))


def gaussian_fit(
    draws: Any,
    gaussian: AnyGaussian,
    target: RegularizedLoss | None = None,
    *,
    rng_key: Key | None = None,
    num_samples: int = 4_000,
    log_weight: Any = None,
) -> GaussianFit:
    """Compares a Gaussian with draws of the density that it approximates.

    Args:
        draws: of q, as `forward_kl` takes them: arrays, dicts of sites, an `MCMC` that has run, `Draws`.
        gaussian: in the coordinates of the draws.
        target: the density q itself, for the divergences and k-hat: the `RegularizedLoss` that was drawn from
            (without a reference, the plain posterior).
        rng_key: a random key for draws of the Gaussian; needed with a target.
        num_samples: number of draws of the Gaussian. The loss is evaluated once for each of them, and once for
            each of `draws`.
        log_weight: of the draws.

    Returns:
        The numbers and one sentence per finding; prints as these.

    Raises:
        TypeError: if the Gaussian, the target or the draws are of another kind, or the key is missing.
        ValueError: if dimensions do not fit, or draws are not finite.

    Example:
        >>> from jax import random
        >>> from numpyro_regloss import Gaussian
        >>> x = random.normal(random.key(0), (4000, 1))
        >>> print(gaussian_fit(x, Gaussian(jnp.zeros(1), jnp.array(0.25))))
        sd: the Gaussian is narrower than the draws, by the factor in brackets, at 0 (0.25).
    """
    if not isinstance(target, RegularizedLoss | None):
        raise TypeError(
            f"gaussian_fit: expected target as a RegularizedLoss or None, got {type(target).__name__}."
        )
    if isinstance(draws, BatchMeans):
        raise TypeError(
            "gaussian_fit: expected draws, got means of batches of draws, which have another distribution; use "
            'shift.SGLD(keep="draws").'
        )
    cloud, names, _ = as_draws(
        draws,
        log_weight=log_weight,
        score=None,
        log_density=None,
        loss=None if target is None else target.loss,
        space="constrained",
        group_by_chain=False,
        what="gaussian_fit",
    )
    x, log_weight = cloud.x, cloud.log_weight
    gaussian = check_gaussian(gaussian, x.shape[-1], "gaussian_fit")
    names = names or (target.loss.flat_names if target else tuple(map(str, range(x.shape[-1]))))
    marginals = _marginals(x, log_weight, gaussian)
    divergences: Any = (None, None, None, None)
    if target is not None:
        if rng_key is None:
            raise TypeError(
                "gaussian_fit: expected rng_key with a target, to draw from the Gaussian, got None; pass "
                "jax.random.key(0)."
            )
        rng_key = check_key(rng_key, "gaussian_fit: rng_key")
        target.loss.check_captured()
        check_count(num_samples, "gaussian_fit: num_samples", 10)
        y = gaussian.sample(rng_key, (num_samples,))
        divergences = _divergences(x, log_weight, gaussian, target, y)
    fit = GaussianFit._make((*divergences, *marginals, names, ()))
    of_chains = None
    if cloud.block_size is None:
        with np.errstate(divide="ignore"):
            ess = np.asarray(fit.mean_shift_error) ** -2.0
        of_chains = disagreement(x, chains_rhat(cloud), ess, names)
    return fit._replace(findings=tuple(_findings(fit, of_chains)))


@jax.jit
@own_settings
def _marginals(x: Array, log_weight: Array, gaussian: AnyGaussian) -> tuple[Array, ...]:
    weight = normalize_log_weight(log_weight).reshape(-1)
    mean, sd, z = standardized(x.reshape(-1, x.shape[-1]), weight)
    chains = Chains(x.shape[0], weight, z, None, None)
    third, fourth = weight @ z**3, weight @ z**4
    # Influence functions of mean, standard deviation, skewness and kurtosis.
    influence = [
        z,
        0.5 * (z**2 - 1.0),
        z**3 - third - 3.0 * z - 1.5 * third * (z**2 - 1.0),
        z**4 - fourth - 4.0 * third * z - 2.0 * fourth * (z**2 - 1.0),
    ]
    errors = series_error(chains, jnp.concatenate(influence, -1)).reshape(4, -1)
    # A coordinate that does not vary has no shape.
    varies = jnp.any(z != 0, 0)
    fourth = jnp.where(varies, fourth, 3.0)
    ratio = jnp.sqrt(gaussian.variance) / sd
    return (
        (gaussian.mean - mean) / sd,
        errors[0],
        ratio,
        ratio * errors[1],
        third,
        errors[2],
        fourth - 3.0,
        errors[3],
    )


@jax.jit
@own_settings
def _divergences(
    x: Array, log_weight: Array, gaussian: AnyGaussian, target: RegularizedLoss, y: Array
) -> tuple[Estimate, Estimate, Array, Estimate]:
    weight = normalize_log_weight(log_weight).reshape(-1)
    flat = x.reshape(-1, x.shape[-1])
    chains = Chains(x.shape[0], weight, flat, None, None)
    independent = Chains(1, jnp.full(len(y), 1.0 / len(y)), y, None, None)

    def log_ratio(points: Array) -> Array:
        values = lax.map(target.log_density, points, batch_size=min(len(points), 256))
        ratio = values - gaussian.log_prob(points)
        # NaN is a failure of the loss, where q is taken to be zero, as the engines do.
        return jnp.where(jnp.isnan(ratio), -jnp.inf, ratio)

    at_q, at_gaussian = log_ratio(flat), log_ratio(y)
    size = weight_ess(log_weight)
    # What has no weight may be anything.
    at_q = jnp.where(weight > 0, at_q, at_q[jnp.argmax(weight)])
    log_normalizer, error, _ = bridge(at_q, at_gaussian, chains, independent, size)
    forward = _divergence(at_q - log_normalizer, chains, error)
    reverse = _divergence(log_normalizer - at_gaussian, independent, error)
    khat, count = pareto_khat(at_gaussian), jnp.asarray(float(len(y)))
    weights = jnp.exp(at_gaussian - log_normalizer)
    share = jnp.mean(weights)
    share_error = jnp.hypot(series_error(independent, weights[:, None])[0], share * error)
    return (
        Estimate(*forward, size, khat),
        Estimate(*reverse, count, khat),
        khat,
        Estimate(share, share_error, count, khat),
    )


def _divergence(log_ratio: Array, chains: Chains, normalizer_error: Array) -> tuple[Array, Array]:
    # Of draws from p, log(p / other): the mean, or the mean of l + exp(-l) - 1.
    excess = jnp.expm1(-log_ratio)
    # To first order a wrong normalizer does not move the second form.
    values = jnp.stack([log_ratio, log_ratio + excess, excess], -1)
    error, mean = series_error(chains, values), chains.weight @ values
    centered = jnp.abs(mean[2]) < CENTERED * jnp.hypot(error[2], normalizer_error)
    trusted = jnp.stack([jnp.asarray(True), centered & (pareto_khat(-log_ratio) < RELIABLE_KHAT)])
    rounding = jnp.finfo(log_ratio.dtype).eps * jnp.max(jnp.abs(log_ratio), initial=0.0)
    mean = mean[:2]
    error = jnp.hypot(jnp.stack([jnp.hypot(error[0], normalizer_error), error[1]]), rounding)
    usable = jnp.isfinite(mean) & jnp.isfinite(error) & trusted
    best = jnp.argmin(jnp.where(usable, error, jnp.inf))
    found = usable.any()
    return jnp.where(found, mean[best], mean[0]), jnp.where(found, error[best], jnp.inf)


def _findings(fit: GaussianFit, of_chains: str | None) -> list[str]:
    found = []
    forward, reverse, reached = fit.forward_kl, fit.reverse_kl, fit.reached
    if forward is not None and reverse is not None and reached is not None:
        share, error = float(reached.value), float(reached.error)
        missed = 1.0 - share > SIGMAS * error and share < LEAST_REACHED
        khat = float(reached.khat)
        named = {"KL(q || Gaussian)": forward, "KL(Gaussian || q)": reverse}
        found.append(_verdict(named, missed=missed, heavy=not khat < MAX_KHAT))
        found += [_divergence_text(name, estimate) for name, estimate in named.items()]
        if missed:
            found.append(f"mass: draws of the Gaussian reach only {reached.value:.0%} of q.")
        able = "can" if khat < MAX_KHAT and not missed else "cannot"
        found.append(
            f"k-hat = {khat:.2f}: averages over the Gaussian {able} be corrected by importance weights."
        )
    if of_chains is not None:
        found.append(f"draws: {of_chains}")
    found += [text.format(which) for text, which in _deviations(fit) if which]
    return found or ["No deviation from the Gaussian was found in the marginals."]


def _range(estimate: Estimate) -> tuple[float, float]:
    # Of a divergence, which is never negative, with 95 %; unknown where the estimate is so far below zero that its
    # error must be wrong.
    value, error = float(estimate.value), float(estimate.error)
    if not (np.isfinite(value) and np.isfinite(error)) or value < -SIGMAS * error:
        return 0.0, np.inf
    return max(value - 2.0 * error, 0.0), max(value, 0.0) + 2.0 * error


def _verdict(named: dict[str, Estimate], *, missed: bool, heavy: bool) -> str:
    ranges = {name: _range(estimate) for name, estimate in named.items()}
    far = [name for name, (least, _) in ranges.items() if least > SMALL_DIVERGENCE]
    if far:
        both = "in both directions" if len(far) == 2 else f"by {far[0]}"
        return f"The Gaussian is not near q, {both} (near is below {SMALL_DIVERGENCE} nats)."
    if not any(np.isfinite(estimate.error) for estimate in named.values()):
        return "The Gaussian is not near q, or the draws are not q's: they do not overlap."
    if missed:
        return "The Gaussian is not near q: it misses a part of it."
    if any(most >= SMALL_DIVERGENCE for _, most in ranges.values()):
        return (
            f"It cannot be told whether the Gaussian is near q, within {SMALL_DIVERGENCE} nats: errors are too "
            "large. Use more draws and a larger num_samples."
        )
    tails = ", but for its tails, which are too heavy for importance weights" if heavy else ""
    return f"The Gaussian is near q, within {SMALL_DIVERGENCE} nats in both directions{tails}."


def _divergence_text(name: str, estimate: Estimate) -> str:
    least, most = _range(estimate)
    if not np.isfinite(estimate.error):
        return f"{name} cannot be estimated: draws of q and of the Gaussian do not overlap."
    if not np.isfinite(most):
        return (
            f"{name} cannot be estimated: the result is {estimate.value:.2g}, but no divergence is negative; the "
            "draws are not q's, or too few for its tails."
        )
    if least == 0.0:
        return f"{name} cannot be distinguished from 0: it is at most {most:.2g} nats."
    return f"{name} = {estimate.value:.3g} ± {estimate.error:.1g} nats."


def _deviations(fit: GaussianFit) -> list[tuple[str, str]]:
    log_ratio, log_error = jnp.log(fit.sd_ratio), fit.sd_ratio_error / fit.sd_ratio
    kurtosis, kurtosis_error = fit.excess_kurtosis, fit.excess_kurtosis_error
    factor = float(np.log(LEAST_RATIO))
    return [
        (
            "mean: the Gaussian is off, by the standard deviations of the draws in brackets, at {}.",
            _where(fit, jnp.abs(fit.mean_shift), fit.mean_shift_error, LEAST_SHIFT, fit.mean_shift),
        ),
        (
            "sd: the Gaussian is narrower than the draws, by the factor in brackets, at {}.",
            _where(fit, -log_ratio, log_error, factor, fit.sd_ratio),
        ),
        (
            "sd: the Gaussian is wider than the draws, by the factor in brackets, at {}.",
            _where(fit, log_ratio, log_error, factor, fit.sd_ratio),
        ),
        (
            "skewness: mean and mode differ, and so do the two directions of KL, at {}.",
            _where(fit, jnp.abs(fit.skewness), fit.skewness_error, LEAST_SKEWNESS, fit.skewness),
        ),
        (
            "kurtosis: tails are heavier than the Gaussian's at {}.",
            _where(fit, kurtosis, kurtosis_error, LEAST_KURTOSIS, kurtosis),
        ),
        (
            "kurtosis: tails are light, or there are two modes, at {}; look at the draws.",
            _where(fit, -kurtosis, kurtosis_error, LEAST_KURTOSIS, kurtosis),
        ),
    ]


def _where(fit: GaussianFit, deviation: Array, error: Array, least: float, shown: Array) -> str:
    size, values = np.asarray(deviation), np.asarray(shown)
    which = np.flatnonzero((size > SIGMAS * np.asarray(error)) & (size > least))
    which = which[np.argsort(-size[which])]
    text = ", ".join(f"{fit.names[i]} ({values[i]:.2f})" for i in which[:MOST_NAMES])
    rest = len(which) - MOST_NAMES
    return text + (f" and {rest} more" if rest > 0 else "")
