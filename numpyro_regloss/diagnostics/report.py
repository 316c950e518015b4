# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""A run at a glance: columns of its steps, the draws at its end, and what to change."""

from typing import Any, NamedTuple

import numpy as np

from numpyro_regloss._core.html import as_html
from numpyro_regloss._core.pareto import MAX_KHAT, pareto_khat
from numpyro_regloss._core.pytree import with_context_axes
from numpyro_regloss._core.stats import weight_ess
from numpyro_regloss.diagnostics.arrival import Finding, Run, arrival
from numpyro_regloss.diagnostics.columns import COLUMNS, run_columns, run_motion
from numpyro_regloss.diagnostics.doubts import LEAST_ESS, MAX_RHAT
from numpyro_regloss.diagnostics.findings import judge
from numpyro_regloss.diagnostics.look import Look, look_around
from numpyro_regloss.diagnostics.rank_diagnostics import rank_diagnostics
from numpyro_regloss.draws.base import BatchMeans, Draws
from numpyro_regloss.two_step.optimizer import TwoStep
from numpyro_regloss.two_step.result import TwoStepResult

__all__ = ["DrawsSummary", "RunSummary", "summary"]

# Rows of a report, evenly spread over the run, the first and the last among them.
SHOWN_ROWS = 12
SHOWN_NAMES = 3
# Not shown: they follow from others, or are constant in most runs.
HIDDEN = ("error", "local_entropy_error", "decrease_error", "ok")
# Not shown where there were none.
COUNTS = ("num_divergent", "num_rejected", "num_grad")


class DrawsSummary(NamedTuple):
    """Diagnostics of the draws at the end.

    Attributes:
        names: of the parameters, unconstrained.
        ess_bulk: `(dim,)`, for Markov chains, rank-normalized. This and the next two are NaN for independent or
            weighted draws.
        ess_tail: `(dim,)`, the smaller one of the 5 % and the 95 % quantile.
        rhat: `(dim,)`, rank-normalized and folded.
        ess_weights: effective sample size 1 / Σ w² of the weights: the number of draws where they are equal.
        khat: Pareto shape of the weights; -inf where they are equal.
    """

    names: tuple[str, ...]
    ess_bulk: np.ndarray
    ess_tail: np.ndarray
    rhat: np.ndarray
    ess_weights: float
    khat: float

    def __str__(self) -> str:
        if np.isnan(self.rhat).all():
            return (
                f"Draws at the end: effective number {self.ess_weights:.4g}, k-hat {self.khat:.2f}."
            )
        return (
            f"Draws at the end: bulk ESS {self.ess_bulk.min():.4g}, tail ESS {self.ess_tail.min():.4g}, R-hat "
            f"{self.rhat.max():.3f} at worst."
        )

    def _repr_html_(self) -> str:
        return as_html(str(self))


