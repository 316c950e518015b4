# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Both regularized losses along a line or over a plane through given parameters.

Draws z_hj = x_h + sqrt(tau) ξ_hj about every point x_h of the grid, in antithetic pairs, serve all points: under
the mixture of all regularizers,

    F_tau(x_g) = -T log E[w_g exp(-loss / T)],  F^H_tau(x_g) = E[w_g loss] / E[w_g],
    w_g(z) = N(z; x_g, tau I) / mean_h N(z; x_h, tau I).

So curves are smooth, and F_tau holds where q lies many sqrt(tau) from x_g but within the grid, where the draws
about x_g alone see nothing of it. The ratio w depends on the one or two coordinates of the grid only.

References: García Trillos, Kaplan & Sanz-Alonso (2019), "Variational Characterizations of Local Entropy and Heat
Regularization in Deep Learning"; Veach & Guibas (1995), "Optimally Combining Sampling Techniques for Monte Carlo
Rendering" (the mixture).
"""

import difflib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from jax.scipy.special import logsumexp

from numpyro_regloss._core.checks import check_count, check_key, check_positive
from numpyro_regloss._core.mesh import check_mesh, copied, mapped, meshed
from numpyro_regloss._core.pareto import MAX_KHAT, pareto_khat
from numpyro_regloss._core.processes import here
from numpyro_regloss._core.stats import weight_ess
from numpyro_regloss._core.tail import tail_error
from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.gaussians.gaussian import AnyGaussian, Gaussian
from numpyro_regloss.losses.loss import Loss
from numpyro_regloss.losses.regularized import RegularizedLoss
from numpyro_regloss.losses.sites import unconstrained_labels
from numpyro_regloss.values.estimate import Estimate
from numpyro_regloss.values.evidence import pair_error
from numpyro_regloss.values.pairs import heat_of_pairs

__all__ = ["Landscape", "find_parameter", "landscape", "projected_covariance"]

WHAT = "values.landscape"
# The grid reaches so many sqrt(tau) to either side, and so far beyond further parameters.
REACH, MARGIN = 4.0, 2.0
POINTS = {1: 61, 2: 31}
SAMPLES = {1: 400, 2: 64}
CHUNK_SIZE = 64
LEAST_EVEN = 0.5
# Of values, in units of the machine's precision.
ROUNDING = 4.0


class Landscape(NamedTuple):
    """Losses over a grid of one or two coordinates.

    Attributes:
        coordinates: one array per axis of the grid, in units of the parameters: values of a named parameter, or
            distances from the origin.
        loss: the plain loss on the grid, `(n,)` or `(n, m)`.
        local_entropy: F_tau, an `Estimate` of such arrays. Its `ess` counts antithetic pairs, one about every
            point. Its error is infinite where it is not `trusted`.
        heat: F^H_tau, also an `Estimate`; its k-hat is that of the losses about the point.
        tau: variance of the regularizer, scalar or `(dim,)`, in squared units of the parameters.
        temperature: T.
        origin: the flat parameters, `(dim,)`.
        directions: orthonormal, one row per axis, `(1, dim)` or `(2, dim)`.
        start: coordinates of the origin, `(1,)` or `(2,)`.
        others: coordinates of the further parameters, `(k, 1)` or `(k, 2)`.
        labels: one per axis; that of a named parameter says where its values are unconstrained.
        num_samples: loss evaluations per point.
    """

    coordinates: tuple[Array, ...]
    loss: Array
    local_entropy: Estimate
    heat: Estimate
    tau: Array
    temperature: Array
    origin: Array
    directions: Array
    start: Array
    others: Array
    labels: tuple[str, ...]
    num_samples: int

    @property
    def trusted(self) -> np.ndarray:
        """Where F_tau may be trusted. Elsewhere q lies outside of the grid, or is too narrow for the draws."""
        return np.asarray(_is_trusted(self.local_entropy, self.num_samples))

    def project(self, x: Any) -> np.ndarray:
        """Coordinates of flat parameters `(..., dim)`, projected onto the line or plane."""
        step = np.asarray(x, float) - np.asarray(self.origin)
        return np.asarray(self.start) + step @ np.asarray(self.directions).T

    def project_covariance(self, gaussian: AnyGaussian) -> np.ndarray:
        """Covariance of a Gaussian's coordinates on the line or plane, `(1, 1)` or `(2, 2)`."""
        return projected_covariance(gaussian, self.directions)


