# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""A problem: a loss with exact answers, and the coordinates in which they are given."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from numpy import ndarray
from numpy.typing import ArrayLike

__all__ = [
    "Answers",
    "At",
    "Function",
    "Moments",
    "Problem",
    "Result",
    "cast",
    "normal_density",
    "refuse",
]

Result = TypeVar("Result")
Function = Callable[[jax.Array], jax.Array]
Moments = tuple[ndarray, ndarray]


class At(NamedTuple):
    """Where an answer is asked for: a point, a variance per coordinate, a temperature."""

    x: ndarray  # (dim,)
    tau: ndarray  # (dim,)
    temperature: float


def refuse(reason: str) -> Callable[[At], NoReturn]:
    """An answer that raises `NotImplementedError` with its reason."""

    def answer(at: At) -> NoReturn:
        raise NotImplementedError(reason)

    return answer


class Answers(NamedTuple):
    """What a problem's methods evaluate; each refuses unless it is given."""

    local_entropy: Callable[[At], float] = refuse("local_entropy: only the loss is known")
    heat: Callable[[At], float] = refuse("heat: only the loss is known")
    moments: Callable[[At], Moments] = refuse("moments of the shift: only the loss is known")
    heat_step: Callable[[At], ndarray] = refuse("heat_step: only the loss is known")


