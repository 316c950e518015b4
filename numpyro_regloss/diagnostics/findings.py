# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a run and what to change, one rule each, and whether the centre has arrived.

Rules look at shares of steps and medians over them; single steps, which are bad in good runs too, are counted.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from numpyro_regloss._core.pareto import MAX_KHAT
from numpyro_regloss._core.pytree import fields_of
from numpyro_regloss.diagnostics.arrival import LEAST_STEPS, SIGMAS, Finding, Run, arrival, window
from numpyro_regloss.diagnostics.doubts import (
    DOUBTS,
    LEAST_ESS,
    MAX_DIVERGENT,
    MAX_RHAT,
    adapted,
    at_rounding,
    bad_steps,
    single_steps,
    transitions,
)
from numpyro_regloss.shift.sgld import SGLDInfo
from numpyro_regloss.shift.sgld import engine as sgld
from numpyro_regloss.two_step.result import rejections, remedies

__all__ = ["LEAST_STEPS", "RULES", "Finding", "Verdict", "arrival", "judge", "window"]

# Findings with which a centre that rests says nothing: steps are not those that were asked for.
UNSOLVED = ("k-hat", "ess", "R-hat", "residual")
# Doubts about a centre that rests: of one that moves they say nothing.
AT_REST = ("dimension", "gradient", "centre")

# Samplers are tuned to 0.4 and more; below this most draws are copies.
LEAST_ACCEPTANCE = 0.15
# Standard deviations of the reference per parameter: 16 independent draws of q, if it is as wide, know its mean so
# well. The noise of the centre then costs 3 % of T per parameter in F_tau.
MAX_ERROR = 0.25
# Share of steps in which an optimizer's update may fail.
MAX_FALLBACK = 0.1
# Share of evaluations that are not finite: q is then another density, the loss cut off.
MAX_NOT_FINITE = 0.01
# SGLD: at a step size times curvature of one the variance of q is doubled.
MAX_STABILITY = 1.0
# The temperature that the effective sample size sets counts as settled where it changes by less between two
# quarters of a run; its noise is some per cent.
MAX_DRIFT = 1.2
# Verdicts of increase happen by chance in one step of forty, see `Record`.
FALSE_INCREASES = 0.025
# The fit by ReverseKL is far from stationary, in standard deviations of its Gaussian per parameter.
MAX_RESIDUAL = 0.3


class Verdict(NamedTuple):
    """What is said of a run.

    Attributes:
        findings: what is wrong.
        arrived: whether the centre has, None where it cannot be told.
        sentence: the same in words.
    """

    findings: tuple[Finding, ...]
    arrived: bool | None
    sentence: str


def judge(
    run: Run, optimizer: Any = None, others: tuple[Finding, ...] = (), *, wall: bool = False
) -> Verdict:
    """Tries all rules.

    Args:
        run: of which the infos are known.
        optimizer: whose engines may have something to say.
        others: reasons to doubt that the run has arrived, found elsewhere.
        wall: whether the loss is infinite near the centre, so that divergent paths are no fault.

    Returns:
        The verdict.
    """
    history = run.history
    arrived, sentence = arrival(run.motion)
    texts = {"rejections": rejections(history)}
    if optimizer is not None:
        texts |= remedies(history, optimizer)
    else:
        for info in (history.shift, fields_of(history.shift).get("engine")):
            if isinstance(info, SGLDInfo):
                texts["shift"] = sgld.remedy(info, history.ok)
    texts |= {name: rule(run) for name, rule in RULES.items()}
    doubts = DOUBTS if arrived is not False else {n: DOUBTS[n] for n in DOUBTS if n not in AT_REST}
    seen = {finding.name for finding in others}
    doubts = {name: rule(run) for name, rule in doubts.items() if name not in seen}
    bad = {name: steps for name, steps in bad_steps(run).items() if not texts[name]}
    if wall:
        texts["divergences"] = ""
        bad.pop("divergences", None)
    single = single_steps(run, bad)
    unsolved = any(texts[name] for name in UNSOLVED)
    if unsolved or doubts.get("dimension"):
        # Of so poor a mean over q nothing follows.
        doubts.pop("centre", None)
    if texts["temperature"]:
        doubts.pop("adapted temperature", None)
    findings = [Finding(name, text) for name, text in (texts | doubts).items() if text]
    findings += [*others, *([Finding("single steps", single)] if single else ())]
    late = any(steps[-window(len(steps)) :].any() for steps in bad.values())
    if arrived and unsolved:
        arrived, sentence = None, "Arrived? The centre rests, but the steps are wrong: see below."
    elif arrived and late:
        arrived, sentence = None, "Arrived? The centre rests, but late steps are poor: see below."
    elif arrived and (others or any(doubts.values())):
        arrived, sentence = None, "Arrived? The centre rests, which proves little here: see below."
    elif arrived:
        sentence = f"{sentence[:-1]}{_how(run)}."
    return Verdict(tuple(findings), arrived, sentence)


