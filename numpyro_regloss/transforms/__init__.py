# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Regularized losses as Optax transformations, for training loops that are there already.

Each is an `optax.GradientTransformationExtraArgs` for parameters of any structure. The loop stays as it is: one
gradient per call of `update`, taken where the parameters stand. They stand at a draw around the centre, which
`eval_params` returns; every `num_samples` calls the centre itself makes a step. Given `grad_fn(params, i)`, a
call of `update` makes the whole step by itself, and the parameters are the centre.
"""

from numpyro_regloss.transforms.base import eval_params
from numpyro_regloss.transforms.gradient_free import (
    GradientFreeInfo,
    GradientFreeState,
    gradient_free,
)
from numpyro_regloss.transforms.heat import HeatState, fsgld, heat
from numpyro_regloss.transforms.local_entropy import (
    LocalEntropyState,
    entropy_sgd,
    local_entropy,
)

__all__ = [
    "GradientFreeInfo",
    "GradientFreeState",
    "HeatState",
    "LocalEntropyState",
    "entropy_sgd",
    "eval_params",
    "fsgld",
    "gradient_free",
    "heat",
    "local_entropy",
]
