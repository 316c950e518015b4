# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""The fitted covariance, not only the mean, makes the next reference.

Without inflation the covariance collapses: C_k⁻¹ = C_0⁻¹ + k H for a loss / T with Hessian H. If it is inflated by
a factor c at every step, it settles at (c - 1) H⁻¹ where H is positive definite. Steps are then those of a damped
Newton method. Where H is not positive definite, the covariance grows. A floor and a ceiling bound it. The
regularizer, and so the regularized loss, changes from step to step.

Reference: García Trillos, Kaplan & Sanz-Alonso (2019), "Variational Characterizations of Local Entropy and
Heat Regularization in Deep Learning".
"""

from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp

from numpyro_regloss._core.checks import cast_fields, check_choice, check_positive
from numpyro_regloss._core.linalg import after, lower_of_root
from numpyro_regloss._core.pytree import is_concrete, pytree_dataclass, static_field
from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.anchor.base import Anchor, scale_of
from numpyro_regloss.draws.base import Draws
from numpyro_regloss.fit.base import FitInfo
from numpyro_regloss.gaussians.gaussian import AnyGaussian, Gaussian
from numpyro_regloss.losses.regularized import RegularizedLoss

__all__ = ["KeepCovariance", "KeepCovarianceInfo"]

STRUCTURES = ("isotropic", "diagonal", "dense")
# Relative standard error of a variance from which on the covariance is not worth keeping.
MOST_ERROR = 0.5


class KeepCovarianceInfo(NamedTuple):
    """Diagnostics of the fitted covariance.

    Attributes:
        ok: the next reference may be used.
        num_loss: loss evaluations.
        num_grad: gradient evaluations.
        kept: whether the next reference has this covariance. If not, since the error of a variance is 50 % or
            more, the scale stays and the reference moves to the fitted mean, as with `Proximal`.
        num_floored: eigenvalues that were raised.
        num_capped: eigenvalues that were lowered.
    """

    ok: Array
    num_loss: Array
    num_grad: Array
    kept: Array
    num_floored: Array
    num_capped: Array


@pytree_dataclass
class KeepCovariance(Anchor):
    """N(fitted mean, inflation times the fitted covariance), with eigenvalues between floor and ceiling.

    The tau of the optimizer is only that of the first reference; the history has the marginal variances of each
    step.

    Args:
        covariance: the structure, that of the fit: `"isotropic"`, `"diagonal"` or `"dense"`.
        inflation: c ≥ 1; one lets the covariance collapse to the floor.
        floor: least eigenvalue, in units of the first tau; zero for none.
        ceiling: largest eigenvalue, in units of the first tau.

    Raises:
        TypeError: if a setting is not a number.
        ValueError: if a setting is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax import random
        >>> from numpyro_regloss import Loss, fit, schemes, shift
        >>> loss = Loss.from_function(lambda x: 0.5 * jnp.sum(jnp.array([1.0, 100.0]) * x**2), jnp.ones(2))
        >>> optimizer = schemes.local_entropy(
        ...     loss, 1.0, shift.HMC(100, 50), fit.ForwardKL("diagonal"), KeepCovariance("diagonal", 2.0)
        ... )
        >>> scale = optimizer.run(random.key(0), 15, progress_bar=False).state.reference.scale
        >>> bool(jnp.all(jnp.abs(scale - jnp.array([1.0, 0.1])) < 0.01))  # of H⁻¹ = diag(1, 0.01)
        True
    """

    covariance: str = static_field(default="dense")
    inflation: Any = 1.5
    floor: Any = 0.01
    ceiling: Any = 1.0

    owns_scale: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_choice(self.covariance, "KeepCovariance: covariance", STRUCTURES)
        cast_fields(self, ("inflation", "floor", "ceiling"), _check_factor)
        if not is_concrete((self.inflation, self.floor, self.ceiling)):
            return
        if self.inflation < 1:
            raise ValueError(f"KeepCovariance: expected inflation >= 1, got {self.inflation}.")
        if self.floor > self.ceiling:
            raise ValueError(
                f"KeepCovariance: expected floor <= ceiling, got {self.floor} and {self.ceiling}."
            )

    def check_fit(self, fit: Any) -> None:
        """Refuses fits of another covariance.

        Args:
            fit: of the optimizer under construction.

        Raises:
            ValueError: if it fits no covariance, or one of another structure.
        """
        if fit.covariance != self.covariance:
            raise ValueError(
                f'KeepCovariance: expected a fit with covariance="{self.covariance}", such as '
                f'fit.ForwardKL("{self.covariance}"), got {fit!r}; or give KeepCovariance the structure that '
                "the fit has."
            )

    def first_reference(self, reference: Gaussian) -> Gaussian:
        """The first reference, in the structure of all later ones.

        Args:
            reference: isotropic, or diagonal where tau has one value per parameter.

        Returns:
            The same Gaussian.

        Raises:
            ValueError: if the structure is isotropic and tau is not.
        """
        if self.covariance == "isotropic":
            if reference.scale.ndim:
                raise ValueError(
                    "KeepCovariance: expected one tau for all parameters with an isotropic covariance, got one "
                    'for each; use covariance="diagonal".'
                )
            return reference
        scale = jnp.broadcast_to(reference.scale, reference.mean.shape)
        return reference._replace(scale=jnp.diag(scale) if self.covariance == "dense" else scale)

    def init(self, target: RegularizedLoss) -> Array:
        """The first standard deviations, `()` or `(dim,)`."""
        scale = scale_of(target.reference, "KeepCovariance")
        return jnp.diagonal(scale) if scale.ndim == 2 else scale

    def step(
        self,
        rng_key: Key,
        state: Array,
        target: RegularizedLoss,
        draws: Draws,
        fitted: AnyGaussian,
        fit_info: Any,
    ) -> tuple[Array, AnyGaussian, KeepCovarianceInfo]:
        """Moves the reference and reshapes it.

        Args:
            rng_key: unused.
            state: the first standard deviations.
            target: the target of this step.
            draws: unused.
            fitted: the fitted Gaussian.
            fit_info: from the fit.

        Returns:
            The state, the next reference and the info.

        Raises:
            ValueError: if the fitted covariance has another structure.
        """
        del rng_key, draws
        if not isinstance(fitted, Gaussian) or fitted.structure != self.covariance:
            raise ValueError(
                f"KeepCovariance: expected a fitted covariance of structure {self.covariance!r}, got "
                f"{fitted.structure!r}."
            )
        old = scale_of(target.reference, "KeepCovariance")
        # Singular values, of which a factor has the square roots of the eigenvalues.
        if self.covariance == "dense":
            lower = after(fitted.mean[0], fitted.scale) / state[:, None]
            vector, value, _ = jnp.linalg.svd(lower, full_matrices=False)
        else:
            vector, value = None, fitted.scale / state
        value = jnp.sqrt(self.inflation) * value
        least, most = jnp.sqrt(self.floor), jnp.sqrt(self.ceiling)
        bounded = jnp.clip(value, least, most)
        scale = bounded * state
        if vector is not None:
            scale = lower_of_root((vector * bounded).T * state)
        kept = jnp.isfinite(scale).all() & (_relative_error(fitted, fit_info) < MOST_ERROR)
        reference = Gaussian(fitted.mean, jnp.where(kept, scale, old))
        info = KeepCovarianceInfo(
            ok=jnp.asarray(True),
            num_loss=jnp.asarray(0),
            num_grad=jnp.asarray(0),
            kept=kept,
            num_floored=jnp.sum(value < least),
            num_capped=jnp.sum(value > most),
        )
        return state, reference, info


def _relative_error(fitted: AnyGaussian, fit_info: Any) -> Array:
    error = FitInfo.of(fit_info).covariance_error
    if error is None:
        return jnp.zeros_like(fitted.mean[0])
    error = jnp.diagonal(error) if error.ndim == 2 else error
    return jnp.max(error / fitted.variance)


def _check_factor(value: Any, what: str) -> Array:
    if what.endswith("floor") and isinstance(value, int | float) and value == 0:
        return jnp.zeros(())
    return check_positive(value, what)
