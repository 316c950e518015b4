# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""Markov moves that leave q_s ∝ exp(-s E) N(0, I) invariant, fitted to the particles that they move.

Both work in coordinates z, ε = m + L z, with m and L Lᵀ the mean and covariance of the particles.

- `"crank_nicolson"`, without gradients: a preconditioned Crank-Nicolson proposal that is reversible for a
  Student t in z, by a latent scale: u | z ~ InverseGamma, z' = sqrt(1 - β²) z + β sqrt(u) ξ. Accepted with
  certainty where q_s is that t; near to it where q_s is Gaussian, in any dimension and for every β; and no
  particle is stuck in a tail, which of a Gaussian proposal with β = 1 would be the rule.
- `"hmc"`: a fixed number of leapfrog steps of one jittered length.

References: Cotter, Roberts, Stuart & White (2013), "MCMC Methods for Functions: Modifying Old Algorithms to Make
Them Faster"; Kamatani (2018), "Efficient Strategy for the Markov Chain Monte Carlo in High-Dimension with
Heavy-Tailed Target Probability Distribution"; Neal (2011), "MCMC Using Hamiltonian Dynamics".
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax, random
from jax.scipy.linalg import solve_triangular

from numpyro_regloss._core.stats import normalize_log_weight
from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.gaussians.gaussian import Gaussian

__all__ = [
    "MOVES",
    "Frame",
    "Particles",
    "adapt",
    "crank_nicolson",
    "first_step_size",
    "frame_of",
    "hmc",
]

MOVES = ("crank_nicolson", "hmc")
# Fewer particles per dimension than this have no covariance, only variances.
DENSE_FROM = 4
# Of a correlation matrix: more than its rounding in float32.
RIDGE = 1e-5
# Acceptance that step sizes are tuned to, how fast, and their range.
TARGET_ACCEPTANCE = {"crank_nicolson": 0.3, "hmc": 0.8}
GAIN = 2.0
STEP_SIZES = {"crank_nicolson": (1e-4, 1.0), "hmc": (1e-4, 1.5)}
# Leapfrog steps are shortened by up to this much: no direction of q is a multiple of its period, and short steps
# are accepted where q is much narrower than its covariance says.
JITTER = 0.95
LEAST_FREEDOM = 4


class Particles(NamedTuple):
    """Particles of any leading shape.

    Attributes:
        noise: whitened positions ε, `(..., dim)`.
        energy: loss / T, `(...)`.
        gradient: of the energy in ε, `(..., dim)`, or None where moves take none.
    """

    noise: Array
    energy: Array
    gradient: Any


# Particles at given positions, and how many of their losses failed.
Evaluate = Callable[[Array], tuple[Particles, Array]]


class Frame(NamedTuple):
    """Coordinates z in which the particles are standardized.

    Attributes:
        gaussian: mean and covariance of the particles.
        inverse: of its scale, `(dim, dim)`, or `(dim,)` of a diagonal one: a product with it is many times
            faster than a triangular solve.
    """

    gaussian: Gaussian
    inverse: Array

    def whiten(self, noise: Array) -> Array:
        """The coordinates z of positions, `(particle, dim)`."""
        offset = noise - self.gaussian.mean
        return offset @ self.inverse.T if self.inverse.ndim == 2 else offset * self.inverse


def frame_of(noise: Array, log_weight: Array) -> Frame:
    """Mean and covariance of weighted particles.

    Args:
        noise: `(particle, dim)`.
        log_weight: `(particle,)`.

    Returns:
        A frame with a dense scale, or a diagonal one where there are few particles for the dimension.
    """
    count, dim = noise.shape
    weight = normalize_log_weight(log_weight)
    mean = weight @ noise
    centered = noise - mean
    variance = weight @ centered**2
    # One particle that carries all weight has no variance.
    usable = variance > jnp.finfo(variance.dtype).eps * jnp.max(variance)
    sd = jnp.sqrt(
        jnp.where(usable, variance, jnp.where(jnp.max(variance) > 0, jnp.max(variance), 1.0))
    )
    if count < DENSE_FROM * dim:
        return Frame(Gaussian(mean, sd), 1.0 / sd)
    z = centered / sd
    identity = jnp.eye(dim, dtype=noise.dtype)
    correlation = (weight[:, None] * z).T @ z
    lower = jnp.linalg.cholesky((correlation + RIDGE * identity) / (1.0 + RIDGE))
    lower = jnp.where(jnp.isfinite(lower).all(), lower, identity)
    inverse = solve_triangular(lower, identity, lower=True) / sd
    return Frame(Gaussian(mean, sd[:, None] * lower), inverse)


def first_step_size(moves: str, dtype: Any) -> Array:
    """The step size at the reference itself, where every one is right."""
    return jnp.asarray({"crank_nicolson": 1.0, "hmc": 0.5}[moves], dtype)


