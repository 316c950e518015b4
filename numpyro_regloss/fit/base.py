# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Step 2 of the scheme: the best Gaussian in KL. The protocol that every fit follows."""

from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

from numpyro_regloss._core.foreign import attribute
from numpyro_regloss._core.pytree import fields_of
from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.draws.base import Draws
from numpyro_regloss.gaussians.gaussian import AnyGaussian
from numpyro_regloss.losses.regularized import RegularizedLoss

__all__ = ["Fit", "FitInfo", "FitResult"]


class FitInfo(NamedTuple):
    """The fields of a fit's info that others read, with defaults for those that a fit does not report.

    Attributes:
        ok: the Gaussian may be used.
        num_loss: loss evaluations.
        num_grad: gradient evaluations.
        mean_error: standard errors of the fitted mean, `(dim,)`; None if they are not known.
        biased: whether `mean_error` contains, beside noise, the way that the mean has left.
        covariance_error: of the covariance `(dim, dim)`, or of the variances, or None.
        control_variate: index of the control variate of the mean, see `draws.control_variates`; None of fits that
            match no moments.
        score_compatible: whether the scores are those of the draws.
    """

    ok: Any = True
    num_loss: Any = 0
    num_grad: Any = 0
    mean_error: Array | None = None
    biased: Any = False
    covariance_error: Array | None = None
    control_variate: Array | None = None
    score_compatible: Any = True

    @classmethod
    def of(cls, info: Any) -> "FitInfo":
        """The fields of a fit's own info that others read.

        Args:
            info: from `Fit.step`, a named tuple or a dataclass; its fields, or properties.

        Returns:
            The values of these fields, and the defaults for missing ones.

        Raises:
            TypeError: if the info is neither.
        """
        # Refuses what has no fields. Of what has some, a property, which takes no place in a history, is as good.
        fields_of(info)
        return cls(**{name: attribute(info, name, a) for name, a in cls._field_defaults.items()})


@runtime_checkable
class Fit(Protocol):
    """Projects the shifted density q to a Gaussian.

    State and info follow the rules of `shift.Shift`.

    Attributes:
        uses_gradient: whether the fit differentiates the loss.
        uses_draws: whether the fit works from draws, so that it needs a shift that makes some.
        needs_scores: whether the draws must have scores.
        covariance: the family of covariances that are fitted; None for that of the reference.
    """

    uses_gradient: ClassVar[bool] = False
    uses_draws: ClassVar[bool] = True
    needs_scores: ClassVar[bool] = False
    covariance: Any = None

    def init(self, rng_key: Key, target: RegularizedLoss) -> Any:
        """The fit's state before the first step.

        Args:
            rng_key: a random key.
            target: the first target.

        Returns:
            A pytree.
        """
        ...

    def step(
        self, rng_key: Key, state: Any, target: RegularizedLoss, draws: Draws
    ) -> tuple[Any, AnyGaussian, Any]:
        """The best Gaussian.

        Args:
            rng_key: a random key.
            state: from `init` or the last step.
            target: the target.
            draws: from the shift.

        Returns:
            The next state, the fitted Gaussian and the info.
        """
        ...

    def after_rejection(self, old: Any, new: Any) -> Any:
        """The state to go on with after a rejected step: the old one, unless something must be measured anew.

        Args:
            old: the state before the step.
            new: the state that the step returned, which may hold non-finite values.

        Returns:
            A state that is safe to step from.
        """
        del new
        return old

    def center_loss(self, info: Any) -> Any:
        """The loss at the reference's mean or draws of it, if it came with the step's gradients, see `Shift`.

        Args:
            info: of the step.

        Returns:
            A scalar, or None if the driver is to evaluate it.
        """
        del info

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


class FitResult(NamedTuple):
    """What the stand-alone fits return; unpacks as a pair.

    Attributes:
        gaussian: a `Gaussian`, or a `LowRankGaussian` for `covariance="low_rank"`.
        info: the fit's diagnostics.
    """

    gaussian: AnyGaussian
    info: Any
