# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Any MCMC kernel of NumPyro on q."""

from numpyro_regloss.shift.kernel.engine import Kernel, KernelInfo, KernelState

__all__ = ["Kernel", "KernelInfo", "KernelState"]