def find_parameter(name: Any, names: Sequence[str], what: str) -> int:
    """The index of a parameter.

    Args:
        name: a flat name, or the index itself.
        names: flat names of all parameters.
        what: begins the error message.

    Returns:
        The index.

    Raises:
        TypeError: if it is neither a name nor an integer.
        ValueError: if there is no such parameter.
    """
    if isinstance(name, str):
        if name in names:
            return list(names).index(name)
    elif isinstance(name, bool) or not isinstance(name, int | np.integer):
        raise TypeError(f"{what}: expected the name or index of a parameter, got {name!r}.")
    elif -len(names) <= name < len(names):
        return int(name) % len(names)
    near = difflib.get_close_matches(str(name), names, 3) or names[:3]
    raise ValueError(
        f"{what}: expected the name of one of {len(names)} parameters, or its index, got {name!r}; names are "
        f"such as {', '.join(near)} (see loss.flat_names)."
    )


def landscape(
    rng_key: Key,
    loss: Loss,
    params: Any = None,
    *others: Any,
    tau: Any,
    temperature: Any = 1.0,
    directions: Sequence[Any] | None = None,
    spans: Sequence[tuple[float, float]] | None = None,
    num_points: int | None = None,
    num_samples: int | None = None,
    chunk_size: int = CHUNK_SIZE,
    mesh: Any = None,
) -> Landscape:
    """The plain loss, F_tau and F^H_tau along a line or over a plane through given parameters.

    With one further set of parameters the grid is the line through both; with two it is the plane through all
    three. Otherwise `directions` define the line or plane.

    Args:
        rng_key: a random key.
        loss: the loss, with its data, all of which is used.
        params: the origin, as the user wrote them (the pytree of the function, the constrained sites of the
            model); default: the loss's start.
        *others: one or two further sets of parameters.
        tau: variance of the regularizer in squared units of the (unconstrained) parameters, a number or `(dim,)`.
        temperature: T, in the units of the loss.
        directions: one or two of: the flat name of a parameter (see `loss.flat_names`), its index, or a flat
            vector `(dim,)` of any length. Default: the parameters themselves if there are at most two.
        spans: lowest and highest coordinate of every axis; default: four sqrt(tau) about the parameters.
        num_points: points of the grid along every axis; default: 61 along a line, 31 over a plane.
        num_samples: loss evaluations per point; rounded up to whole chunks; default: 400 along
            a line, 64 over a plane.
        chunk_size: evaluations at once, an even number.
        mesh: devices that divide the points of the grid, see `TwoStep`.

    Returns:
        The landscape, which `plots.landscape` draws.

    Raises:
        TypeError: if the loss is not a `Loss`.
        ValueError: if the line or plane is not determined, or a setting is out of range.

    Example:
        >>> loss = Loss.from_function(lambda x: 0.5 * jnp.sum(x**2), jnp.zeros(3))
        >>> report = landscape(random.key(0), loss, tau=1.0, directions=["params[0]"], num_points=9)
        >>> report.loss.shape, float(report.loss[0])
        ((9,), 8.0)
        >>> exact = 0.25 * report.coordinates[0] ** 2 + 1.5 * jnp.log(2.0)
        >>> bool(jnp.all(jnp.abs(report.local_entropy.value - exact) < 5 * report.local_entropy.error))
        True
    """
    if not isinstance(loss, Loss):
        raise TypeError(
            f"{WHAT}: expected a Loss, got {type(loss).__name__}; wrap it with Loss.from_function(fn, params)."
        )
    rng_key = check_key(rng_key, WHAT)
    tau = check_positive(tau, f"{WHAT}: tau", ((), (loss.dim,)))
    origin = loss.x0 if params is None else loss.unconstrain(params)
    points = [loss.unconstrain(other) for other in others]
    if points:
        steps = [np.asarray(point - origin, float) for point in points]
        labels = _towards(len(points), directions)
        named = [False] * len(points)
    else:
        steps, labels, named = _chosen(loss, directions)
    basis = _orthonormal(np.stack(steps))
    start = np.where(named, basis @ np.asarray(origin, float), 0.0)
    reached = (
        start + np.stack([np.zeros_like(steps[0]), *steps]) @ basis.T if points else start[None]
    )
    width = np.sqrt(basis**2 @ np.broadcast_to(np.asarray(tau, float), loss.dim))
    axes = _grid(spans, reached, width, num_points)
    kind = len(axes)
    count = SAMPLES[kind] if num_samples is None else num_samples
    check_count(count, f"{WHAT}: num_samples", 4)
    # Pairs stay within a chunk.
    chunk = min(check_count(chunk_size, f"{WHAT}: chunk_size", 2), count)
    chunk += chunk % 2
    num_samples = -(-count // chunk) * chunk
    offsets = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, kind) - start
    target = RegularizedLoss(loss, Gaussian.isotropic(origin, tau), temperature=temperature)
    mesh = check_mesh(mesh, f"{WHAT}: mesh", external=loss.is_external)
    where = jnp.asarray(offsets, origin.dtype), jnp.asarray(basis, origin.dtype)
    given = copied(mesh, (rng_key, target.without_batches(), *where))
    sizes: dict[str, Any] = {"num_samples": num_samples, "chunk_size": chunk, "mesh": mesh}
    values = here(_evaluate(*given, **sizes))
    shape = tuple(map(len, axes))
    plain, entropy, heat = jax.tree.map(lambda a: a.reshape(shape), values)
    return Landscape(
        tuple(jnp.asarray(axis, origin.dtype) for axis in axes),
        plain,
        entropy,
        heat,
        jnp.asarray(tau),
        target.temperature,
        origin,
        jnp.asarray(basis, origin.dtype),
        jnp.asarray(start, origin.dtype),
        jnp.asarray(reached[1:], origin.dtype),
        labels,
        num_samples,
    )


