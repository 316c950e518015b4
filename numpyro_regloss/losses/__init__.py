# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Losses: of functions and of NumPyro models, on data and minibatches, and regularized."""

from numpyro_regloss.losses.loss import Loss
from numpyro_regloss.losses.minibatch import Minibatch
from numpyro_regloss.losses.regularized import RegularizedLoss, model

__all__ = ["Loss", "Minibatch", "RegularizedLoss", "model"]
