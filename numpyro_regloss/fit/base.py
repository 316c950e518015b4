# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Step 2 of the scheme: the best Gaussian in KL. The protocol that every fit follows."""

from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

from numpyro_regloss._core.types import Key
from numpyro_regloss.draws.base import Draws
from numpyro_regloss.gaussians.gaussian import AnyGaussian
from numpyro_regloss.losses.regularized import RegularizedLoss

__all__ = ["Fit", "FitResult"]


@runtime_checkable
class Fit(Protocol):
    """Projects the shifted density q to a Gaussian.

    State and info follow the rules of `shift.Shift`.

    Attributes:
        uses_gradient: whether the fit differentiates the loss.
        uses_draws: whether the fit works from draws, so that it needs a shift that makes some.
    """

    uses_gradient: ClassVar[bool] = False
    uses_draws: ClassVar[bool] = True

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


class FitResult(NamedTuple):
    """What the stand-alone fits return; unpacks as a pair.

    Attributes:
        gaussian: a `Gaussian`, or a `LowRankGaussian` for `covariance="low_rank"`.
        info: the fit's diagnostics.
    """

    gaussian: AnyGaussian
    info: Any
