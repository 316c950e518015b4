# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""Tau by the overlap of the reference with the shifted density.

With u = loss / T, the effective share of a cloud from the reference N(x, tau I), weighted to q, is

    ESS / n = (E exp(-u))² / E exp(-2u) = 1 / (E_q[exp(u)] E_q[exp(-u)]),

which can be estimated from draws of q, whatever engine made them. For a linear loss it is exp(-tau |∇u|²). So the
next tau is

    tau (log share* / log ESS/n)^rate,

which for a rate of 1/2 does not overshoot, whether log ESS/n falls in proportion to tau or to tau².

Reference: García Trillos, Kaplan & Sanz-Alonso (2019), "Variational Characterizations of Local Entropy and Heat
Regularization in Deep Learning".
"""

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from numpyro_regloss._core.checks import cast_fields, check_positive, usable_range
from numpyro_regloss._core.pytree import is_concrete, pytree_dataclass
from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.anchor.base import Anchor, scale_of
from numpyro_regloss.draws.base import Draws
from numpyro_regloss.gaussians.gaussian import AnyGaussian, Gaussian
from numpyro_regloss.losses.regularized import RegularizedLoss

__all__ = ["AdaptTau", "AdaptTauInfo", "AdaptTauState"]

# Largest change of tau in one step, and what a rejected step divides it by.
MOST_CHANGE = 2.0


class AdaptTauState(NamedTuple):
    """What the next step needs.

    Attributes:
        factor: tau over the first tau.
        anchor: state of the inner anchor.
    """

    factor: Array
    anchor: Any


class AdaptTauInfo(NamedTuple):
    """Diagnostics of one step.

    Attributes:
        ok: the next reference may be used.
        num_loss: loss evaluations.
        num_grad: gradient evaluations.
        ess: effective sample size of a cloud, as a share of its draws.
        factor: the next tau over the first tau.
        anchor: info of the inner anchor.
    """

    ok: Array
    num_loss: Array
    num_grad: Array
    ess: Array
    factor: Array
    anchor: Any


@pytree_dataclass
class AdaptTau(Anchor):
    """Wraps another anchor, and adapts tau so that the effective sample size stays near a share of the draws.

    The regularized loss changes with tau, as with a schedule. The tau of the optimizer is only the first one; if
    it is a schedule, the schedule is not followed. The history has the tau that each step used. A rejected step,
    such as one of a cloud without overlap, halves tau.

    Args:
        anchor: moves the centre.
        ess: share of the draws, between 0 and 1.
        rate: power of the correction, between 0 and 1.
        least: smallest tau, in units of the first.
        most: largest tau, in units of the first.

    Raises:
        TypeError: if a setting is not a number, or `anchor` is not an anchor.
        ValueError: if a setting is out of range, or the anchor has a scale of its own.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax import random
        >>> from numpyro_regloss import Loss, anchor, schemes, shift
        >>> loss = Loss.from_function(lambda x: jnp.sum(jnp.array([3.0, 4.0]) * x), jnp.zeros(2))
        >>> optimizer = schemes.local_entropy(
        ...     loss, 1.0, shift.Importance(4000), anchor=AdaptTau(anchor.Proximal(), ess=0.5)
        ... )
        >>> result = optimizer.run(random.key(0), 20, progress_bar=False)
        >>> round(float(result.history.tau[-1]), 2)  # log(2) / 25
        0.03
    """

    anchor: Any
    ess: Any = 0.5
    rate: Any = 0.5
    least: Any = 1e-3
    most: Any = 1e3

    owns_scale: ClassVar[bool] = True

    def __post_init__(self) -> None:
        inner = self.anchor
        if isinstance(inner, type) or not isinstance(inner, Anchor):
            raise TypeError(
                f"AdaptTau: expected an anchor such as anchor.Proximal(), got {inner!r}."
            )
        if inner.owns_scale:
            raise ValueError(
                f"AdaptTau: expected an anchor that leaves the scale alone, got {type(inner).__name__}; use "
                "anchor.Proximal, anchor.Newton or anchor.Anderson."
            )
        cast_fields(self, ("ess", "rate", "least", "most"), check_positive)
        if not is_concrete((self.ess, self.rate, self.least, self.most)):
            return
        if self.ess >= 1 or self.rate > 1:
            raise ValueError(
                f"AdaptTau: expected ess below 1 and rate up to 1, got {self.ess} and {self.rate}."
            )
        if self.least > 1 or self.most < 1:
            raise ValueError(
                f"AdaptTau: expected least <= 1 <= most, in units of the first tau, got {self.least} and "
                f"{self.most}."
            )

    def check_fit(self, fit: Any) -> None:
        """Refuses fits without draws, and fits that the inner anchor refuses.

        Args:
            fit: of the optimizer under construction.

        Raises:
            ValueError: if the fit makes no use of draws.
        """
        if not fit.uses_draws:
            raise ValueError(
                f"AdaptTau: expected a fit that works from draws, such as fit.ForwardKL, got "
                f"{type(fit).__name__}; use a schedule of tau instead."
            )
        self.anchor.check_fit(fit)

    def init(self, target: RegularizedLoss) -> AdaptTauState:
        """The first tau."""
        one = jnp.ones_like(target.reference.mean, shape=())
        return AdaptTauState(one, self.anchor.init(target))

    def after_rejection(
        self, state: AdaptTauState, reference: AnyGaussian
    ) -> tuple[AdaptTauState, AnyGaussian]:
        """Halves tau, unless it would become too small.

        Args:
            state: before the step.
            reference: of the step.

        Returns:
            State and reference of the next step.
        """
        return self._changed(state, reference, state.factor / MOST_CHANGE)

    def step(
        self,
        rng_key: Key,
        state: AdaptTauState,
        target: RegularizedLoss,
        draws: Draws,
        fitted: AnyGaussian,
        fit_info: Any,
    ) -> tuple[AdaptTauState, AnyGaussian, AdaptTauInfo]:
        """Moves the reference with the inner anchor, then rescales it.

        Args:
            rng_key: a random key.
            state: from `init` or the last step.
            target: the target of this step.
            draws: from the shift.
            fitted: the fitted Gaussian.
            fit_info: from the fit.

        Returns:
            The next state, the next reference and the info.
        """
        inner, reference, info = self.anchor.step(
            rng_key, state.anchor, target, draws, fitted, fit_info
        )
        log_share = _log_effective_share(draws)
        # Of a flat loss the logarithm is zero, up to rounding.
        ratio = jnp.log(self.ess) / jnp.minimum(log_share, -jnp.finfo(log_share.dtype).eps)
        change = jnp.clip(ratio**self.rate, 1.0 / MOST_CHANGE, MOST_CHANGE)
        change = jnp.where(jnp.isfinite(change), change, 1.0 / MOST_CHANGE)
        state, reference = self._changed(
            AdaptTauState(state.factor, inner), reference, state.factor * change
        )
        return (
            state,
            reference,
            AdaptTauInfo(
                ok=info.ok,
                num_loss=info.num_loss,
                num_grad=info.num_grad,
                ess=jnp.exp(log_share),
                factor=state.factor,
                anchor=info,
            ),
        )

    def _changed(
        self, state: AdaptTauState, reference: AnyGaussian, factor: Array
    ) -> tuple[AdaptTauState, AnyGaussian]:
        factor = jnp.clip(factor, self.least, self.most).astype(state.factor.dtype)
        # No variance may be rounded to zero.
        least, most = usable_range(factor.dtype)
        scale = scale_of(reference, "AdaptTau")
        variance = scale**2 * (factor / state.factor)
        usable = jnp.all((variance >= least) & (variance <= most))
        factor = jnp.where(usable, factor, state.factor)
        reference = Gaussian(reference.mean, scale * jnp.sqrt(factor / state.factor))
        return state._replace(factor=factor), reference


def _log_effective_share(draws: Draws) -> Array:
    log_weight = draws.log_weight - jax.nn.logsumexp(draws.log_weight)
    used = log_weight > -jnp.inf
    energy = jnp.where(used, draws.loss / draws.temperature, 0.0)
    up, down = (jax.nn.logsumexp(log_weight + sign * energy) for sign in (1.0, -1.0))
    # Draws of a cloud on the far side of a wall count as well, and for nothing.
    return jnp.minimum(-(up + down), 0.0)
