# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""A loss as a part of the distribution of what it is a function of, and a model's observations as its own sites.

A `numpyro.factor` is an observed site: whatever counts observations (ArviZ, `log_likelihood`) would count the
loss as one. So the loss weights the density of its argument, and a model keeps its own observed sites.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.primitives import Messenger

from numpyro_regloss._core.pytree import Partition
from numpyro_regloss._core.types import Array, Key

__all__ = ["Observed", "Tilted", "WithoutObservations", "observations"]


class Tilted(dist.Distribution):
    """A distribution of a vector whose density is multiplied by a weight, not normalized; draws are of the former.

    Args:
        base_dist: of one vector.
        log_weight: of one vector, a pytree such as `jax.tree_util.Partial`.
    """

    arg_constraints = {}
    pytree_data_fields = ("base_dist", "log_weight")

    def __init__(self, base_dist: dist.Distribution, log_weight: Callable[[Array], Any]) -> None:
        self.base_dist, self.log_weight = base_dist, log_weight
        super().__init__(base_dist.batch_shape, base_dist.event_shape)

    @property
    def support(self) -> Any:
        """That of the distribution."""
        return self.base_dist.support

    def sample(self, key: Key | None, sample_shape: tuple[int, ...] = ()) -> Any:
        """Draws of the distribution, without the weight."""
        return self.base_dist.sample(key, sample_shape)

    def log_prob(self, value: Any, intermediates: Any = None) -> Any:
        """The log density with the weight."""
        weigh = self.log_weight
        for _ in range(jnp.ndim(value) - 1):
            weigh = jax.vmap(weigh)
        return self.base_dist.log_prob(value) + weigh(value)


@dataclass(frozen=True)
class WithoutObservations:
    """A model whose observed sites have a density of one; its factors keep theirs.

    Attributes:
        model: the model.
    """

    model: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model.

        Args:
            *args: its arguments.
            **kwargs: its keyword arguments.

        Returns:
            What the model returns.
        """
        with _Masked():
            return self.model(*args, **kwargs)


class _Masked(Messenger):
    def process_message(self, msg: Any) -> None:
        if _is_observation(msg):
            msg["fn"] = msg["fn"].mask(False)


class Observed(dist.Distribution):
    """What is known of the observations of a site: their log densities.

    Args:
        value: the observations.
        log_density: of each of them.
    """

    arg_constraints = {}
    pytree_data_fields = ("value", "log_density")

    def __init__(self, value: Array, log_density: Array) -> None:
        self.value, self.log_density = value, log_density
        batch = jnp.shape(log_density)
        super().__init__(batch, jnp.shape(value)[len(batch) :])

    def sample(self, key: Key | None, sample_shape: tuple[int, ...] = ()) -> Any:
        """The observations themselves."""
        return jnp.broadcast_to(self.value, (*sample_shape, *jnp.shape(self.value)))

    def log_prob(self, value: Any, intermediates: Any = None) -> Any:
        """The log densities of the observations, whatever the value."""
        return self.log_density


def observations(
    model: Callable[..., Any], latent: dict[str, Array], arguments: Partition
) -> dict[str, tuple[Array, Array, Any]]:
    """What a model says of its observed sites.

    Args:
        model: the model.
        latent: values of its latent sites.
        arguments: its `(args, kwargs)`.

    Returns:
        By name the observations, the log density of each, and their weight by the model's own handlers, or None.
    """
    args, kwargs = arguments.tree
    with handlers.block():
        seen = handlers.substitute(handlers.seed(model, 0), data=latent)
        trace = handlers.trace(seen).get_trace(*args, **kwargs)
    return {
        name: (site["value"], site["fn"].log_prob(site["value"]), site["scale"])
        for name, site in trace.items()
        if _is_observation(site)
    }


def _is_observation(site: Any) -> bool:
    is_observed = site["type"] == "sample" and site["is_observed"]
    return is_observed and not isinstance(site["fn"], dist.Unit)
