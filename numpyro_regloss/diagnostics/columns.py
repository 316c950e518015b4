# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""The history of a run as columns, one number per step, under common names whatever the engines are.

Lengths are in standard deviations of the reference, sqrt(tau) for an isotropic one, so that they compare whatever
the units of the parameters.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from numpyro_regloss._core.pytree import fields_of
from numpyro_regloss.two_step.motion import MotionInfo
from numpyro_regloss.two_step.result import TwoStepResult
from numpyro_regloss.two_step.until import is_biased, pulls

__all__ = ["COLUMNS", "Motion", "run_columns", "run_motion"]

# In the order of the table.
COLUMNS = {
    "ok": "whether the step was taken",
    "loss": "at the centre, in the units of the loss",
    "tau": "mean over the parameters, in their squared units",
    "step": "length of the step",
    "noise": "standard error of the fitted mean over its distance from the centre: near 1, the step is noise",
    "error": "root mean square over the parameters of the fitted mean's standard errors",
    "temperature": "of the weights, where the engine sets it",
    "ess": "least effective sample size of the mean",
    "rhat": "greatest split R-hat",
    "khat": "Pareto shape of the weights",
    "num_divergent": "divergent transitions",
    "accept_prob": "mean acceptance probability",
    "step_size": "of the sampler",
    "stability": "step size times steepest curvature (SGLD)",
    "num_rounds": "rounds of draws (Adaptive)",
    "num_stages": "rungs of the ladder (SMC)",
    "num_rejected": "evaluations that were not finite",
    "negative_elbo": "of the guide, in the units of the loss (SVI)",
    "residual": "of the fit's equation, NaN where it was not looked at",
    "local_entropy": "F_tau at the centre, in the units of the loss",
    "local_entropy_error": "standard error of it",
    "decrease": "of the regularized loss by the step, in the units of the loss",
    "decrease_error": "standard error of it",
    "verdict": "1 decrease, 0 not distinguishable, -1 increase",
    "num_loss": "loss evaluations",
    "num_grad": "gradient evaluations",
    "seconds": "wall time",
}
# Two-sided 95 %, as `Record`.
CONFIDENT = 1.96
# Of the engine within `Adaptive` they are those of its last round, which says little of all draws.
OF_ONE_ROUND = ("ess", "rhat")


class Motion(NamedTuple):
    """How the centre moved in the steps that were taken, `(step, dim)`, in standard deviations of the reference.

    Of a history without vectors these are sketches, which are as long and add as the vectors do.

    Attributes:
        pull: from the centre to the fitted mean; with `Proximal` that is the step.
        error: standard errors of the fitted mean, or None where the fit has none.
        step: from one centre to the next.
        stopped: whether the run ended because it had arrived.
        exact: lengths of a history without vectors.
        dim: number of parameters, where it is not that of columns.
        biased: whether errors contain the way that fitted means have left.
    """

    pull: np.ndarray
    error: np.ndarray | None
    step: np.ndarray
    stopped: bool = False
    exact: MotionInfo | None = None
    dim: int | None = None
    biased: bool = False

    @property
    def num_parameters(self) -> int:
        """How many parameters move."""
        return self.pull.shape[1] if self.dim is None else self.dim

    def lengths(self, name: str) -> np.ndarray:
        """Of the steps (`"step"`), pulls or errors, `(step,)`."""
        known = self if self.exact is None else self.exact
        lengths = fields_of(known)[name]
        return _length(lengths) if known is self else lengths


def run_motion(result: TwoStepResult) -> Motion:
    """The centre's motion.

    Args:
        result: of a run.

    Returns:
        The motion, rejected steps left out.
    """
    stopped, motion = result.stopped == "arrived", result.history.motion
    biased = is_biased(result.history)
    if motion is not None:
        ok, dim = np.asarray(result.history.ok), len(result.state.reference.mean)
        exact = jax.tree.map(lambda a: np.asarray(a)[ok], motion)
        return Motion(*pulls(result.history), exact.step_sketch, stopped, exact, dim, biased)
    sd = np.sqrt(np.asarray(result.history.reference.variance))
    step = (np.diff(result.centers, axis=0) / sd)[result.history.ok]
    return Motion(*pulls(result.history), step, stopped, biased=biased)


def run_columns(result: TwoStepResult, motion: Motion) -> dict[str, np.ndarray]:
    """Columns of all steps.

    Args:
        result: of a run.
        motion: of the same run.

    Returns:
        Those of `COLUMNS` that the engines of the run report, each `(step,)`; lengths of rejected steps are NaN.
    """
    history, ok = result.history, np.asarray(result.history.ok)

    def taken(values: np.ndarray) -> np.ndarray:
        column = np.full(len(ok), np.nan)
        column[ok] = values
        return column

    found: dict[str, Any] = {
        "ok": ok,
        "loss": history.loss,
        "tau": np.asarray(history.tau).reshape(len(ok), -1).mean(1),
        "step": taken(motion.lengths("step")),
        "num_loss": history.num_loss,
        "num_grad": history.num_grad,
        "seconds": result.seconds,
    }
    if motion.error is not None:
        error, pull = motion.lengths("error"), motion.lengths("pull")
        found["noise"] = taken(np.divide(error, pull, np.full(len(pull), np.inf), where=pull > 0))
        found["error"] = taken(error / np.sqrt(motion.num_parameters))
    own = set(COLUMNS) - set(found)
    infos = [fields_of(info) for info in (history.record, history.fit, history.shift)]
    of_round = fields_of(infos[-1].get("engine"))
    infos.append({name: a for name, a in of_round.items() if name not in OF_ONE_ROUND})
    for info in infos:
        for name in own - set(found):
            column = info.get(name)
            if column is None or np.shape(column) != ok.shape:
                continue
            # What an engine reports of another one that never drew is no number.
            if not np.isnan(np.asarray(column, float)).all():
                found[name] = np.asarray(column)
    if "verdict" not in found and "local_entropy" in found:
        found |= _decreases(history, found["local_entropy"], found["local_entropy_error"])
    return {name: found[name] for name in COLUMNS if found.get(name) is not None}


def _decreases(history: Any, value: np.ndarray, error: np.ndarray) -> dict[str, np.ndarray]:
    # What a step did is seen at the centre of the next one, by its own draws; of one tau, and of all data.
    tau = np.asarray(history.tau).reshape(len(value), -1)
    same = np.append((tau[1:] == tau[:-1]).all(1), False)
    known = np.asarray(history.ok) & same & np.isfinite(error) & np.isfinite(np.roll(error, -1))
    if history.draws is None or np.isnan(history.draws.share_lower).all():
        known[:] = False
    decrease = np.where(known, value - np.roll(value, -1), np.nan)
    spread = np.where(known, np.hypot(error, np.roll(error, -1)), np.nan)
    verdict = np.where(np.abs(decrease) > CONFIDENT * spread, np.sign(decrease), 0.0)
    return {"decrease": decrease, "decrease_error": spread, "verdict": verdict}


def _length(vectors: np.ndarray) -> np.ndarray:
    return np.sqrt(np.sum(np.asarray(vectors, float) ** 2, -1))
