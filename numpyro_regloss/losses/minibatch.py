# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Minibatches: which arguments of a loss are data, and how many rows to draw."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from numpyro_regloss._core.checks import check_count, check_flag
from numpyro_regloss._core.pytree import Constant, Partition
from numpyro_regloss._core.types import Key

__all__ = ["Minibatch", "take_rows"]


@dataclasses.dataclass(frozen=True)
class Minibatch:
    """Rows drawn uniformly with replacement from the leading axis of a loss's data.

    With replacement, the gradient of an averaged loss is unbiased, and no epoch has to be remembered. Inside
    exp(-loss) a minibatch causes a bias. Importance sampling and MCMC engines keep one batch for a whole outer
    step, and so minimize the loss of that batch. Stochastic-gradient engines draw a fresh batch at every inner
    step.

    Args:
        batch_size: rows per batch.
        argnums: positions (counted after `params`) of the arguments that hold data. Default: every
            positional and keyword argument with a leading axis.
        argnames: names of the keyword arguments that hold data.
        split: whether an outer step of `fit.RobbinsMonro` or `shift.SGLD` takes one batch, of which each
            inner step gets an equal share (256 rows over five steps are 51 each), instead of a batch for each.
        copies: number of replicas that share a batch, as `schemes.parle` sets it; each gets equally many rows.

    Raises:
        TypeError: if a count, position or name is of the wrong kind.
        ValueError: if `batch_size` is not positive.

    Example:
        >>> Minibatch(128)
        Minibatch(batch_size=128, argnums=None, argnames=None, split=False)
    """

    batch_size: int
    argnums: int | tuple[int, ...] | None = None
    argnames: str | tuple[str, ...] | None = None
    split: bool = False
    copies: int = dataclasses.field(default=1, repr=False)

    def __post_init__(self) -> None:
        check_flag(self.split, "Minibatch: split")
        object.__setattr__(
            self, "batch_size", check_count(self.batch_size, "Minibatch: batch_size")
        )
        for name, value, kind in (
            ("argnums", self.argnums, int),
            ("argnames", self.argnames, str),
        ):
            if value is None:
                continue
            value = tuple(value) if isinstance(value, list | tuple) else (value,)
            if not all(isinstance(v, kind) and not isinstance(v, bool) for v in value):
                raise TypeError(
                    f"Minibatch: expected {name} as {kind.__name__} or a tuple of them, got {value!r}."
                )
            object.__setattr__(self, name, value)

    def num_rows(self, arguments: Partition) -> int:
        """Length of the data's leading axis.

        Args:
            arguments: the loss's `(args, kwargs)`.

        Returns:
            The number of rows.

        Raises:
            ValueError: if no argument is data, leading axes differ, or there are fewer rows than
                `batch_size`.
        """
        _, selected = self._select(arguments)
        lengths = {leaf.shape[0] for leaf in selected}
        if len(lengths) != 1:
            raise ValueError(
                "Minibatch: expected data arguments that share one leading axis, got "
                f"{sorted(lengths) or 'no array argument with a leading axis'}; name the data with "
                "argnums=(...) (positions after params) or argnames=(...)."
            )
        (rows,) = lengths
        if rows < self.batch_size:
            raise ValueError(
                f"Minibatch: expected at least batch_size={self.batch_size} rows, got {rows}; "
                "use a smaller batch or no minibatch."
            )
        return rows

    def draw(self, rng_key: Key, arguments: Partition) -> Partition:
        """The arguments with data replaced by `batch_size` of their rows.

        Args:
            rng_key: a random key.
            arguments: the loss's `(args, kwargs)`.

        Returns:
            The arguments of the batch.
        """
        rows = self.num_rows(arguments)
        index = jax.random.randint(rng_key, (self.batch_size,), 0, rows)
        flags, _ = self._select(arguments)
        picks = iter(flags)
        return arguments.map(lambda leaf: take_rows(leaf, index) if next(picks) else leaf)

    def block(self, index: Any, arguments: Partition) -> Partition:
        """The arguments of one of the batches that follow each other in the data, without overlap.

        Args:
            index: which, below rows // `batch_size`.
            arguments: the loss's `(args, kwargs)`.

        Returns:
            The arguments of the batch.
        """
        rows = index * self.batch_size + jnp.arange(self.batch_size)
        picks = iter(self._select(arguments)[0])
        return arguments.map(lambda leaf: take_rows(leaf, rows) if next(picks) else leaf)

    def is_row(self, arguments: Partition) -> tuple[bool, ...]:
        """Which of the traced arguments are data."""
        return tuple(self._select(arguments)[0])

    def times(self, count: int) -> "Minibatch":
        """The same data in batches `count` times as large."""
        return dataclasses.replace(
            self, batch_size=count * self.batch_size, copies=count * self.copies
        )

    def share(self, num_steps: int) -> "Minibatch":
        """The same data in the batches of the inner steps of one outer step.

        Rows are drawn with replacement, so that shares of one batch are batches themselves.

        Args:
            num_steps: number of inner steps.

        Returns:
            The minibatch of one of them.

        Raises:
            ValueError: if there are more steps than rows.
        """
        rows = self.batch_size // (num_steps * self.copies)
        if not rows:
            raise ValueError(
                f"Minibatch: expected {num_steps} rows at least to split a batch over as many inner steps, got "
                f"batch_size={self.batch_size // self.copies}; use a larger batch, fewer steps or split=False."
            )
        return dataclasses.replace(self, batch_size=rows * self.copies, split=False)

    def part(self, arguments: Partition, count: int) -> tuple[Partition, Partition]:
        """A batch in `count` equal parts.

        Args:
            arguments: of a batch.
            count: number of parts.

        Returns:
            The arguments with a leading axis of parts on the data, and for `jax.vmap` the axes: zero there, None
            elsewhere.
        """
        flags, _ = self._select(arguments)
        parts, axes = iter(flags), iter(flags)
        return (
            arguments.map(lambda a: a.reshape(count, -1, *a.shape[1:]) if next(parts) else a),
            arguments.map(lambda _: 0 if next(axes) else None),
        )

    def _select(self, arguments: Partition) -> tuple[list[bool], list[Any]]:
        args, kwargs = arguments.tree
        # The constructor has made tuples of single positions and names.
        argnums: Any = self.argnums or ()
        argnames: Any = self.argnames or ()
        everything = self.argnums is None and self.argnames is None
        for position in argnums:
            if not -len(args) <= position < len(args):
                raise ValueError(
                    f"Minibatch: argnums names position {position}, but the loss has {len(args)} "
                    "positional arguments after params; count from 0, without params."
                )
        for name in argnames:
            if name not in kwargs:
                raise ValueError(
                    f"Minibatch: argnames names {name!r}, but the loss has the keyword arguments "
                    f"{sorted(kwargs)}; use these names, or argnums for positional arguments."
                )
        numbers = {position % len(args) for position in argnums}
        chosen = [
            *((everything or i in numbers, arg) for i, arg in enumerate(args)),
            *((everything or name in argnames, kwargs[name]) for name in sorted(kwargs)),
        ]
        for selected, value in chosen:
            constants = [c for c in Partition(value).static if isinstance(c, Constant)]
            for constant in constants:
                if selected and jnp.ndim(constant.value) > 0:
                    raise ValueError(
                        f"Minibatch: {constant.name} cannot be drawn in batches: the function needs its values "
                        "when it is traced (np.unique, boolean indexing, a loop over rows). Compute what needs "
                        "them beforehand and pass that, or name the data with argnums or argnames and bind the "
                        "rest with functools.partial(function, data)."
                    )
        for selected, value in chosen:
            named = selected and not everything
            is_list = isinstance(value, list | tuple)
            if (named or is_list) and not any(map(jnp.ndim, Partition(value).leaves)):
                raise ValueError(
                    f"Minibatch: expected data as arrays with a leading axis, got {type(value).__name__}; "
                    "wrap it in jnp.asarray, or name the data with argnums or argnames."
                )
        flags = [
            selected and jnp.ndim(leaf) > 0
            for selected, value in chosen
            for leaf in Partition(value).leaves
        ]
        leaves = [leaf for flag, leaf in zip(flags, arguments.leaves, strict=True) if flag]
        return flags, leaves


def take_rows(leaf: Any, index: jax.Array) -> jax.Array:
    """Some rows of data, wherever these are.

    Args:
        leaf: an array with a leading axis of rows.
        index: which, `(row,)`.

    Returns:
        The rows.
    """
    mesh = jax.typeof(leaf).sharding.mesh
    if AxisType.Explicit not in mesh.axis_types:
        return jnp.take(leaf, index, axis=0)
    # Within jax.set_mesh JAX asks where rows from all devices shall lie: a batch is small, and lies on each.
    return leaf.at[index].get(out_sharding=NamedSharding(mesh, PartitionSpec()))
