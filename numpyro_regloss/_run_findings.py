# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a run and what to change, one rule each, and whether the centre has arrived.

Rules look at shares of steps and medians over them: single steps are bad in good runs too.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from numpyro_regloss._pareto import MAX_KHAT
from numpyro_regloss._result import TwoStepResult, rejections, remedies
from numpyro_regloss._run_columns import Motion

__all__ = ["Finding", "arrival", "run_findings", "window"]

# The end of a run: its last quarter, and enough steps to tell a trend from a single one.
END, LEAST_STEPS = 0.25, 4
# So few effective draws do not tell their own error.
LEAST_ESS = 20.0
# With as many effective draws as that R-hat of a chain at rest is 1.03 in the median over a few coordinates.
MAX_RHAT = 1.1
# Samplers are tuned to 0.4 and more; below this most draws are copies.
LEAST_ACCEPTANCE = 0.15
# Standard deviations of the reference per parameter: 16 independent draws of q, if it is as wide, know its mean so
# well. The noise of the centre then costs 3 % of T per parameter in F_tau.
MAX_ERROR = 0.25
# Share of divergent transitions that leave a hole in q: of the centred eight schools one in 250 diverges, and that
# is harmless beside the noise of the centre.
MAX_DIVERGENT = 0.01
# Share of steps in which an optimizer's update may fail.
MAX_FALLBACK = 0.1
# Share of evaluations that are not finite: q is then another density, the loss cut off.
MAX_NOT_FINITE = 0.01
# SGLD: at a step size times curvature of one the variance of q is doubled.
MAX_STABILITY = 1.0
# The temperature that the effective sample size sets counts as settled where it changes by less between two
# quarters of a run; its noise is some per cent.
MAX_DRIFT = 1.2
# Verdicts of increase happen by chance in one step of forty, see `Record`; three standard deviations above that.
FALSE_INCREASES, SIGMAS = 0.025, 3.0
# Errors are estimates: they count twice as large in squares, as those of chains and control variates may be.
MARGIN = 2.0
# Without errors: a walk of w independent steps has |sum|^2 = sum |step|^2 on average, a straight one w times that.
STRAIGHT = 3.0
# Less is gained at the end of the run, in units of T, than any use of the loss notices.
NEGLIGIBLE = 1e-3
# Steps that shrink by less from the first to the second half of the end of a run will not end soon.
STEADY, TREND = 0.9, 10
# The fit by ReverseKL is far from stationary, in standard deviations of its Gaussian per parameter.
MAX_RESIDUAL = 0.3


class Finding(NamedTuple):
    """Something that is wrong.

    Attributes:
        name: of the rule.
        text: what was seen, and what to change.
    """

    name: str
    text: str


class _Run(NamedTuple):
    columns: Mapping[str, np.ndarray]
    history: Any
    motion: Motion

    def often(self, name: str, bad: Callable[[np.ndarray], np.ndarray]) -> bool:
        # In most steps, of all or of the end of the run.
        if name not in self.columns:
            return False
        values = bad(np.asarray(self.columns[name], float))
        return max(values.mean(), values[-window(len(values)) :].mean()) > 0.5

    def median(self, name: str) -> float:
        return float(np.nanmedian(self.columns[name]))


def window(num_steps: int) -> int:
    """How many steps are the end of a run."""
    return min(num_steps, max(LEAST_STEPS, int(END * num_steps)))


def run_findings(
    result: TwoStepResult, columns: Mapping[str, np.ndarray], motion: Motion, optimizer: Any = None
) -> list[Finding]:
    """Tries all rules.

    Args:
        result: of the run.
        columns: of the run.
        motion: of the run.
        optimizer: whose engines may have something to say.

    Returns:
        What is wrong.
    """
    history = result.history
    found = [Finding("rejections", rejections(history))]
    found += [Finding(part, text) for part, text in remedies(history, optimizer).items()]
    run = _Run(columns, history, motion)
    found += [Finding(name, rule(run)) for name, rule in RULES.items()]
    return [finding for finding in found if finding.text]


