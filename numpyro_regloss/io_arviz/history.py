# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""The history of a run as one labelled dataset over its steps."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from numpyro_regloss._core.pytree import fields_of, has_fields
from numpyro_regloss.io_arviz.draws import plain
from numpyro_regloss.io_arviz.labels import Labels
from numpyro_regloss.two_step.motion import no_vectors
from numpyro_regloss.two_step.result import TwoStepResult
from numpyro_regloss.values.estimate import Estimate

__all__ = ["history_dataset", "iterations"]

PARTS = ("shift", "fit", "anchor", "record")


def iterations(result: TwoStepResult) -> np.ndarray:
    """The true numbers of the steps of a history, which may continue an earlier run."""
    count = len(result.history.ok)
    return np.arange(count) + int(result.state.step) - count


def history_dataset(result: TwoStepResult, labels: Labels) -> Any:
    """Everything of the history that is a number, under its path there, and the wall seconds of each step.

    Args:
        result: of the run.
        labels: of the parameters.

    Returns:
        A dataset with the dimension `iteration`, and `param` for what has a value per parameter. Of a history
        without vectors its attribute `left_out` says so; centres that were kept have the dimension
        `center_iteration`.
    """
    import xarray as xr  # noqa: PLC0415

    # That of `TwoStep.scan` is on the device.
    history = jax.device_get(result.history)
    variables = {
        "ok": history.ok,
        "loss": history.loss,
        "tau": history.tau,
        "num_loss": history.num_loss,
        "num_grad": history.num_grad,
    }
    if history.motion is None:
        variables |= {
            "center": history.reference.mean,
            "fitted_mean": history.fitted.mean,
            "fitted_sd": np.sqrt(np.asarray(history.fitted.variance)),
            "step_norm": np.linalg.norm(np.diff(result.centers, axis=0), axis=-1),
        }
    else:
        variables["step_norm"] = history.motion.step_norm
    if result.seconds is not None:
        variables["seconds"] = result.seconds
    for part in PARTS:
        variables |= dict(_numbers(part, fields_of(history)[part]))
    dim = len(labels.flat)
    dataset = xr.Dataset(
        {name: (_dims(name, np.shape(a)[1:], dim), plain(a)) for name, a in variables.items()},
        coords={"iteration": iterations(result), "param": labels.flat},
    )
    if history.motion is not None:
        dataset.attrs["left_out"] = f"{no_vectors('optimization')}."
    if result.path is not None:
        steps, centers = result.path
        dataset = dataset.assign_coords(center_iteration=steps)
        dataset["center"] = (("center_iteration", "param"), plain(centers))
    return dataset


def _numbers(path: str, info: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(info, Estimate):
        yield path, info.value
        yield f"{path}_error", info.error
        return
    if has_fields(info):
        for name, value in fields_of(info).items():
            yield from _numbers(f"{path}_{name}", value)
    elif isinstance(info, np.ndarray) and info.ndim and info.dtype != object:
        yield path, info


def _dims(name: str, shape: tuple[int, ...], dim: int) -> tuple[str, ...]:
    flat = ["param", "param_bis"] if len(shape) > 1 else ["param"]
    if shape == (dim,) * len(shape):
        return ("iteration", *flat[: len(shape)])
    return ("iteration", *(f"{name}_dim_{axis}" for axis in range(len(shape))))