def _how(run: Run) -> str:
    found = adapted(run)
    if found is None:
        return ""
    text = f", at an adapted temperature of {found[0]:.3g}, not yours ({found[1]:.3g})"
    return f"{text}, and as far as the rounding of the loss tells" if at_rounding(run) else text


def _not_finite(run: Run) -> str:
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


def _khat(run: Run) -> str:
    if not run.often("khat", lambda khat: khat > MAX_KHAT):
        return ""
    khat = run.median("khat")
    if not np.isfinite(khat):
        seen = "too few draws have any weight to compute the k-hat of the weights"
    else:
        seen = (
            f"k-hat of the weights is {khat:.2f} in the median, and above {MAX_KHAT} weighted averages are not to "
            "be trusted"
        )
    if "negative_elbo" in run.columns:
        return f"{seen}: {GUIDE}"
    if not np.isfinite(khat):
        return f"{seen}; use more draws, or a smaller tau."
    return (
        f"{seen}: the cloud hangs on few draws; use a smaller tau, more draws, a higher temperature, or another "
        "engine: shift.SMC, or with gradients shift.NUTS."
    )


GUIDE = "the guide is too far from q; use more num_steps of SVI, a richer guide, or shift.NUTS."


def _ess(run: Run) -> str:
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
    return f"{seen}, too few to estimate the error of the mean; use more draws, or a smaller tau."


def _rhat(run: Run) -> str:
    if not run.often("rhat", lambda rhat: rhat > MAX_RHAT):
        return ""
    return (
        f"R-hat is {run.median('rhat'):.2f} in the median: chains disagree; use longer ones (num_samples, "
        "num_warmup), a smaller tau, or shift.SMC where q has several modes."
    )


def _divergences(run: Run) -> str:
    # NaN where no sampler drew.
    count = np.nan_to_num(np.asarray(run.columns.get("num_divergent", np.zeros(1)), float))
    total = transitions(run)
    if total is None and np.mean(count > 0) <= 0.5:
        return ""
    if total is not None and np.sum(count) <= MAX_DIVERGENT * np.nansum(total):
        return ""
    return (
        f"{int(np.sum(count))} divergent transitions in {np.sum(count > 0)} of {len(count)} steps: draws miss "
        "places where q is steep, unless they end at a wall where the loss is infinite; use a smaller tau, a "
        "target_accept_prob nearer to one, or other parameters."
    )


def _acceptance(run: Run) -> str:
    if not run.often("accept_prob", lambda accepted: accepted < LEAST_ACCEPTANCE):
        return ""
    return (
        f"acceptance is {run.median('accept_prob'):.2f} in the median: the sampler hardly moves; use a "
        "smaller step size, more num_warmup, or a smaller tau."
    )


