# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""Newton's step on F_tau, with the curvature that the draws show.

The plain step moves the centre x to m = E_q[X], which is gradient descent with the step tau / T, and the
Jacobian of this map is Cov_q / tau. So

    x ← x + (I - C / tau)⁻¹ (m - x),   C = (E_q[g gᵀ])⁻¹ ⪯ Cov_q with the scores g = ∇ log q, else C = Cov_q.

Eigenvalues λ of I - C / tau are replaced by |λ|, since a negative one means a direction in which to leave a
saddle. They are kept between `floor` and one, so that no step is shorter than the plain one. Let e be a component
of m - x, and s its standard error. It is lengthened only as far as it exceeds s: by the factor 1 + (1/λ - 1) (1 -
2 s² / e²)₊. Without scores the floor is at least the amount that chance adds to the largest eigenvalue.

References: García Trillos, Kaplan & Sanz-Alonso (2019), "Variational Characterizations of Local Entropy and
Heat Regularization in Deep Learning"; Jamshidian & Jennrich (1997), "Acceleration of the EM Algorithm by Using
Quasi-Newton Methods"; Dauphin et al. (2014), "Identifying and Attacking the Saddle Point Problem in
High-Dimensional Non-Convex Optimization".
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from numpyro_regloss._core.checks import cast_fields, check_choice, check_positive
from numpyro_regloss._core.pytree import is_concrete, pytree_dataclass, static_field
from numpyro_regloss._core.stats import normalize_log_weight, weight_ess
from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.anchor import safeguard
from numpyro_regloss.anchor.base import Anchor
from numpyro_regloss.anchor.regression import Regression, regress
from numpyro_regloss.anchor.safeguard import REASONS, AcceleratedInfo
from numpyro_regloss.draws.base import Draws
from numpyro_regloss.fit.base import FitInfo
from numpyro_regloss.gaussians.gaussian import AnyGaussian
from numpyro_regloss.losses.regularized import RegularizedLoss

__all__ = ["Newton", "NewtonState"]

# Draws per parameter that a regression needs, and halves of the draws are to make sense.
LEAST_DRAWS = 2
# Effective draws with scores per parameter, from which the curvature is known to some per cent.
KNOWN = 3
# Squared standard errors below which a component is not lengthened at all.
INSIGNIFICANT = 2.0
# Of the radius after a step that was taken back, and after one that was taken.
SHORTER, LONGER = 4.0, 2.0


class NewtonState(NamedTuple):
    """What the next step needs to know about this one.

    Attributes:
        last: the step, which is judged where it led.
        radius: bound on the next step, a fraction of `max_step`.
    """

    last: safeguard.Last
    radius: Array


