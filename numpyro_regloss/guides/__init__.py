# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Guides of NumPyro as Gaussians, and Gaussians as guides."""

from numpyro_regloss.guides.gaussian_guide import GaussianGuide, to_guide
from numpyro_regloss.guides.reading import GuideInfo, from_guide

__all__ = ["GaussianGuide", "GuideInfo", "from_guide", "to_guide"]
