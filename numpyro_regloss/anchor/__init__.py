# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Step 3: how the fitted Gaussian becomes the next reference."""

from numpyro_regloss.anchor.adapt_tau import AdaptTau
from numpyro_regloss.anchor.anderson import Anderson
from numpyro_regloss.anchor.base import Anchor
from numpyro_regloss.anchor.keep_covariance import KeepCovariance
from numpyro_regloss.anchor.newton import Newton
from numpyro_regloss.anchor.optax import Optax
from numpyro_regloss.anchor.proximal import Proximal

__all__ = ["AdaptTau", "Anchor", "Anderson", "KeepCovariance", "Newton", "Optax", "Proximal"]
