# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""A cloud of draws around the reference, in memory or regenerated from its key chunk by chunk."""

from collections.abc import Callable
from functools import partial
from typing import ClassVar, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random

from numpyro_regloss._core.mesh import (
    MOST_BLOCKS,
    is_divided,
    num_blocks,
    sum_of_blocks,
    values_of_blocks,
)
from numpyro_regloss._core.pytree import pytree_dataclass, static_field
from numpyro_regloss._core.settings import own_settings
from numpyro_regloss._core.threefry import from_position, unrolled
from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.draws.base import Chunk, merge
from numpyro_regloss.gaussians.gaussian import AnyGaussian
from numpyro_regloss.losses.long_losses import CENTER_FROM
from numpyro_regloss.losses.regularized import RegularizedLoss
from numpyro_regloss.shift.importance.mirror import is_mirror, is_wider
from numpyro_regloss.shift.importance.sobol import sobol_normal

__all__ = [
    "Cloud",
    "Layout",
    "draws_of",
    "evaluate",
    "kept_noise",
    "lay_out",
    "single_weights",
]

Carry = TypeVar("Carry")

# Two megabytes of float32 per chunk: larger leaves the cache, smaller loses the matrix product.
CHUNK_ELEMENTS = 500_000
# Of an external loss all draws go to its workers at once, up to 64 megabytes of them.
EXTERNAL_ELEMENTS = 16_000_000
# Up to 64 megabytes of noise are kept for the fit, which else draws it again.
KEPT_ELEMENTS = 16_000_000
# Chunks whose noise is drawn at once. From one, XLA would drop the loop between noise and loss and draw the
# noise within the loss, element by element. A cloud that is to be evaluated at once is one chunk all the same,
# with a barrier in the loop's place: its loss is a simulator, which has a price per call.
CHUNKS_PER_SEGMENT = 2


