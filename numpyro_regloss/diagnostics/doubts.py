# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Why a centre that rests may not have arrived, one rule each, and single bad steps in a good run.

A centre also rests where the loss is the same everywhere or to rounding, where gradients are zero, on a saddle,
and where steps are nothing but noise or the temperature hides the loss: rules look for each of these.
"""

from collections.abc import Callable

import numpy as np

from numpyro_regloss._core.pytree import fields_of
from numpyro_regloss.diagnostics.arrival import LEAST_STEPS, Run, window

__all__ = [
    "DOUBTS",
    "LEAST_ESS",
    "MAX_DIVERGENT",
    "MAX_RHAT",
    "adapted",
    "at_rounding",
    "bad_steps",
    "single_steps",
    "transitions",
]

# So few effective draws do not tell their own error.
LEAST_ESS = 20.0
# With as many effective draws as that R-hat of a chain at rest is 1.03 in the median over a few coordinates.
MAX_RHAT = 1.1
# Share of divergent transitions that leave a hole in q: of the centred eight schools one in 250 diverges, and that
# is harmless beside the noise of the centre.
MAX_DIVERGENT = 0.01
# Averages of weights have no variance above `MAX_KHAT`, which single clouds of good runs exceed by chance, and no
# mean above this.
MAX_SINGLE_KHAT = 1.0
# Losses are rounded, in the last place and at many places on the way: they tell nothing where they vary by less.
ROUNDINGS = 4.0
# A cloud that narrows comes to the rounding of the loss; one that began with such a spread, in units of it, knew
# the loss before.
BEGUN = 1000.0
# Temperatures that differ by less are the same.
SAME = 1e-3
# Weights exp(-loss / T) of a loss that is rounded to T / 2 are off by a quarter.
MAX_ROUNDING = 0.5
# Length of the mean's noise, all parameters together, in standard deviations of the reference: fewer draws than
# parameters exceed it, and then noise costs more than T / 2 in F_tau. Of few parameters `LEAST_ESS` counts.
MAX_NOISE, MANY_PARAMETERS = 1.0, 20
# Losses that differ by less than the temperature are hardly told apart: at ten times yours, not those that you
# asked for.
MAX_HEATING = 10.0
# How far the loss at the centre is above its mean over q, in its standard deviations there and in standard errors:
# of a convex loss it is below, whatever its shape.
LEAST_EXCESS, MANY_SIGMAS = 0.1, 4.0


def _rounding(run: Run) -> str:
    draws = run.history.draws
    # SGLD follows gradients alone, whatever the values: with its usual temperatures they are all but equal.
    if draws is None or "stability" in run.columns:
        return ""
    unit, varied, temperature = rounding(run)
    if at_rounding(run):
        return ""
    if varied == 0.0:
        return (
            "the loss was the same at all draws of a step, so the draws do not show where it is lower: use a "
            "larger tau, or check whether the loss depends on its parameters."
        )
    if not (varied <= ROUNDINGS * unit or unit > MAX_ROUNDING * temperature):
        return ""
    return (
        f"a loss of {run.history.loss[-1]:.3g} is rounded to multiples of about {unit:.2g}, and it varied by "
        f"{varied:.2g} over the draws, at a temperature of {temperature:.3g}: steps follow the rounding; subtract "
        "a constant from the loss, use a larger tau, or compute in double precision (jax_enable_x64)."
    )


def rounding(run: Run) -> tuple[float, float, float]:
    """Of the end of a run: the unit in the last place of the loss, its spread over the draws, the temperature."""
    count = window(len(run.history.ok))
    loss = np.abs(np.asarray(run.history.loss)[-count:])
    unit = np.median(np.finfo(loss.dtype).eps * np.where(np.isfinite(loss), loss, 0.0))
    spread, temperature = run.history.draws.sd[-count:], _temperature(run)[-count:]
    return float(unit), float(np.median(spread)), float(np.median(temperature))


def at_rounding(run: Run) -> bool:
    """Whether a cloud whose temperature adapts has narrowed until the loss is rounded, and not begun so.

    Args:
        run: that rests.

    Returns:
        True where the centre is as well known as the precision allows.
    """
    draws = run.history.draws
    if draws is None or np.allclose(_temperature(run), draws.temperature, rtol=SAME):
        return False
    unit, varied, _ = rounding(run)
    return bool(varied <= ROUNDINGS * unit and np.max(draws.sd) > BEGUN * unit)


def adapted(run: Run) -> tuple[float, float] | None:
    """The last temperature and the target's, where they differ."""
    draws = run.history.draws
    if draws is None or np.isclose(_temperature(run)[-1], draws.temperature[-1], rtol=SAME):
        return None
    return float(_temperature(run)[-1]), float(draws.temperature[-1])