def adapt(moves: str, step_size: Array, accept_prob: Array) -> Array:
    """The step size after a move of all particles with this mean acceptance."""
    change = jnp.exp(GAIN * (accept_prob - TARGET_ACCEPTANCE[moves]))
    return jnp.clip(step_size * change, *STEP_SIZES[moves])


def crank_nicolson(
    rng_key: Key, now: Particles, frame: Frame, s: Array, step_size: Array, evaluate: Evaluate
) -> tuple[Particles, Array, Array]:
    """One proposal for every particle.

    Args:
        rng_key: a random key.
        now: particles, `(particle, dim)`.
        frame: to propose in.
        s: inverse temperature.
        step_size: β, between zero and one.
        evaluate: of positions.

    Returns:
        The particles, their acceptance probabilities and the number of failures.
    """
    key_scale, key_noise, key_accept = random.split(rng_key, 3)
    count, dim = now.noise.shape
    # An even sum with the dimension: then the chi-square is a sum of exponentials.
    freedom = LEAST_FREEDOM + dim % 2
    z = frame.whiten(now.noise)
    radius = jnp.sum(z**2, -1)
    exponential = random.exponential(key_scale, (count, (freedom + dim) // 2), z.dtype)
    scale = (freedom + radius) / (2.0 * jnp.sum(exponential, -1))
    xi = random.normal(key_noise, z.shape, z.dtype)
    proposed = jnp.sqrt(1.0 - step_size**2) * z + step_size * jnp.sqrt(scale)[:, None] * xi
    then, failures = evaluate(frame.gaussian.unwhiten(proposed))

    def log_ratio(at: Particles, radius: Array) -> Array:
        log_student = -0.5 * (freedom + dim) * jnp.log1p(radius / freedom)
        return -_potential(at, s) - log_student

    log_accept = log_ratio(then, jnp.sum(proposed**2, -1)) - log_ratio(now, radius)
    return *_accept(key_accept, now, then, log_accept), failures


def hmc(
    rng_key: Key,
    now: Particles,
    frame: Frame,
    s: Array,
    step_size: Array,
    evaluate: Evaluate,
    num_leapfrog: int,
) -> tuple[Particles, Array, Array]:
    """One Hamiltonian path for every particle.

    Args:
        rng_key: a random key.
        now: particles, `(particle, dim)`, with gradients.
        frame: whose covariance is the inverse mass matrix.
        s: inverse temperature.
        step_size: of the leapfrog integrator, in units of the frame.
        evaluate: of positions.
        num_leapfrog: steps of the path.

    Returns:
        The particles, their acceptance probabilities and the number of failures.
    """
    key_momentum, key_jitter, key_accept = random.split(rng_key, 3)
    momentum = random.normal(key_momentum, now.noise.shape, now.noise.dtype)
    size = step_size * random.uniform(key_jitter, (), now.noise.dtype, 1.0 - JITTER, 1.0)

    def force(at: Particles) -> Array:
        # Any force that is a function of the place keeps the path reversible: none where the loss has no gradient.
        gradient = jnp.where(jnp.isfinite(at.gradient), at.gradient, 0.0)
        return -frame.gaussian.scaled_transpose(s * gradient + at.noise)

    def leap(_: int, carry: tuple[Particles, Array, Array]) -> tuple[Particles, Array, Array]:
        at, momentum, failures = carry
        momentum = momentum + 0.5 * size * force(at)
        at, failed = evaluate(at.noise + size * frame.gaussian.scaled(momentum))
        return at, momentum + 0.5 * size * force(at), failures + failed

    start = now, momentum, jnp.asarray(0)
    then, last, failures = lax.fori_loop(0, num_leapfrog, leap, start)
    kinetic = 0.5 * (jnp.sum(momentum**2, -1) - jnp.sum(last**2, -1))
    log_accept = _potential(now, s) - _potential(then, s) + kinetic
    return *_accept(key_accept, now, then, log_accept), failures


def _potential(at: Particles, s: Array) -> Array:
    return s * at.energy + 0.5 * jnp.sum(at.noise**2, -1)


def _accept(
    rng_key: Key, now: Particles, then: Particles, log_accept: Array
) -> tuple[Particles, Array]:
    # A path that ends where the loss fails, or ran off, is a proposal that is rejected; a particle behind a wall
    # leaves it at the first chance.
    probability = jnp.exp(jnp.minimum(log_accept, 0.0))
    probability = jnp.where(jnp.isfinite(then.energy) & ~jnp.isnan(probability), probability, 0.0)
    accepted = random.uniform(rng_key, probability.shape, probability.dtype) < probability

    def choose(a: Array, b: Array) -> Array:
        return jnp.where(accepted.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

    gradient = None if now.gradient is None else choose(then.gradient, now.gradient)
    chosen = choose(then.noise, now.noise), choose(then.energy, now.energy), gradient
    return Particles(*chosen), probability
