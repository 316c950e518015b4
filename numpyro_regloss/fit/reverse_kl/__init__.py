# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""The best Gaussian in the first argument of KL."""

from numpyro_regloss.fit.reverse_kl.engine import (
    ReverseKL,
    ReverseKLInfo,
    ReverseKLState,
    reverse_kl,
)

__all__ = ["ReverseKL", "ReverseKLInfo", "ReverseKLState", "reverse_kl"]
