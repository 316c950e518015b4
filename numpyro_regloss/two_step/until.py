# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""When a run may stop by itself: the centre has arrived, as far as its draws can tell.

A step pulls the centre x to the fitted mean m(x) + noise. In a window of w steps the mean pull p̂ estimates the
true one, p, with the variance s²/w, where s² = Σ s_i² is that of a step, in standard deviations of the
reference. A run stops where p is surely no longer than s,

    |p̂|² - s²/w + z (4 Σ s_i² p̂_i² / w + 2 Σ s_i⁴ / w²)^(1/2)  ≤  max(s², negligible),

so that more steps of so many draws would only move it about, or where the loss does not notice such a pull. Looks
are at disjoint windows, and the k-th has the chance (1 - confidence) / (k (k + 1)) of stopping too early: over all
looks that adds up to 1 - confidence.

Reference: Wellek (2010), "Testing Statistical Hypotheses of Equivalence and Noninferiority".
"""

from statistics import NormalDist

import numpy as np

from numpyro_regloss._core.checks import check_count, check_positive
from numpyro_regloss._core.pytree import pytree_dataclass, static_field
from numpyro_regloss.fit.base import FitInfo
from numpyro_regloss.two_step.outer_step import TwoStepInfo

__all__ = ["NEGLIGIBLE", "Arrived", "excess", "is_biased", "is_steady", "pulls"]

# Squared length of a pull, in standard deviations of the reference, that no use of the loss notices: a step gains
# about so much, in units of T.
NEGLIGIBLE = 1e-3
# Differences of neighbouring pulls have the variance of two steps; three times as much where q is narrow, and the
# noise of one step is the pull of the next.
SCATTER = 3.0
# A reported error may be above the scatter of a window by so many standard deviations of the logarithm of that.
AGREES = 3.0
# Pulls of a run that ends become shorter than this, from one half of some steps to the other; the sum of pulls in
# one direction is longer than this share of their lengths.
STEADY, STRAIGHT = 0.9, 0.5


def pulls(history: TwoStepInfo) -> tuple[np.ndarray, np.ndarray | None]:
    """From the centres to the fitted means, and their standard errors, in standard deviations of the reference.

    Args:
        history: of a run, or a part of it.

    Returns:
        `(step, dim)` of the steps that were taken, and the same, or None where the fit has no errors. In a history
        without vectors their sketches, `(step, 61)`.
    """
    ok = np.asarray(history.ok)
    if history.motion is not None:
        sketch, error = history.motion.pull_sketch, history.motion.error_sketch
        return np.asarray(sketch)[ok], None if error is None else np.asarray(error)[ok]
    sd = np.sqrt(np.asarray(history.reference.variance))
    pull = (np.asarray(history.fitted.mean) - np.asarray(history.reference.mean)) / sd
    error = FitInfo.of(history.fit).mean_error
    return pull[ok], None if error is None else (np.asarray(error) / sd)[ok]


def is_biased(history: TwoStepInfo) -> bool:
    """Whether errors of the fitted means contain the way that these have left, see `FitInfo.biased`.

    Args:
        history: of a run, or a part of it.

    Returns:
        The answer.
    """
    return bool(np.any(FitInfo.of(history.fit).biased))


@pytree_dataclass
class Arrived:
    """Stops a run when a step without its noise is surely no longer than that noise, or is negligible.

    Args:
        confidence: probability that a whole run does not stop too early.
        patience: steps of a window; the criterion is checked after every window.

    Raises:
        TypeError: if a setting is of the wrong kind.
        ValueError: if a setting is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax import random
        >>> from numpyro_regloss import Loss, schemes
        >>> loss = Loss.from_function(lambda x: jnp.sum((x - 1.0) ** 4), jnp.full(3, 4.0))
        >>> optimizer = schemes.local_entropy(loss, tau=0.1)
        >>> result = optimizer.run(random.key(0), 1000, until=Arrived(), progress_bar=False)
        >>> result.stopped, len(result.history.ok) < 200
        ('arrived', True)
    """

    confidence: float = static_field(default=0.95)
    patience: int = static_field(default=10)

    def __post_init__(self) -> None:
        confidence = float(check_positive(self.confidence, "Arrived: confidence"))
        if confidence >= 1:
            raise ValueError(
                f"Arrived: expected confidence between 0 and 1, such as 0.95, got {confidence}."
            )
        object.__setattr__(self, "confidence", confidence)
        check_count(self.patience, "Arrived: patience", 4)

    def holds(self, window: TwoStepInfo, look: int) -> bool:
        """Whether the centre has arrived.

        Args:
            window: the history of the last `patience` steps.
            look: how many checks there were, with this one.

        Returns:
            Whether to stop.
        """
        pull, error = pulls(window)
        if is_biased(window):
            # A way that is left is no noise: wherever the centre is, a pull may be shorter than it.
            error = None
        pull = np.asarray(pull, float)
        count = len(pull)
        if 2 * count <= self.patience or not np.isfinite(pull).all():
            return False
        mean = pull.mean(0)
        square = _noise(pull, error)
        chance = (1 - self.confidence) / (look * (look + 1))
        spread = 4 * np.sum(square * mean**2) / count + 2 * np.sum(square**2) / count**2
        highest = (
            np.sum(mean**2)
            - np.sum(square) / count
            + NormalDist().inv_cdf(1 - chance) * np.sqrt(spread)
        )
        short = bool(highest <= max(np.sum(square), NEGLIGIBLE))
        # A pull that is negligible, of one length and in one direction, is a slow run and no end.
        return short and not (_is_straight(pull) and is_steady(pull))


def is_steady(pull: np.ndarray) -> bool:
    """Whether pulls are as long in the second half of some steps as in the first: those that end become shorter.

    Args:
        pull: `(step, dim)`.

    Returns:
        The answer.
    """
    half = len(pull) // 2
    early, late = (np.linalg.norm(part.sum(0)) for part in (pull[:half], pull[-half:]))
    return bool(late > STEADY * early)


def excess(pull: np.ndarray, square: np.ndarray, *, biased: bool = False) -> float:
    """How far reported errors are above the scatter of pulls.

    Few inner steps do not know how curvature damps their noise. Let a share a of the way to the end be left after
    a step of noise s. Pulls then have the variance 2 s² / (1 + a), and neighbours the covariance
    -s² (1 - a) / (1 + a): the sum of both is s².

    Args:
        pull: `(step, dim)`, in standard deviations of the reference.
        square: reported errors of a step, squared, `(dim,)`.
        biased: whether they contain more than noise.

    Returns:
        A factor of `square`; 1 where chance may be the cause, infinite where pulls do not scatter at all.
    """
    rest, count = pull - pull.mean(0), len(pull)
    scatter, reported = np.mean(rest**2, 0), np.sum(square)
    # About their own mean: by 2 / count of s² too small where a is near one, and 1 / count too large near zero.
    seen = np.sum(scatter) + np.sum(rest[1:] * rest[:-1]) / count
    if seen <= 0:
        return 1.0 if reported <= 0 else np.inf
    # Of the logarithm of a sum of squares: two over its degrees of freedom.
    variance = 2 * np.sum(scatter**2) / ((count - 1) * np.sum(scatter) ** 2)
    agrees = 0.0 if biased else AGREES
    return reported / seen if reported > seen * np.exp(agrees * np.sqrt(variance)) else 1.0


def _noise(pull: np.ndarray, error: np.ndarray | None) -> np.ndarray:
    # Variance of one step by coordinate. What the fit does not know, as of minibatches, is in the differences.
    # Noise is the same in both halves of a window; far from the end, pulls of the first change by more than that.
    halves = np.array_split(np.diff(pull, axis=0) ** 2 / (2 * SCATTER), 2)
    least = min((half.mean(0) for half in halves), key=np.sum)
    if error is None or not np.isfinite(error).all():
        return least
    square = np.mean(np.asarray(error, float) ** 2, 0)
    return np.maximum(least, square / excess(pull, square))


def _is_straight(pull: np.ndarray) -> bool:
    # Noise goes to and fro.
    return bool(np.linalg.norm(pull.sum(0)) > STRAIGHT * np.sum(np.linalg.norm(pull, axis=1)))
