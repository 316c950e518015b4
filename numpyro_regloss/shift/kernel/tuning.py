# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Step size and mass matrix of kernels that adapt as HMC does, carried from one target to the next.

NumPyro estimates a mass matrix from the variance of one chain's own draws. After a step there are draws and scores
of all chains. They say more of it, and hold for the next target as well, in the units of its reference.
With another matrix goes another step size, which the next burn-in finds by dual averaging.
"""

from typing import Any

import jax
import jax.numpy as jnp
from numpyro.infer.hmc_util import (
    HMCAdaptState,
    build_adaptation_schedule,
    dual_averaging,
    welford_covariance,
)

from numpyro_regloss._core.coordinates import Coordinates
from numpyro_regloss._core.foreign import attribute
from numpyro_regloss._core.linalg import after, inverse_of_lower
from numpyro_regloss._core.pytree import all_finite, strip_weak_types
from numpyro_regloss._core.types import Array
from numpyro_regloss.shift.metric import Metric

__all__ = ["LEAST_BURN_IN", "moved", "renewed", "resumed", "tuning_of"]

MATRICES = ("inverse_mass_matrix", "mass_matrix_sqrt", "mass_matrix_sqrt_inv")
# Iterations that dual averaging takes to find a step size.
LEAST_BURN_IN = 20


def tuning_of(state: Any) -> dict[str, Any] | None:
    """What a kernel is tuned by, in units of the reference.

    Args:
        state: of the kernel.

    Returns:
        Step size and matrices by name, or None if it does not adapt as HMC does.
    """
    adapt_state = attribute(state, "adapt_state", None)
    if not isinstance(adapt_state, HMCAdaptState):
        return None
    adapted = adapt_state._asdict()
    return strip_weak_types({name: adapted[name] for name in ("step_size", *MATRICES)})


def resumed(state: Any, tuning: dict[str, Any], num_warmup: int, burn_in: int) -> Any:
    """A kernel's state before the last iterations of a warm-up, in which only the step size adapts.

    Args:
        state: as the kernel begins.
        tuning: from an earlier step.
        num_warmup: iterations of its warm-up.
        burn_in: how many of them are left; with 0 nothing adapts.

    Returns:
        The state.
    """
    start, _ = dual_averaging()
    adapt_state = state.adapt_state._replace(
        ss_state=start(jnp.log(tuning["step_size"])),
        window_idx=jnp.full_like(
            state.adapt_state.window_idx, len(build_adaptation_schedule(num_warmup)) - 1
        ),
        **tuning,
    )
    return state._replace(i=jnp.full_like(state.i, num_warmup - burn_in), adapt_state=adapt_state)


def renewed(tuning: dict[str, Any], noise: Array, gradient: Array) -> dict[str, Any]:
    """The mass matrix that the draws and scores of all chains tell of, in the form that the kernel has.

    Args:
        tuning: of all chains, with a leading axis.
        noise: draws in units of the reference, `(chain, draw, dim)`.
        gradient: of the potential there.

    Returns:
        The tuning of all chains; as it was where the draws tell of no matrix.
    """
    dim = noise.shape[-1]
    z, score = noise.reshape(-1, dim), -gradient.reshape(-1, dim)
    (matrix,), structure = _matrix_of(tuning)
    dense = matrix[0].ndim > 1
    found, told = Metric("scores", dense).found(z, score, jnp.ones(len(z), bool))
    return _with(tuning, _matrices(structure, _inverse_mass(found)), told)


def moved(tuning: dict[str, Any], before: Array, now: Array) -> dict[str, Any]:
    """The mass matrices in units of another reference.

    Args:
        tuning: of all chains, with a leading axis.
        before: `unit_of` the target of the tuning.
        now: the same of the next target.

    Returns:
        The tuning of all chains; as it was where units are the same.
    """
    (matrix,), structure = _matrix_of(tuning)

    def one(inverse: Array) -> dict[str, Any]:
        dense = inverse.ndim > 1
        if dense:
            lower = jnp.linalg.cholesky(inverse)
            unit = jnp.ones(len(inverse), inverse.dtype)
            old = Coordinates(unit, None, lower, inverse_of_lower(after(lower[0, 0], lower)))
        else:
            old = Coordinates(jnp.sqrt(inverse), None, None, None)
        new = Metric("scores", dense).moved(old, before, now)
        return _matrices(structure, _inverse_mass(new))

    return _with(tuning, jax.vmap(one)(matrix), jnp.any(before != now))


def _matrix_of(tuning: dict[str, Any]) -> tuple[list[Array], Any]:
    # One, by name or not: the model has one latent site.
    return jax.tree.flatten(tuning["inverse_mass_matrix"])


def _inverse_mass(metric: Coordinates) -> Array:
    if metric.inner is None:
        return metric.scale**2
    rows = metric.forth(jnp.eye(len(metric.scale), dtype=metric.scale.dtype))
    return rows.T @ rows


def _matrices(structure: Any, inverse: Array) -> dict[str, Any]:
    # NumPyro's way from moments to the three matrices: of two draws the covariance is their second moment.
    *_, finish = welford_covariance()
    moments = (jnp.zeros(len(inverse), inverse.dtype), inverse, 2)
    found = finish(jax.tree.unflatten(structure, [moments]))
    return dict(zip(MATRICES, found, strict=True))


def _with(tuning: dict[str, Any], new: dict[str, Any], usable: Array) -> dict[str, Any]:
    old = {name: tuning[name] for name in MATRICES}
    usable &= all_finite(new)
    return strip_weak_types(tuning | jax.tree.map(lambda a, b: jnp.where(usable, b, a), old, new))
