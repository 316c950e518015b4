# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Draws from the shifted density: a weighted cloud, in memory or regenerated from keys."""

from numpyro_regloss.draws.base import BatchMeans, Chunk, Draws, StoredDraws

__all__ = ["BatchMeans", "Chunk", "Draws", "StoredDraws"]
