# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Numbers by group of parameters: given ones, and norms of the weights of layers and filters.

Perturbations in units of the norm of a layer's weights do not see its scale: multiply the weights of one layer of
ReLUs by a number, divide those of the next by it, and the perturbed functions are the same.

Reference: Li, Xu, Taylor, Studer & Goldstein (2018), "Visualizing the Loss Landscape of Neural Nets" (filters).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_regloss._core.checks import check_positive
from numpyro_regloss._core.types import Array
from numpyro_regloss.losses.loss import Loss

__all__ = ["SCALES", "check_groups", "check_scale"]

SCALES = ("filter", "layer")
# Weights that are all zero have no size: they move by this share of that of all parameters, which is not at all.
RESTING = 1e-9


def check_groups(value: Any, loss: Loss, what: str) -> Any:
    """Casts one positive number for all parameters, or one per parameter or group of them.

    Args:
        value: a number, an array `(dim,)`, or a pytree prefix of the parameters (a dict by site name for a model);
            the values of tracers pass unchecked.
        loss: whose parameters they are.
        what: begins the error message.

    Returns:
        An array `()` or `(dim,)`.

    Raises:
        ValueError: if a number is not positive, or the groups are not those of the parameters.
    """
    shapes = ((), (loss.dim,))
    is_array = isinstance(value, np.ndarray | jax.Array)
    is_number = jax.tree_util.all_leaves([value]) and (not is_array or value.shape in shapes)
    if value is None or is_number:
        return check_positive(value, what, shapes)
    for leaf in jax.tree.leaves(value):
        check_positive(leaf, what, (np.shape(leaf),))
    try:
        groups = loss.source.expand(value)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{what}: expected a number, or one value per group of parameters (a pytree prefix of the "
            f"parameters), got {str(value)[:100]}: {error}"
        ) from error
    return check_positive(groups, what, shapes)


def check_scale(scale: Any, loss: Loss, x: Array, what: str) -> Array:
    """Standard deviations of perturbations of the parameters, in units of sqrt(tau).

    Args:
        scale: None for one; `"filter"` or `"layer"`; or positive numbers by group, as `check_groups` takes them.
        loss: whose parameters they are.
        x: the parameters, `(dim,)`.
        what: begins the error message.

    Returns:
        An array `()` or `(dim,)`.

    Raises:
        TypeError: if norms are asked for of the sites of a model.
        ValueError: if a number is not positive, groups are others, parameters are not finite, or all are zero.
    """
    if scale is None:
        return jnp.ones((), x.dtype)
    if not isinstance(scale, str):
        return jnp.asarray(check_groups(scale, loss, what), x.dtype)
    if scale not in SCALES:
        raise ValueError(
            f"{what}: expected None, one of {SCALES} or standard deviations by group of parameters, got {scale!r}."
        )
    if loss.source.density is not None:
        raise TypeError(
            f"{what}: expected a loss from Loss.from_function for {scale!r}, got one of a model, whose sites have "
            "no norm in the coordinates that are perturbed; give numbers by site."
        )
    size = np.sqrt(np.mean(np.square(np.asarray(x, float))))
    if not np.isfinite(size):
        raise ValueError(
            f"{what}: expected finite parameters for {scale!r}, got NaN or infinity among them; give those of a "
            "run that did not diverge."
        )
    if not size > 0:
        raise ValueError(
            f"{what}: expected parameters that are not all zero for {scale!r}, got nothing but zeros; give the "
            "trained ones."
        )
    by_site = {
        name: _root_mean_square(value, whole=scale == "layer")
        for name, value in loss.named_sites(x, loss.bind()).items()
    }
    return jnp.maximum(loss.unconstrain(by_site), RESTING * size)


def _root_mean_square(value: Array, *, whole: bool) -> Array:
    axes = tuple(range(value.ndim if whole or value.ndim < 2 else value.ndim - 1))
    # Parameters of 16 bits overflow in a sum of squares.
    mean = jnp.mean(jnp.square(value.astype(float)), axes, keepdims=True)
    return jnp.broadcast_to(jnp.sqrt(mean), value.shape)
