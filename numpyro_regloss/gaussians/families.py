# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""The families of Gaussians: their names, and projections to them."""

from typing import Any

import jax.numpy as jnp
from jax import random

from numpyro_regloss._core.checks import check_choice, check_count
from numpyro_regloss._core.types import Key
from numpyro_regloss.gaussians.gaussian import AnyGaussian, Gaussian
from numpyro_regloss.gaussians.low_rank import LowRankGaussian

__all__ = ["FAMILIES", "nearest_in_forward_kl", "check_family", "nearest_in_reverse_kl"]

# Size of a column of factors at the start, in units of the diagonal: without factors their gradient is zero.
FIRST_FACTOR = 0.1
FAMILIES = ("reference", "isotropic", "diagonal", "dense", "low_rank")


def nearest_in_reverse_kl(
    gaussian: AnyGaussian, covariance: str, rank: int | None = None, rng_key: Key | None = None
) -> AnyGaussian:
    """The member of a family that is nearest in reverse KL, for low ranks one nearby.

    Args:
        gaussian: any Gaussian.
        covariance: the family.
        rank: number of factors.
        rng_key: for factors where `gaussian` has none.

    Returns:
        A Gaussian of the family's structure.

    Raises:
        TypeError: if a low rank lacks rank or key.
    """
    mean = gaussian.mean
    if covariance == "reference":
        return gaussian
    if covariance == "dense":
        if isinstance(gaussian, LowRankGaussian):
            return Gaussian(mean, jnp.linalg.cholesky(gaussian.covariance))
        if gaussian.structure == "dense":
            return Gaussian(mean, gaussian.scale)
        return Gaussian(mean, jnp.diag(jnp.sqrt(gaussian.variance)))
    precision = gaussian.precision_diagonal
    if covariance == "isotropic":
        return Gaussian(mean, jnp.sqrt(1.0 / jnp.mean(precision)))
    if covariance == "diagonal":
        return Gaussian(mean, jnp.sqrt(1.0 / precision))
    if isinstance(gaussian, LowRankGaussian) and gaussian.rank == rank:
        return gaussian
    if rank is None or rng_key is None:
        raise TypeError(
            "nearest_in_reverse_kl: expected a rank and a random key for a low rank, got None."
        )
    noise = random.normal(rng_key, (mean.size, rank), mean.dtype)
    columns = FIRST_FACTOR * noise / jnp.sqrt(precision)[:, None]
    return LowRankGaussian(mean, 1.0 / precision, columns)


def nearest_in_forward_kl(
    gaussian: AnyGaussian, covariance: str | None, rank: int | None
) -> AnyGaussian:
    """The Gaussian of another family with the least KL(gaussian || other): its moments are matched.

    Args:
        gaussian: the Gaussian.
        covariance: the family, or None for that of the Gaussian.
        rank: number of factors of the low-rank family.

    Returns:
        The Gaussian of the family.

    Raises:
        ValueError: if the Gaussian would have to be approximated by factors.
    """
    if covariance is None or (covariance == gaussian.structure and covariance != "low_rank"):
        return gaussian
    if covariance == "low_rank":
        if isinstance(gaussian, LowRankGaussian) and gaussian.rank == rank:
            return gaussian
        found = (
            f"of rank {gaussian.rank}"
            if isinstance(gaussian, LowRankGaussian)
            else gaussian.structure
        )
        raise ValueError(
            f'from_guide: expected a guide of low rank {rank} for covariance="low_rank", got one that is exactly '
            f'{found}; leave covariance out to keep its structure, or use covariance="dense".'
        )
    if covariance == "dense":
        return Gaussian(gaussian.mean, jnp.linalg.cholesky(gaussian.covariance))
    variance = gaussian.variance
    if covariance == "isotropic":
        variance = jnp.mean(variance, -1)
    return Gaussian(gaussian.mean, jnp.sqrt(variance))


def check_family(covariance: Any, rank: Any, what: str) -> None:
    """Refuses unknown families of covariances, and a rank that is missing or that nothing uses.

    Args:
        covariance: one of `FAMILIES`.
        rank: number of factors for `"low_rank"`, else None.
        what: begins the error message.

    Raises:
        ValueError: if the family is unknown, or rank and family do not go together.
    """
    check_choice(covariance, f"{what}: covariance", FAMILIES)
    if covariance == "low_rank":
        if rank is None:
            raise ValueError(
                f'{what}: expected rank, the number of factors, with covariance="low_rank", got None; '
                "try rank=5."
            )
        check_count(rank, f"{what}: rank")
    elif rank is not None:
        raise ValueError(
            f'{what}: expected rank only with covariance="low_rank", got rank={rank!r} with '
            f"{covariance!r}."
        )
