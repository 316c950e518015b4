# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""Variational fits by NumPyro's SVI, with a guide for every family of Gaussians.

The model's factor is the mean of log q over some draws x, which the guide makes from the Gaussian in antithetic
pairs; the Gaussian's density is differentiated through x alone ("sticking the landing"). So gradients have no
noise where the Gaussian is q, and none that is linear in the draws anywhere.

References: Hoffman, Blei, Wang & Paisley (2013), "Stochastic Variational Inference"; Kucukelbir, Tran,
Ranganath, Gelman & Blei (2017), "Automatic Differentiation Variational Inference"; Roeder, Wu & Duvenaud
(2017), "Sticking the Landing: Simple, Lower-Variance Gradient Estimators for Variational Inference".
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import lax, random
from jax.flatten_util import ravel_pytree
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO

from numpyro_regloss._core.optimizers import get_optax
from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.fit.reverse_kl.coordinates import draw, move, noise_size, zero_step
from numpyro_regloss.fit.reverse_kl.improper import Guard
from numpyro_regloss.gaussians.gaussian import AnyGaussian
from numpyro_regloss.losses.regularized import RegularizedLoss

__all__ = ["guide_fit"]

LEARNING_RATE = 0.1


def guide_fit(
    rng_key: Key,
    target: RegularizedLoss,
    start: AnyGaussian,
    covariance: str,
    num_steps: int,
    num_pairs: int,
    optimizer: Any = None,
    guard: Guard | None = None,
) -> tuple[AnyGaussian, Array]:
    """Optimizes the guide's Gaussian.

    Args:
        rng_key: a random key.
        target: the target.
        start: of the family.
        covariance: the family.
        num_steps: optimization steps.
        num_pairs: half the draws of the guide per step.
        optimizer: Optax's or NumPyro's; default: Adam whose rate falls to zero along a cosine.
        guard: of directions that nothing holds, or None.

    Returns:
        The Gaussian and the number of steps that were skipped because loss or gradient was not finite.
    """
    zero, unravel = ravel_pytree(zero_step(start, covariance))

    def gaussian_at(coordinates: Array) -> AnyGaussian:
        return move(start, unravel(coordinates))

    def guide(target: RegularizedLoss) -> None:
        del target
        coordinates = jnp.asarray(numpyro.param("coordinates", zero))
        gaussian = gaussian_at(coordinates)
        shape = (num_pairs, noise_size(start, covariance))
        noise = random.normal(jnp.asarray(numpyro.prng_key()), shape, zero.dtype)
        x = draw(gaussian, jnp.concatenate([noise, -noise]))
        log_density = jnp.mean(lax.stop_gradient(gaussian).log_prob(x))
        numpyro.sample("x", dist.Delta(x, log_density, event_dim=2))

    def model(target: RegularizedLoss) -> None:
        flat = dist.ImproperUniform(constraints.real_matrix, (), (2 * num_pairs, target.dim))
        x = jnp.asarray(numpyro.sample("x", flat))
        log_density = jax.vmap(target.log_density)(x)
        if guard is not None:
            log_density = log_density - guard.pull(x)[0]
        numpyro.factor("log_density", jnp.mean(log_density))

    key_init, key_batch = random.split(rng_key)
    if optimizer is None:
        optax = get_optax()
        optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, num_steps))
    svi = SVI(model, guide, optimizer, Trace_ELBO())
    state = svi.init(key_init, target.on_batch(random.fold_in(key_batch, num_steps)))

    def update(state: Any, j: Array) -> tuple[Any, Array]:
        state, loss = svi.stable_update(state, target.on_batch(random.fold_in(key_batch, j)))
        return state, ~jnp.isfinite(loss)

    state, rejected = lax.scan(update, state, jnp.arange(num_steps))
    return gaussian_at(svi.get_params(state)["coordinates"]), jnp.sum(rejected)
