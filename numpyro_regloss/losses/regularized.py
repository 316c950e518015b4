# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""The regularized loss: the shifted density of one outer step, as a density and as a NumPyro model.

    q(x) ∝ exp(-loss(x) / T) N(x; mean, scale scaleᵀ)

Reference: García Trillos, Kaplan & Sanz-Alonso (2019), "Variational Characterizations of Local Entropy
and Heat Regularization in Deep Learning", Entropy 21(5), 511.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax.tree_util import Partial
from numpyro import handlers
from numpyro.distributions import constraints

from numpyro_regloss._core.checks import check_positive
from numpyro_regloss._core.pytree import Partition, pytree_dataclass, replace_fields, static_field
from numpyro_regloss._core.types import Array, Key, Scalar, Vector
from numpyro_regloss.gaussians.gaussian import AnyGaussian, check_gaussian
from numpyro_regloss.losses.loss import Loss
from numpyro_regloss.losses.numpyro_model import ModelSource
from numpyro_regloss.losses.tilted import Observed, Tilted, observations

__all__ = ["RegularizedLoss", "latent_name", "model", "x_name"]


@pytree_dataclass
class RegularizedLoss:
    """A loss, a Gaussian reference and a temperature: one target density.

    Args:
        loss: the loss.
        reference: the Gaussian regularizer, or None for the plain posterior exp(-loss / T).
        args: positional arguments of the loss in place of the bound ones.
        kwargs: keyword arguments over the bound ones.
        temperature: T > 0, in the units of the loss.

    Raises:
        TypeError: if `loss` is not a `Loss` or `reference` not a `Gaussian`.
        ValueError: if shapes do not fit, the scale is not positive, or the temperature is not; if x64 was
            switched after the loss was built.

    Example:
        >>> from numpyro_regloss import Gaussian
        >>> loss = Loss.from_function(lambda x: 0.5 * jnp.sum(x**2), jnp.ones(2))
        >>> target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, tau=0.5))
        >>> float(target.energy(loss.x0))
        1.0
    """

    loss: Loss
    reference: AnyGaussian  # or None, which only `model` and `log_density` accept
    arguments: Partition
    temperature: Any = 1.0
    data_scale: float = static_field(default=1.0)

    def __init__(
        self,
        loss: Loss,
        reference: AnyGaussian | None = None,
        args: tuple | None = None,
        kwargs: dict | None = None,
        temperature: Array | float = 1.0,
    ) -> None:
        if not isinstance(loss, Loss):
            raise TypeError(
                f"RegularizedLoss: expected a Loss, got {type(loss).__name__}; build one with "
                "Loss.from_function or Loss.from_model."
            )
        loss.check_precision("RegularizedLoss")
        if reference is not None:
            reference = check_gaussian(reference, loss.dim, "RegularizedLoss", "reference")
            loss.check_digits(reference, "RegularizedLoss")
        temperature = check_positive(temperature, "RegularizedLoss: temperature")
        loss.check_captured()
        checked = self.unchecked(loss, reference, loss.bind(args, kwargs), temperature)
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, vars(checked)[field.name])

    @classmethod
    def unchecked(
        cls,
        loss: Loss,
        reference: AnyGaussian | None,
        arguments: Partition,
        temperature: Array | float,
    ) -> "RegularizedLoss":
        """The same, without checks, from parts that were checked before; for compiled loops."""
        obj = object.__new__(cls)
        for name, value in {
            "loss": loss,
            "reference": reference,
            "arguments": arguments,
            "temperature": temperature,
            "data_scale": 1.0,
        }.items():
            object.__setattr__(obj, name, value)
        return obj

    @property
    def args(self) -> tuple:
        """Positional arguments that the loss uses."""
        return self.arguments.tree[0]

    @property
    def kwargs(self) -> dict:
        """Keyword arguments that the loss uses."""
        return self.arguments.tree[1]

    @property
    def dim(self) -> int:
        """Number of flat unconstrained parameters."""
        return self.loss.dim

    def value(self, x: Vector) -> Scalar:
        """The plain loss at `x`, `(dim,)` -> scalar, on the bound data."""
        return self.loss.evaluate(x, self.arguments, self.data_scale)

    def energy(self, x: Vector) -> Scalar:
        """loss(x) / T, `(dim,)` -> scalar."""
        return self.value(x) / self.temperature

    def log_density(self, x: Vector) -> Scalar:
        """reference.log_prob(x) - energy(x): unnormalized log density, `(dim,)` -> scalar."""
        prior = 0.0 if self.reference is None else self.reference.log_prob(x)
        return prior - self.energy(x)

    def whitened_potential(self, noise: Vector) -> Scalar:
        """|noise|²/2 + energy(mean + scale noise): what MCMC engines sample, `(dim,)` -> scalar."""
        return 0.5 * jnp.sum(noise**2) + self.energy(self.reference.unwhiten(noise))

    def constrain(self, x: Vector) -> Any:
        """The parameters as the user wrote them, at the bound arguments."""
        return self.loss.source.constrain(x, *self.arguments.tree)

    def on_batch(self, rng_key: Key) -> "RegularizedLoss":
        """The same target on a fresh minibatch of the data and with fresh noise, or itself if the loss has none.

        Args:
            rng_key: a random key.

        Returns:
            The target on the batch.
        """
        if not self.loss.is_random:
            return self
        arguments, scale = self.loss.draw_batch(rng_key, self.arguments)
        return replace_fields(self, arguments=arguments, data_scale=scale)

    @property
    def num_blocks(self) -> int:
        """How many whole batches there are in the data; one where the loss has no minibatch."""
        minibatch = self.loss.minibatch
        if minibatch is None:
            return 1
        return minibatch.num_rows(self.arguments) // minibatch.batch_size

    def on_block(self, index: Any) -> "RegularizedLoss":
        """The same target on one of the batches that follow each other in the data, or itself without a minibatch.

        Args:
            index: which, below `num_blocks`.

        Returns:
            The target on the batch.
        """
        minibatch = self.loss.minibatch
        if minibatch is None:
            return self
        scale = minibatch.num_rows(self.arguments) / minibatch.batch_size
        arguments = minibatch.block(index, self.arguments)
        return replace_fields(self, arguments=arguments, data_scale=scale)

    def split_over(self, num_steps: int) -> "RegularizedLoss":
        """The same target with batches that are shares of one batch, if its minibatch is to be split.

        Args:
            num_steps: inner steps of an outer step, each of which draws a batch.

        Returns:
            The target.

        Raises:
            ValueError: if there are more steps than rows.
        """
        minibatch = self.loss.minibatch
        if minibatch is None or not minibatch.split:
            return self
        return replace_fields(
            self, loss=replace_fields(self.loss, minibatch=minibatch.share(num_steps))
        )

    def without_batches(self) -> "RegularizedLoss":
        """The same target without a minibatch, on the data and with the noise that it has."""
        loss = replace_fields(self.loss, minibatch=None, rng_names=())
        return replace_fields(self, loss=loss)


