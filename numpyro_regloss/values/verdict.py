# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""Would training for flatness pay? Curvature against slope at a width that layers cannot rescale.

Each weight moves by o = 0.05 times the root mean square of its filter, times a normal number. The loss changes by

    slope:  sd of o · ∇loss,            rise:  E [ loss(x + o) + loss(x - o) ] / 2 - loss(x),

and their ratio, rise / slope, has no unit: neither the scale of the loss nor that of layers of ReLUs changes it.
As long as the slope is the larger one, plain training goes on downhill, and penalties on sharpness slow it. Where
curvature is as large, the network lies at the bottom of something whose width matters. The two limits are from
`benchmarks/flatness.py`: networks of one hidden layer on scikit-learn's digits, trained by SGD and by SAM (Foret,
Kleiner, Mobahi & Neyshabur, 2021, "Sharpness-Aware Minimization for Efficiently Improving Generalization").

Reference: Li, Xu, Taylor, Studer & Goldstein (2018), "Visualizing the Loss Landscape of Neural Nets" (filters).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from numpyro_regloss._core.checks import (
    check_count,
    check_differentiable,
    check_key,
    differentiating,
)
from numpyro_regloss._core.html import as_html
from numpyro_regloss._core.settings import own_settings
from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.gaussians.gaussian import Gaussian
from numpyro_regloss.losses.groups import check_scale
from numpyro_regloss.losses.loss import Loss
from numpyro_regloss.losses.probe import Probe, check_gradient, probe
from numpyro_regloss.losses.regularized import RegularizedLoss
from numpyro_regloss.values.estimate import Estimate
from numpyro_regloss.values.pairs import heat_of_means
from numpyro_regloss.values.rise import Pairs, pairs

__all__ = ["FlatnessVerdict", "flatness_verdict"]

# Share of the norm of its filter by which each weight moves: small enough for the slope to be one.
WIDTH = 0.05
# Between these limits training for flatness helped some networks and harmed others.
LOWEST, HIGHEST = 0.5, 0.75
SIGMAS = 2.0


class FlatnessVerdict(NamedTuple):
    """Whether training for flatness would pay, with the numbers behind the answer; prints as a sentence.

    Attributes:
        answer: `"pays"`, `"does not pay"` or `"cannot tell"`.
        ratio: rise over slope, without a unit.
        error: its standard error; infinite if it is not known.
        rise: of the heat above the loss, an `Estimate` in the units of the loss.
        slope: standard deviation of the linear change, in the units of the loss.
        loss: at the parameters.
    """

    answer: str
    ratio: float
    error: float
    rise: Estimate
    slope: float
    loss: float

    def __str__(self) -> str:
        why = {
            "pays": "the curvature is as large as the slope, so flatness matters",
            "does not pay": "the slope is larger, so plain training can still progress",
            "cannot tell": (
                f"for ratios between {LOWEST} and {HIGHEST}, or with errors that reach there, both outcomes "
                "occurred"
            ),
        }[self.answer]
        head = {
            "pays": "Training for flatness (SAM, Entropy-SGD, heat) would pay",
            "does not pay": "Training for flatness (SAM, Entropy-SGD, heat) would not pay",
            "cannot tell": "Cannot tell whether training for flatness (SAM, Entropy-SGD, heat) would pay",
        }[self.answer]
        return (
            f"{head}: when each weight moves by {WIDTH:.0%} of the norm of its filter, the loss of "
            f"{self.loss:.4g} rises by {float(self.rise.value):.3g} ± {float(self.rise.error):.1g} and slopes by "
            f"{self.slope:.3g}, a ratio of {self.ratio:.2f} ± {self.error:.1g}; {why}."
        )

    def _repr_html_(self) -> str:
        return as_html(str(self))


