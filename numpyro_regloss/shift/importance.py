# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Importance sampling: a Gaussian cloud around the centre, weighted by softmax(-loss / T).

    z_j = mean + scale ξ_j,   w_j ∝ exp(-loss(z_j) / T)

No gradients, and the loss need not be differentiable. A large cloud's noise is regenerated from keys, chunk
by chunk, so that memory stays bounded; a small cloud's is kept. Weights degenerate when
tau |∇loss/T|² exceeds about log(num_samples): watch ESS and k-hat.

References: García Trillos, Kaplan & Sanz-Alonso (2019), "Variational Characterizations of Local Entropy
and Heat Regularization in Deep Learning"; Vehtari, Simpson, Gelman, Yao & Gabry (2024), "Pareto Smoothed
Importance Sampling".
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax, random

from numpyro_regloss._checks import check_count
from numpyro_regloss._pareto import pareto_khat
from numpyro_regloss._pytree import pytree_dataclass, static_field
from numpyro_regloss._stats import weight_ess
from numpyro_regloss._threefry import unrolled
from numpyro_regloss._typing import Array, Key
from numpyro_regloss.draws import Chunk
from numpyro_regloss.gaussian import AnyGaussian
from numpyro_regloss.regularized import RegularizedLoss
from numpyro_regloss.shift.base import Shift

__all__ = ["Cloud", "Importance", "ImportanceInfo"]

Carry = TypeVar("Carry")

# Two megabytes of float32 per chunk: larger leaves the cache, smaller loses the matrix product.
CHUNK_ELEMENTS = 500_000
# Up to 64 megabytes of noise are kept for the fit, which else draws it again.
KEPT_ELEMENTS = 16_000_000
# Chunks whose noise is drawn at once. From one, XLA would drop the loop between noise and loss and draw the
# noise within the loss, element by element.
CHUNKS_PER_SEGMENT = 2


class ImportanceInfo(NamedTuple):
    """Diagnostics of one cloud.

    Attributes:
        ok: some draw had a finite loss.
        num_loss: loss evaluations; a few more than `num_samples` where they do not fill equal chunks.
        num_grad: zero.
        ess: effective sample size 1 / Σ w².
        khat: Pareto shape of the weights; above 0.7 the weighted mean is not to be trusted.
        num_rejected: draws whose loss was NaN or -infinity; they got weight zero.
    """

    ok: Array
    num_loss: Array
    num_grad: Array
    ess: Array
    khat: Array
    num_rejected: Array


