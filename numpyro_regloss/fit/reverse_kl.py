# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""The Gaussian that minimizes KL(Gaussian || q), by NumPyro's stochastic variational inference.

The guide lives in whitened coordinates. With the covariance of the reference it is N(loc, I), and the
optimum is the paper's heat step; with a dense one the mean differs from it, since the best mean of a
Gaussian in this direction depends on its covariance.

References: Hoffman, Blei, Wang & Paisley (2013), "Stochastic Variational Inference"; Kucukelbir, Tran,
Ranganath, Gelman & Blei (2017), "Automatic Differentiation Variational Inference".
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
from jax import lax, random
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from numpyro.optim import _NumPyroOptim

from numpyro_regloss._checks import check_choice, check_count
from numpyro_regloss._pytree import pytree_dataclass, static_field
from numpyro_regloss._typing import Array, Key
from numpyro_regloss.draws import Draws
from numpyro_regloss.fit.base import Fit
from numpyro_regloss.gaussian import Gaussian
from numpyro_regloss.regularized import RegularizedLoss, latent_name, model

__all__ = ["ReverseKL", "ReverseKLInfo", "ReverseKLState"]

LEARNING_RATE = 0.1


class ReverseKLState(NamedTuple):
    """The last solution in whitened coordinates, from which the next one starts.

    Attributes:
        loc: `(dim,)`.
        scale_tril: `(dim, dim)`, or None with the covariance of the reference.
    """

    loc: Array
    scale_tril: Array | None


class ReverseKLInfo(NamedTuple):
    """Diagnostics of one fit.

    Attributes:
        ok: the Gaussian is finite.
        num_loss: zero.
        num_grad: gradient evaluations.
        bound: E loss + T KL(Gaussian || reference), averaged over the last tenth of the steps: an upper
            bound of F_tau(centre), in the units of the loss.
        bound_error: its standard error.
        num_rejected: steps that were skipped because loss or gradient was not finite.
    """

    ok: Array
    num_loss: Array
    num_grad: Array
    bound: Array
    bound_error: Array
    num_rejected: Array


@pytree_dataclass
class ReverseKL(Fit):
    """Gaussian variational inference on the shifted density.

    Args:
        covariance: `"reference"`: fit the mean only (the heat step); `"dense"`: fit a full covariance.
        method: `"svi"`, NumPyro's SVI on `model`.
        num_steps: optimization steps.
        num_particles: draws of the guide per step.
        optimizer: an Optax or NumPyro optimizer, built once; default: Adam whose rate falls from 0.1 (in
            whitened units) to zero along a cosine.

    Raises:
        TypeError: if a setting is of the wrong kind.
        ValueError: if a setting is out of range.

    Example:
        >>> ReverseKL(covariance="dense", num_steps=200).method
        'svi'
    """

    covariance: str = static_field(default="reference")
    method: str = static_field(default="svi")
    num_steps: int = static_field(default=500)
    num_particles: int = static_field(default=8)
    optimizer: Any = static_field(default=None)

    uses_gradient: ClassVar[bool] = True
    uses_draws: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_choice(self.covariance, "ReverseKL: covariance", ("reference", "dense"))
        check_choice(self.method, "ReverseKL: method", ("svi",))
        check_count(self.num_steps, "ReverseKL: num_steps")
        check_count(self.num_particles, "ReverseKL: num_particles")
        known = (optax.GradientTransformation, _NumPyroOptim)
        if self.optimizer is not None and not isinstance(self.optimizer, known):
            raise TypeError(
                "ReverseKL: expected optimizer as an Optax or NumPyro optimizer such as optax.adam(0.01), "
                f"got {type(self.optimizer).__name__}."
            )

    def init(self, rng_key: Key, target: RegularizedLoss) -> ReverseKLState:
        """The reference itself."""
        del rng_key
        dtype = target.reference.mean.dtype
        scale = jnp.eye(target.dim, dtype=dtype) if self.covariance == "dense" else None
        return ReverseKLState(jnp.zeros(target.dim, dtype), scale)

    def step(
        self, rng_key: Key, state: ReverseKLState, target: RegularizedLoss, draws: Draws
    ) -> tuple[ReverseKLState, Gaussian, ReverseKLInfo]:
        """Runs SVI from the last solution.

        Args:
            rng_key: a random key.
            state: the last solution.
            target: the target.
            draws: unused.

        Returns:
            The solution in whitened coordinates, the Gaussian and the info.
        """
        del draws
        key_init, key_batch = random.split(rng_key)
        schedule = optax.cosine_decay_schedule(LEARNING_RATE, self.num_steps)
        # With the reference's covariance NumPyro knows KL(guide || prior), which leaves less noise.
        elbo = Trace_ELBO if self.covariance == "dense" else TraceMeanField_ELBO
        svi = SVI(
            model,
            _guide(state, latent_name(target)),
            self.optimizer or optax.adam(schedule),
            elbo(num_particles=self.num_particles),
        )
        svi_state = svi.init(key_init, target.on_batch(random.fold_in(key_batch, self.num_steps)))

        def body(svi_state: Any, j: Array) -> tuple[Any, Array]:
            return svi.stable_update(svi_state, target.on_batch(random.fold_in(key_batch, j)))

        svi_state, losses = lax.scan(body, svi_state, jnp.arange(self.num_steps))
        params = svi.get_params(svi_state)
        solution = ReverseKLState(params["loc"], params.get("scale_tril"))
        reference = target.reference
        mean, scale = reference.unwhiten(solution.loc), reference[1]
        if solution.scale_tril is not None:
            scale = _compose(reference, solution.scale_tril)
        last = losses[-max(self.num_steps // 10, 1) :]
        finite = jnp.isfinite(last)
        count = jnp.maximum(jnp.sum(finite), 1)
        average = jnp.sum(last, where=finite) / count
        spread = jnp.sum((last - average) ** 2, where=finite) / jnp.maximum(count - 1, 1)
        info = ReverseKLInfo(
            ok=jnp.isfinite(mean).all() & jnp.isfinite(scale).all() & finite.any(),
            num_loss=jnp.asarray(0),
            num_grad=jnp.asarray(self.num_steps * self.num_particles),
            bound=target.temperature * average,
            bound_error=target.temperature * jnp.sqrt(spread / count),
            num_rejected=jnp.sum(~jnp.isfinite(losses)),
        )
        return solution, Gaussian(mean, scale), info


def _guide(start: ReverseKLState, latent: str) -> Callable[[RegularizedLoss], None]:
    def guide(target: RegularizedLoss) -> None:
        del target
        loc = jnp.asarray(numpyro.param("loc", start.loc))
        if start.scale_tril is None:
            numpyro.sample(latent, dist.Normal(loc, jnp.ones_like(loc)).to_event(1))
            return
        scale_tril = numpyro.param(
            "scale_tril", start.scale_tril, constraint=constraints.softplus_lower_cholesky
        )
        numpyro.sample(latent, dist.MultivariateNormal(loc, scale_tril=scale_tril))

    return guide


def _compose(reference: Gaussian, scale_tril: Array) -> Array:
    # A product of lower triangular factors is one; columns of scale_tril are vectors in whitened space.
    return jax.vmap(reference.scaled, in_axes=1, out_axes=1)(scale_tril)
