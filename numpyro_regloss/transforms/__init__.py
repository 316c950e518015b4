# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Regularized losses as Optax transformations, for existing training loops.

Each is an `optax.GradientTransformationExtraArgs` for parameters of any structure. The loop does not change: it
takes one gradient per call of `update`, at its parameters. These parameters are a draw around the centre, and
`eval_params` returns the centre. After every `num_samples` calls the centre makes a step. If `update` gets
`grad_fn(params, i)`, one call makes the whole step, and the parameters are the centre. In an `optax.chain` each
comes last, since what follows would move the parameters away from the draw. Clipping and the like come before it,
or belong to the optimizer of the centre.
"""

from numpyro_regloss.transforms.center import eval_params
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
