# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Step 2 of the scheme: the best Gaussian in KL. The protocol that every fit follows."""

from typing import Any, ClassVar, Protocol, runtime_checkable

from numpyro_regloss._typing import Key
from numpyro_regloss.draws import Draws
from numpyro_regloss.gaussian import Gaussian
from numpyro_regloss.regularized import RegularizedLoss

__all__ = ["Fit"]


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
    ) -> tuple[Any, Gaussian, Any]:
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
