# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Values of the two regularized losses, each with its error; their gradients; how flat a minimum is."""

from numpyro_regloss._estimate import Estimate
from numpyro_regloss._gradient import value_and_grad
from numpyro_regloss._landscape import Landscape, landscape
from numpyro_regloss._profile import Profile, profile
from numpyro_regloss._values import METHODS, heat, local_entropy

__all__ = [
    "METHODS",
    "Estimate",
    "Landscape",
    "Profile",
    "heat",
    "landscape",
    "local_entropy",
    "profile",
    "value_and_grad",
]