def _draws(run: Run) -> str:
    # SGLD and minibatches in a heat step are noisy on purpose: noise averages out over outer steps.
    if "stability" in run.columns or not run.often("error", lambda error: error > MAX_ERROR):
        return ""
    moving = arrival(run.motion)[0] is False
    if moving or not np.isfinite(run.median("error")):
        return ""
    seen = (
        f"the fitted mean has an error of {run.median('error'):.2g} sd of the reference per parameter, and the "
        "centre jumps about by as much"
    )
    if "residual" in run.columns:
        return f"{seen}: use more num_steps of the fit, larger minibatches, or a smaller tau."
    return f"{seen}: use more draws, or shift.Adaptive, which draws until a step is significant."


def _stability(run: Run) -> str:
    # From two on it is the engine that says so.
    if not run.often("stability", lambda value: (value > MAX_STABILITY) & (value < 2.0)):
        return ""
    return (
        f"SGLD: the step size times the steepest curvature is {run.median('stability'):.2g} in the median, so "
        "that draws spread too far; use half of the step_size, or a preconditioner."
    )


def _temperature(run: Run) -> str:
    temperature, tau = run.columns.get("temperature"), run.columns["tau"]
    # Where tau falls too, the user asks for another loss at every step.
    if temperature is None or np.ptp(tau) > 1e-3 * tau.max() or len(tau) < 2 * LEAST_STEPS:
        return ""
    count = window(len(tau))
    earlier, last = np.median(temperature[-2 * count : -count]), np.median(temperature[-count:])
    if not max(earlier, last) > MAX_DRIFT * min(earlier, last):
        return ""
    return (
        f"the temperature that the effective sample size sets still drifts, from {earlier:.3g} to {last:.3g} in "
        f"the last {2 * count} steps, and with it the loss that is minimized; run until it settles, or fix it: "
        f"temperature={last:.3g} and no ess."
    )


def _increases(run: Run) -> str:
    verdict = run.columns.get("verdict", np.zeros(1))
    count, size = np.sum(verdict == -1), len(verdict)
    expected = FALSE_INCREASES * size
    if count <= max(1.0, expected + SIGMAS * np.sqrt(expected)):
        return ""
    return (
        f"the regularized loss rose in {count} of {size} steps, significantly and beyond noise: use more draws, a "
        "smaller tau, or the plain anchor.Proximal()."
    )


def _residual(run: Run) -> str:
    fit = run.history.fit
    known = fields_of(fit)
    if "curvature" in known:
        # As long as directions in which the loss is flat take to move, see `RobbinsMonro`.
        needed = np.median(1 + fit.curvature)
        # Only some steps look at their residual.
        ok = run.history.ok
        farther = (fit.residual[ok] - run.motion.lengths("pull"))[fit.looked[ok]]
        far = farther.size and np.median(farther) > 0
        if not (needed > np.median(fit.num_steps) and far):
            return ""
        return (
            f"RobbinsMonro did {int(np.median(fit.num_steps))} inner steps, and flat directions need about "
            f"{needed:.3g}; use more num_steps, or a smaller tau."
        )
    if "bound" not in known:
        return ""
    limit = MAX_RESIDUAL * np.sqrt(run.motion.num_parameters)
    if not run.often("residual", lambda residual: residual > limit):
        return ""
    return (
        f"ReverseKL stopped {run.median('residual'):.2g} from where its gradient is zero, in the median: use more "
        "num_steps, or a smaller tau."
    )


def _covariance(run: Run) -> str:
    floored = np.asarray(fields_of(run.history.fit).get("floored", False))
    if np.mean(floored) <= 0.5:
        return ""
    return (
        "the fitted covariance was singular in most steps and was raised: use more draws than parameters, or "
        'covariance="diagonal" or "low_rank".'
    )


def _fallback(run: Run) -> str:
    fell_back = np.asarray(fields_of(run.history.anchor).get("fell_back", False))
    if np.mean(fell_back) <= MAX_FALLBACK:
        return ""
    return (
        f"the optimizer's update was not finite in {np.mean(fell_back):.0%} of the steps, which were plain: use a "
        "smaller learning rate."
    )


RULES: dict[str, Callable[[Run], str]] = {
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
