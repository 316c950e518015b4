# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Step 1: engines that draw from the shifted density q ∝ exp(-loss / T) N(reference)."""

from numpyro_regloss.shift.adaptive import Adaptive
from numpyro_regloss.shift.base import Shift
from numpyro_regloss.shift.hmc import HMC
from numpyro_regloss.shift.implicit import Implicit
from numpyro_regloss.shift.importance import Importance
from numpyro_regloss.shift.nuts import NUTS

__all__ = ["HMC", "NUTS", "Adaptive", "Implicit", "Importance", "Shift"]
