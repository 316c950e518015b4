# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Step 2 of the scheme: the best Gaussian in KL. The protocol that every fit follows."""

from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

from numpyro_regloss._checks import check_choice, check_count
from numpyro_regloss._typing import Key
from numpyro_regloss.draws import Draws
from numpyro_regloss.gaussian import AnyGaussian
from numpyro_regloss.regularized import RegularizedLoss

__all__ = ["FAMILIES", "Fit", "FitResult", "check_family"]

FAMILIES = ("reference", "isotropic", "diagonal", "dense", "low_rank")


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


def check_family(covariance: Any, rank: Any, what: str) -> None:
    """Refuses unknown families of covariances, and a rank that is missing or that nothing uses.

    Args:
        covariance: one of `FAMILIES`.
        rank: number of factors for `"low_rank"`, else None.
        what: begins the error message.

    Raises:
        ValueError: if the family is unknown, or rank and family do not go together.
    """
    check_choice(covariance, f"{what}: covariance", FAMILIES)
    if covariance == "low_rank":
        if rank is None:
            raise ValueError(
                f'{what}: expected rank, the number of factors, with covariance="low_rank", got None; '
                "try rank=5."
            )
        check_count(rank, f"{what}: rank")
    elif rank is not None:
        raise ValueError(
            f'{what}: expected rank only with covariance="low_rank", got rank={rank!r} with '
            f"{covariance!r}."
        )