def arrival(motion: Motion) -> tuple[bool | None, str]:
    """Whether the centre has arrived: in the last steps fitted means pull it nowhere, beyond their noise.

    Args:
        motion: of the run.

    Returns:
        The answer, None where it cannot be told, and a sentence.
    """
    count = window(len(motion.step))
    if count < LEAST_STEPS:
        return None, f"Arrived? Fewer than {LEAST_STEPS} steps were taken: too few to tell."
    pull, step = (np.asarray(a[-count:], float) for a in (motion.pull, motion.step))
    way = np.sum(step.sum(0) ** 2)
    # Anchors with momentum step where the pull has gone, and ties between replicas pull where no step goes.
    went = min(way, np.sum(pull.sum(0) ** 2))
    where = f"in the last {count} steps the centre moved by {np.sqrt(way):.2g} sd of the reference"
    error = None if motion.error is None else np.asarray(motion.error[-count:], float)
    if error is None or not np.isfinite(error).all():
        limit, noise = STRAIGHT * np.sum(pull**2), None
    else:
        squares = np.sum(error**2, 0)
        noise = squares.sum()
        dimension = max(noise**2 / max(np.sum(squares**2), np.finfo(float).tiny), 1.0)
        limit = MARGIN * noise * (1 + SIGMAS * np.sqrt(2 / dimension))
    if went / count < NEGLIGIBLE:
        if went > limit and _is_steady(pull):
            return None, f"Arrived? {where.capitalize()}, steadily in one direction. {FASTER}"
        return True, f"Arrived: {where}, which the loss does not notice."
    if noise is None:
        if went > limit:
            return False, f"Still moving: {where}, in one direction. {CONTINUE}"
        return None, f"Arrived? {where.capitalize()}; the fit states no error to compare that with."
    of = f"noise alone moves it by {np.sqrt(noise):.2g}"
    if went > limit:
        return False, f"Still moving: {where}, and {of}. {CONTINUE}"
    return True, f"Arrived, as far as these draws tell: {where}, and {of}."


def _is_steady(pull: np.ndarray) -> bool:
    # Steps that end do so by becoming shorter, which few of them do not tell from noise.
    if len(pull) < TREND:
        return False
    half = len(pull) // 2
    early, late = (np.linalg.norm(part.sum(0)) for part in (pull[:half], pull[-half:]))
    return bool(late > STEADY * early)


CONTINUE = "Run more steps, with init_state=result.state."
FASTER = (
    "If the loss should fall further, use a larger tau or a lower temperature: steps are tau / T times "
    "the slope."
)


def _not_finite(run: _Run) -> str:
    if "num_rejected" not in run.columns:
        return ""
    spent = np.sum(run.history.shift.num_loss + run.history.shift.num_grad)
    spent = spent or np.sum(run.history.num_loss + run.history.num_grad)
    share = np.sum(run.columns["num_rejected"]) / max(spent, 1)
    if share <= MAX_NOT_FINITE:
        return ""
    return (
        f"the loss or its gradient was not finite in {share:.1%} of the evaluations, which got no weight: use a "
        "smaller tau, or write the loss so that it is finite there."
    )


def _khat(run: _Run) -> str:
    if not run.often("khat", lambda khat: khat > MAX_KHAT):
        return ""
    khat = run.median("khat")
    if not np.isfinite(khat):
        seen = "k-hat of the weights cannot be told from so few draws of any weight"
    else:
        seen = (
            f"k-hat of the weights is {khat:.2f} in the median, and above {MAX_KHAT} their averages are not to be "
            "trusted"
        )
    if "negative_elbo" in run.columns:
        return f"{seen}: {GUIDE}"
    if not np.isfinite(khat):
        return f"{seen}; use more of them, or a smaller tau."
    return (
        f"{seen}: the cloud hangs on few draws; use a smaller tau, more draws, a higher temperature, or another "
        "engine: shift.SMC, or with gradients shift.NUTS."
    )


GUIDE = "the guide is too far from q; use more num_steps of SVI, a richer guide, or shift.NUTS."


def _ess(run: _Run) -> str:
    # Chains of SGLD are short on purpose: they average over outer steps.
    if "stability" in run.columns or not run.often("ess", lambda ess: ess < LEAST_ESS):
        return ""
    seen = f"the effective sample size is {run.median('ess'):.3g} in the median"
    if "negative_elbo" in run.columns:
        return f"{seen}: too few draws, or {GUIDE}"
    if "khat" in run.columns:
        return (
            f"{seen}: the cloud is degenerate or too small; use more draws, a smaller tau, a higher "
            "temperature, or another engine: shift.SMC, or with gradients shift.NUTS."
        )
    return f"{seen}, too few to know their own error; use more draws, or a smaller tau."


def _rhat(run: _Run) -> str:
    if not run.often("rhat", lambda rhat: rhat > MAX_RHAT):
        return ""
    return (
        f"R-hat is {run.median('rhat'):.2f} in the median: chains disagree; use longer ones (num_samples, "
        "num_warmup), a smaller tau, or shift.SMC where q has several modes."
    )


def _divergences(run: _Run) -> str:
    count = run.columns.get("num_divergent", np.zeros(1))
    # Transitions, warm-up among them, where the engine tells the gradients of each; else in how many steps.
    per_transition = getattr(run.history.shift, "num_steps", None)
    if per_transition is None:
        few = np.mean(count > 0) <= 0.5
    else:
        few = np.sum(count) <= MAX_DIVERGENT * np.sum(run.history.shift.num_grad / per_transition)
    if few:
        return ""
    return (
        f"{int(np.sum(count))} divergent transitions in {np.sum(count > 0)} of {len(count)} steps: draws miss "
        "places where q is steep; use a smaller tau, a target_accept_prob nearer to one, or other parameters."
    )


