# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""What a run returns, and how it tells of trouble: one warning with the remedy, or an error with the result."""

import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np

from numpyro_regloss._core.html import as_html
from numpyro_regloss._core.pytree import fields_of
from numpyro_regloss.two_step.motion import no_vectors
from numpyro_regloss.two_step.outer_step import TwoStepInfo, TwoStepState

__all__ = [
    "RejectedError",
    "TwoStepResult",
    "disagreement",
    "headline",
    "rejections",
    "remedies",
    "report_interruption",
    "report_trouble",
    "silent_unless",
]


# R-hat of chains between which there is fifteen times the variance that there is within. Chains that mix slowly in
# one place come to two or three; of those the report tells.
APART = 4.0
# Of the parameters, in notebooks.
SHOWN_LEAVES, SHOWN_SIZE = 20, 10


class TwoStepResult(NamedTuple):
    """What a run returns.

    Attributes:
        params: the parameters at the last centre, as the user wrote them.
        state: to continue from, `run(..., init_state=result.state)`.
        history: a `TwoStepInfo` of NumPy arrays with a leading axis of steps.
        seconds: wall time of each step, `(step,)`: the time of its chunk divided by the steps in it. The first
            step includes compilation. It is not in the history, which depends on the key alone. None unless `run`
            made it.
        stopped: why the run ended before its number of steps: `"arrived"`, `"callback"`, `"interrupted"` (Ctrl-C),
            `"terminated"` (SIGTERM, where there are checkpoints), `"exhausted"` (no further batch); or None.
        path: numbers of steps and centres `(centre, dim)` that `Record(centers_every=k)` kept where the history
            has no vectors, the first and the last among them; else None.
    """

    params: Any
    state: TwoStepState
    history: TwoStepInfo
    seconds: Any = None
    stopped: str | None = None
    path: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def centers(self) -> np.ndarray:
        """Centres before the first and after every step, flat, `(step + 1, dim)`; or those that were kept."""
        if self.path is not None:
            return self.path[1]
        if self.history.motion is not None:
            raise ValueError(no_vectors("TwoStepResult.centers") + ".")
        before, last = self.history.reference.mean, self.state.reference.mean
        return np.concatenate([np.asarray(before), np.asarray(last)[None]])

    @property
    def center_steps(self) -> np.ndarray:
        """How many steps were done at each of `centers`, including steps of earlier runs."""
        if self.path is not None:
            return self.path[0]
        count, last = len(self.centers), int(self.state.step)
        return np.arange(last + 1 - count, last + 1)

    def _repr_html_(self) -> str:
        history, ok = self.history, np.asarray(self.history.ok)
        if ok.ndim != 1 or not ok.size:
            return as_html(f"No steps of one run: history.ok has shape {ok.shape}.")
        head = f"{ok.sum()} of {ok.size} steps taken"
        if self.seconds is not None:
            head += f", {np.sum(self.seconds):.1f} s"
        if self.stopped is not None:
            head += f", stopped: {self.stopped}"
        steps = [["step #", "loss before the step", "tau"]]
        for step in sorted({0, ok.size - 1}):
            values = (history.loss[step], np.mean(history.tau[step]))
            steps.append([str(step), *(f"{float(value):.4g}" for value in values)])
        found = jax.tree_util.tree_flatten_with_path(self.params)[0]
        params = [["parameters", "shape", "value"]]
        for path, leaf in found[:SHOWN_LEAVES]:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            params.append([name, str(np.shape(leaf)), _brief(leaf)])
        more = len(found) - SHOWN_LEAVES
        rest = f"{more} more arrays of parameters are not shown. " if more > 0 else ""
        return as_html(
            f"{head}.", steps, params, f"{rest}diagnostics.summary(result) is the whole report."
        )


def _brief(leaf: Any) -> str:
    # Values of keys, of large arrays, and of those that other processes hold in part, are not shown.
    is_array = isinstance(leaf, jax.Array)
    is_key = is_array and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    is_elsewhere = is_array and not leaf.is_fully_addressable
    if is_key or is_elsewhere or np.size(leaf) > SHOWN_SIZE:
        return ""
    return np.array2string(np.asarray(leaf), precision=4)


class RejectedError(RuntimeError):
    """Every step of a run was rejected.

    Attributes:
        result: the result, with the diagnostics of each rejected step.
    """

    def __init__(self, message: str, result: TwoStepResult) -> None:
        super().__init__(message)
        self.result = result


def headline(infos: TwoStepInfo, uses_draws: bool) -> dict[str, str]:  # noqa: FBT001
    """What the progress bar shows of a chunk: its last step, and the last value of the regularized loss in it.

    Args:
        infos: of the steps of a chunk, with their axis.
        uses_draws: whether the fit does, so that the run minimizes F_tau, not the heat.

    Returns:
        Texts by name. The regularized loss has its error, and is left out where no step has its value.
    """
    info = jax.tree.map(lambda a: a[-1], infos)
    shown = {"loss": f"{float(info.loss):.4g}"}
    known, name, values, errors = fields_of(info.shift), "F_tau", np.empty(0), np.empty(0)
    if infos.record is not None:
        name, found = (
            ("F_tau", infos.record.local_entropy) if uses_draws else ("heat", infos.record.heat)
        )
        values, errors = found.value, found.error
    elif "local_entropy_error" in known:
        # Some engines find it with their draws.
        values, errors = infos.shift.local_entropy, infos.shift.local_entropy_error
    steps = np.flatnonzero(np.isfinite(values) & np.isfinite(errors))
    if steps.size:
        shown[name] = f"{float(values[steps[-1]]):.4g} ± {float(errors[steps[-1]]):.2g}"
    shown["tau"] = f"{float(np.mean(info.tau)):.4g}"
    # Of the engine that drew: `Auto` has the fields of two.
    drew = [n for n in ("accept_prob", "ess") if n in known and not np.isnan(known[n])]
    for name in drew[:1]:
        shown[name] = f"{float(known[name]):.4g}"
    return shown


