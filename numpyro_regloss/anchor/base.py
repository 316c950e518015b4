# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Step 3 of the scheme: the next reference. The protocol that every anchor follows."""

from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.draws.base import Draws
from numpyro_regloss.gaussians.gaussian import AnyGaussian, Gaussian
from numpyro_regloss.losses.regularized import RegularizedLoss

__all__ = ["Anchor", "AnchorInfo", "scale_of"]


class AnchorInfo(NamedTuple):
    """What every anchor reports.

    Attributes:
        ok: the next reference may be used.
        num_loss: loss evaluations.
        num_grad: gradient evaluations.
    """

    ok: Array
    num_loss: Array
    num_grad: Array


@runtime_checkable
class Anchor(Protocol):
    """Turns the fitted Gaussian into the next reference, at the tau of this step.

    Attributes:
        owns_scale: whether the scale that it returns is kept. Otherwise the driver sets it to sqrt(tau) of
            the next step, so that schedules of tau are followed.
    """

    owns_scale: ClassVar[bool] = False

    def check_fit(self, fit: Any) -> None:
        """Refuses fits that this anchor cannot work with.

        Args:
            fit: of the optimizer under construction.
        """
        del fit

    def first_reference(self, reference: Gaussian) -> Gaussian:
        """The reference of the first step, in the structure of all later ones.

        Args:
            reference: N(start, tau I), or with one variance per parameter.

        Returns:
            The same Gaussian; in another structure if the anchor sets the scale.
        """
        return reference

    def after_rejection(self, state: Any, reference: AnyGaussian) -> tuple[Any, AnyGaussian]:
        """State and reference after a rejected step: both as they were, unless tau must fall.

        Args:
            state: before the step.
            reference: of the step.

        Returns:
            State and reference of the next step.
        """
        return state, reference

    def init(self, target: RegularizedLoss) -> Any:
        """The anchor's state before the first step.

        Args:
            target: the first target.

        Returns:
            A pytree.
        """
        ...

    def step(
        self,
        rng_key: Key,
        state: Any,
        target: RegularizedLoss,
        draws: Draws,
        fitted: AnyGaussian,
        fit_info: Any,
    ) -> tuple[Any, AnyGaussian, Any]:
        """The next reference.

        Args:
            rng_key: a random key.
            state: from `init` or the last step.
            target: the target of this step, with the reference so far.
            draws: from the shift.
            fitted: from the fit.
            fit_info: from the fit.

        Returns:
            The next state, a Gaussian of the structure of `target.reference`, and the info.
        """
        ...

    def remedy(self, info: Any, ok: Any) -> str:
        """What is wrong by the diagnostics of a run, and what to change; see `shift.Shift.remedy`.

        Args:
            info: of all steps, as NumPy arrays with a leading axis.
            ok: which steps were taken.

        Returns:
            A sentence, or nothing.
        """
        del info, ok
        return ""


def scale_of(reference: AnyGaussian, what: str) -> Array:
    """The scale of a reference, for anchors that change it.

    Args:
        reference: the reference.
        what: begins the error message.

    Returns:
        Its scale, `()`, `(dim,)` or `(dim, dim)`.

    Raises:
        TypeError: if it is of low rank, whose parts are no scale.
    """
    if not isinstance(reference, Gaussian):
        raise TypeError(
            f"{what}: expected a Gaussian as reference, got {type(reference).__name__}; use Gaussian.isotropic."
        )
    return reference.scale
