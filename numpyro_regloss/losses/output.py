# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""What a loss returns: a real scalar, of enough digits to tell draws apart."""

import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.util import find_stack_level

from numpyro_regloss._core.pytree import Partition, is_concrete
from numpyro_regloss._core.types import Array
from numpyro_regloss.gaussians.gaussian import AnyGaussian
from numpyro_regloss.losses.arguments import explain
from numpyro_regloss.losses.compiled import shape_of

__all__ = ["batch_of", "check_output", "warn_of_equal_draws", "warn_of_few_digits"]


def batch_of(minibatch: Any, arguments: Partition) -> tuple[Partition | None, tuple[bool, ...]]:
    """Shapes of the arguments of a batch, None without one, and which of the traced ones are its rows.

    Args:
        minibatch: which arguments are data, or None.
        arguments: of the loss.

    Returns:
        Both.
    """
    if minibatch is None:
        return None, ()
    minibatch.num_rows(arguments)
    batch = jax.eval_shape(minibatch.draw, jax.random.key(0), arguments)
    return batch, minibatch.is_row(arguments)


def check_output(source: Any, x0: Array, arguments: Partition, minibatch: Any) -> None:
    """Refuses a loss that returns no real scalar, and a minibatch that does not follow the rows of the data.

    Args:
        source: of the loss.
        x0: `(dim,)`.
        arguments: of the loss.
        minibatch: which of them are data, or None.

    Raises:
        TypeError: if it returns something else.
        ValueError: if the user's function raises.
    """
    split = batch_of(minibatch, arguments)
    explain(lambda: source.check_data(arguments, *split), "loss of a minibatch")
    # The shapes of a jitted function are remembered: new values of equal shape run nothing again.
    out = explain(lambda: shape_of(source, x0, arguments), "loss")
    if not hasattr(out, "shape") or out.shape != ():
        got = f"shape {out.shape}" if hasattr(out, "shape") else type(out).__name__
        raise TypeError(
            f"Loss: expected the loss to return a scalar, got {got}; sum or average it over the "
            "data, and say has_aux=True if the function returns a pair (loss, aux)."
        )
    if not any(jnp.issubdtype(out.dtype, kind) for kind in (jnp.floating, jnp.integer, bool)):
        raise TypeError(
            f"Loss: expected a real scalar, got {out.dtype}; take its real part, or another number."
        )


def warn_of_few_digits(dtype: Any) -> None:
    """Warns of a loss that is returned in 16 bits.

    Args:
        dtype: of the loss.
    """
    if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4:
        warnings.warn(
            f"Loss: the loss returns {dtype}, whose {-math.log10(jnp.finfo(dtype).eps):.0f} digits are too few to "
            "tell draws apart; compute in it as you like, but sum over the data in float32: "
            "jnp.mean(..., dtype=float).",
            stacklevel=find_stack_level(),
        )


def warn_of_equal_draws(source: Any, reference: AnyGaussian, what: str) -> None:
    """Warns where parameters have so few digits that draws around them are the same to the loss.

    Args:
        source: of the loss.
        reference: the Gaussian of the draws, concrete or not; nothing is said of one that is traced.
        what: begins the warning.
    """
    digits = source.digits()
    if not np.ndim(digits) or not is_concrete(reference):
        return
    mean, width = np.asarray(reference.mean), np.sqrt(np.asarray(reference.variance))
    spacing = np.ldexp(digits, np.frexp(mean)[1] - 1) * (mean != 0)
    # Draws of half a spacing and more are rounded here and there, and right on average.
    lost = 2 * width < spacing
    if 2 * lost.sum() > (digits > 0).sum():
        warnings.warn(
            f"{what}: {lost.sum()} of {mean.size} parameters have types of 16 bits, whose neighboring numbers "
            f"are up to {spacing.max():.2g} apart at the centre, and draws around it are at most "
            f"{width[lost].max():.2g} wide: to the loss they are all the same. Take a larger tau, or "
            "parameters of type float32, and cast them within the loss if it computes in 16 bits.",
            stacklevel=find_stack_level(),
        )
