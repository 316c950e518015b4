# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Importance sampling: a Gaussian cloud around the centre, weighted by the loss."""

from numpyro_regloss.shift.importance.engine import Importance, ImportanceInfo

__all__ = ["Importance", "ImportanceInfo"]
