# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""Bridge sampling: the normalizing constant of q from draws of q and of a normalized density p.

    Z = E_p[h q] / E_q[h p],   h = 1 / (s_q q / Z + s_p p)

with s_q and s_p the shares of effective draws, iterated in Z. Terms of both averages are bounded, so that one
tail thinner than the other does no harm; what does is draws that never meet.

References: Meng & Wong (1996), "Simulating Ratios of Normalizing Constants via a Simple Identity"; Frühwirth-
Schnatter (2004), "Estimating Marginal Likelihoods for Mixture and Markov Switching Models Using Bridge Sampling
Techniques".
"""

import jax.numpy as jnp
from jax import lax

from numpyro_regloss._core.types import Array
from numpyro_regloss.draws.control_variates import Chains, series_error

__all__ = ["bridge"]

MAX_ITERATIONS = 500
# Draws that must carry the bridge on either side.
LEAST_OVERLAP = 30.0


def bridge(
    at_q: Array, at_p: Array, chains: Chains, independent: Chains, size: Array
) -> tuple[Array, Array, Array]:
    """The optimal bridge of Meng & Wong.

    Args:
        at_q: log q - log p at draws of q, `(draw,)`, q not normalized.
        at_p: the same at draws of p, `(draw,)`.
        chains: those of the draws of q, with their weights.
        independent: the draws of p.
        size: effective number of draws of q.

    Returns:
        The log normalizer of q, its standard error, and the number of draws that carry the bridge on its weaker
        side. The error counts the autocorrelation of draws; it is infinite where a handful of them is all that
        the two sides have in common.
    """
    share = size / (size + at_p.size)
    log_shares = jnp.log(share), jnp.log1p(-share)

    def parts(log_z: Array) -> tuple[Array, Array]:
        a, b = at_q - log_z, at_p - log_z
        top = jnp.exp(b - jnp.logaddexp(log_shares[0] + b, log_shares[1]))
        bottom = jnp.exp(-jnp.logaddexp(log_shares[0] + a, log_shares[1]))
        return top, bottom

    # To a digit more than rounding, and well below any Monte Carlo error.
    tolerance = 10.0 * jnp.finfo(at_q.dtype).eps

    def unfinished(carry: tuple[Array, Array, Array]) -> Array:
        log_z, change, iteration = carry
        far = jnp.abs(change) > tolerance * (1.0 + jnp.abs(log_z))
        return far & (iteration < MAX_ITERATIONS)

    def iterate(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        log_z, _, iteration = carry
        top, bottom = parts(log_z)
        change = jnp.log(jnp.mean(top)) - jnp.log(chains.weight @ bottom)
        return log_z + change, change, iteration + 1

    start = jnp.median(at_q)
    log_z, change, _ = lax.while_loop(unfinished, iterate, (start, start + jnp.inf, jnp.asarray(0)))
    top, bottom = parts(log_z)
    pairs = ((independent, top), (chains, bottom))
    relative = [series_error(which, v[:, None])[0] / (which.weight @ v) for which, v in pairs]
    overlap = jnp.min(jnp.stack([jnp.sum(v) ** 2 / jnp.sum(v**2) for _, v in pairs]))
    error = jnp.hypot(jnp.hypot(*relative), change)
    trusted = (overlap > LEAST_OVERLAP) & jnp.isfinite(error)
    return log_z, jnp.where(trusted, error, jnp.inf), overlap