@pytree_dataclass
class Newton(Anchor):
    """N(x + (I - C / tau)⁻¹ (m - x), tau I), or the plain step N(m, tau I) if that decreases F_tau by more.

    The fit must match moments, as `fit.ForwardKL` does. The curvature C comes from the scores of the draws, which
    NUTS, HMC and AdaptiveImportance have, or from the covariance of the draws. With at least three effective draws
    with scores per parameter, the two steps are not compared beforehand, since half of the draws estimate a
    curvature less well than all. The step is then taken, and undone if the gradient at its end says that F_tau
    rose.

    Args:
        floor: least eigenvalue of I - C / tau: no direction is lengthened by more than 1 / floor.
        max_step: longest distance beyond the plain step, in units of sqrt(tau dim).
        curvature: `"full"`, which needs twice as many draws as parameters, or `"diagonal"`, for more parameters
            with little correlation.

    Raises:
        TypeError: if a setting is not a number.
        ValueError: if a setting is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax import random
        >>> from numpyro_regloss import Loss, schemes, shift
        >>> loss = Loss.from_function(lambda x: jnp.sum(jnp.array([0.1, 1.0]) * (x - 1.0) ** 2), jnp.full(2, 3.0))
        >>> optimizer = schemes.local_entropy(loss, 0.1, shift.HMC(100, 25), anchor=Newton())
        >>> result = optimizer.run(random.key(0), 4, progress_bar=False)
        >>> bool(jnp.all(jnp.abs(result.params - 1.0) < 0.01))
        True
    """

    floor: Any = 0.02
    max_step: Any = 2.0
    curvature: str = static_field(default="full")

    def __post_init__(self) -> None:
        cast_fields(self, ("floor", "max_step"), check_positive)
        if is_concrete(self.floor) and self.floor > 1:
            raise ValueError(
                f"Newton: expected floor between 0 and 1 (the plain step), got {self.floor}."
            )
        check_choice(self.curvature, "Newton: curvature", ("full", "diagonal"))

    def check_fit(self, fit: Any) -> None:
        """Refuses fits that do not match moments.

        Args:
            fit: of the optimizer under construction.

        Raises:
            ValueError: if it is a fit of the heat regularization.
        """
        safeguard.check_uses_draws(fit, "Newton", "for others there is anchor.Anderson")

    def init(self, target: RegularizedLoss) -> NewtonState:
        """No step to judge yet, and the longest steps that are allowed."""
        return NewtonState(safeguard.first(target), jnp.ones_like(target.reference.mean, shape=()))

    def step(
        self,
        rng_key: Key,
        state: NewtonState,
        target: RegularizedLoss,
        draws: Draws,
        fitted: AnyGaussian,
        fit_info: Any,
    ) -> tuple[NewtonState, AnyGaussian, AcceleratedInfo]:
        """Moves the reference.

        Args:
            rng_key: unused.
            state: from `init` or the last step.
            target: the target of this step.
            draws: from the shift.
            fitted: the fitted Gaussian, with the mean m.
            fit_info: from `fit.ForwardKL`.

        Returns:
            The next state, the next reference and the info.

        Raises:
            ValueError: if there are too few draws for a full curvature.
        """
        del rng_key
        if self.curvature == "full" and draws.log_weight.size < LEAST_DRAWS * target.dim:
            raise ValueError(
                f"Newton: expected at least {LEAST_DRAWS * target.dim} draws for the curvature in {target.dim} "
                f'parameters, got {draws.log_weight.size}; draw more, or use Newton(curvature="diagonal") or '
                "anchor.Anderson()."
            )
        known = FitInfo.of(fit_info)
        control = jnp.asarray(0) if known.control_variate is None else known.control_variate
        reference, here, plain = safeguard.in_order(target, fitted)
        regression = regress(
            here,
            draws,
            control,
            compatible=known.score_compatible,
            diagonal=self.curvature == "diagonal",
        )
        stretch = self._stretch(here, draws, regression, fit_info, state.radius)

        def steps(step: Array) -> Array:
            # Half of the draws have twice the variance.
            return jnp.stack([step, step + stretch(step, 2.0)])

        decreases = safeguard.compare(here, draws, regression, steps)
        error = safeguard.whitened_error(here, fit_info)
        _, back = safeguard.rise(state.last, reference, plain, error)
        step = plain + stretch(plain, 1.0)
        # A half of the draws that sees a rise may be wrong where all of them know the curvature.
        is_known = (regression.noise == 0) & (weight_ess(draws.log_weight) >= KNOWN * target.dim)
        take = (decreases[1] > decreases[0]) | is_known
        take &= jnp.isfinite(step).all() & ~back
        reason = jnp.where(take, 0, REASONS.index("no further decrease"))
        reason = jnp.where(back, REASONS.index("went back"), reason)
        mean = jnp.where(take, reference.unwhiten(step), fitted.mean)
        mean = jnp.where(back, state.last.plain, mean)
        radius = jnp.where(back, state.radius / SHORTER, state.radius)
        radius = jnp.where(take, jnp.minimum(LONGER * radius, 1.0), radius)
        last = safeguard.remember(reference, plain, error, fitted.mean, take)
        info = safeguard.report(reason, plain, step, decreases)
        return NewtonState(last, radius), target.reference._replace(mean=mean), info

    def _stretch(
        self,
        target: RegularizedLoss,
        draws: Draws,
        regression: Regression,
        fit_info: Any,
        radius: Array,
    ) -> Callable[[Array, float], Array]:
        # What comes on top of a plain step whose sampling variance is so many times that of all draws.
        error = jnp.sum(safeguard.whitened_error(target, fit_info) ** 2)
        weight = normalize_log_weight(draws.log_weight).reshape(-1)
        if regression.covariance.ndim == 1:
            eigenvalue, vector = 1.0 - regression.covariance, None
            variance = safeguard.whitened_error(target, fit_info) ** 2
        else:
            identity = jnp.eye(target.dim, dtype=weight.dtype)
            eigenvalue, vector = jnp.linalg.eigh(identity - regression.covariance)
            variance = weight**2 @ (regression.residual @ vector) ** 2
            total = jnp.sum(variance)
            # Independent draws would have this variance; the fit knows how correlated they are.
            variance = variance * jnp.where(
                total > 0, error / jnp.where(total > 0, total, 1.0), 0.0
            )
        floor = jnp.maximum(self.floor, jnp.minimum(regression.noise, 1.0))
        factor = 1.0 / jnp.clip(jnp.abs(eigenvalue), floor, 1.0) - 1.0

        def stretch(plain: Array, share: float) -> Array:
            part = plain if vector is None else plain @ vector
            noise = INSIGNIFICANT * share * variance
            kept = jnp.maximum(1.0 - noise / jnp.where(part == 0, 1.0, part**2), 0.0)
            beyond = factor * kept * part
            beyond = beyond if vector is None else vector @ beyond
            longest = radius * self.max_step * jnp.sqrt(1.0 * target.dim)
            length = jnp.linalg.norm(beyond)
            return beyond * jnp.minimum(1.0, longest / jnp.where(length > 0, length, 1.0))

        return stretch
