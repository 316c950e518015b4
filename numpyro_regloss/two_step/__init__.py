# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""The outer loop, which maps Gaussian to Gaussian: the optimizer, its runs and records of them."""

from numpyro_regloss._core.processes import LostProcessError
from numpyro_regloss.two_step.checkpoint import Checkpoint
from numpyro_regloss.two_step.motion import LeftOut, MotionInfo
from numpyro_regloss.two_step.optimizer import TwoStep
from numpyro_regloss.two_step.outer_step import TwoStepInfo, TwoStepState
from numpyro_regloss.two_step.record import Record, RecordInfo
from numpyro_regloss.two_step.result import RejectedError, TwoStepResult
from numpyro_regloss.two_step.until import Arrived

__all__ = [
    "Arrived",
    "Checkpoint",
    "LeftOut",
    "LostProcessError",
    "MotionInfo",
    "Record",
    "RecordInfo",
    "RejectedError",
    "TwoStep",
    "TwoStepInfo",
    "TwoStepResult",
    "TwoStepState",
]
