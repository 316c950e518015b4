# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Importance sampling from a Gaussian that follows q."""

from numpyro_regloss.shift.adaptive_importance.engine import (
    AdaptiveImportance,
    AdaptiveImportanceInfo,
    AdaptiveImportanceState,
)

__all__ = ["AdaptiveImportance", "AdaptiveImportanceInfo", "AdaptiveImportanceState"]
