# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Hamiltonian Monte Carlo and NUTS in whitened coordinates."""

from numpyro_regloss.shift.hmc.engine import HMC, NUTS
from numpyro_regloss.shift.hmc.transitions import HMCInfo, HMCState

__all__ = ["HMC", "HMCInfo", "HMCState", "NUTS"]