def _dimension(run: Run) -> str:
    error = run.motion.error
    # SGLD is noisy on purpose: noise averages out over outer steps.
    if run.history.draws is None or "stability" in run.columns or error is None or not len(error):
        return ""
    noise = np.sqrt(np.median(np.sum(np.asarray(error[-window(len(error)) :], float) ** 2, -1)))
    dim = run.motion.num_parameters
    if not noise > MAX_NOISE or dim < MANY_PARAMETERS:
        return ""
    draws = f"{run.median('ess'):.3g} effective draws" if "ess" in run.columns else "draws"
    length = f"by {noise:.2g} sd of the reference" if np.isfinite(noise) else "by an unknown length"
    return (
        f"{draws} are too few for {dim} parameters: noise moves the mean {length} in each step, all parameters "
        "together; use more draws than parameters, a smaller tau, or an engine that follows gradients."
    )


def _heating(run: Run) -> str:
    if run.history.draws is None or len(run.history.ok) < LEAST_STEPS:
        return ""
    count = window(len(run.history.ok))
    yours = np.median(run.history.draws.temperature[-count:])
    used = np.median(_temperature(run)[-count:])
    if not used > MAX_HEATING * yours:
        return ""
    return (
        f"the effective sample size set a temperature of {used:.3g}, and yours is {yours:.3g}: losses that "
        "differ by less than the first are hardly told apart; use a smaller tau (or last_width), scale the "
        "parameters to equal importance, or go on from here with a fixed temperature and no ess."
    )


def _never_moved(run: Run) -> str:
    pull = run.motion.pull
    if run.history.draws is not None or not len(pull) or np.any(pull != 0):
        return ""
    return (
        "the centre never moved, not even by noise: gradients are zero, or cancel exactly on its two sides; use "
        'another start, or for a loss with jumps shift.Importance or fit.RobbinsMonro(gradient="score").'
    )


def _excess(run: Run) -> str:
    draws, count = run.history.draws, window(len(run.history.ok))
    if draws is None or count < LEAST_STEPS or np.isnan(draws.share_lower).all():
        return ""
    loss, mean, sd = (
        np.asarray(a[-count:], float) for a in (run.history.loss, draws.mean, draws.sd)
    )
    if not np.isfinite(loss[-1]):
        return (
            "the loss at the centre is not finite, though it is at draws around it: use a smaller tau, or other "
            "parameters."
        )
    ess = np.maximum(np.asarray(run.columns.get("ess", np.ones(len(run.history.ok)))[-count:]), 1)
    eps = np.finfo(np.asarray(run.history.loss).dtype).eps
    known = np.isfinite(loss) & (sd > ROUNDINGS * eps * np.abs(loss))
    if not known.any():
        return ""
    excess = ((loss - mean)[known] / sd[known]).mean()
    error = np.sqrt(np.sum(1 / ess[known])) / np.sum(known)
    if not excess > max(LEAST_EXCESS, MANY_SIGMAS * error):
        return ""
    share = np.mean(draws.share_lower[-count:])
    return (
        f"the loss is {loss[-1]:.6g} at the centre and {mean[-1]:.6g} in the mean over q, and {share:.0%} of q "
        "has a lower loss than the centre: the centre rests on a saddle, on a ridge or between modes; start "
        "elsewhere, or use a larger tau."
    )


