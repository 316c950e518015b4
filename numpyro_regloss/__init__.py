# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Local-entropy and heat regularized losses as NumPyro models, minimized by a two-step scheme."""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

# ArviZ 1.x leaves a numpyro behind that loads itself at its first use, and comes out broken where that is the
# import of one of its submodules.
from numpyro import __version__ as _numpyro_version  # noqa: F401

from numpyro_regloss import anchor, fit, schedules, schemes, shift, values
from numpyro_regloss.draws.chains import sharded
from numpyro_regloss.fit.forward_kl import forward_kl
from numpyro_regloss.fit.reverse_kl import reverse_kl
from numpyro_regloss.fit.score_matching import score_matching
from numpyro_regloss.gaussians import Gaussian, LowRankGaussian, kl_divergence
from numpyro_regloss.losses import Loss, Minibatch, RegularizedLoss, model
from numpyro_regloss.two_step import (
    Arrived,
    Checkpoint,
    LostProcessError,
    Record,
    RecordInfo,
    RejectedError,
    TwoStep,
    TwoStepInfo,
    TwoStepResult,
    TwoStepState,
)

if TYPE_CHECKING:
    __version__: str
    from numpyro_regloss import diagnostics, plots, transforms
    from numpyro_regloss.guides import from_guide, to_guide
    from numpyro_regloss.io_arviz import gaussian_to_arviz, to_arviz
    from numpyro_regloss.two_step.checkpoint.results import load, save

__all__ = [
    "Arrived",
    "Checkpoint",
    "Gaussian",
    "Loss",
    "LostProcessError",
    "LowRankGaussian",
    "Minibatch",
    "Record",
    "RecordInfo",
    "RegularizedLoss",
    "RejectedError",
    "TwoStep",
    "TwoStepInfo",
    "TwoStepResult",
    "TwoStepState",
    "__version__",
    "anchor",
    "diagnostics",
    "fit",
    "forward_kl",
    "from_guide",
    "gaussian_to_arviz",
    "kl_divergence",
    "load",
    "model",
    "plots",
    "reverse_kl",
    "save",
    "schedules",
    "schemes",
    "score_matching",
    "sharded",
    "shift",
    "to_arviz",
    "to_guide",
    "transforms",
    "values",
]

# What looks at results, deals with guides or needs Optax, a fifth of all modules, is loaded at its first use.
_LATER = {
    "diagnostics": "diagnostics",
    "from_guide": "guides",
    "gaussian_to_arviz": "io_arviz",
    "load": "two_step.checkpoint.results",
    "plots": "plots",
    "save": "two_step.checkpoint.results",
    "to_arviz": "io_arviz",
    "to_guide": "guides",
    "transforms": "transforms",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return metadata.version("numpyro_regloss")
    if name not in _LATER:
        raise AttributeError(f"module 'numpyro_regloss' has no attribute {name!r}")
    module = import_module(f"numpyro_regloss.{_LATER[name]}")
    return module if _LATER[name] == name else getattr(module, name)


def __dir__() -> list[str]:
    return __all__
