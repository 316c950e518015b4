# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Stochastic gradient Langevin dynamics."""

from numpyro_regloss.shift.sgld.engine import SGLD, SGLDInfo, SGLDState
from numpyro_regloss.shift.sgld.langevin import RMSprop

__all__ = ["RMSprop", "SGLD", "SGLDInfo", "SGLDState"]
