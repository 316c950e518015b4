# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Running averages of a network at its final parameters, such as the statistics of batch norm.

A framework moves an average s by s' = m s + (1 - m) b, with a momentum m and the statistic b of a batch. Two calls
with s = 0 and s = 1 tell m, and every further call a statistic. The plain mean over batches has no share of
the start, and none of earlier parameters.

Reference: Izmailov, Podoprikhin, Garipov, Vetrov & Wilson (2018), "Averaging Weights Leads to Wider Optima and
Better Generalization", whose averaged weights need statistics of their own (PyTorch: `update_bn`).
"""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_regloss._core.pytree import Partition, replace_fields
from numpyro_regloss._core.types import Array
from numpyro_regloss.losses.items import split_item
from numpyro_regloss.losses.minibatch import take_rows
from numpyro_regloss.losses.noise import renew_keys

__all__ = ["recalibrated"]

# Momenta of all entries are equal up to so many units of the last digit.
ROUNDING = 64.0


def recalibrated(loss: Any, params: Any, batches: Iterable[Any] | None) -> Any:
    """A module whose running averages are the mean over batches.

    Args:
        loss: of a function of modules.
        params: the module.
        batches: arguments of the loss for each batch, see `split_item`; None for the bound data.

    Returns:
        The module.

    Raises:
        ValueError: if there is no batch, or the function does not hand out its new state.
    """
    source = loss.source
    x, held = source.unconstrain(params, (), {}), source.held_of(params)
    momenta: list[Any] = []
    sums: list[Any] = []
    count = 0

    def after(held: tuple[Any, ...], arguments: Partition) -> tuple[Any, ...]:
        return _updated(replace_fields(source, held=held), x, arguments)

    original = held
    for arguments in _batches(loss, batches):
        arguments = renew_keys(
            loss.rng_names, jax.random.fold_in(jax.random.key(0), count), arguments
        )
        if not count:
            ends = [after(tuple(_filled(a, end) for a in held), arguments) for end in (0, 1)]
            momenta = [_momentum(*pair) for pair in zip(*ends, strict=True)]
            sums = [0.0] * len(held)
        new = after(held, arguments)
        for i, (old, now, momentum) in enumerate(zip(held, new, momenta, strict=True)):
            if momentum is not None:
                sums[i] = sums[i] + (now - momentum * old) / (1.0 - momentum)
        held, count = new, count + 1
    if not count:
        raise ValueError(
            "Loss.recalibrate: expected at least one batch, got none; a generator that was used up has none."
        )
    means = [
        first if _is_key(first) else last if m is None else (total / count).astype(last.dtype)
        for first, last, m, total in zip(original, held, momenta, sums, strict=True)
    ]
    module = replace_fields(source, held=tuple(means)).constrain(x, (), {})
    all_known = all(m is not None for a, m in zip(held, momenta, strict=True) if _is_float(a))
    return source.layout.settled(module) if all_known else module


def _batches(loss: Any, batches: Iterable[Any] | None) -> Iterator[Partition]:
    if batches is not None:
        for batch in batches:
            yield loss.bind(*split_item(loss, batch, "Loss.recalibrate: batches"))
        return
    arguments = loss.bind()
    if loss.minibatch is None:
        yield arguments
        return
    # A rest that is smaller is left out: its statistics would count as much as those of the others.
    size, flags = loss.minibatch.batch_size, loss.minibatch.is_row(arguments)
    for start in range(0, loss.minibatch.num_rows(arguments) + 1 - size, size):
        is_row, index = iter(flags), jnp.arange(start, start + size)
        yield arguments.map(partial(_rows, is_row, index))


def _rows(is_row: Iterator[bool], index: Array, leaf: Any) -> Any:
    return take_rows(leaf, index) if next(is_row) else leaf


@jax.jit
def _updated(source: Any, x: Array, arguments: Partition) -> tuple[Any, ...]:
    return source.updated(x, *arguments.tree)


def _filled(leaf: Any, value: int) -> Any:
    return jnp.full_like(leaf, value) if _is_float(leaf) else leaf


def _momentum(zero: Any, one: Any) -> float | None:
    """The momentum of an average from its values after a start at zero and at one; None of what is no average."""
    if not _is_float(zero) or not zero.size:
        return None
    eps = jnp.finfo(zero.dtype).eps * ROUNDING
    zero, one = np.asarray(zero, np.float64), np.asarray(one, np.float64)
    each = one - zero
    momentum = float(np.median(each))
    slack = eps * max(1.0, float(np.max(np.abs(zero))))
    is_average = np.ptp(each) <= slack and -slack <= momentum < 1.0 - slack
    return momentum if is_average else None


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