def _towards(count: int, directions: Any) -> tuple[str, ...]:
    if directions is not None or count > 2:
        raise ValueError(
            f"{WHAT}: expected one or two further sets of parameters, or directions, got {count}"
            f"{' and directions' if directions is not None else ''}; give the one or the other."
        )
    if count == 1:
        return ("distance towards the second parameters",)
    return ("distance towards the second parameters", "distance across, towards the third")


def _chosen(loss: Loss, directions: Any) -> tuple[list[np.ndarray], tuple[str, ...], list[bool]]:
    directions = range(loss.dim) if directions is None else directions
    if (
        isinstance(directions, str)
        or not isinstance(directions, Sequence)
        or len(directions) not in (1, 2)
    ):
        raise ValueError(
            f"{WHAT}: expected a list of one or two directions, for a line or a plane, got {directions!r}; name "
            f"parameters, such as [{loss.flat_names[0]!r}], or give flat vectors of shape ({loss.dim},)."
        )
    steps, labels, named = [], [], []
    for number, direction in enumerate(directions, 1):
        index = (
            find_parameter(direction, loss.flat_names, WHAT) if np.ndim(direction) == 0 else None
        )
        step = np.eye(loss.dim)[index] if index is not None else np.asarray(direction, float)
        if step.shape != (loss.dim,):
            raise ValueError(
                f"{WHAT}: expected a direction as a flat vector of shape ({loss.dim},), got {step.shape}."
            )
        steps.append(step)
        labels.append(
            f"distance along direction {number}"
            if index is None
            else unconstrained_labels(loss)[index]
        )
        named.append(index is not None)
    return steps, tuple(labels), named


def _orthonormal(steps: np.ndarray) -> np.ndarray:
    # One row after the other, so that the first keeps its direction.
    rows: list[np.ndarray] = []
    for step in steps:
        rest = step - sum(((row @ step) * row for row in rows), np.zeros_like(step))
        length = np.linalg.norm(rest)
        if not (np.isfinite(length) and length > 1e-6 * np.linalg.norm(step)):
            raise ValueError(
                f"{WHAT}: expected directions (or further parameters) that are finite, not zero and not on one "
                "line, got others; leave one out for a line."
            )
        rows.append(rest / length)
    return np.stack(rows)


def _grid(
    spans: Any, reached: np.ndarray, width: np.ndarray, num_points: int | None
) -> list[np.ndarray]:
    kind = len(width)
    count = check_count(
        POINTS[kind] if num_points is None else num_points, f"{WHAT}: num_points", 2
    )
    if spans is None:
        margin = (REACH if len(reached) == 1 else MARGIN) * width
        spans = np.stack([reached.min(0) - margin, reached.max(0) + margin], 1)
    ends = np.asarray(spans, float)
    if (
        ends.shape != (kind, 2)
        or not np.isfinite(ends).all()
        or not (ends[:, 0] < ends[:, 1]).all()
    ):
        raise ValueError(
            f"{WHAT}: expected spans as {kind} pair(s) (lowest, highest) of coordinates, such as [(-1.0, 1.0)], "
            f"got {spans!r}."
        )
    return [np.linspace(low, high, count) for low, high in ends]