def model(target: RegularizedLoss) -> None:
    """The regularized loss as a NumPyro model, in whitened form.

    Sites: `eps`, latent, of shape `(dim,)`, drawn from N(0, I), with the density of N(0, I) times
    exp(-loss / T); `x` = mean + scale eps, deterministic; the user's parameters (and deterministic
    sites) by name, deterministic. Without a reference `x` itself is latent, with a flat improper
    prior. If the user's own model already uses one of these names, also for an observed site or a plate, the new
    site gets a trailing underscore. So the samples can be passed to `Predictive` of either model.

    The observed sites of a user's model are observed sites here too, with the weight 1 / T, and carry that part of
    the loss. So `numpyro.infer.log_likelihood` and ArviZ see the same observations as in the user's model. There
    are no observed sites if the loss is a function, or a model that factorizes several matrices (Gaussian
    processes): such a loss is evaluated one draw at a time, as one number.

    Its log joint in `eps` is `target.log_density(x)` plus `target.reference.log_det`.

    Args:
        target: the regularized loss.

    Raises:
        TypeError: if it is not a `RegularizedLoss`.

    Example:
        >>> from jax import random
        >>> from numpyro.infer import MCMC, NUTS
        >>> from numpyro_regloss import Gaussian
        >>> loss = Loss.from_function(lambda x: 0.5 * jnp.sum(x**2), jnp.ones(2))
        >>> target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, tau=1.0))
        >>> mcmc = MCMC(NUTS(model), num_warmup=200, num_samples=1000, progress_bar=False)
        >>> mcmc.run(random.key(0), target)
        >>> bool(jnp.all(jnp.abs(mcmc.get_samples()["x"].mean(0) - 0.5) < 0.1))
        True
    """
    if not isinstance(target, RegularizedLoss):
        raise TypeError(
            f"model: expected a RegularizedLoss, got {type(target).__name__}; pass "
            "RegularizedLoss(loss, Gaussian.isotropic(loss.x0, tau)) as the model's only argument."
        )
    target.loss.check_captured()
    taken = target.loss.source.taken_names(target.arguments)
    name, energy = _free("x", taken), Partial(_log_weight, target)
    if target.reference is None:
        flat = dist.ImproperUniform(constraints.real_vector, (), (target.dim,))
        x = numpyro.sample(name, Tilted(flat, energy))
    else:
        standard = dist.Normal(jnp.zeros(target.dim), 1.0).to_event(1)
        noise = jnp.asarray(numpyro.sample(_free("eps", taken), Tilted(standard, energy)))
        x = numpyro.deterministic(name, target.reference.unwhiten(noise))
    sites = target.loss.named_sites(jnp.asarray(x), target.arguments)
    for site, value in sites.items():
        numpyro.deterministic(site, value)
    source = _observed_source(target)
    if source is not None:
        latent = {name: sites[name] for name in source.names}
        found = source.user.call(observations, latent, target.arguments)
        for site, (value, log_density, weight) in found.items():
            rows = target.data_scale if site in source.rows else 1.0
            scale = rows / target.temperature * (1.0 if weight is None else weight)
            with handlers.scale(scale=scale):
                numpyro.sample(site, Observed(value, log_density), obs=value)


