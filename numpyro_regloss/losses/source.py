# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""What a loss is made of: the protocol of functions, NumPyro models and replicas of either."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np

from numpyro_regloss._core.pytree import Partition
from numpyro_regloss._core.types import Array
from numpyro_regloss.losses.caller import Watch

__all__ = ["LossSource"]


class LossSource(Protocol):
    """Parameters as one flat unconstrained vector, and the loss at it.

    Attributes:
        user: the user's function, with what it captures.
        density: which density of a NumPyro model the loss is of; None for what is no model.
        fixed_names: settings among the parameters, which are not optimized.
    """

    user: Any
    density: Any = None

    @property
    def held(self) -> tuple[Any, ...]:
        """Values of what is no parameter of a network, such as running averages."""
        return ()

    @property
    def is_module(self) -> bool:
        """Whether parameters are those of a framework's module."""
        return False

    @property
    def num_first(self) -> int:
        """How many arguments of the user's function come before the data."""
        return int(self.density is None)

    @property
    def fixed_names(self) -> tuple[str, ...]:
        """None, but for a function of modules with settings."""
        return ()

    @property
    def is_external(self) -> bool:
        """Whether the loss is a Python function that JAX calls, but does not see into; few are."""
        return False

    def digits(self) -> Any:
        """Machine epsilon of each parameter whose type has less than 32 bits, `(dim,)`, else 0; or just 0."""
        return 0.0

    def watch(self) -> AbstractContextManager[Watch]:
        """Listens to what happens to the calls of such a function while programs run."""
        return nullcontext(Watch())

    @property
    def dim(self) -> int:
        """Number of flat unconstrained parameters."""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """Of the sites or leaves."""
        ...

    @property
    def flat_names(self) -> tuple[str, ...]:
        """Of the flat parameters, `(dim,)`."""
        ...

    def keeps_values(self, x: Array, args: tuple, kwargs: dict) -> np.ndarray:
        """Which flat parameters are the user's own numbers, `(dim,)` booleans: all of them, but for models."""
        del x, args, kwargs
        return np.ones(self.dim, bool)

    def value(self, x: Array, args: tuple, kwargs: dict, data_scale: float) -> Any:
        """The loss at a flat vector, with likelihoods of batches scaled."""
        ...

    def constrain(self, x: Array, args: tuple, kwargs: dict) -> Any:
        """The parameters as the user wrote them."""
        ...

    def unconstrain(self, params: Any, /, args: tuple, kwargs: dict) -> Array:
        """The flat vector of parameters as the user wrote them."""
        ...

    def named(self, x: Array, args: tuple, kwargs: dict) -> dict[str, Array]:
        """Constrained values by name."""
        ...

    def ravel(self, sites: dict[str, Array]) -> Array:
        """The flat vector of unconstrained values by name, with leading axes."""
        ...

    def own_settings(self) -> AbstractContextManager[Any]:
        """JAX's settings as the user chose them when he built the loss."""
        return nullcontext()

    def as_tree(self, x: Array) -> Any:
        """The flat vector in the user's structure, unconstrained and in JAX's default float."""
        return x

    def from_tree(self, tree: Any) -> Array:
        """The inverse of `as_tree`."""
        return tree

    def expand(self, tree: Any) -> Array:
        """One value per group of parameters as one value per parameter."""
        ...

    def taken_names(self, arguments: Partition) -> frozenset[str]:
        """Names of sites that no other site may have."""
        ...

    def check(self, arguments: Partition) -> None:
        """Refuses arguments that change what the parameters are."""
        ...

    def check_data(
        self, arguments: Partition, batch: Partition | None, is_row: tuple[bool, ...]
    ) -> None:
        """Refuses a minibatch that does not follow the rows of the data."""
        ...
