# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Step 1: engines that draw from the shifted density q ∝ exp(-loss / T) N(reference)."""

from numpyro_regloss.shift.adaptive import Adaptive
from numpyro_regloss.shift.base import Shift
from numpyro_regloss.shift.hmc import HMC
from numpyro_regloss.shift.implicit import Implicit
from numpyro_regloss.shift.importance import Importance
from numpyro_regloss.shift.kernel import Kernel
from numpyro_regloss.shift.nuts import NUTS
from numpyro_regloss.shift.sgld import SGLD, RMSprop
from numpyro_regloss.shift.smc import SMC
from numpyro_regloss.shift.svi import SVI

__all__ = [
    "Adaptive",
    "HMC",
    "Implicit",
    "Importance",
    "Kernel",
    "NUTS",
    "RMSprop",
    "SGLD",
    "SMC",
    "SVI",
    "Shift",
]
