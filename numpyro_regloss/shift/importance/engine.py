# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Importance sampling: a Gaussian cloud around the centre, weighted by softmax(-loss / T).

    z_j = mean + scale ξ_j,   w_j ∝ exp(-loss(z_j) / T)

No gradients, and the loss need not be differentiable. A large cloud's noise is regenerated from keys, chunk
by chunk, so that memory stays bounded; a small cloud's is kept. Weights degenerate when
tau |∇loss/T|² exceeds about log(num_samples): watch ESS and k-hat, or let the ESS set the temperature.

References: García Trillos, Kaplan & Sanz-Alonso (2019), "Variational Characterizations of Local Entropy
and Heat Regularization in Deep Learning"; Vehtari, Simpson, Gelman, Yao & Gabry (2024), "Pareto Smoothed
Importance Sampling"; Owen (1997), "Scrambled Net Variance for Integrals of Smooth Functions"; Del Moral, Doucet &
Jasra (2012), "An Adaptive Sequential Monte Carlo Method for Approximate Bayesian Computation" (temperatures set by
the effective sample size).
"""

from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jax import random

from numpyro_regloss._core.checks import (
    cast_fields,
    check_choice,
    check_count,
    check_flag,
    check_positive,
)
from numpyro_regloss._core.pareto import pareto_khat, pareto_smooth
from numpyro_regloss._core.pytree import is_concrete, pytree_dataclass, static_field
from numpyro_regloss._core.stats import bisect, weight_ess
from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.losses.regularized import RegularizedLoss
from numpyro_regloss.shift.base import Shift
from numpyro_regloss.shift.importance.cloud import (
    Cloud,
    Layout,
    draws_of,
    evaluate,
    kept_noise,
    lay_out,
    single_weights,
)
from numpyro_regloss.shift.importance.sobol import MAX_DIM

__all__ = ["Cloud", "Importance", "ImportanceInfo"]

NOISES = ("normal", "sobol")
# An error estimated from fewer independent scrambles is too noisy to be called one.
LEAST_SCRAMBLES = 8
# Where the temperature is looked for: from the smallest gap between two losses to the range of them all, with
# room on both sides, and halved until float32 cannot tell.
COLDEST, HOTTEST, NUM_BISECTIONS = 0.01, 1000.0, 40


class ImportanceInfo(NamedTuple):
    """Diagnostics of one cloud.

    Attributes:
        ok: some draw had a finite loss.
        num_loss: loss evaluations; a few more than `num_samples` where they do not fill equal chunks, one more
            (of a long loss one per chunk) where the center is evaluated with them.
        num_grad: zero.
        ess: effective sample size 1 / Σ w².
        khat: Pareto shape of the weights; above 0.7 the weighted mean is not to be trusted.
        num_rejected: draws whose loss was NaN or -infinity; they got weight zero.
        temperature: of the weights: the target's, or the one that the effective sample size set.
    """

    ok: Array
    num_loss: Array
    num_grad: Array
    ess: Array
    khat: Array
    num_rejected: Array
    temperature: Array


@pytree_dataclass
class Importance(Shift):
    """Self-normalized importance sampling from the reference.

    With `ess` the weights cannot degenerate, wherever the reference is. Each step sets its temperature so that the
    effective sample size is a given share of the draws: far from the minimum a high temperature, and near it a low
    one. The target's own temperature is then not used (unless all losses are equal). Every step minimizes another
    regularized loss, so no F_tau is sure to fall. The temperature is in the draws and in the history.

    Args:
        num_samples: size of the cloud.
        antithetic: draw pairs mean ± scale ξ: the linear part of the loss then causes no error. There is one
            exception: if the loss is symmetric about the mean, loss(mean + o) = loss(mean - o), and the mean is
            not a minimum (q is wider than the reference along some direction), pairs would keep the mean there
            forever. Then only the first members of the pairs, which are independent draws, have a weight.
        chunk_size: draws evaluated at once; default: about two megabytes of them, fewer when the loss
            holds much data, and all of them of an external loss. A Sobol net is never divided. With `num_samples`
            or more, each step calls the loss once, on all draws and the center. This is for simulators with a high
            cost per call.
        noise: `"normal"`: independent ξ_j; `"sobol"`: independently scrambled Sobol nets, each of the
            largest power of two that leaves `num_scrambles` of them: smaller errors where few directions
            matter and the loss is smooth, in up to 21,201 dimensions.
        num_scrambles: the least number of Sobol nets, eight or more; errors are computed from their scatter.
        pareto_smoothing: replace the largest weights by quantiles of the Pareto distribution that fits them:
            less noise, some bias.
        ess: None, or the effective sample size to be reached as a share of the draws with finite loss, between
            0 and 1.

    Raises:
        TypeError: if a setting is of the wrong kind.
        ValueError: if a setting is out of range, or does not go with the number of draws.

    Example:
        >>> from numpyro_regloss import Gaussian, Loss
        >>> loss = Loss.from_function(lambda x: 1e6 * jnp.sum(x**2), jnp.ones(2))
        >>> target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, tau=1.0))
        >>> for engine in (Importance(1000), Importance(1000, noise="sobol", ess=0.2)):
        ...     _, draws, info = engine.step(random.key(0), (), target)
        ...     print(int(info.ess), int(draws.temperature) > 1)
        1 False
        200 True
    """

    num_samples: int = static_field()
    antithetic: bool = static_field(default=True)
    chunk_size: int | None = static_field(default=None)
    noise: str = static_field(default="normal")
    num_scrambles: int = static_field(default=16)
    pareto_smoothing: bool = static_field(default=False)
    ess: Any = None

    hands_scores: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_count(self.num_samples, "Importance: num_samples")
        if self.chunk_size is not None:
            check_count(self.chunk_size, "Importance: chunk_size")
        cast_fields(self, ("antithetic", "pareto_smoothing"), check_flag)
        check_choice(self.noise, "Importance: noise", NOISES)
        check_count(self.num_scrambles, "Importance: num_scrambles", LEAST_SCRAMBLES)
        least = 2 * self.num_scrambles
        if self.noise == "sobol" and self.num_samples < least:
            raise ValueError(
                f"Importance: expected at least {least} draws for {self.num_scrambles} Sobol nets, got "
                f'num_samples={self.num_samples}; draw more, or use noise="normal".'
            )
        if self.ess is not None:
            object.__setattr__(self, "ess", check_positive(self.ess, "Importance: ess"))
            if is_concrete(self.ess) and not 1 / self.num_samples < self.ess < 1:
                raise ValueError(
                    "Importance: expected ess as a share of the draws, above one draw and below 1, got "
                    f"{self.ess} of {self.num_samples}; 0.1 to 0.5 are common."
                )

    def init(self, rng_key: Key, target: RegularizedLoss) -> tuple[()]:
        """Returns an empty state: clouds do not depend on each other.

        Args:
            rng_key: unused.
            target: the first target.

        Returns:
            `()`.

        Raises:
            ValueError: if the target has more dimensions than the Sobol sequence.
        """
        del rng_key
        self._net_size(target.dim)
        return ()

    def step(
        self, rng_key: Key, state: tuple[()], target: RegularizedLoss
    ) -> tuple[tuple[()], Cloud, ImportanceInfo]:
        """Evaluates the loss on a fresh cloud.

        Args:
            rng_key: a random key.
            state: `()`.
            target: the target.

        Returns:
            `()`, the cloud and its diagnostics.

        Raises:
            ValueError: if the target has more dimensions than the Sobol sequence.
        """
        key_batch, rng_key = random.split(rng_key)
        # One batch for the whole cloud: weights of different losses cannot be compared.
        target = target.on_batch(key_batch)
        layout = self._layout(target)
        found = evaluate(rng_key, target, layout, with_center=True)
        return state, *self._weighted(rng_key, target, layout, *found)

    def ask(self, rng_key: Key, state: tuple[()], target: RegularizedLoss) -> Array:
        """The draws of `step`, and the reference's mean.

        Args:
            rng_key: of the step.
            state: unused.
            target: the target.

        Returns:
            `(num_samples + 1, dim)`.
        """
        del state
        _, rng_key = random.split(rng_key)
        x = draws_of(rng_key, target.reference, self._layout(target))
        return jnp.concatenate([x, target.reference.mean[None]])

    def tell(
        self, rng_key: Key, state: tuple[()], target: RegularizedLoss, values: Array
    ) -> tuple[tuple[()], Cloud, ImportanceInfo]:
        """The cloud of `step`, weighted by losses that were evaluated elsewhere.

        Args:
            rng_key: as of `ask`.
            state: `()`.
            target: the target.
            values: the losses at the points of `ask`.

        Returns:
            `()`, the cloud and its diagnostics.
        """
        _, rng_key = random.split(rng_key)
        layout = self._layout(target)
        offset = kept_noise(rng_key, target.reference, layout)
        found = (values[:-1], offset, values[-1], values.size)
        return state, *self._weighted(rng_key, target, layout, *found)

    def _weighted(
        self,
        rng_key: Key,
        target: RegularizedLoss,
        layout: Layout,
        loss: Array,
        offset: Array | None,
        center_loss: Array | None,
        num_loss: int,
    ) -> tuple[Cloud, ImportanceInfo]:
        # +infinity is a wall, a legitimate weight of zero; NaN and -infinity are failures of the loss.
        rejected = jnp.isnan(loss) | (loss == -jnp.inf)
        temperature, lowest = target.temperature, 0.0
        if self.ess is not None:
            temperature, lowest = _temperature_of_ess(loss, self.ess, target.temperature)
        log_weight = jnp.where(rejected, -jnp.inf, -(loss - lowest) / temperature)
        if self.antithetic:
            log_weight = single_weights(log_weight, loss, rng_key, target.reference, offset, layout)
        if self.pareto_smoothing:
            log_weight, khat = pareto_smooth(log_weight)
        else:
            khat = pareto_khat(log_weight)
        ess = weight_ess(log_weight)
        info = ImportanceInfo(
            ok=ess > 0,
            num_loss=jnp.asarray(num_loss),
            num_grad=jnp.asarray(0),
            ess=ess,
            khat=khat,
            num_rejected=jnp.sum(rejected),
            temperature=jnp.asarray(temperature, log_weight.dtype),
        )
        cloud = Cloud(
            rng_key,
            target.reference,
            log_weight[None],
            loss[None],
            temperature,
            offset,
            layout,
            center_loss,
        )
        return cloud, info

    def losses(self, rng_key: Key, target: RegularizedLoss) -> Array:
        """The losses of the cloud that `step` draws from this key, without that of the center.

        Args:
            rng_key: a random key.
            target: the target.

        Returns:
            `(draw,)`.
        """
        key_batch, rng_key = random.split(rng_key)
        target = target.on_batch(key_batch)
        return evaluate(rng_key, target, self._layout(target), with_center=False)[0]

    def center_loss(self, draws: Cloud) -> Array | None:
        """The loss at the reference's mean, if it was evaluated with the draws.

        Args:
            draws: of `step`.

        Returns:
            A scalar, or None.
        """
        return draws.center_loss

    def _layout(self, target: RegularizedLoss) -> Layout:
        return lay_out(
            target,
            self.num_samples,
            self.chunk_size,
            antithetic=self.antithetic,
            net_size=self._net_size(target.dim),
        )

    def _net_size(self, dim: int) -> int | None:
        if self.noise != "sobol":
            return None
        if dim > MAX_DIM:
            raise ValueError(
                f"Importance: expected at most {MAX_DIM} parameters for Sobol points, got {dim}; use "
                'noise="normal", which has no limit and errs no more in so many dimensions.'
            )
        return 1 << ((self.num_samples // self.num_scrambles).bit_length() - 1)


def _temperature_of_ess(loss: Array, share: Array, default: Array) -> tuple[Array, Array]:
    """The temperature of an effective sample size, and the lowest loss.

    The effective sample size of weights exp(-loss / T) rises with T from the number of draws of lowest loss to
    that of all draws. Where the former is enough already, T is so low that other draws have no weight.

    Args:
        loss: `(draw,)`; draws that are not finite do not count.
        share: of the other draws.
        default: the temperature where all losses are equal.

    Returns:
        Two scalars; the temperature is positive and finite.
    """
    finite = jnp.isfinite(loss)
    lowest = jnp.min(jnp.where(finite, loss, jnp.inf))
    lowest = jnp.where(jnp.isfinite(lowest), lowest, 0.0)
    height = jnp.where(finite, loss - lowest, jnp.inf)
    largest = jnp.max(jnp.where(finite, height, 0.0))
    smallest = jnp.min(jnp.where(height > 0, height, jnp.inf))
    spread = largest > 0
    wanted = share * jnp.sum(finite)
    low = jnp.log(jnp.where(spread, smallest, 1.0)) + jnp.log(COLDEST)
    high = jnp.log(jnp.where(spread, largest, 1.0)) + jnp.log(HOTTEST)

    def is_colder(log_temperature: Array) -> Array:
        return ~(weight_ess(-height / jnp.exp(log_temperature)) >= wanted)

    found = jnp.exp(bisect(is_colder, low, high, NUM_BISECTIONS)[1])
    tiny, huge = jnp.finfo(loss.dtype).tiny, jnp.finfo(loss.dtype).max
    found = jnp.clip(found, tiny, huge)
    return jnp.where(spread, found, jnp.asarray(default, loss.dtype)), lowest
