# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Step 2: the best Gaussian in KL, by either argument."""

from numpyro_regloss.fit.base import Fit
from numpyro_regloss.fit.forward_kl import ForwardKL
from numpyro_regloss.fit.reverse_kl import ReverseKL
from numpyro_regloss.fit.robbins_monro import RobbinsMonro

__all__ = ["Fit", "ForwardKL", "ReverseKL", "RobbinsMonro"]
