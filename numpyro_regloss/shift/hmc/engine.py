# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Hamiltonian Monte Carlo and the No-U-Turn sampler of NumPyro on the shifted density, several chains at once.

Paths of HMC have a jittered length; those of NUTS end where they would turn back.

References: Neal (2011), "MCMC Using Hamiltonian Dynamics"; Bou-Rabee & Sanz-Serna (2017), "Randomized
Hamiltonian Monte Carlo"; Hoffman & Gelman (2014), "The No-U-Turn Sampler: Adaptively Setting Path Lengths in
Hamiltonian Monte Carlo".
"""

import math
from typing import Any, ClassVar

from numpyro_regloss._core.checks import check_count
from numpyro_regloss._core.pytree import pytree_dataclass, static_field
from numpyro_regloss._core.types import Key
from numpyro_regloss.draws.base import StoredDraws
from numpyro_regloss.losses.regularized import RegularizedLoss
from numpyro_regloss.shift.base import Shift
from numpyro_regloss.shift.hmc import transitions
from numpyro_regloss.shift.hmc.transitions import Settings, check_settings, remedy
from numpyro_regloss.shift.metric import Metric

__all__ = ["HMC", "NUTS"]


class _Hamiltonian(Shift):
    """What the two have in common: all but their settings."""

    uses_gradient: ClassVar[bool] = True

    @property
    def settings(self) -> Settings:
        """The kernel's settings."""
        raise NotImplementedError

    def init(self, rng_key: Key, target: RegularizedLoss) -> transitions.HMCState:
        """Chains at the centre; the first step warms them up."""
        del rng_key
        return transitions.init(self.settings, target)

    def step(
        self, rng_key: Key, state: transitions.HMCState, target: RegularizedLoss
    ) -> tuple[transitions.HMCState, StoredDraws, transitions.HMCInfo]:
        """Draws from q.

        Args:
            rng_key: a random key.
            state: from `init` or the last step.
            target: the target.

        Returns:
            The next state, draws of shape `(num_chains, num_samples, dim)` with scores, diagnostics.
        """
        return transitions.step(self.settings, rng_key, state, target)

    def after_rejection(
        self, old: transitions.HMCState, new: transitions.HMCState
    ) -> transitions.HMCState:
        """Positions go back, and the next step warms up again."""
        return transitions.after_rejection(old, new)

    def remedy(self, info: transitions.HMCInfo, ok: Any) -> str:
        """What to use where walls or steepness stopped the chains."""
        return remedy(self.settings, info, ok)


@pytree_dataclass
class HMC(_Hamiltonian):
    """HMC in whitened coordinates, warmed up once.

    Cheaper per draw than NUTS where one path length suits the target, as it does in whitened
    coordinates near a minimum.

    Args:
        num_warmup: warm-up iterations before the first step (and again when acceptance collapses).
        num_samples: draws per chain and outer step.
        num_chains: chains, run side by side by `vmap`.
        dense_mass: adapt a dense mass matrix, whatever the number of parameters.
        trajectory_length: mean path length in whitened units; each draw takes a path between 0.75 and
            1.25 times as long. A quarter period of the standard normal is pi / 2.
        step_size: initial step size in units of the mass matrix.
        target_accept_prob: acceptance that the step size is tuned to.
        metric: how the mass matrix is estimated and, unless `dense_mass` is set, its form. "low_rank" uses draws
            and their scores: the matrix is dense up to 64 parameters, and beyond that diagonal plus 32 directions.
            "scores" is diagonal, from draws and scores. "variance" is diagonal, from draws alone, as in Stan; it
            is for losses whose gradients do not belong to their values.

    Raises:
        TypeError: if a setting is of the wrong kind.
        ValueError: if a setting is out of range.

    Example:
        >>> HMC(num_warmup=200, num_samples=50).num_chains
        4
    """

    num_warmup: int = static_field(default=200)
    num_samples: int = static_field(default=100)
    num_chains: int = static_field(default=4)
    dense_mass: bool = static_field(default=False)
    trajectory_length: Any = math.pi / 2
    step_size: Any = 0.5
    target_accept_prob: Any = 0.8
    metric: str = static_field(default="low_rank")

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def settings(self) -> Settings:
        """The kernel's settings."""
        return Settings(
            algorithm="HMC",
            num_warmup=self.num_warmup,
            num_samples=self.num_samples,
            num_chains=self.num_chains,
            metric=Metric(self.metric, self.dense_mass),
            max_tree_depth=10,
            trajectory_length=self.trajectory_length,
            step_size=self.step_size,
            target_accept_prob=self.target_accept_prob,
        )


@pytree_dataclass
class NUTS(_Hamiltonian):
    """NUTS in whitened coordinates, warmed up once.

    Args:
        num_warmup: warm-up iterations before the first step (and again when acceptance collapses).
        num_samples: draws per chain and outer step.
        num_chains: chains, run side by side by `vmap`.
        dense_mass: adapt a dense mass matrix, whatever the number of parameters.
        max_tree_depth: at most `2**max_tree_depth` leapfrog steps per draw.
        step_size: initial step size in units of the mass matrix.
        target_accept_prob: acceptance that the step size is tuned to.
        metric: how the mass matrix is estimated and, unless `dense_mass` is set, its form. "low_rank" uses draws
            and their scores: the matrix is dense up to 64 parameters, and beyond that diagonal plus 32 directions.
            "scores" is diagonal, from draws and scores. "variance" is diagonal, from draws alone, as in Stan; it
            is for losses whose gradients do not belong to their values.

    Raises:
        TypeError: if a setting is of the wrong kind.
        ValueError: if a setting is out of range.

    Example:
        >>> NUTS(num_warmup=200, num_samples=50).num_chains
        4
    """

    num_warmup: int = static_field(default=200)
    num_samples: int = static_field(default=100)
    num_chains: int = static_field(default=4)
    dense_mass: bool = static_field(default=False)
    max_tree_depth: int = static_field(default=10)
    step_size: Any = 0.5
    target_accept_prob: Any = 0.8
    metric: str = static_field(default="low_rank")

    def __post_init__(self) -> None:
        check_settings(self)
        check_count(self.max_tree_depth, "NUTS: max_tree_depth")

    @property
    def settings(self) -> Settings:
        """The kernel's settings."""
        return Settings(
            algorithm="NUTS",
            num_warmup=self.num_warmup,
            num_samples=self.num_samples,
            num_chains=self.num_chains,
            metric=Metric(self.metric, self.dense_mass),
            max_tree_depth=self.max_tree_depth,
            trajectory_length=None,
            step_size=self.step_size,
            target_accept_prob=self.target_accept_prob,
        )
