# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Moment matching: the best Gaussian in the second argument of KL."""

from numpyro_regloss.fit.forward_kl.engine import ForwardKL, ForwardKLInfo, forward_kl

__all__ = ["ForwardKL", "ForwardKLInfo", "forward_kl"]
