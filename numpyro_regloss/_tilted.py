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

from numpyro_regloss._pytree import Partition
from numpyro_regloss._typing import Array, Key

__all__ = ["Tilted", "WithoutObservations", "observe"]


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


def observe(
    model: Callable[..., Any],
    latent: dict[str, Array],
    arguments: Partition,
    scales: dict[str, Any],
    scale: Any,
) -> None:
    """Emits the observed sites of a model, in their plates, and nothing else of it.

    Args:
        model: the model.
        latent: values of its latent sites.
        arguments: its `(args, kwargs)`.
        scales: weights of observed sites by name.
        scale: weight of the others.
    """
    args, kwargs = arguments.tree
    weights = _Weights(scales, scale)
    with weights, handlers.block(hide_fn=lambda site: not _is_observation(site)):
        handlers.substitute(handlers.seed(model, 0), data=latent)(*args, **kwargs)


class _Weights(Messenger):
    def __init__(self, scales: dict[str, Any], scale: Any) -> None:
        super().__init__()
        self.scales, self.scale = scales, scale

    def process_message(self, msg: Any) -> None:
        if _is_observation(msg):
            weight = self.scales.get(msg["name"], self.scale)
            msg["scale"] = weight if msg["scale"] is None else weight * msg["scale"]


def _is_observation(site: Any) -> bool:
    is_observed = site["type"] == "sample" and site["is_observed"]
    return is_observed and not isinstance(site["fn"], dist.Unit)