def _lengths(run: Run) -> str:
    if all(np.isfinite(part).all() for part in (run.motion.pull, run.motion.step)):
        return ""
    return (
        "the lengths of steps, over the standard deviation of the reference, are not finite: tau is too small for "
        "the precision, or a fitted mean is not finite; use a larger tau, or look at history.fitted."
    )


def bad_steps(run: Run) -> dict[str, np.ndarray]:
    """Which steps are bad, and why.

    Args:
        run: whose steps were judged.

    Returns:
        By name of the rule for whole runs, `(step,)` each; rejected steps are not among them.
    """
    ok, columns = np.asarray(run.history.ok), run.columns
    bad = {}
    if "rhat" in columns:
        bad["R-hat"] = columns["rhat"] > MAX_RHAT
    if "num_divergent" in columns:
        count = transitions(run)
        most = np.inf if count is None else MAX_DIVERGENT * count
        bad["divergences"] = columns["num_divergent"] > most
    # Chains of SGLD are short on purpose.
    if "ess" in columns and "stability" not in columns:
        bad["ess"] = columns["ess"] < LEAST_ESS
    if "khat" in columns:
        bad["k-hat"] = (columns["khat"] > MAX_SINGLE_KHAT) & np.isfinite(columns["khat"])
    return {name: steps & ok for name, steps in bad.items()}


def transitions(run: Run) -> np.ndarray | None:
    """How many transitions a step had, warm-up among them, where the engine tells the gradients of each."""
    per_transition = fields_of(run.history.shift).get("num_steps")
    if per_transition is None:
        return None
    return run.history.shift.num_grad / np.maximum(per_transition, 1)


def single_steps(run: Run, bad: dict[str, np.ndarray]) -> str:
    """Names bad steps of a run whose other steps are good.

    Args:
        run: whose steps were judged.
        bad: which, see `bad_steps`.

    Returns:
        A sentence, or nothing.
    """
    columns, found = run.columns, np.zeros(len(run.history.ok), bool)
    found = np.any([found, *bad.values()], 0)
    where = np.flatnonzero(found)
    if not len(where):
        return ""
    up, down = (" up to", " down to") if len(where) > 1 else ("", "")
    seen = []
    if np.any(bad.get("R-hat", False)):
        seen.append(f"R-hat{up} {np.nanmax(columns['rhat'][found]):.3g}")
    if "divergences" in bad and columns["num_divergent"][found].any():
        seen.append(f"{int(columns['num_divergent'][found].sum())} divergent transitions")
    if np.any(bad.get("ess", False)):
        seen.append(f"ESS{down} {np.nanmin(columns['ess'][found]):.3g}")
    if np.any(bad.get("k-hat", False)):
        seen.append(f"k-hat{up} {columns['khat'][bad['k-hat']].max():.3g}")
    last = f"the last of them is step {where[-1]}" if len(where) > 1 else f"step {where[0]}"
    are = "are" if len(where) > 1 else "is"
    return (
        f"{len(where)} of {len(found)} steps {are} poor: {', '.join(seen)} ({last}). Later steps make up for a "
        "poor one; if such steps come again, use longer chains or more draws, a smaller tau, or other parameters "
        "(not centred ones)."
    )


def _temperature(run: Run) -> np.ndarray:
    used = run.columns.get("temperature")
    return np.asarray(run.history.draws.temperature if used is None else used)


DOUBTS: dict[str, Callable[[Run], str]] = {
    "lengths": _lengths,
    "rounding": _rounding,
    "dimension": _dimension,
    "adapted temperature": _heating,
    "gradient": _never_moved,
    "centre": _excess,
}
