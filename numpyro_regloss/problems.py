# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Problems with known answers, for tests, notebooks and benchmarks.

A `Problem` is a JAX loss f with the exact values of what the engines estimate: both regularized
losses, the moments of the shifted density q ∝ exp(-f/T) N(x, tau I), and both exact two-step
updates. Answers are closed forms, or quadrature and root finding in float64 on the host.

References:
    N. García Trillos, Z. Kaplan, D. Sanz-Alonso (2019). Variational Characterizations of Local
    Entropy and Heat Regularization in Deep Learning. Entropy 21(5), 511.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from numpy import ndarray
from numpy.polynomial import Polynomial, legendre
from numpy.typing import ArrayLike
from scipy.ndimage import minimum_filter
from scipy.optimize import minimize, root
from scipy.special import erfcx, log_ndtr, logsumexp, ndtr, softmax

__all__ = [
    "Problem",
    "absolute",
    "double_well",
    "gaussian_mixture",
    "linear",
    "quadratic",
    "rastrigin",
    "relu",
    "rosenbrock",
    "separable",
    "zero_one",
]

_Result = TypeVar("_Result")
_Function = Callable[[jax.Array], jax.Array]
_Moments = tuple[ndarray, ndarray]


class _At(NamedTuple):
    x: ndarray  # (dim,)
    tau: ndarray  # (dim,)
    temperature: float


def _refuse(reason: str) -> Callable[[_At], NoReturn]:
    def answer(at: _At) -> NoReturn:
        raise NotImplementedError(reason)

    return answer


