# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""The mean of the weights of one round, E exp(-loss / T) over the reference, with its standard error.

Under the law p of the draws, the density of any Gaussian over p has the mean one. That of the Gaussian which is
believed to be q is a control variate of the weights: where q is that Gaussian, it takes away all of their
variance. p has draws from a wider Gaussian, so the control is bounded, and falls off as the weights do. Products
with powers of the noise would be larger in the tails than anywhere else, and hang on draws that are seldom there.

References: Owen & Zhou (2000), "Safe and Effective Importance Sampling"; MacKinnon & White (1985), "Some
Heteroskedasticity-Consistent Covariance Matrix Estimators" (their jackknife, HC3).
"""

import jax.numpy as jnp

from numpyro_regloss._core.types import Array

__all__ = ["mean_weight"]

# Of one minus the leverage, against division by zero.
LEAST_FREE = 0.05


def mean_weight(weight: Array, control: Array) -> tuple[Array, Array]:
    """Mean over the reference and its standard error.

    Args:
        weight: of antithetic pairs, one after the other, `(draw,)`.
        control: a function of the draws whose mean is zero, `(draw,)`.

    Returns:
        Two scalars.
    """
    pairs = jnp.mean(weight.reshape(-1, 2), -1)
    known = jnp.mean(control.reshape(-1, 2), -1)
    # Over all parts of the mixture: of a part of few pairs hardly any may lie where q is, and what they have in
    # common would be no part of the error.
    x, y = known - jnp.mean(known), pairs - jnp.mean(pairs)
    second = jnp.sum(x**2) + jnp.finfo(x.dtype).tiny
    slope = jnp.sum(x * y) / second
    mean = jnp.mean(pairs) - slope * jnp.mean(known)
    # A far pair bends the regression towards itself: residuals as they are without each of them.
    leverage = 1.0 / len(pairs) + x**2 / second
    rest = (y - slope * x) / jnp.maximum(1.0 - leverage, LEAST_FREE)
    return mean, jnp.sqrt(jnp.sum(rest**2)) / len(pairs)