def _log_weight(target: RegularizedLoss, value: Array) -> Array:
    """Minus the energy at a value of the latent site, without what observed sites say."""
    source = _observed_source(target)
    if source is not None:
        source = replace_fields(source, has_observations=False)
        target = replace_fields(target, loss=replace_fields(target.loss, source=source))
    return -target.energy(value if target.reference is None else target.reference.unwhiten(value))


def _observed_source(target: RegularizedLoss) -> ModelSource | None:
    """The model whose observed sites stand for themselves, if there is one."""
    source = target.loss.source
    # Chains of NumPyro are few, and wait for each other only within several factorizations: of such a loss, which
    # is evaluated one draw at a time, there is the value alone.
    alone = target.loss.is_evaluated_alone(target.arguments, num_calls=2)
    return source if isinstance(source, ModelSource) and not alone else None


def latent_name(target: RegularizedLoss) -> str:
    """Name of the whitened latent site of `model`: `eps`, unless the user's model has that name."""
    return _free("eps", target.loss.source.taken_names(target.arguments))


def x_name(target: RegularizedLoss) -> str:
    """Name of the site of `model` with the flat parameters: `x`, unless the user's model has that name."""
    return _free("x", target.loss.source.taken_names(target.arguments))


def _free(name: str, taken: frozenset[str]) -> str:
    while name in taken:
        name += "_"
    return name
