# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""The paper's step: the reference moves to the fitted mean and keeps its covariance.

Reference: García Trillos, Kaplan & Sanz-Alonso (2019), "Variational Characterizations of Local Entropy
and Heat Regularization in Deep Learning".
"""

from typing import Any

import jax.numpy as jnp

from numpyro_regloss._core.pytree import pytree_dataclass
from numpyro_regloss._core.types import Key
from numpyro_regloss.anchor.base import Anchor, AnchorInfo
from numpyro_regloss.draws.base import Draws
from numpyro_regloss.gaussians.gaussian import AnyGaussian
from numpyro_regloss.losses.regularized import RegularizedLoss

__all__ = ["Proximal"]


@pytree_dataclass
class Proximal(Anchor):
    """N(fitted mean, tau I). Exact steps never increase the regularized loss.

    Example:
        >>> Proximal()
        Proximal()
    """

    def init(self, target: RegularizedLoss) -> tuple[()]:
        """No state."""
        del target
        return ()

    def step(
        self,
        rng_key: Key,
        state: tuple[()],
        target: RegularizedLoss,
        draws: Draws,
        fitted: AnyGaussian,
        fit_info: Any,
    ) -> tuple[tuple[()], AnyGaussian, AnchorInfo]:
        """Moves the reference.

        Args:
            rng_key: unused.
            state: `()`.
            target: the target of this step.
            draws: unused.
            fitted: the fitted Gaussian.
            fit_info: unused.

        Returns:
            `()`, the next reference and an info that is always ok.
        """
        del rng_key, draws, fit_info
        info = AnchorInfo(jnp.asarray(True), jnp.asarray(0), jnp.asarray(0))
        return state, target.reference._replace(mean=fitted.mean), info