@pytree_dataclass
class Cloud:
    """Draws whose noise is kept, or regenerated from its key whenever it is needed.

    Attributes:
        rng_key: the key of the noise.
        reference: the Gaussian that the cloud was drawn from.
        log_weight: `(1, draw)`, unnormalized.
        loss: `(1, draw)`.
        temperature: scalar.
        offset: of the draws (or pairs) from the center, `(1, chunk, draw, dim)`, or None.
        chunk_size: draws per chunk.
        antithetic: whether draws come in pairs mean ± scale ξ.
    """

    rng_key: Key
    reference: AnyGaussian
    log_weight: Array
    loss: Array
    temperature: Array
    offset: Array | None
    chunk_size: int = static_field()
    antithetic: bool = static_field()

    @property
    def block_size(self) -> int:
        """Two for antithetic pairs, one for independent draws."""
        return 2 if self.antithetic else 1

    @property
    def score(self) -> None:
        """No gradients."""

    @property
    def x(self) -> Array:
        """All draws, `(1, draw, dim)`."""
        return _materialize(self)

    def fold(self, fn: Callable[[Carry, Chunk], Carry], init: Carry) -> Carry:
        """Reduces over chunks, each regenerated on the way unless it was kept."""
        num_samples = self.loss.shape[-1]
        segment = CHUNKS_PER_SEGMENT * self.chunk_size
        num_segments = -(-num_samples // segment)
        padding = num_segments * segment - num_samples
        log_weight = jnp.pad(self.log_weight[0], (0, padding), constant_values=-jnp.inf)

        def add(carry: Carry, item: tuple[Array, Array]) -> tuple[Carry, None]:
            offset, weights = item
            return fn(carry, Chunk(self.reference.mean, offset, weights, None)), None

        if self.offset is not None:
            offsets = self.offset.reshape(-1, *self.offset.shape[-2:])
            weights = log_weight.reshape(*offsets.shape[:2], self.block_size)
            return lax.scan(add, init, (offsets, weights))[0]

        def draw_and_add(carry: Carry, item: tuple[Array, Array]) -> tuple[Carry, None]:
            index, weights = item
            offset = _offsets(self.rng_key, self.reference, segment // self.block_size, index)
            return add(carry, (offset, weights))

        chunks = log_weight.reshape(num_segments, -1, self.block_size)
        return lax.scan(draw_and_add, init, (jnp.arange(num_segments), chunks))[0]


@pytree_dataclass
class Importance(Shift):
    """Self-normalized importance sampling from the reference.

    Args:
        num_samples: size of the cloud.
        antithetic: draw pairs mean ± scale ξ: the linear part of the loss then causes no error.
        chunk_size: draws evaluated at once; default: about ten megabytes of them, fewer when the loss
            holds much data.

    Raises:
        TypeError: if a count is not an integer.
        ValueError: if a count is not positive.

    Example:
        >>> Importance(num_samples=1000)
        Importance(num_samples=1000, antithetic=True, chunk_size=None)
    """

    num_samples: int = static_field()
    antithetic: bool = static_field(default=True)
    chunk_size: int | None = static_field(default=None)

    def __post_init__(self) -> None:
        check_count(self.num_samples, "Importance: num_samples")
        if self.chunk_size is not None:
            check_count(self.chunk_size, "Importance: chunk_size")
        if not isinstance(self.antithetic, bool):
            raise TypeError(
                f"Importance: expected antithetic as True or False, got {self.antithetic!r}."
            )

    def init(self, rng_key: Key, target: RegularizedLoss) -> tuple[()]:
        """Nothing is carried from one cloud to the next."""
        del rng_key, target
        return ()

    def step(
        self, rng_key: Key, state: tuple[()], target: RegularizedLoss
    ) -> tuple[tuple[()], Cloud, ImportanceInfo]:
        """Evaluates the loss on a fresh cloud.

        Args:
            rng_key: a random key.
            state: `()`.
            target: the target.

        Returns:
            `()`, the cloud and its diagnostics.
        """
        key_batch, rng_key = random.split(rng_key)
        # One batch for the whole cloud: weights of different losses cannot be compared.
        target = target.on_batch(key_batch)
        chunk_size = self._chunk_size(target)
        block = 2 if self.antithetic else 1
        num_chunks = CHUNKS_PER_SEGMENT * -(-self.num_samples // (CHUNKS_PER_SEGMENT * chunk_size))
        kept = num_chunks * chunk_size // block * target.dim <= KEPT_ELEMENTS
        num_segments = 1 if kept else num_chunks // CHUNKS_PER_SEGMENT

        def evaluate(offset: Array) -> Array:
            pairs = jnp.zeros((chunk_size // block, block))
            return jax.vmap(target.value)(Chunk(target.reference.mean, offset, pairs, None).x)

        def draw_and_evaluate(index: Array) -> tuple[Array, Array | None]:
            chunks = num_chunks // num_segments
            rows = chunks * chunk_size // block
            offset = _offsets(rng_key, target.reference, rows, index)
            offset = offset.reshape(chunks, -1, target.dim)
            return lax.map(evaluate, offset), offset if kept else None

        loss, offset = lax.map(draw_and_evaluate, jnp.arange(num_segments))
        num_loss = loss.size  # the last chunk may be longer than what is asked for
        loss = loss.reshape(-1)[: self.num_samples]
        # +infinity is a wall, a legitimate weight of zero; NaN and -infinity are failures of the loss.
        rejected = jnp.isnan(loss) | (loss == -jnp.inf)
        log_weight = jnp.where(rejected, -jnp.inf, -loss / target.temperature)
        ess = weight_ess(log_weight)
        info = ImportanceInfo(
            ok=ess > 0,
            num_loss=jnp.asarray(num_loss),
            num_grad=jnp.asarray(0),
            ess=ess,
            khat=pareto_khat(log_weight),
            num_rejected=jnp.sum(rejected),
        )
        cloud = Cloud(
            rng_key,
            target.reference,
            log_weight[None],
            loss[None],
            target.temperature,
            offset,
            chunk_size,
            self.antithetic,
        )
        return state, cloud, info

    def _chunk_size(self, target: RegularizedLoss) -> int:
        size = self.chunk_size
        if size is None:
            # What a loss keeps per draw is unknown; an eighth of its data is a fair guess for a network.
            data = sum(leaf.size for leaf in target.arguments.leaves)
            size = max(16, CHUNK_ELEMENTS // max(target.dim, data // 8))
        block = 2 if self.antithetic else 1
        num_chunks = CHUNKS_PER_SEGMENT * -(-self.num_samples // (CHUNKS_PER_SEGMENT * size))
        balanced = -(-self.num_samples // num_chunks)
        return -(-balanced // block) * block


@jax.jit
def _materialize(cloud: Cloud) -> Array:
    num_samples = cloud.loss.shape[-1]
    if cloud.offset is not None:
        offset = cloud.offset.reshape(-1, cloud.reference.dim)
    else:
        segment = CHUNKS_PER_SEGMENT * cloud.chunk_size
        draw = partial(_offsets, cloud.rng_key, cloud.reference, segment // cloud.block_size)
        offset = lax.map(draw, jnp.arange(-(-num_samples // segment)))
        offset = offset.reshape(-1, cloud.reference.dim)
    weights = jnp.zeros((offset.shape[0], cloud.block_size))
    return Chunk(cloud.reference.mean, offset, weights, None).x[None, :num_samples]


def _offsets(rng_key: Key, reference: AnyGaussian, num_rows: int, index: Array) -> Array:
    key = random.fold_in(unrolled(rng_key), index)
    return reference.scaled(random.normal(key, (num_rows, reference.dim), reference.mean.dtype))