@meshed("num_samples", "chunk_size")
def _evaluate(
    rng_key: Key,
    target: RegularizedLoss,
    steps: Array,
    basis: Array,
    num_samples: int,
    chunk_size: int,
) -> tuple[Array, Estimate, Estimate]:
    reference = target.reference
    # Coordinates on the line or plane in which the regularizer is a standard normal.
    axes, triangle = jnp.linalg.qr(reference.whiten(reference.mean + basis).T)
    places = steps @ triangle.T

    def at(point: tuple[Key, Array]) -> tuple[Array, Array, Array]:
        key, step = point
        center = reference.mean + step @ basis
        noise = random.normal(key, (num_samples // 2, target.dim), center.dtype)
        noise = jnp.stack([noise, -noise], 1).reshape(num_samples, target.dim)
        x = jnp.concatenate([center + reference.scaled(noise), center[None]])
        # Draws that are evaluated at once take the point along.
        size = chunk_size + (chunk_size == num_samples)
        losses = lax.map(target.value, x, batch_size=size)
        return losses[-1], losses[:-1], noise @ axes

    plain, losses, draws = mapped(at, (random.split(rng_key, len(steps)), steps))
    draws = places[:, None] + draws
    height = 0.5 * jnp.sum(places**2, 1)
    # Log densities but for a term that cancels.
    log_mixture = lax.map(lambda some: logsumexp(some @ places.T - height, 1), draws)
    log_mixture = log_mixture - jnp.log(1.0 * len(places))
    failed = jnp.isnan(losses) | (losses == -jnp.inf)

    def regularized(point: tuple[Array, Array, Array]) -> tuple[Estimate, Estimate]:
        place, height, own = point
        log_ratio = draws @ place - height - log_mixture
        # What fails at the point's own draws is told; at those of others it has no weight.
        log_weight = jnp.where(failed, -jnp.inf, log_ratio - losses / target.temperature)
        by_draw = logsumexp(log_weight, 0) - jnp.log(1.0 * len(places))
        log_mean = jnp.logaddexp(by_draw[::2], by_draw[1::2]) - jnp.log(2.0)
        known = jnp.mean(jnp.mean(jnp.exp(log_ratio), 0).reshape(-1, 2), 1)
        entropy = _entropy(log_mean, known, target.temperature)
        entropy = _unless(~_is_trusted(entropy, num_samples), entropy, entropy.value)
        entropy = _unless(jnp.isnan(own).any(), entropy, jnp.nan)
        usable = jnp.isfinite(losses)
        ratio = jnp.where(usable, jnp.exp(log_ratio), 0.0)
        weight, weighted = jnp.sum(ratio, 0), jnp.sum(ratio * jnp.where(usable, losses, 0.0), 0)
        heat = _heat(weight.reshape(-1, 2).sum(1), weighted.reshape(-1, 2).sum(1), own)
        return entropy, _unless(~jnp.isfinite(own).all(), heat, jnp.mean(own))

    return plain, *mapped(regularized, (places, height, losses))


def _entropy(log_weight: Array, known: Array, temperature: Array) -> Estimate:
    # The ratios average to one: how far they do not tells of the error, as control variate of the logarithm.
    log_mean = logsumexp(log_weight) - jnp.log(1.0 * log_weight.size)
    weight, known_mean = jnp.exp(log_weight - log_mean), jnp.mean(known)
    centered = known / known_mean - 1.0
    spread = jnp.mean(centered**2)
    slope = jnp.mean(weight * centered) / jnp.where(spread > 0, spread, 1.0)
    value = -temperature * (log_mean - slope * jnp.log(known_mean))
    error = temperature * pair_error(weight - slope * centered)
    # Of a smooth loss in one dimension rounding leaves more than noise.
    rounding = ROUNDING * jnp.finfo(value.dtype).eps * (jnp.abs(value) + temperature)
    error = jnp.where(jnp.isfinite(value), error + rounding, jnp.inf)
    return Estimate(value, error, weight_ess(log_weight), pareto_khat(log_weight))


def _heat(weight: Array, weighted: Array, own: Array) -> Estimate:
    value = jnp.sum(weighted) / jnp.sum(weight)
    khat = heat_of_pairs(own).khat
    error = tail_error((weighted - value * weight) / jnp.mean(weight), khat)
    return Estimate(value, error, weight_ess(jnp.log(weight)), khat)


def _is_trusted(entropy: Estimate, num_samples: int) -> Array:
    # The k-hat of few pairs is itself noisy; where most of them count alike, the weights are well.
    return (entropy.khat <= MAX_KHAT) | (entropy.ess > LEAST_EVEN * num_samples / 2)


def _unless(failed: Array, estimate: Estimate, value: Array | float) -> Estimate:
    return estimate._replace(
        value=jnp.where(failed, value, estimate.value),
        error=jnp.where(failed, jnp.inf, estimate.error),
    )


def projected_covariance(gaussian: AnyGaussian, directions: Any) -> np.ndarray:
    """Covariance of a Gaussian's coordinates along directions `(k, dim)`, `(k, k)`; on the host."""
    columns = np.stack([gaussian.scaled_transpose(row) for row in jnp.asarray(directions)])
    return columns @ columns.T