@dataclass(frozen=True, eq=False)
class Problem:
    """A loss with known regularized values, shifted moments and exact two-step updates.

    Methods take and return NumPy float64. `x` is `(dim,)`; `tau` is a variance in squared units
    of x, a scalar or one per coordinate `(dim,)`; `temperature` is T, in units of the loss. They
    raise `ValueError` on wrong shapes or signs, `NotImplementedError` where no answer is exact.

    Attributes:
        name: what it is called in tables.
        dim: number of parameters.
        loss: `(dim,) -> ()`, pure JAX, in the precision of its input.
        start: `(dim,)`, where a run may sensibly begin.
        minimizer: `(dim,)`, a global minimizer of the plain loss, or None.
        minimum: the infimum of the plain loss, or None.
        answers: what the methods evaluate.

    Example:
        >>> from numpyro_regloss.problems import double_well
        >>> problem = double_well(dim=2).transformed(shift=[1.0, 0.0], rotation=0)
        >>> round(problem.heat(problem.minimizer, tau=0.1), 6)  # 2 (4 tau + 3 tau²)
        0.86
    """

    name: str
    dim: int
    loss: Function
    start: ndarray
    minimizer: ndarray | None = None
    minimum: float | None = None
    answers: Answers = field(default=Answers(), repr=False)

    def local_entropy(self, x: ArrayLike, tau: ArrayLike, temperature: float = 1.0) -> float:
        """Return F_tau(x) = -T log E exp(-f(x')/T) with x' ~ N(x, tau I)."""
        return float(self._evaluate(self.answers.local_entropy, x, tau, temperature))

    def heat(self, x: ArrayLike, tau: ArrayLike) -> float:
        """Return F^H_tau(x) = E f(x') with x' ~ N(x, tau I)."""
        return float(self._evaluate(self.answers.heat, x, tau, 1.0))

    def shift_mean(self, x: ArrayLike, tau: ArrayLike, temperature: float = 1.0) -> ndarray:
        """Return the `(dim,)` mean of q: the exact local-entropy update."""
        return self._evaluate(self.answers.moments, x, tau, temperature)[0]

    def shift_covariance(self, x: ArrayLike, tau: ArrayLike, temperature: float = 1.0) -> ndarray:
        """Return the `(dim, dim)` covariance of q."""
        return self._evaluate(self.answers.moments, x, tau, temperature)[1]

    def heat_step(self, x: ArrayLike, tau: ArrayLike, temperature: float = 1.0) -> ndarray:
        """Return `(dim,)` argmin_y F^H_tau(y) + T|x - y|²/(2 tau), one of them at a tie."""
        return self._evaluate(self.answers.heat_step, x, tau, temperature)

    def transformed(
        self,
        shift: ArrayLike | None = None,
        rotation: ArrayLike | np.random.Generator | int | None = None,
    ) -> "Problem":
        """The same problem in other coordinates: f(Rᵀ(x - shift)).

        Args:
            shift: where the origin goes, `(dim,)` or a scalar.
            rotation: R, orthogonal `(dim, dim)`, or a generator or seed to draw one from. With a
                rotation the answers raise `ValueError` unless tau is equal in all coordinates.

        Returns:
            The problem with start, minimizer and all answers moved.

        Raises:
            ValueError: if the rotation is not an orthogonal matrix of this dimension.
        """
        dim, inner, rotated = self.dim, self.answers, rotation is not None
        if isinstance(rotation, int | np.integer | np.random.Generator):
            q, r = np.linalg.qr(np.random.default_rng(rotation).normal(size=(dim, dim)))
            rotation = q * np.sign(np.diag(r))  # the unique QR: then the rotation is uniform
        turn = np.asarray(rotation, float) if rotated else np.eye(dim)
        move = np.broadcast_to(np.asarray(0.0 if shift is None else shift, float), (dim,))
        if turn.shape != (dim, dim) or not np.allclose(turn.T @ turn, np.eye(dim), atol=1e-10):
            raise ValueError(f"expected an orthogonal ({dim}, {dim}) rotation, got {turn}")

        def inside(at: At) -> At:
            if rotated and np.ptp(at.tau) > 0:
                raise ValueError(f"expected one tau for all coordinates of a rotation: {at.tau}")
            return at._replace(x=(at.x - move) @ turn)

        def outside(x: ndarray) -> ndarray:
            return move + turn @ x

        def moments(at: At) -> Moments:
            mean, covariance = inner.moments(inside(at))
            return outside(mean), turn @ covariance @ turn.T

        def loss(x: jax.Array) -> jax.Array:
            return self.loss(jnp.dot(x - cast(move, x), cast(turn, x)))

        answers = Answers(
            lambda at: inner.local_entropy(inside(at)),
            lambda at: inner.heat(inside(at)),
            moments,
            lambda at: outside(inner.heat_step(inside(at))),
        )
        best = None if self.minimizer is None else outside(self.minimizer)
        name, start = f"transformed {self.name}", outside(self.start)
        return Problem(name, dim, loss, start, best, self.minimum, answers)

    def _evaluate(
        self, answer: Callable[[At], Result], x: ArrayLike, tau: ArrayLike, temperature: float
    ) -> Result:
        point, variance = np.asarray(x, float), np.asarray(tau, float)
        if point.shape != (self.dim,):
            raise ValueError(f"expected x of shape ({self.dim},), got {point.shape}")
        if variance.shape not in {(), point.shape}:
            raise ValueError(f"expected tau a scalar or ({self.dim},), got {variance.shape}")
        if not (np.all(variance > 0) and 0 < temperature < np.inf):
            raise ValueError(f"expected tau and temperature > 0, got {tau} and {temperature}")
        try:
            at = At(point, np.broadcast_to(variance, point.shape), float(temperature))
            return answer(at)
        except NotImplementedError as missing:
            message = f"{self.name} in {self.dim} dimensions has no exact {missing}"
            raise NotImplementedError(message) from None


def cast(constant: ndarray, x: jax.Array) -> ndarray:
    """The constant in the precision of `x`."""
    # By hand: JAX's own casts of captured arrays do not survive a change of `enable_x64` between
    # two traces, and the answers, float64 always, make such changes.
    return constant.astype(jnp.result_type(x, float))


def normal_density(x: ArrayLike) -> ndarray:
    """Density of the standard normal."""
    return np.exp(-np.square(x) / 2) / np.sqrt(2 * np.pi)
