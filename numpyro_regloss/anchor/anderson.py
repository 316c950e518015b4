# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""Anderson's acceleration of the fixed-point iteration of the two-step scheme.

With the centres x_j of the last steps, the means m_j fitted there and e_j = m_j - x_j, the next centre is

    Σ_j a_j m_j,   a = argmin_{Σ a = 1} |Σ_j a_j e_j|²

in units of the reference. The problem is regularized with the standard errors of the e_j, so that differences
within the noise lead to the plain step. On a linear map without noise the method is essentially GMRES, which ends
after as many steps as there are dimensions.

References: Anderson (1965), "Iterative Procedures for Nonlinear Integral Equations"; Walker & Ni (2011),
"Anderson Acceleration for Fixed-Point Iterations"; Henderson & Varadhan (2019), "Damped Anderson Acceleration
With Restarts and Monotonicity Control for Accelerating EM and EM-like Algorithms".
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from numpyro_regloss._core.checks import check_count, check_positive
from numpyro_regloss._core.linalg import after
from numpyro_regloss._core.pytree import pytree_dataclass, replace_fields, static_field
from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.anchor import safeguard
from numpyro_regloss.anchor.base import Anchor
from numpyro_regloss.anchor.regression import regress
from numpyro_regloss.anchor.safeguard import REASONS, AcceleratedInfo
from numpyro_regloss.draws.base import Draws
from numpyro_regloss.fit.base import FitInfo
from numpyro_regloss.gaussians.gaussian import AnyGaussian
from numpyro_regloss.losses.regularized import RegularizedLoss

__all__ = ["Anderson", "AndersonState"]

# Of the unit diagonal of a Gram matrix, in units of the last digit.
RIDGE = 10.0
# Halves of fewer draws say nothing.
LEAST_DRAWS = 8


class AndersonState(NamedTuple):
    """The last pairs, in ring buffers, and the last step.

    Attributes:
        mean: centres, `(memory, dim)`.
        gradient: -∇F_tau / T there, `(memory, dim)`: unlike e it does not depend on tau.
        noise: squared standard error of e over its squared length, `(memory,)`.
        used: whether there is such a pair, `(memory,)`.
        place: position of the next pair in the buffers.
        last: the last step, which is judged where it led.
    """

    mean: Array
    gradient: Array
    noise: Array
    used: Array
    place: Array
    last: safeguard.Last


@pytree_dataclass
class Anderson(Anchor):
    """N(Σ a_j m_j, tau I), or the plain step if that decreases the regularized loss by more.

    Works with every fit. If the fit does not use draws, steps are judged only afterwards.

    Args:
        memory: number of pairs that are combined, including the present one.
        max_step: longest distance beyond the plain step, in units of sqrt(tau dim).

    Raises:
        TypeError: if a setting is not a number.
        ValueError: if a setting is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax import random
        >>> from numpyro_regloss import Loss, schemes, shift
        >>> loss = Loss.from_function(lambda x: jnp.sum(jnp.array([0.1, 1.0]) * (x - 1.0) ** 2), jnp.full(2, 3.0))
        >>> optimizer = schemes.local_entropy(loss, 0.1, shift.HMC(100, 25), anchor=Anderson())
        >>> result = optimizer.run(random.key(0), 8, progress_bar=False)
        >>> bool(jnp.all(jnp.abs(result.params - 1.0) < 0.01))
        True
    """

    memory: int = static_field(default=5)
    max_step: Any = 2.0

    def __post_init__(self) -> None:
        check_count(self.memory, "Anderson: memory", 2)
        number = check_positive(self.max_step, "Anderson: max_step")
        object.__setattr__(self, "max_step", number)

    def init(self, target: RegularizedLoss) -> AndersonState:
        """No pairs yet."""
        zero = jnp.zeros((self.memory, target.dim), target.reference.mean.dtype)
        return AndersonState(
            mean=zero,
            gradient=zero,
            noise=zero[:, 0],
            used=jnp.zeros(self.memory, bool),
            place=jnp.asarray(0, jnp.int32),
            last=safeguard.first(target),
        )

    def step(
        self,
        rng_key: Key,
        state: AndersonState,
        target: RegularizedLoss,
        draws: Draws,
        fitted: AnyGaussian,
        fit_info: Any,
    ) -> tuple[AndersonState, AnyGaussian, AcceleratedInfo]:
        """Moves the reference.

        Args:
            rng_key: unused.
            state: from `init` or the last step.
            target: the target of this step.
            draws: from the shift.
            fitted: the fitted Gaussian, with the mean m.
            fit_info: from the fit.

        Returns:
            The next state, the next reference and the info.
        """
        del rng_key
        reference, here, plain = safeguard.in_order(target, fitted)
        error = safeguard.whitened_error(here, fit_info)
        _, back = safeguard.rise(state.last, reference, plain, error)
        # The least residual need not have the least F_tau, but one of them falls.
        before = reference.scaled_transpose(state.last.gradient)
        back &= plain @ plain > before @ before
        pairs = _remember(state, reference, plain, error)
        weight = _weights(pairs, reference, state.place)
        rest = jnp.where(jnp.arange(self.memory) == state.place, 0.0, weight)
        fixed = rest @ (reference.whiten(pairs.mean) + _steps(pairs, reference))

        def lengthened(plain: Array) -> Array:
            beyond = fixed + (weight[state.place] - 1.0) * plain
            longest = self.max_step * jnp.sqrt(1.0 * target.dim)
            length = jnp.linalg.norm(beyond)
            return plain + beyond * jnp.minimum(1.0, longest / jnp.where(length > 0, length, 1.0))

        step = lengthened(plain)
        decreases = self._judge(here, draws, fit_info, lengthened, weight)
        alone = ~jnp.any(state.used)
        worse = decreases[1] <= decreases[0]
        reason = jnp.where(worse, REASONS.index("no further decrease"), 0)
        reason = jnp.where(alone, REASONS.index("no history"), reason)
        reason = jnp.where(back, REASONS.index("went back"), reason)
        take = (reason == 0) & jnp.isfinite(step).all()
        mean = jnp.where(take, reference.unwhiten(step), fitted.mean)
        mean = jnp.where(back, state.last.plain, mean)
        # Of a memory that misled only the present pair is kept.
        kept = pairs.used & (take | (jnp.arange(self.memory) == state.place))
        state = pairs._replace(
            used=kept,
            place=(state.place + 1) % self.memory,
            last=safeguard.remember(reference, plain, error, fitted.mean, take),
        )
        info = safeguard.report(reason, plain, step, decreases)
        return state, target.reference._replace(mean=mean), info

    def _judge(
        self,
        target: RegularizedLoss,
        draws: Draws,
        fit_info: Any,
        lengthened: Callable[[Array], Array],
        weight: Array,
    ) -> Array:
        # Fits of the heat regularization have no draws, or none that say how it changes.
        known = FitInfo.of(fit_info)
        if known.control_variate is None or draws.log_weight.size < LEAST_DRAWS:
            return jnp.asarray([-jnp.inf, jnp.nan], weight.dtype)
        target = replace_fields(
            target,
            reference=target.reference._replace(mean=after(weight[0], target.reference.mean)),
        )
        regression = regress(
            target,
            draws,
            known.control_variate,
            compatible=known.score_compatible,
            diagonal=draws.log_weight.size < 2 * target.dim,
        )
        return safeguard.compare(
            target,
            draws,
            regression,
            lambda plain: jnp.stack([plain, lengthened(plain)]),
        )


