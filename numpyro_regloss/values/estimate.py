# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""A number with its error, and the way in which it was found.

The way is the type: it survives `jit`, `vmap` and stacking, and four fields remain four.
"""

from typing import NamedTuple

from numpyro_regloss._core.types import Array

__all__ = [
    "BridgeEstimate",
    "Estimate",
    "GaussianEstimate",
    "ImportanceEstimate",
    "SMCEstimate",
]


class Estimate(NamedTuple):
    """A number with its error.

    Attributes:
        value: the estimate, in the units of the loss.
        error: its standard error, in the same units, with an allowance for rare large terms that were not drawn.
            Infinite if the value is not finite, and if k-hat is above 0.7.
        ess: effective sample size of the average.
        khat: Pareto shape of the weights, or of the losses for an average; above 0.7 do not trust value or error.
            It is computed from the share of the largest term if there are fewer than a hundred terms, if ties
            leave no tail, or if many terms carry the variance. It is -inf if all terms are equal, or if there are
            no weights.
        method: the method that found it: `"average"`, or one of the methods of `values.local_entropy`. It belongs
            to the class, and is no field.
    """

    value: Array
    error: Array
    ess: Array
    khat: Array

    method = "average"


class ImportanceEstimate(Estimate):
    """By importance sampling from the reference."""

    __slots__ = ()
    method = "importance"


class GaussianEstimate(Estimate):
    """By importance sampling from a fitted Gaussian, mixed with the reference."""

    __slots__ = ()
    method = "gaussian"


class BridgeEstimate(Estimate):
    """By bridge sampling between Markov chains and a fitted Gaussian."""

    __slots__ = ()
    method = "bridge"


class SMCEstimate(Estimate):
    """By sequential Monte Carlo from the reference."""

    __slots__ = ()
    method = "smc"