class RunSummary(NamedTuple):
    """What a run did; prints as a report.

    Attributes:
        columns: of the steps, by name, each `(step,)`; see `describe`.
        draws: of the end, or None.
        findings: what is wrong; empty for a good run.
        arrived: whether the centre has arrived: True, False if it still moves, None if it cannot be told.
        arrival: the same as a sentence.
        checked: what was checked and what was not, as sentences.
    """

    columns: dict[str, np.ndarray]
    draws: DrawsSummary | None
    findings: tuple[Finding, ...]
    arrived: bool | None
    arrival: str
    checked: str = ""

    def table(self, most: int | None = None) -> str:
        """One row per step.

        Args:
            most: rows at most, evenly spread over the run; default: all.

        Returns:
            The text. A rejected step is marked by a cross.
        """
        cells = self._cells(most)
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            for line in cells
        )

    def _cells(self, most: int | None) -> list[list[str]]:
        count = len(self.columns["ok"])
        most = count if most is None else max(min(most, count), 1)
        rows = np.unique(np.linspace(count - 1, 0, most).round().astype(int))
        shown = {
            name: column
            for name, column in self.columns.items()
            if name not in HIDDEN and not (name in COUNTS and not np.any(column))
        }
        cells = [["step #", *shown]]
        for row in rows:
            mark = "" if self.columns["ok"][row] else " x"
            cells.append([f"{row}{mark}", *(_text(column[row]) for column in shown.values())])
        return cells

    def describe(self) -> str:
        """What the columns mean, one per line."""
        return "\n".join(f"{name}: {COLUMNS[name]}" for name in self.columns)

    def __str__(self) -> str:
        head, sentences = self._sentences()
        return "\n".join([head, "", self.table(SHOWN_ROWS), "", *sentences])

    def _repr_html_(self) -> str:
        head, sentences = self._sentences()
        return as_html(head, self._cells(SHOWN_ROWS), "\n".join(sentences))

    def _sentences(self) -> tuple[str, list[str]]:
        # Before and after the table.
        columns = self.columns
        spent = (
            f"{np.sum(columns['num_loss']):,} losses and {np.sum(columns['num_grad']):,} gradients"
        )
        head = f"{np.sum(columns['ok'])} of {len(columns['ok'])} steps taken, {spent}"
        if "seconds" in columns:
            head += f", {np.sum(columns['seconds']):.1f} s"
        lines = [self.arrival]
        if self.draws is not None:
            lines.append(str(self.draws))
        if not self.findings:
            lines.append("Nothing wrong was found.")
        lines += [f"[{finding.name}] {finding.text}" for finding in self.findings]
        return f"{head}.", [*lines, self.checked] if self.checked else lines


def summary(result: TwoStepResult, optimizer: Any = None, draws: Draws | None = None) -> RunSummary:
    """Was each shift sampled well, was each step signal or noise, has the run arrived, and what should change?

    Lengths are in standard deviations of the reference. Steps have the effective sample size of the mean; those of
    bulk and tails need `draws`.

    Args:
        result: of `TwoStep.run`, with any engines, including your own.
        optimizer: the `TwoStep`, for the names of parameters and the remedies of its engines. If the engines
            follow gradients, some hundred gradients are evaluated around the last centre, with the arguments bound
            to the loss: do they agree with differences of the loss, and does the loss curve down somewhere? All
            other findings come from the history.
        draws: at the end, as `optimizer.draw(rng_key, result.state)` makes them.

    Returns:
        Columns, findings and sentences; prints as a report.

    Raises:
        TypeError: if the result or the draws are of another kind.
        ValueError: if the run has no steps.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax import random
        >>> from numpyro_regloss import Loss, schemes, shift
        >>> loss = Loss.from_function(lambda x: jnp.sum((x - 1.0) ** 2), jnp.zeros(2))
        >>> optimizer = schemes.local_entropy(loss, tau=0.5, shift=shift.Importance(2000))
        >>> report = summary(optimizer.run(random.key(0), 20, progress_bar=False))
        >>> report.arrived, report.findings
        (True, ())
    """
    if not isinstance(result, TwoStepResult):
        raise TypeError(
            f"diagnostics.summary: expected the result of TwoStep.run, got {type(result).__name__}."
        )
    if np.ndim(result.history.ok) != 1 or not len(result.history.ok):
        raise ValueError(
            "diagnostics.summary: expected the history of one run of at least one step, got ok of shape "
            f"{np.shape(result.history.ok)}; of several runs take one."
        )
    if optimizer is not None and not isinstance(optimizer, TwoStep):
        raise TypeError(
            f"diagnostics.summary: expected the TwoStep of the run or None, got {type(optimizer).__name__}."
        )
    motion = run_motion(result)
    columns = run_columns(result, motion)
    run = Run(columns, result.history, motion)
    look = Look()
    if optimizer is not None and len(motion.pull):
        resting = arrival(motion)[0] is not False
        look = look_around(optimizer, result.state.reference, result.history, curvature=resting)
    findings, arrived, sentence = judge(run, optimizer, look.findings, wall=look.wall)
    ends = None
    if draws is not None:
        ends = _draws_summary(draws, optimizer)
        findings = (*findings, *_draws_findings(ends))
    return RunSummary(columns, ends, findings, arrived, sentence, _checked(run, look, optimizer))