def _remember(
    state: AndersonState, reference: AnyGaussian, plain: Array, error: Array
) -> AndersonState:
    square = plain @ plain
    noise = (error @ error) / jnp.where(square > 0, square, 1.0)
    place = state.place
    return state._replace(
        mean=state.mean.at[place].set(reference.mean),
        gradient=state.gradient.at[place].set(reference.unscale_transpose(plain)),
        noise=state.noise.at[place].set(noise),
        used=state.used.at[place].set(True),
    )


def _steps(pairs: AndersonState, reference: AnyGaussian) -> Array:
    return reference.scaled_transpose(pairs.gradient)


def _weights(pairs: AndersonState, reference: AnyGaussian, place: Array) -> Array:
    # In terms of D_j = e_j - e_k, with k the present pair: (DᵀD + N) a = -(Dᵀ e_k + s_k²) for the weights of the
    # others, N the covariance of the noise of D, and -s_k² what the noise of e_k adds to the product on average.
    # So noise alone gives the plain step, where the least residual would be that of an average over the memory.
    steps = _steps(pairs, reference)
    present = jnp.arange(len(steps)) == place
    square = jnp.sum(steps**2, -1)
    usable = pairs.used & ~present & jnp.isfinite(pairs.noise) & jnp.isfinite(pairs.noise[place])
    noise = jnp.where(usable | present, pairs.noise * square, 0.0)
    here = jnp.where(jnp.isfinite(noise[place]), noise[place], 0.0)
    gap = jnp.where(usable[:, None], steps - steps[place], 0.0)
    length = jnp.sqrt(jnp.sum(gap**2, -1))
    length = jnp.where(length > 0, length, 1.0)
    unit = gap / length[:, None]
    penalty = (jnp.diag(noise) + here) / length[:, None] / length
    ridge = jnp.where(usable, RIDGE * jnp.finfo(steps.dtype).eps, 1.0)
    penalty = jnp.where(usable[:, None] & usable, penalty, 0.0) + jnp.diag(ridge)
    lower = jnp.linalg.cholesky(unit @ unit.T + penalty)
    right = jnp.where(usable, -(unit @ steps[place]) - here / length, 0.0)
    others = jax.scipy.linalg.cho_solve((lower, True), right) / length
    others = jnp.where(jnp.isfinite(others).all(), others, 0.0)
    return jnp.where(present, 1.0 - jnp.sum(others), others)
