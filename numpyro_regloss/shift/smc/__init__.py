# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Sequential Monte Carlo from the reference to q."""

from numpyro_regloss.shift.smc.engine import SMC, SMCInfo

__all__ = ["SMC", "SMCInfo"]
