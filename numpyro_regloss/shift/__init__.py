# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Step 1: engines that draw from the shifted density q ∝ exp(-loss / T) N(reference)."""

from numpyro_regloss.shift.adaptive import Adaptive, AdaptiveInfo, AdaptiveState
from numpyro_regloss.shift.adaptive_importance import (
    AdaptiveImportance,
    AdaptiveImportanceInfo,
    AdaptiveImportanceState,
)
from numpyro_regloss.shift.auto import Auto, AutoInfo, AutoState
from numpyro_regloss.shift.base import Shift
from numpyro_regloss.shift.hmc import HMC, NUTS, HMCInfo, HMCState
from numpyro_regloss.shift.implicit import Implicit, ImplicitInfo
from numpyro_regloss.shift.importance import Importance, ImportanceInfo
from numpyro_regloss.shift.kernel import Kernel, KernelInfo, KernelState
from numpyro_regloss.shift.sgld import SGLD, RMSprop, SGLDInfo, SGLDState
from numpyro_regloss.shift.smc import SMC, SMCInfo
from numpyro_regloss.shift.svi import SVI, SVIInfo, SVIState

__all__ = [
    "Adaptive",
    "AdaptiveImportance",
    "AdaptiveImportanceInfo",
    "AdaptiveImportanceState",
    "AdaptiveInfo",
    "AdaptiveState",
    "Auto",
    "AutoInfo",
    "AutoState",
    "HMC",
    "HMCInfo",
    "HMCState",
    "Implicit",
    "ImplicitInfo",
    "Importance",
    "ImportanceInfo",
    "Kernel",
    "KernelInfo",
    "KernelState",
    "NUTS",
    "RMSprop",
    "SGLD",
    "SGLDInfo",
    "SGLDState",
    "SMC",
    "SMCInfo",
    "SVI",
    "SVIInfo",
    "SVIState",
    "Shift",
]