def report_interruption(
    cause: BaseException | str | None, result: TwoStepResult, num_steps: int
) -> None:
    """Warns of Ctrl-C and SIGTERM, and raises anything else again with the result so far as its attribute.

    Args:
        cause: what was raised on the way, or another reason.
        result: what was computed before.
        num_steps: steps that were asked for.
    """
    if not isinstance(cause, BaseException) and cause != "terminated":
        return
    ended = "terminated by SIGTERM" if cause == "terminated" else "interrupted"
    message = f"TwoStep.run: {ended} after {len(result.history.ok)} of {num_steps} steps"
    if not isinstance(cause, Exception):
        warnings.warn(f"{message}.", stacklevel=3)
        return
    # Another run's result, of a run within the callback, stays.
    if not hasattr(cause, "result"):
        vars(cause)["result"] = result
        cause.add_note(f"{message}; the exception's attribute `result` holds what they computed.")
    raise cause


def rejections(history: TwoStepInfo) -> str:
    """A sentence on rejected steps, or nothing."""
    ok = history.ok
    if ok.all():
        return ""
    undefined = ~ok & ~np.isfinite(history.loss)
    # Draws of a cloud that all failed; +infinity alone is a wall.
    known = fields_of(history.shift)
    ess, num_failed = known.get("ess", 0), known.get("num_rejected", 0)
    nowhere = ~ok & ~undefined & (np.asarray(ess) == 0) & (np.asarray(num_failed) > 0)
    parts = [f"{np.sum(~ok)} of {ok.size} steps were rejected and kept their reference."]
    if (~ok & ~undefined & ~nowhere).any():
        parts.append(
            "Causes are a loss or fit that is not finite, all weight on one draw, or a sampler that did not move: "
            "look at history.shift and history.fit, and use a smaller tau, more draws or another start."
        )
    if undefined.any():
        parts.append(
            f"In {undefined.sum()} of them the loss itself is not finite at the centre, before anything is drawn: "
            "look for NaN or infinity among the data and arguments of these steps, or go back to a state whose "
            "loss is finite."
        )
    if nowhere.any():
        parts.append(
            f"In {nowhere.sum()} of them the loss is finite at the centre, but NaN or -infinity at the draws, so "
            "that none had a weight: look for what is not defined around the centre (logarithms and roots of "
            "negative numbers, overflow); use unconstrained parameters (exp of them), or return infinity there."
        )
    return " ".join(parts)


def disagreement(history: TwoStepInfo) -> str:
    """A sentence on chains that stayed in different places in most steps that were taken, or nothing."""
    ok = np.asarray(history.ok)
    rhat = np.broadcast_to(fields_of(history.shift).get("rhat", np.nan), ok.shape)
    # Steps of an engine without chains have none.
    rhat = rhat[ok & ~np.isnan(rhat)]
    if not rhat.size or np.median(rhat) < APART:
        return ""
    return (
        f"TwoStep.run: in {np.sum(rhat >= APART)} of {rhat.size} steps that were taken the chains stayed in "
        f"different places (split R-hat {np.median(rhat):.3g} in the median), so that the fitted mean depends on "
        "how many of them are where: use shift.SMC, which weighs several modes, longer chains, or a smaller tau."
    )


def remedies(history: TwoStepInfo, optimizer: Any) -> dict[str, str]:
    """What the engines themselves have to say of a run.

    Args:
        history: of the run.
        optimizer: of the run.

    Returns:
        Sentences by part.
    """
    found = {
        "shift": optimizer.shift.remedy(history.shift, history.ok),
        "fit": optimizer.fit.remedy(history.fit, history.ok),
        "anchor": optimizer.anchor.remedy(history.anchor, history.ok),
    }
    return {part: sentence for part, sentence in found.items() if sentence}


def report_trouble(result: TwoStepResult, optimizer: Any, of_loss: str = "") -> None:
    """Warns once of rejected steps, of chains apart and of what the engines themselves have to say of the run.

    Args:
        result: of the run.
        optimizer: of the run.
        of_loss: what the loss has to say of its calls.

    Raises:
        RejectedError: if every step was rejected.
    """
    rejected = rejections(result.history)
    parts = [rejected and f"TwoStep.run: {rejected}", *remedies(result.history, optimizer).values()]
    parts.append(disagreement(result.history))
    message = " ".join(filter(None, parts))
    if not result.history.ok.any():
        text = f"{message} No step succeeded; error.result holds the history. {of_loss}".rstrip()
        raise RejectedError(text, result)
    message = " ".join(filter(None, [message, of_loss]))
    if message:
        warnings.warn(message, stacklevel=3)


@contextmanager
def silent_unless(speaks: bool) -> Generator[None, None, None]:  # noqa: FBT001
    """Within it nothing is warned of, unless this process speaks for all."""
    if speaks:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