def _checked(run: Run, look: Look, optimizer: Any) -> str:
    columns, draws = run.columns, run.history.draws
    seen = {
        "the loss at the draws": draws is not None,
        "weights": "khat" in columns,
        "chains": "rhat" in columns,
        "noise of the centre": run.motion.error is not None,
    }
    checked = [*(name for name, known in seen.items() if known), *look.checked]
    unchecked = list(look.unchecked)
    if draws is None and not look.checked:
        unchecked.append("values of the loss beside the centre")
    if optimizer is None and np.any(columns["num_grad"]):
        unchecked.append("gradients against differences and curvature (pass the optimizer)")
    text = f"Checked: {', '.join(['steps', *checked])}."
    if run.history.motion is not None:
        text += (
            ' The history has no centres; arrival is judged by sketches of them (history="all").'
        )
    return f"{text} Not checked: {', '.join(unchecked)}." if unchecked else text


def _draws_summary(draws: Any, optimizer: Any) -> DrawsSummary:
    if not isinstance(draws, Draws):
        raise TypeError(
            "diagnostics.summary: expected draws as optimizer.draw(rng_key, result.state) makes them, got "
            f"{type(draws).__name__}."
        )
    draws = with_context_axes(draws)
    dim = draws.x.shape[-1]
    names = map(str, range(dim)) if optimizer is None else optimizer.loss.flat_names
    log_weight = np.asarray(draws.log_weight)
    unknown = np.full(dim, np.nan)
    ranks: Any = (unknown, unknown, unknown)
    # Draws of one weight in chains; means of batches have another distribution, and weighted draws no order.
    equal = bool(np.all(log_weight == log_weight.flat[0])) if log_weight.size else False
    if draws.block_size is None and equal and not isinstance(draws, BatchMeans):
        ranks = rank_diagnostics(draws.x)
    khat = -np.inf if equal else float(pareto_khat(draws.log_weight.reshape(-1)))
    return DrawsSummary(tuple(names), *ranks, float(weight_ess(draws.log_weight)), khat)


def _draws_findings(draws: DrawsSummary) -> list[Finding]:
    found = []
    if draws.ess_weights < LEAST_ESS or draws.khat > MAX_KHAT:
        found.append(
            Finding(
                "draws at the end",
                f"{draws.ess_weights:.3g} effective draws, k-hat {draws.khat:.2f}: averages over them are not to "
                "be trusted; use more draws, or another engine.",
            )
        )
    worst = (
        ("R-hat", draws.rhat, draws.rhat > MAX_RHAT),
        ("bulk ESS", draws.ess_bulk, draws.ess_bulk < LEAST_ESS),
        ("tail ESS", draws.ess_tail, draws.ess_tail < LEAST_ESS),
    )
    for name, values, bad in worst:
        if bad.any():
            which = np.flatnonzero(bad)
            places = ", ".join(f"{draws.names[i]} ({values[i]:.3g})" for i in which[:SHOWN_NAMES])
            rest = len(which) - SHOWN_NAMES
            places += f" and {rest} more" if rest > 0 else ""
            found.append(
                Finding(
                    "draws at the end",
                    f"{name} is bad at {places}: draw with longer chains (num_samples, num_warmup).",
                )
            )
    return found


def _text(value: Any) -> str:
    if isinstance(value, np.integer | np.bool_ | bool | int):
        return f"{int(value)}"
    if np.isnan(value):
        return "-"
    return f"{value:.0f}" if 1e3 <= abs(value) < 1e6 else f"{value:.3g}"