def flatness_verdict(
    rng_key: Key, loss: Loss, params: Any = None, *, num_samples: int = 128
) -> FlatnessVerdict:
    """Is this network so sharp that SAM, Entropy-SGD or training on the heat would pay?

    The answer compares curvature with slope, see the formulas of this module. It predicts whether SAM in place of
    SGD, from the start and for as many updates, would have the higher accuracy on test data. The limits were found
    for small networks of ReLUs on small images, and hold for others as far as they are similar. It is no promise:
    the page "Flat minima" says how often it was right. Momentum, decay of the learning rate and weight decay were
    not tried.

    The gradient takes one pass over all rows, in blocks of the loss's minibatch where it has one (rows beyond a
    whole number of batches are left out); pairs of draws see a fresh batch each. A million parameters and 60,000
    rows took 16 seconds on two cores.

    Args:
        rng_key: a random key.
        loss: differentiable, on the training data; averaged over the rows.
        params: as the user wrote them; default: the loss's start.
        num_samples: draws of the rise, in pairs.

    Returns:
        The verdict.

    Raises:
        TypeError: if the loss is not a `Loss` of a function, or has no gradient.
        ValueError: if loss or gradient are not finite at the parameters, if the gradient is exactly zero near them
            although the loss changes, or if the parameters are all zero.

    Example:
        >>> loss = Loss.from_function(lambda x: jnp.sum(x**2 - 2 * x), jnp.full(20, 1.001))
        >>> verdict = flatness_verdict(jax.random.key(0), loss)
        >>> verdict.answer
        'pays'
        >>> flatness_verdict(jax.random.key(0), loss, jnp.full(20, 3.0)).answer
        'does not pay'
    """
    what = "values.flatness_verdict"
    if not isinstance(loss, Loss):
        raise TypeError(
            f"{what}: expected a Loss, got {type(loss).__name__}; wrap it with Loss.from_function(fn, params)."
        )
    rng_key = check_key(rng_key, what)
    check_count(num_samples, f"{what}: num_samples", 8)
    check_differentiable(["the slope"], loss, what, "values.profile")
    loss.check_precision(what)
    loss.check_captured()
    x = loss.x0 if params is None else loss.unconstrain(params)
    scale = WIDTH * check_scale("filter", loss, x, f"{what}: the width")
    target = RegularizedLoss(loss, Gaussian(x, scale))
    with differentiating(["the slope"], loss, what, "values.profile"):
        found = _measure(rng_key, target, num_pairs=-(-num_samples // 2))
    plain, slope, found, look = jax.device_get(found)
    if not (np.isfinite(plain) and np.isfinite(slope)):
        raise ValueError(
            f"{what}: expected a finite loss and gradient at the parameters, got {plain} and a slope of {slope}."
        )
    check_gradient(look, ["the slope"], what, "values.profile")
    rise = heat_of_means(jnp.asarray(found.rise), jnp.asarray(found.largest))
    # Of a slope of zero any rise is larger.
    steep = max(float(slope), float(np.finfo(slope.dtype).tiny))
    ratio, error = float(rise.value) / steep, float(rise.error) / steep
    return FlatnessVerdict(_answer(ratio, error), ratio, error, rise, float(slope), float(plain))


def _answer(ratio: float, error: float) -> str:
    if ratio - SIGMAS * error > HIGHEST:
        return "pays"
    if ratio + SIGMAS * error < LOWEST:
        return "does not pay"
    return "cannot tell"


@partial(jax.jit, static_argnames="num_pairs")
@own_settings
def _measure(
    rng_key: Key, target: RegularizedLoss, *, num_pairs: int
) -> tuple[Array, Array, Pairs, Probe]:
    x = target.reference.mean
    blocks = target.num_blocks

    def block(index: Array, total: tuple[Array, Array]) -> tuple[Array, Array]:
        value, gradient = jax.value_and_grad(target.on_block(index).value)(x)
        return total[0] + value / blocks, total[1] + gradient / blocks

    plain, gradient = lax.fori_loop(0, blocks, block, (jnp.zeros((), x.dtype), jnp.zeros_like(x)))
    slope = jnp.linalg.norm(target.reference.scaled(gradient))
    look = probe(rng_key, target.on_batch(rng_key))
    return plain, slope, pairs(rng_key, target, num_pairs), look