def _acceptance(run: _Run) -> str:
    if not run.often("accept_prob", lambda accepted: accepted < LEAST_ACCEPTANCE):
        return ""
    return (
        f"acceptance is {run.median('accept_prob'):.2f} in the median: the sampler hardly moves; use a "
        "smaller step size, more num_warmup, or a smaller tau."
    )


def _draws(run: _Run) -> str:
    # SGLD and minibatches in a heat step are noisy on purpose: noise averages out over outer steps.
    if "stability" in run.columns or not run.often("error", lambda error: error > MAX_ERROR):
        return ""
    moving = arrival(run.motion)[0] is False
    if moving:
        return ""
    seen = (
        f"the fitted mean is known to {run.median('error'):.2g} sd of the reference per parameter only, and the "
        "centre jumps about by that"
    )
    if "residual" in run.columns:
        return f"{seen}: use more num_steps of the fit, larger minibatches, or a smaller tau."
    return f"{seen}: too few draws; use more of them, or shift.Adaptive, which draws until a step is certain."


def _stability(run: _Run) -> str:
    # From two on it is the engine that says so.
    if not run.often("stability", lambda value: (value > MAX_STABILITY) & (value < 2.0)):
        return ""
    return (
        f"SGLD: step size times steepest curvature is {run.median('stability'):.2g} in the median, so that draws "
        "spread too far; use half of the step_size, or a preconditioner."
    )


def _temperature(run: _Run) -> str:
    temperature, tau = run.columns.get("temperature"), run.columns["tau"]
    # Where tau falls too, the user asks for another loss at every step.
    if temperature is None or np.ptp(tau) > 1e-3 * tau.max() or len(tau) < 2 * LEAST_STEPS:
        return ""
    count = window(len(tau))
    earlier, last = np.median(temperature[-2 * count : -count]), np.median(temperature[-count:])
    if max(earlier, last) <= MAX_DRIFT * min(earlier, last):
        return ""
    return (
        f"the temperature that the effective sample size sets still drifts, from {earlier:.3g} to {last:.3g} in "
        f"the last {2 * count} steps, and with it the loss that is minimized; run until it settles, or fix it: "
        f"temperature={last:.3g} and no ess."
    )


def _increases(run: _Run) -> str:
    verdict = run.columns.get("verdict", np.zeros(1))
    count, size = np.sum(verdict == -1), len(verdict)
    expected = FALSE_INCREASES * size
    if count <= max(1.0, expected + SIGMAS * np.sqrt(expected)):
        return ""
    return (
        f"the regularized loss rose in {count} of {size} steps, significantly and beyond noise: use more draws, a "
        "smaller tau, or the plain anchor.Proximal()."
    )


def _residual(run: _Run) -> str:
    fit = run.history.fit
    if hasattr(fit, "curvature"):
        # As long as directions in which the loss is flat take to move, see `RobbinsMonro`.
        needed = np.median(1 + fit.curvature)
        way = np.sqrt(np.sum(run.motion.pull**2, -1))
        if needed <= np.median(fit.num_steps) or np.median(fit.residual[run.history.ok] - way) <= 0:
            return ""
        return (
            f"RobbinsMonro did {int(np.median(fit.num_steps))} inner steps, and flat directions need about "
            f"{needed:.3g}; use more num_steps, or a smaller tau."
        )
    if not hasattr(fit, "bound"):
        return ""
    limit = MAX_RESIDUAL * np.sqrt(run.motion.step.shape[1])
    if not run.often("residual", lambda residual: residual > limit):
        return ""
    return (
        f"ReverseKL stopped {run.median('residual'):.2g} from where its gradient is zero, in the median: use more "
        "num_steps, or a smaller tau."
    )


def _covariance(run: _Run) -> str:
    floored = np.asarray(getattr(run.history.fit, "floored", False))
    if np.mean(floored) <= 0.5:
        return ""
    return (
        "the fitted covariance was singular in most steps and was raised: use more draws than parameters, or "
        'covariance="diagonal" or "low_rank".'
    )


def _fallback(run: _Run) -> str:
    fell_back = np.asarray(getattr(run.history.anchor, "fell_back", False))
    if np.mean(fell_back) <= MAX_FALLBACK:
        return ""
    return (
        f"the optimizer's update was not finite in {np.mean(fell_back):.0%} of the steps, which were plain: use a "
        "smaller learning rate."
    )


RULES: dict[str, Callable[[_Run], str]] = {
    "not finite": _not_finite,
    "k-hat": _khat,
    "ess": _ess,
    "R-hat": _rhat,
    "divergences": _divergences,
    "acceptance": _acceptance,
    "draws": _draws,
    "step size": _stability,
    "temperature": _temperature,
    "increases": _increases,
    "residual": _residual,
    "covariance": _covariance,
    "fallback": _fallback,
}