class _Answers(NamedTuple):
    local_entropy: Callable[[_At], float] = _refuse("local_entropy: only the loss is known")
    heat: Callable[[_At], float] = _refuse("heat: only the loss is known")
    moments: Callable[[_At], _Moments] = _refuse("moments of the shift: only the loss is known")
    heat_step: Callable[[_At], ndarray] = _refuse("heat_step: only the loss is known")


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
        >>> problem = double_well(dim=2).transformed(shift=[1.0, 0.0], rotation=0)
        >>> round(problem.heat(problem.minimizer, tau=0.1), 6)  # 2 (4 tau + 3 tau²)
        0.86
    """

    name: str
    dim: int
    loss: _Function
    start: ndarray
    minimizer: ndarray | None = None
    minimum: float | None = None
    answers: _Answers = field(default=_Answers(), repr=False)

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

        def inside(at: _At) -> _At:
            if rotated and np.ptp(at.tau) > 0:
                raise ValueError(f"expected one tau for all coordinates of a rotation: {at.tau}")
            return at._replace(x=(at.x - move) @ turn)

        def outside(x: ndarray) -> ndarray:
            return move + turn @ x

        def moments(at: _At) -> _Moments:
            mean, covariance = inner.moments(inside(at))
            return outside(mean), turn @ covariance @ turn.T

        def loss(x: jax.Array) -> jax.Array:
            return self.loss(jnp.dot(x - _cast(move, x), _cast(turn, x)))

        answers = _Answers(
            lambda at: inner.local_entropy(inside(at)),
            lambda at: inner.heat(inside(at)),
            moments,
            lambda at: outside(inner.heat_step(inside(at))),
        )
        best = None if self.minimizer is None else outside(self.minimizer)
        name, start = f"transformed {self.name}", outside(self.start)
        return Problem(name, dim, loss, start, best, self.minimum, answers)

    def _evaluate(
        self, answer: Callable[[_At], _Result], x: ArrayLike, tau: ArrayLike, temperature: float
    ) -> _Result:
        point, variance = np.asarray(x, float), np.asarray(tau, float)
        if point.shape != (self.dim,):
            raise ValueError(f"expected x of shape ({self.dim},), got {point.shape}")
        if variance.shape not in {(), point.shape}:
            raise ValueError(f"expected tau a scalar or ({self.dim},), got {variance.shape}")
        if not (np.all(variance > 0) and 0 < temperature < np.inf):
            raise ValueError(f"expected tau and temperature > 0, got {tau} and {temperature}")
        try:
            at = _At(point, np.broadcast_to(variance, point.shape), float(temperature))
            return answer(at)
        except NotImplementedError as missing:
            message = f"{self.name} in {self.dim} dimensions has no exact {missing}"
            raise NotImplementedError(message) from None


def linear(slope: ArrayLike) -> Problem:
    """f(x) = slope·x, with F = f - tau|slope|²/(2T) and both updates x - tau slope/T.

    Args:
        slope: `(dim,)`.

    Returns:
        The problem; it has no minimizer.

    Example:
        >>> linear([1.0, -2.0]).local_entropy([0.0, 0.0], tau=0.5)
        -1.25
    """
    slope = np.atleast_1d(np.asarray(slope, float))
    zero = np.zeros_like(slope)
    answers = _quadratic_answers(np.diag(zero), zero, slope, 0.0)
    return Problem(
        "linear", slope.size, lambda x: jnp.dot(x, _cast(slope, x)), zero, answers=answers
    )


def quadratic(hessian: ArrayLike, center: ArrayLike = 0.0, offset: float = 0.0) -> Problem:
    """f(x) = (x - m)ᵀH(x - m)/2 + c, with both updates (I + tau H/T)⁻¹(x + tau H m/T).

    Args:
        hessian: H, symmetric positive semidefinite `(dim, dim)`, or its diagonal `(dim,)`.
        center: m, `(dim,)` or a scalar.
        offset: c.

    Returns:
        The problem, started one unit off the center in every coordinate.

    Raises:
        ValueError: if the Hessian is not a symmetric positive semidefinite matrix.

    Example:
        >>> quadratic([1.0, 3.0]).shift_mean([1.0, 1.0], tau=1.0).tolist()
        [0.5, 0.25]
    """
    given, offset = np.atleast_1d(np.asarray(hessian, float)), float(offset)
    matrix = np.diag(given) if given.ndim == 1 else given
    if matrix.shape != matrix.T.shape or not np.allclose(matrix, matrix.T):
        raise ValueError(f"expected a symmetric Hessian or its diagonal, got {given}")
    eigenvalues = np.linalg.eigvalsh(matrix)
    if eigenvalues[0] < -1e-10 * abs(eigenvalues[-1]):
        raise ValueError(f"expected a positive semidefinite Hessian, got eigenvalues {eigenvalues}")
    middle = np.zeros(len(matrix)) + np.asarray(center, float)
    curve = jnp.multiply if given.ndim == 1 else jnp.dot

    def loss(x: jax.Array) -> jax.Array:
        residual = x - _cast(middle, x)
        return jnp.dot(residual, curve(_cast(given, x), residual)) / 2 + offset

    answers = _quadratic_answers(matrix, middle, np.zeros_like(middle), offset)
    return Problem("quadratic", middle.size, loss, middle + 1.0, middle, offset, answers)


def gaussian_mixture(weights: ArrayLike, means: ArrayLike, covariances: ArrayLike) -> Problem:
    """f(x) = -log Σ_j w_j N(x; m_j, S_j); at T = 1, F = -log Σ_j w_j N(x; m_j, S_j + tau I).

    Other temperatures and the heat answers are quadratures, of one and two dimensions only. Where
    tau is hundreds of times the smallest variance, f has creases on its scale and the heat in two
    dimensions is good to 1e-5 only, else to 1e-8.

    Args:
        weights: w, `(k,)`, positive; a sum other than one only moves the loss.
        means: m, `(k, dim)`, or `(k,)` in one dimension.
        covariances: S, a variance, one per component `(k,)`, one per component and coordinate
            `(k, dim)`, or matrices `(k, dim, dim)`.

    Returns:
        The problem, started one standard deviation off the mean of the lightest component. Its
        minimizer is numerical (about 1e-8): the best of the descents from every mean.

    Raises:
        ValueError: if shapes disagree, a weight is not positive or a covariance not definite.

    Example:
        >>> problem = gaussian_mixture([0.5, 0.5], [-1.0, 1.0], 0.5)
        >>> round(problem.local_entropy([0.0], tau=0.5), 6)  # -log N(1; 0, 1)
        1.418939
    """
    weight, mean, spread = (np.asarray(given, float) for given in (weights, means, covariances))
    mean = mean[:, None] if mean.ndim == 1 else mean
    count, dim = mean.shape
    if spread.ndim < 3:
        spread = spread[:, None] if spread.ndim == 1 else spread
        spread = np.broadcast_to(spread, mean.shape)[..., None] * np.eye(dim)
    if weight.shape != (count,) or np.any(weight <= 0):
        raise ValueError(f"expected {count} positive weights, got {weights}")
    if spread.shape != (count, dim, dim) or np.linalg.eigvalsh(spread).min() <= 0:
        raise ValueError(f"expected {count} positive definite covariances, got {covariances}")
    whiten = np.linalg.inv(np.linalg.cholesky(spread))
    log_scale = np.log(weight) - np.linalg.slogdet(2 * np.pi * spread)[1] / 2

    def loss(x: jax.Array) -> jax.Array:
        residual = jnp.einsum("kij,kj->ki", _cast(whiten, x), x - _cast(mean, x))
        return -jax.nn.logsumexp(_cast(log_scale, x) - jnp.sum(residual**2, axis=1) / 2)

    def components(x: ndarray, tau: ndarray) -> tuple[ndarray, ndarray, ndarray]:
        total = spread + np.diag(tau)
        pulled = np.linalg.solve(total, (x - mean)[..., None])[..., 0]
        squares = np.sum((x - mean) * pulled, axis=1) + np.linalg.slogdet(2 * np.pi * total)[1]
        return np.log(weight) - squares / 2, pulled, total

    def value_and_grad(x: ndarray) -> tuple[float, ndarray]:
        log_terms, pulled, _ = components(x, np.zeros(dim))
        return -logsumexp(log_terms), softmax(log_terms) @ pulled

    best = min(
        (minimize(value_and_grad, m, jac=True, tol=1e-10) for m in mean), key=lambda r: r.fun
    )
    numerical = _quadrature_answers(loss, dim, best.fun)

    def local_entropy(at: _At) -> float:
        if at.temperature != 1:
            return numerical.local_entropy(at)
        return -logsumexp(components(at.x, at.tau)[0])

    def moments(at: _At) -> _Moments:
        if at.temperature != 1:
            return numerical.moments(at)
        log_terms, pulled, total = components(at.x, at.tau)
        center, between = _weighted_moments(at.x - at.tau * pulled, log_terms)
        within = spread @ np.linalg.solve(total, np.diag(at.tau))
        return center, between + np.tensordot(softmax(log_terms), within, axes=1)

    lightest = np.argmin(weight)
    start = mean[lightest] + np.sqrt(np.diag(spread[lightest]))
    answers = numerical._replace(local_entropy=local_entropy, moments=moments)
    return Problem("gaussian_mixture", dim, loss, start, best.x, float(best.fun), answers)


def separable(
    name: str,
    one_dimensional_loss: _Function,
    dim: int,
    *,
    start: float,
    minimum: float,
    minimizer: float | None = None,
    kinks: tuple[float, ...] = (),
    heat: Callable[[ndarray, ndarray], ndarray] | None = None,
    local_entropy: Callable[[ndarray, ndarray, float], ndarray] | None = None,
) -> Problem:
    """f(x) = Σ_i g(x_i): every answer by quadrature of one coordinate, or by the form given.

    Args:
        name: of the problem.
        one_dimensional_loss: g, elementwise, pure JAX, without captured NumPy arrays.
        dim: number of coordinates.
        start: of every coordinate.
        minimum: infimum of g, or a lower bound: it limits where mass and minimizers can be.
        minimizer: where g attains the minimum, if it does.
        kinks: where g is not smooth; the panels of the quadrature are graded towards them.
        heat: elementwise closed form in (x, tau).
        local_entropy: elementwise closed form in (x, tau, temperature).

    Returns:
        The problem.

    Example:
        >>> problem = separable("quartic", lambda x: x**4, 2, start=1.0, minimum=0.0)
        >>> round(problem.heat([0.0, 1.0], tau=0.5), 6)  # Σ x⁴ + 6 tau x² + 3 tau²
        5.5
    """
    line = _quadrature_answers(lambda x: one_dimensional_loss(x[0]), 1, minimum, kinks)

    def loss(x: jax.Array) -> jax.Array:
        return jnp.sum(one_dimensional_loss(x))

    def each(answer: Callable[[_At], _Result], at: _At) -> list[_Result]:
        pieces = (at._replace(x=at.x[i : i + 1], tau=at.tau[i : i + 1]) for i in range(dim))
        return [answer(piece) for piece in pieces]

    def moments(at: _At) -> _Moments:
        means, variances = zip(*each(line.moments, at), strict=True)
        return np.concatenate(means), np.diag(np.ravel(variances))

    answers = _Answers(
        lambda at: np.sum(local_entropy(*at) if local_entropy else each(line.local_entropy, at)),
        lambda at: np.sum(heat(at.x, at.tau) if heat else each(line.heat, at)),
        moments,
        lambda at: np.concatenate(each(line.heat_step, at)),
    )
    best = None if minimizer is None else np.full(dim, float(minimizer))
    return Problem(name, dim, loss, np.full(dim, float(start)), best, dim * float(minimum), answers)


def absolute(dim: int) -> Problem:
    """f(x) = Σ_i |x_i|, both regularized losses in closed form; a kink at the minimum.

    Args:
        dim: number of coordinates.

    Returns:
        The problem.

    Example:
        >>> round(absolute(1).heat([0.0], tau=0.5), 6)  # sqrt(2 tau/π)
        0.56419
    """

    def heat(x: ndarray, tau: ndarray) -> ndarray:
        return _ramp(x, tau) + _ramp(-x, tau)

    def local_entropy(x: ndarray, tau: ndarray, temperature: float) -> ndarray:
        right, left = _log_decay(x, tau, temperature), _log_decay(-x, tau, temperature)
        return -temperature * np.logaddexp(right, left)

    known = {"kinks": (0.0,), "heat": heat, "local_entropy": local_entropy}
    return separable("absolute", jnp.abs, dim, start=2.0, minimum=0.0, minimizer=0.0, **known)


def relu(dim: int) -> Problem:
    """f(x) = Σ_i max(x_i, 0), both regularized losses in closed form; flat on one side.

    Args:
        dim: number of coordinates.

    Returns:
        The problem; its minimizer is the corner of the flat orthant.

    Example:
        >>> round(relu(1).heat([0.0], tau=0.5), 6)  # half of that of the absolute value
        0.282095
    """

    def local_entropy(x: ndarray, tau: ndarray, temperature: float) -> ndarray:
        right, left = _log_decay(x, tau, temperature), log_ndtr(-x / np.sqrt(tau))
        return -temperature * np.logaddexp(right, left)

    known = {"kinks": (0.0,), "heat": _ramp, "local_entropy": local_entropy}
    return separable("relu", jax.nn.relu, dim, start=2.0, minimum=0.0, minimizer=0.0, **known)


def double_well(dim: int) -> Problem:
    """f(x) = Σ_i (x_i² - 1)², with 2^dim equal minima at the corners ±1.

    Args:
        dim: number of coordinates.

    Returns:
        The problem; the minimizer given is the corner of ones.

    Example:
        >>> round(double_well(1).heat([1.0], tau=0.1), 6)  # 4 tau + 3 tau² at a minimum
        0.43
    """

    def heat(x: ndarray, tau: ndarray) -> ndarray:
        return x**4 + 6 * tau * x**2 + 3 * tau**2 - 2 * (x**2 + tau) + 1

    def loss(x: jax.Array) -> jax.Array:
        return (x**2 - 1) ** 2

    return separable("double_well", loss, dim, start=2.0, minimum=0.0, minimizer=1.0, heat=heat)


def rastrigin(dim: int) -> Problem:
    """f(x) = Σ_i x_i² + 10 - 10 cos(2π x_i), a bowl with a local minimum near every integer.

    Args:
        dim: number of coordinates.

    Returns:
        The problem, started in a wrong basin.

    Example:
        >>> round(rastrigin(2).heat([0.0, 0.0], tau=1.0), 6)  # dim (10 + tau), the ripple is gone
        22.0
    """

    def heat(x: ndarray, tau: ndarray) -> ndarray:
        return x**2 + tau + 10 - 10 * np.exp(-2 * np.pi**2 * tau) * np.cos(2 * np.pi * x)

    def loss(x: jax.Array) -> jax.Array:
        return x**2 + 10 - 10 * jnp.cos(2 * jnp.pi * x)

    return separable("rastrigin", loss, dim, start=2.7, minimum=0.0, minimizer=0.0, heat=heat)


def rosenbrock(a: float = 1.0, b: float = 100.0) -> Problem:
    """f(x) = (a - x_0)² + b (x_1 - x_0²)², a narrow curved valley in two dimensions.

    Given x_0 all is Gaussian in x_1, so that quadrature and roots are needed in x_0 alone.

    Args:
        a: position of the minimum, (a, a²).
        b: steepness of the walls, positive.

    Returns:
        The problem.

    Raises:
        ValueError: if b is not positive.

    Example:
        >>> rosenbrock().heat([1.0, 1.0], tau=0.5)  # tau + b (tau + 3 tau² + 4 tau)
        325.5
    """
    if b <= 0:
        raise ValueError(f"expected b > 0, got {b}")

    def loss(x: jax.Array) -> jax.Array:
        return (a - x[0]) ** 2 + b * (x[1] - x[0] ** 2) ** 2

    def tilt(at: _At) -> tuple[ndarray, ndarray, float]:
        wall = 1 / (1 / b + 2 * at.tau[1] / at.temperature)  # b, once x_1 is integrated out

        def marginal(u: ndarray) -> ndarray:
            return (a - u[..., 0]) ** 2 + wall * (u[..., 0] ** 2 - at.x[1]) ** 2

        rule = _tilt(marginal, at._replace(x=at.x[:1], tau=at.tau[:1]), 0.0)
        return *rule, 2 * wall * at.tau[1] / at.temperature

    def local_entropy(at: _At) -> float:
        _, log_weight, gain = tilt(at)
        return -at.temperature * (logsumexp(log_weight) + np.log1p(-gain) / 2)

    def heat(at: _At) -> float:
        (x, y), (s, t) = at.x, at.tau
        return (a - x) ** 2 + s + b * (t + 2 * s**2 + 4 * s * x**2 + (y - x**2 - s) ** 2)

    def moments(at: _At) -> _Moments:
        u, log_weight, gain = tilt(at)
        nodes = np.hstack([u, at.x[1] + gain * (u**2 - at.x[1])])
        mean, covariance = _weighted_moments(nodes, log_weight)
        return mean, covariance + np.diag([0.0, at.tau[1] * (1 - gain)])

    def heat_step(at: _At) -> ndarray:
        (x, y), (pull_x, pull_y), u = at.x, at.temperature / at.tau, Polynomial([0.0, 1.0])
        valley, gain = u**2 + at.tau[0], 2 * b / (2 * b + pull_y)
        # The objective minimized over x_1; its critical points are the roots of a cubic.
        profile = (a - u) ** 2 + 4 * b * at.tau[0] * u**2 + pull_x / 2 * (u - x) ** 2
        profile += gain * pull_y / 2 * (valley - y) ** 2
        best = min(profile.deriv().roots().real, key=profile)
        return np.array([best, y + gain * (valley(best) - y)])

    start, best = np.array([-1.2, 1.0]), np.array([a, a**2], float)
    answers = _Answers(local_entropy, heat, moments, heat_step)
    return Problem("rosenbrock", 2, loss, start, best, 0.0, answers)


def zero_one(
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    start: ArrayLike | None = None,
    minimizer: ArrayLike | None = None,
) -> Problem:
    """f(w) = #{i: label_i inputs_i·w <= 0}, the training errors of a linear classifier.

    An integer and not differentiable, yet F^H(w) = Σ_i Φ(-label_i inputs_i·w/(sqrt(tau)|inputs_i|))
    is exact, and so is its update at temperatures high enough to make it provably unique.

    Args:
        inputs: `(n, dim)`, no row zero; a column of ones is an intercept.
        labels: `(n,)`, -1 or 1.
        start: `(dim,)`; the first unit vector if None.
        minimizer: `(dim,)`, the best classifier where it is known: finding it is NP-hard.

    Returns:
        The problem; its minimum is the loss of the minimizer.

    Raises:
        ValueError: if shapes disagree, a label is not -1 or 1, or a row of the inputs is zero.

    Example:
        >>> problem = zero_one([[1.0, 0.0], [0.0, 2.0]], [1, -1])
        >>> int(problem.loss(jnp.array([1.0, 1.0]))), problem.heat([0.0, 0.0], tau=0.5)
        (1, 1.0)
    """
    rows, signs = np.asarray(inputs, float), np.asarray(labels, float)
    if rows.ndim != 2 or signs.shape != rows.shape[:1]:
        raise ValueError(f"expected (n, dim) and (n,), got {rows.shape} and {signs.shape}")
    if not (np.all(np.abs(signs) == 1) and np.all(np.any(rows, axis=1))):
        raise ValueError("expected labels -1 or 1 and no row of zeros among the inputs")
    signed, dim = signs[:, None] * rows, rows.shape[1]

    def loss(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.dot(_cast(signed, x), x) <= 0)

    def standardized(at: _At) -> ndarray:
        return signed / np.sqrt(signed**2 @ at.tau)[:, None]

    def heat_step(at: _At) -> ndarray:
        scaled, pull = standardized(at), np.diag(at.temperature / at.tau)
        # Φ'' is at least -φ(1), at 1: a bound on how concave the heat can be.
        if np.linalg.eigvalsh(pull - _normal(1.0) * scaled.T @ scaled)[0] <= 0:
            raise NotImplementedError("heat_step: at this temperature it may not be unique")

        def slope(y: ndarray) -> _Moments:
            margin = scaled @ y
            hessian = (scaled.T * (margin * _normal(margin))) @ scaled + pull
            return pull @ (y - at.x) - _normal(margin) @ scaled, hessian

        return root(slope, at.x, jac=True, tol=1e-12).x

    none = _refuse("local entropy: it would sum over the cells of a hyperplane arrangement")
    answers = _Answers(none, lambda at: np.sum(ndtr(-standardized(at) @ at.x)), none, heat_step)
    begin = np.eye(dim)[0] if start is None else np.asarray(start, float)
    best = None if minimizer is None else np.asarray(minimizer, float)
    minimum = None if best is None else float(np.sum(signed @ best <= 0))
    return Problem("zero_one", dim, loss, begin, best, minimum, answers)


def _cast(constant: ndarray, x: jax.Array) -> ndarray:
    # By hand: JAX's own casts of captured arrays do not survive a change of `enable_x64` between
    # two traces, and the answers, float64 always, make such changes.
    return constant.astype(jnp.result_type(x, float))


def _normal(x: ArrayLike) -> ndarray:
    return np.exp(-np.square(x) / 2) / np.sqrt(2 * np.pi)


def _ramp(x: ndarray, tau: ndarray) -> ndarray:
    """Return E max(x', 0) with x' ~ N(x, tau)."""
    scale = np.sqrt(tau)
    return x * ndtr(x / scale) + scale * _normal(x / scale)


def _log_decay(x: ndarray, tau: ndarray, temperature: float) -> ndarray:
    """Return log E[exp(-x'/T); x' > 0] with x' ~ N(x, tau)."""
    drop = tau / temperature
    center = (x - drop) / np.sqrt(tau)
    scaled = np.log(erfcx(np.maximum(-center, 0.0) / np.sqrt(2)) / 2) - x**2 / (2 * tau)
    # Left of zero the second form would subtract two numbers of order tau/T².
    return np.where(center < 0, scaled, (drop / 2 - x) / temperature + log_ndtr(center))


def _weighted_moments(nodes: ndarray, log_weight: ndarray) -> _Moments:
    weight = softmax(log_weight)
    mean = weight @ nodes
    return mean, ((nodes - mean).T * weight) @ (nodes - mean)


def _mesh(axes: list[ndarray]) -> ndarray:
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)


def _quadratic_answers(
    hessian: ndarray, center: ndarray, slope: ndarray, offset: float
) -> _Answers:
    def value(x: ndarray) -> float:
        return (x - center) @ hessian @ (x - center) / 2 + slope @ x + offset

    def moments(at: _At) -> _Moments:
        covariance = np.linalg.inv(hessian / at.temperature + np.diag(1 / at.tau))
        gradient = hessian @ (at.x - center) + slope
        return at.x - covariance @ gradient / at.temperature, covariance

    def local_entropy(at: _At) -> float:
        mean, covariance = moments(at)
        log_det = np.sum(np.log(at.tau)) - np.linalg.slogdet(covariance)[1]
        return value(mean) + at.temperature * (np.sum((at.x - mean) ** 2 / at.tau) + log_det) / 2

    def heat(at: _At) -> float:
        return value(at.x) + at.tau @ np.diag(hessian) / 2

    return _Answers(local_entropy, heat, moments, lambda at: moments(at)[0])


_ORDER = 16
_NODES, _WEIGHTS = legendre.leggauss(_ORDER)
_PANELS = {1: (256, 256), 2: (12, 40)}  # per axis while the box closes in, and at the end
_GRID = {1: 1001, 2: 25}  # points per axis among which a heat step is sought
_NATS = 60.0  # a density so far below its peak is lost to rounding, moments included
# Around a kink, in units of the range: one side may fall off much faster than the other.
_GRADES = np.r_[0.0, 2.0 ** -np.arange(8, 28), -(2.0 ** -np.arange(8, 28))]


def _coarse_heat(loss: Callable[[ndarray], ndarray], x: ndarray, tau: ndarray) -> ndarray:
    # The trapezoidal rule is spectrally accurate under a Gaussian, up to kinks.
    dim = x.shape[-1]
    offsets = _mesh([np.linspace(-8, 8, _GRID[dim])] * dim).reshape(-1, dim)
    weights = softmax(-np.sum(offsets**2, axis=1) / 2)
    return loss(x[..., None, :] + np.sqrt(tau) * offsets) @ weights


def _tilt(
    loss: Callable[[ndarray], ndarray], at: _At, minimum: float, kinks: tuple[float, ...] = ()
) -> tuple[ndarray, ndarray]:
    """Return nodes `(n, dim)` and log weights `(n,)` that integrate exp(-loss/T) N(x, tau I).

    An infinite temperature leaves the Gaussian alone. The first box provably holds the mass: at r
    standard deviations there is at most exp(-minimum/T - r²/2) of it and in all, by Jensen, at
    least exp(-heat/T). Then the box closes in on the Gauss-Legendre panels that matter.
    """
    (x, tau, temperature), dim = at, at.x.size
    reach = max((_coarse_heat(loss, x, tau) - minimum) / temperature, 0.0)
    radius = np.sqrt(2.4 * tau * (_NATS + reach))
    low, high, (count, full) = x - radius, x + radius, _PANELS[dim]
    while True:
        width, edges, axes, weights, kept = high - low, [], [], [], []
        for a, b in zip(low, high, strict=True):
            breaks = np.add.outer(kinks, (b - a) * _GRADES).ravel()
            breaks = breaks[(a < breaks) & (breaks < b)]
            edges.append(np.unique(np.r_[np.linspace(a, b, count + 1), breaks]))
            half = np.diff(edges[-1])[:, None] / 2
            axes.append((edges[-1][:-1, None] + half * (1 + _NODES)).ravel())
            weights.append((half * _WEIGHTS).ravel())
        nodes = _mesh(axes)
        log_density = -np.sum((nodes - x) ** 2 / tau + np.log(2 * np.pi * tau), axis=-1) / 2
        if np.isfinite(temperature):
            log_density -= loss(nodes) / temperature
        for axis, edge in enumerate(edges):
            ridge = np.moveaxis(log_density, axis, 0).reshape(len(edge) - 1, _ORDER, -1).max(-1)
            peak = ridge.max(axis=1)
            # A panel's own variation bounds what its nodes may have missed of a narrow peak.
            inside = np.flatnonzero(2 * peak - ridge.min(axis=1) > peak.max() - _NATS)
            kept.append((edge[inside[0]], edge[inside[-1] + 1]))
        low, high = np.transpose(kept)
        settled = np.all(high - low > width / 2)
        if settled and count == full:
            return nodes.reshape(-1, dim), (log_density + np.log(_mesh(weights)).sum(-1)).ravel()
        count = full if settled else count


def _quadrature_answers(
    loss: _Function, dim: int, minimum: float, kinks: tuple[float, ...] = ()
) -> _Answers:
    if dim > 2:
        reason = "quadrature stops at two dimensions"
        return _Answers(*(_refuse(f"{answer}: {reason}") for answer in _Answers._fields))
    compiled = jax.jit(jax.vmap(loss))

    def values(nodes: ndarray) -> ndarray:
        with jax.enable_x64(True):
            return np.asarray(compiled(nodes.reshape(-1, dim))).reshape(nodes.shape[:-1])

    def tilt(at: _At) -> tuple[ndarray, ndarray]:
        return _tilt(values, at, minimum, kinks)

    def heat(at: _At) -> float:
        nodes, log_weight = tilt(at._replace(temperature=np.inf))
        return float(np.exp(log_weight) @ values(nodes))

    def heat_step(at: _At) -> ndarray:
        (x, tau, _), pull = at, at.temperature / at.tau

        def slope(y: ndarray) -> _Moments:
            nodes, log_weight = tilt(_At(y, tau, np.inf))
            weight = np.exp(log_weight) * values(nodes)
            score = (nodes - y) / tau  # differentiates the Gaussian: the loss may have kinks
            hessian = (score.T * weight) @ score + np.diag(pull - weight.sum() / tau)
            return weight @ score + pull * (y - x), hessian

        # A better point y has pull (y - x)²/2 <= heat(x) - minimum: the grid holds them all.
        radius = np.sqrt(2 * max(heat(at) - minimum, 0.0) / pull) + 1e-3 * np.sqrt(tau)
        grid = x + _mesh([np.linspace(-r, r, _GRID[dim]) for r in radius])
        coarse = _coarse_heat(values, grid, tau) + np.sum(pull * (grid - x) ** 2, axis=-1) / 2
        valleys = zip(*np.nonzero(coarse == minimum_filter(coarse, size=3)), strict=True)
        starts = sorted(valleys, key=lambda index: coarse[index])[:3]
        steps = [root(slope, grid[index], jac=True, tol=1e-12).x for index in starts]
        return min(steps, key=lambda y: heat(at._replace(x=y)) + pull @ (y - x) ** 2 / 2)

    return _Answers(
        lambda at: -at.temperature * logsumexp(tilt(at)[1]),
        heat,
        lambda at: _weighted_moments(*tilt(at)),
        heat_step,
    )
