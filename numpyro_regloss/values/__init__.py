# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Values of the two regularized losses, each with its error; their gradients; how flat a minimum is."""

from numpyro_regloss.values.estimate import Estimate
from numpyro_regloss.values.estimators import METHODS, heat, local_entropy
from numpyro_regloss.values.flatness import Profile, profile
from numpyro_regloss.values.gradient import value_and_grad
from numpyro_regloss.values.grid import Landscape, landscape
from numpyro_regloss.values.verdict import FlatnessVerdict, flatness_verdict

__all__ = [
    "METHODS",
    "Estimate",
    "FlatnessVerdict",
    "Landscape",
    "Profile",
    "flatness_verdict",
    "heat",
    "landscape",
    "local_entropy",
    "profile",
    "value_and_grad",
]
