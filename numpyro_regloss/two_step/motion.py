# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""A history without vectors: numbers of every step, and sketches that tell where the centre goes.

A vector x in standard deviations of the reference, such as the pull to the fitted mean, leaves its length and a
sketch z = S x of at most 61 numbers: each is the sum of every 61st coordinate, with random signs that are the same
in all steps. Then E |S x|² = |x|² over the signs, with a relative standard deviation of sqrt(2 / 61) where x is
spread over the numbers of the sketch, and sketches add as vectors do: |Σ S x_t|² estimates |Σ x_t|², by which a
walk is told from a straight way. Independent errors s_i of the coordinates become errors (Σ s_i²)^(1/2) of the
sums, so that a test in the sketch is the same test in fewer dimensions. Up to 61 parameters are their own sketch.

Reference: Charikar, Chen & Farach-Colton (2002), "Finding Frequent Items in Data Streams".
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_regloss._core.types import Array
from numpyro_regloss.fit.base import FitInfo

__all__ = [
    "HISTORIES",
    "HISTORY_BYTES",
    "LeftOut",
    "MotionInfo",
    "Path",
    "keeps_vectors",
    "no_vectors",
    "scalars_of",
]

HISTORIES = ("auto", "all", "scalars")
# Vectors stay in the history of a run while it takes no more than this.
HISTORY_BYTES = 2**28
# A prime, so that rows and columns of a layer's weights, whose widths are no multiples of it, go to all numbers.
SKETCH = 61
REMEDY = (
    'to keep all of them run with history="all", or to keep every k-th centre alone with '
    "record=Record(centers_every=k, verdicts=False)"
)


class MotionInfo(NamedTuple):
    """How far a step moved the centre, where the history has no vectors.

    Lengths are in standard deviations of the reference, but for the last two of them.

    Attributes:
        step: length from this centre to the next one.
        pull: length from the centre to the fitted mean.
        error: length of the fitted mean's standard errors, or None where the fit has none.
        step_norm: as `step`, in the units of the parameters.
        error_norm: as `error`, in the units of the parameters.
        step_sketch: the step as at most 61 numbers, which add over steps.
        pull_sketch: the pull likewise.
        error_sketch: standard errors of `pull_sketch`, or None.
    """

    step: Array
    pull: Array
    error: Array | None
    step_norm: Array
    error_norm: Array | None
    step_sketch: Array
    pull_sketch: Array
    error_sketch: Array | None


@jax.tree_util.register_static
class LeftOut:
    """Stands for the vectors that a history leaves out; every access is an error that says how to keep them."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{no_vectors('history')} (asked for {name!r})")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LeftOut)

    def __hash__(self) -> int:
        return hash(LeftOut)

    def __repr__(self) -> str:
        return "<left out of the history>"


class Path:
    """Centres that are kept at an interval, beside a history without vectors.

    Args:
        every: interval in steps, from step 0 on.
        before: numbers of steps and centres that were kept before.
    """

    def __init__(self, every: int, before: tuple[np.ndarray, np.ndarray] | None = None) -> None:
        self.every = every
        self.kept: dict[int, np.ndarray] = {}
        if before is not None:
            self.kept |= dict(zip(before[0].tolist(), before[1], strict=True))

    def add(self, state: Any) -> None:
        """Keeps the centre of a state, whatever its step."""
        self.kept[int(state.step)] = np.asarray(state.reference.mean)

    def until(self, state: Any) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of steps and centres `(centre, dim)` up to a state, its own among them."""
        last = int(state.step)
        kept = {**self.kept, last: np.asarray(state.reference.mean)}
        steps = sorted(step for step in kept if step <= last)
        return np.array(steps), np.stack([kept[step] for step in steps])


def no_vectors(what: str) -> str:
    """What to say where vectors are asked for and there are none.

    Args:
        what: begins the sentence.

    Returns:
        A sentence without its full stop.
    """
    return (
        f"{what}: centres, fitted Gaussians and other vectors of every step were left out of this history, which "
        f"would have taken more than {HISTORY_BYTES >> 20} MiB, or was asked for without them; {REMEDY}"
    )


def keeps_vectors(history: str, row: Any, num_steps: int) -> bool:
    """Whether the history of a run has vectors.

    Args:
        history: one of `HISTORIES`.
        row: shapes and types of one step's info.
        num_steps: steps that are asked for.

    Returns:
        True for `"all"`, and for `"auto"` while the whole history fits in `HISTORY_BYTES`.

    Raises:
        ValueError: if it is another word.
    """
    if history not in HISTORIES:
        raise ValueError(
            f'TwoStep.run: expected history as "auto", "all" or "scalars", got {history!r}.'
        )
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(row))
    return history == "all" or (history == "auto" and size * num_steps <= HISTORY_BYTES)


def scalars_of(info: Any, after: Any) -> Any:
    """The info of a step without its vectors.

    Args:
        info: a `TwoStepInfo`.
        after: the next reference.

    Returns:
        The same info: numbers as they are, tau as its mean, None for what has axes, `LeftOut` for the two
        Gaussians, and `motion`.
    """
    here = info.reference
    sd = jnp.sqrt(here.variance)
    moved, pulled = after.mean - here.mean, info.fitted.mean - here.mean
    errors = FitInfo.of(info.fit).mean_error
    motion = MotionInfo(
        step=_length(moved / sd),
        pull=_length(pulled / sd),
        error=None if errors is None else _length(errors / sd),
        step_norm=_length(moved),
        error_norm=None if errors is None else _length(errors),
        step_sketch=_sketch(moved / sd),
        pull_sketch=_sketch(pulled / sd),
        error_sketch=None if errors is None else jnp.sqrt(_sums((errors / sd) ** 2)),
    )
    numbers = jax.tree.map(lambda a: None if jnp.ndim(a) else a, info)
    return numbers._replace(
        reference=LeftOut(), fitted=LeftOut(), tau=jnp.mean(info.tau), motion=motion
    )


def _length(x: Array) -> Array:
    return jnp.sqrt(jnp.sum(x**2))


def _sketch(x: Array) -> Array:
    return x if len(x) <= SKETCH else _sums(jnp.where(_signs(len(x)), x, -x))


def _sums(x: Array) -> Array:
    if len(x) <= SKETCH:
        return x
    return jnp.sum(jnp.pad(x, (0, -len(x) % SKETCH)).reshape(-1, SKETCH), 0)


def _signs(dim: int) -> Array:
    # A hash of the position, for a stream of random numbers would be another one for every release of JAX.
    bits = jnp.arange(dim, dtype=jnp.uint32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return (bits ^ (bits >> 16)) & 1 == 1