class Layout(NamedTuple):
    """How draws lie in chunks; it compiles.

    Attributes:
        num_samples: draws that are used; the last chunk may have more.
        chunk_size: draws evaluated at once, a multiple of `block_size`.
        segment_size: draws whose noise is made at once, a multiple of `chunk_size`; all draws if it is kept.
        block_size: draws that depend on one another: 1, 2 of an antithetic pair, or all of one Sobol net.
        antithetic: whether draws come in pairs mean ± scale ξ.
        sobol: whether each block is a scrambled Sobol net.
        kept: whether the noise is kept in memory.
    """

    num_samples: int
    chunk_size: int
    segment_size: int
    block_size: int
    antithetic: bool
    sobol: bool
    kept: bool

    @property
    def per_row(self) -> int:
        """Draws per row of noise: two for pairs."""
        return 2 if self.antithetic else 1

    @property
    def at_once(self) -> bool:
        """Whether all draws are evaluated in one batch."""
        return self.chunk_size == self.segment_size

    @property
    def num_segments(self) -> int:
        """How often noise is made."""
        return -(-self.num_samples // self.segment_size)

    @property
    def parts(self) -> "Parts":
        """How a mesh divides the draws: whole segments, or parts of them where there are few."""
        atom = self.block_size // self.per_row
        rows = self.segment_size // self.per_row
        wanted = -(-num_blocks(self.num_samples // self.block_size) // self.num_segments)
        # No more draws are evaluated at once than without a mesh.
        size = -(-rows // wanted)
        num_chunks = max(1, -(-size * self.per_row // self.chunk_size))
        size = -(-size // (num_chunks * atom)) * num_chunks * atom
        per_segment = -(-rows // size)
        return Parts(size, per_segment, num_chunks, per_segment * self.num_segments)


class Parts(NamedTuple):
    """How a mesh divides the draws of a cloud, whatever the number of its devices.

    Attributes:
        num_rows: rows of noise per part; the last part of a segment may go beyond its end.
        per_segment: parts of a segment.
        num_chunks: batches in which the loss of a part is evaluated.
        total: parts of all.
    """

    num_rows: int
    per_segment: int
    num_chunks: int
    total: int


def lay_out(
    target: RegularizedLoss,
    num_samples: int,
    chunk_size: int | None,
    *,
    antithetic: bool,
    net_size: int | None = None,
) -> Layout:
    """Chunks of about equal size that hold whole blocks.

    Args:
        target: what is evaluated.
        num_samples: draws.
        chunk_size: draws at once, about, and all of them in one batch if there are no more; default: about two
            megabytes of them, fewer when the loss holds much data; of an external loss all, up to 64 megabytes.
        antithetic: whether draws come in pairs.
        net_size: draws per scrambled Sobol net, a power of two; None for random noise.

    Returns:
        The layout.
    """
    if chunk_size is None and target.loss.is_external:
        chunk_size = max(16, EXTERNAL_ELEMENTS // target.dim)
    size = chunk_size
    if size is None:
        # What a loss keeps per draw is unknown; half its data is what a layer half as wide as its inputs keeps.
        # Too large a chunk of a network leaves the cache; too small a one costs little.
        data = sum(leaf.size for leaf in target.arguments.leaves)
        size = max(16, CHUNK_ELEMENTS // max(target.dim, data // 2))
    per_row = 2 if antithetic else 1
    block = net_size or per_row
    if chunk_size is not None and chunk_size >= num_samples:
        total = -(-num_samples // block) * block
        kept = total // per_row * target.dim <= KEPT_ELEMENTS
        return Layout(num_samples, total, total, block, antithetic, net_size is not None, kept)
    num_segments = -(-num_samples // (CHUNKS_PER_SEGMENT * size))
    balanced = -(-num_samples // (CHUNKS_PER_SEGMENT * num_segments))
    size = -(-balanced // block) * block
    num_segments = -(-num_samples // (CHUNKS_PER_SEGMENT * size))
    total = CHUNKS_PER_SEGMENT * num_segments * size
    kept = total // per_row * target.dim <= KEPT_ELEMENTS
    segment = total if kept else CHUNKS_PER_SEGMENT * size
    return Layout(num_samples, size, segment, block, antithetic, net_size is not None, kept)


@pytree_dataclass
class Cloud:
    """Draws whose noise is kept, or regenerated from its key whenever it is needed.

    Attributes:
        rng_key: the key of the noise.
        reference: the Gaussian that the cloud was drawn from.
        log_weight: `(1, draw)`, unnormalized.
        loss: `(1, draw)`.
        temperature: scalar, the one of the weights.
        offset: of the draws (or pairs) from the center, `(chunk, row, dim)`, or None.
        layout: how draws lie in chunks.
        center_loss: at the reference's mean, if it was evaluated with the draws, else None.
    """

    rng_key: Key
    reference: AnyGaussian
    log_weight: Array
    loss: Array
    temperature: Array
    offset: Array | None
    layout: Layout = static_field()
    center_loss: Array | None = None

    spread: ClassVar[None] = None
    stats: ClassVar[None] = None

    @property
    def block_size(self) -> int:
        """One for independent draws, two for antithetic pairs, the size of a net for Sobol points."""
        return self.layout.block_size

    @property
    def score(self) -> None:
        """No gradients."""

    @property
    def x(self) -> Array:
        """All draws, `(1, draw, dim)`."""
        return _materialize(self)

    def fold(self, fn: Callable[[Carry, Chunk], Carry], init: Carry) -> Carry:
        """Reduces over chunks, each regenerated on the way unless it was kept."""
        if is_divided():
            return self._fold_parts(fn, init)
        layout = self.layout
        padding = layout.num_segments * layout.segment_size - layout.num_samples
        log_weight = jnp.pad(self.log_weight[0], (0, padding), constant_values=-jnp.inf)

        def add(carry: Carry, item: tuple[Array, Array]) -> tuple[Carry, None]:
            offset, weights = item
            return fn(carry, Chunk(self.reference.mean, offset, weights, None)), None

        if self.offset is not None:
            weights = log_weight.reshape(*self.offset.shape[:2], layout.per_row)
            return lax.scan(add, init, (self.offset, weights))[0]

        def draw_and_add(carry: Carry, item: tuple[Array, Array]) -> tuple[Carry, None]:
            index, weights = item
            return add(carry, (_offsets(self.rng_key, self.reference, layout, index), weights))

        segments = log_weight.reshape(layout.num_segments, -1, layout.per_row)
        return lax.scan(draw_and_add, init, (jnp.arange(layout.num_segments), segments))[0]

    def _fold_parts(self, fn: Callable[[Carry, Chunk], Carry], init: Carry) -> Carry:
        layout, parts = self.layout, self.layout.parts

        def pad(a: Array, size: int) -> Array:
            return jnp.pad(a, (*((0, 0),) * (a.ndim - 1), (0, size)), constant_values=-jnp.inf)

        in_segments = layout.num_segments * layout.segment_size
        weights = pad(self.log_weight[0], in_segments - layout.num_samples)
        weights = weights.reshape(layout.num_segments, layout.segment_size)
        per_part = parts.num_rows * layout.per_row
        weights = pad(weights, parts.per_segment * per_part - layout.segment_size)
        weights = weights.reshape(parts.total, parts.num_rows, layout.per_row)

        # Of about equal size, as many as a tree has leaves: so devices have equal work.
        num_groups = 1 << min(parts.total, MOST_BLOCKS).bit_length() - 1

        def of_group(group: Array) -> Carry:
            def add(i: Array, carry: Carry) -> Carry:
                offset = _offsets_of_part(self.rng_key, self.reference, layout, i)
                return fn(carry, Chunk(self.reference.mean, offset, weights[i], None))

            first, end = (k * parts.total // num_groups for k in (group, group + 1))
            return lax.fori_loop(first, end, add, init)

        return sum_of_blocks(of_group, num_groups, init, merge)


def evaluate(
    rng_key: Key, target: RegularizedLoss, layout: Layout, *, with_center: bool
) -> tuple[Array, Array | None, Array | None, int]:
    """The loss on a fresh cloud.

    Args:
        rng_key: the key of the noise.
        target: reference and loss, on one batch of data.
        layout: how draws lie in chunks.
        with_center: whether to take the reference's mean along, in a cloud that is evaluated at once or of a loss
            that is long.

    Returns:
        Losses `(draw,)`; the offsets of the draws if they are kept, else None; the loss at the reference's mean,
        or None; the number of evaluations.
    """
    if is_divided():
        return _evaluate_parts(rng_key, target, layout)
    if layout.at_once:
        return _evaluate_at_once(rng_key, target, layout, with_center=with_center)

    # The step evaluates the center apart: of a long loss that would compile it a second time.
    whole = target.loss.is_long and target.loss.minibatch is None
    with_center = with_center and whole and layout.chunk_size >= CENTER_FROM

    def of_chunk(offset: Array) -> Array:
        pairs = jnp.zeros((offset.shape[0], layout.per_row))
        x = Chunk(target.reference.mean, offset, pairs, None).x
        if with_center:
            x = jnp.concatenate([x, target.reference.mean[None]])
        return jax.vmap(target.value)(x)

    def of_segment(index: Array) -> tuple[Array, Array | None]:
        offset = _offsets(rng_key, target.reference, layout, index)
        offset = offset.reshape(-1, layout.chunk_size // layout.per_row, target.dim)
        # Fused with its readers, the noise would be computed once for each of them.
        offset = lax.optimization_barrier(offset)
        return lax.map(of_chunk, offset), offset if layout.kept else None

    if layout.kept:
        loss, offset = of_segment(jnp.asarray(0))
    else:
        loss, offset = lax.map(of_segment, jnp.arange(layout.num_segments))
        loss = loss.reshape(-1, loss.shape[-1])
    center, num_loss = None, loss.size
    if with_center:
        loss, center = loss[:, :-1], loss[0, -1]
    return loss.reshape(-1)[: layout.num_samples], offset, center, num_loss


def _evaluate_parts(
    rng_key: Key, target: RegularizedLoss, layout: Layout
) -> tuple[Array, None, None, int]:
    # Noise is not kept: it would lie on the device that made it, and draws lie on all.
    parts = layout.parts

    def of_chunk(offset: Array) -> Array:
        pairs = jnp.zeros((offset.shape[0], layout.per_row))
        return jax.vmap(target.value)(Chunk(target.reference.mean, offset, pairs, None).x)

    def of_part(index: Array) -> Array:
        offset = _offsets_of_part(rng_key, target.reference, layout, index)
        if parts.num_chunks == 1:
            return of_chunk(offset)
        return lax.map(of_chunk, offset.reshape(parts.num_chunks, -1, target.dim)).reshape(-1)

    loss = values_of_blocks(of_part, parts.total)
    segments = loss.reshape(layout.num_segments, -1)[:, : layout.segment_size]
    return segments.reshape(-1)[: layout.num_samples], None, None, loss.size


def _evaluate_at_once(
    rng_key: Key, target: RegularizedLoss, layout: Layout, *, with_center: bool
) -> tuple[Array, Array | None, Array | None, int]:
    offset = lax.optimization_barrier(_offsets(rng_key, target.reference, layout, jnp.asarray(0)))
    pairs = jnp.zeros((offset.shape[0], layout.per_row))
    x = Chunk(target.reference.mean, offset, pairs, None).x[: layout.num_samples]
    if with_center:
        x = jnp.concatenate([x, target.reference.mean[None]])
    loss = jax.vmap(target.value)(x)
    center = loss[-1] if with_center else None
    kept = offset[None] if layout.kept else None
    return loss[: layout.num_samples], kept, center, loss.size


def single_weights(
    log_weight: Array,
    loss: Array,
    rng_key: Key,
    reference: AnyGaussian,
    offset: Array | None,
    layout: Layout,
) -> Array:
    """Log weights of a cloud of pairs, of first members alone where pairs would hide the way off a mirror.

    Args:
        log_weight: `(draw,)`.
        loss: `(draw,)`.
        rng_key: the key of the noise.
        reference: the Gaussian that the cloud was drawn from.
        offset: from `evaluate`.
        layout: how draws lie in chunks.

    Returns:
        `(draw,)`: the weights as they are, or with none for the second members.
    """
    padding = (0, -log_weight.size % 2)
    pairs = jnp.pad(log_weight, padding, constant_values=-jnp.inf).reshape(-1, 2)

    def look() -> Array:
        # Of a cloud that is not kept the first segment is enough. Other shapes of what is kept would be fused with
        # the noise, and compute it again: the look takes its part within its branch.
        first = offset
        if first is None:
            first = _offsets(rng_key, reference, layout, jnp.asarray(0))
        first = first.reshape(-1, reference.dim)[: len(pairs)]
        unit = jnp.sqrt(reference.variance)
        return is_wider(first, pairs[: len(first)].max(1), unit)

    mirror = is_mirror(jnp.pad(loss, padding).reshape(-1, 2), pairs)
    leave = lax.cond(mirror, look, lambda: jnp.asarray(False))
    second = jnp.arange(log_weight.size) % 2 == 1
    return jnp.where(leave & second, -jnp.inf, log_weight)


def kept_noise(rng_key: Key, reference: AnyGaussian, layout: Layout) -> Array | None:
    """The offsets of the draws as `evaluate` keeps them, without an evaluation.

    Args:
        rng_key: the key of the noise.
        reference: the Gaussian that the cloud is drawn from.
        layout: how draws lie in chunks.

    Returns:
        `(chunk, row, dim)`, or None of a cloud that is not kept.
    """
    if not layout.kept:
        return None
    offset = _offsets(rng_key, reference, layout, jnp.asarray(0))
    offset = offset.reshape(-1, layout.chunk_size // layout.per_row, reference.dim)
    return lax.optimization_barrier(offset)


def draws_of(
    rng_key: Key, reference: AnyGaussian, layout: Layout, offset: Array | None = None
) -> Array:
    """All draws of a cloud.

    Args:
        rng_key: the key of the noise.
        reference: the Gaussian that the cloud is drawn from.
        layout: how draws lie in chunks.
        offset: of the draws, if it is kept.

    Returns:
        `(draw, dim)`.
    """
    if offset is None:
        draw = partial(_offsets, rng_key, reference, layout)
        offset = lax.map(draw, jnp.arange(layout.num_segments))
    offset = lax.optimization_barrier(offset.reshape(-1, reference.dim))
    weights = jnp.zeros((offset.shape[0], layout.per_row))
    return Chunk(reference.mean, offset, weights, None).x[: layout.num_samples]


@jax.jit
@own_settings
def _materialize(cloud: Cloud) -> Array:
    return draws_of(cloud.rng_key, cloud.reference, cloud.layout, cloud.offset)[None]


def _offsets_of_part(rng_key: Key, reference: AnyGaussian, layout: Layout, index: Array) -> Array:
    # The rows that `_offsets` has there.
    parts = layout.parts
    segment, part = jnp.divmod(index, parts.per_segment)
    if parts.per_segment == 1:
        return lax.optimization_barrier(_offsets(rng_key, reference, layout, segment))
    key = random.fold_in(unrolled(rng_key), segment)
    first, dim = part * parts.num_rows, reference.dim
    if layout.sobol:
        size = layout.block_size // layout.per_row
        num_nets = layout.segment_size // layout.block_size
        nets = first // size + jnp.arange(parts.num_rows // size)
        keys = random.split(key, num_nets)[jnp.minimum(nets, num_nets - 1)]
        noise = lax.map(partial(sobol_normal, num_draws=size, dim=dim), keys)
        noise = noise.reshape(-1, dim).astype(reference.mean.dtype)
    else:
        shape, dtype = (parts.num_rows, dim), reference.mean.dtype
        at = from_position(key, first.astype(jnp.uint32) * np.uint32(dim))
        if at is None:
            # Of other generators all noise of the segment is made.
            rows = max(layout.segment_size // layout.per_row, parts.num_rows * parts.per_segment)
            noise = random.normal(key, (layout.segment_size // layout.per_row, dim), dtype)
            noise = jnp.pad(noise, ((0, rows - len(noise)), (0, 0)))
            noise = lax.dynamic_slice_in_dim(noise, first, parts.num_rows)
        else:
            noise = random.normal(at, shape, dtype)
    return lax.optimization_barrier(reference.scaled(noise))


def _offsets(rng_key: Key, reference: AnyGaussian, layout: Layout, index: Array) -> Array:
    key = random.fold_in(unrolled(rng_key), index)
    num_rows, dim = layout.segment_size // layout.per_row, reference.dim
    if not layout.sobol:
        return reference.scaled(random.normal(key, (num_rows, dim), reference.mean.dtype))
    size = layout.block_size // layout.per_row
    nets = lax.map(
        partial(sobol_normal, num_draws=size, dim=dim), random.split(key, num_rows // size)
    )
    return reference.scaled(nets.reshape(num_rows, dim).astype(reference.mean.dtype))
