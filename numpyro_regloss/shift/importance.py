# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Importance sampling: a Gaussian cloud around the centre, weighted by softmax(-loss / T).

    z_j = mean + scale ξ_j,   w_j ∝ exp(-loss(z_j) / T)

No gradients, and the loss need not be differentiable. Noise is regenerated from keys, chunk by chunk, so
memory does not grow with the number of samples times the dimension. Weights degenerate when
tau |∇loss/T|² exceeds about log(num_samples): watch ESS and k-hat.

References: García Trillos, Kaplan & Sanz-Alonso (2019), "Variational Characterizations of Local Entropy
and Heat Regularization in Deep Learning"; Vehtari, Simpson, Gelman, Yao & Gabry (2024), "Pareto Smoothed
Importance Sampling".
"""

from collections.abc import Callable
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
from numpyro_regloss.gaussian import Gaussian
from numpyro_regloss.regularized import RegularizedLoss
from numpyro_regloss.shift.base import Shift

__all__ = ["Cloud", "Importance", "ImportanceInfo"]

Carry = TypeVar("Carry")

# Ten megabytes of float32 per chunk: larger leaves the cache, smaller loses the matrix product.
CHUNK_ELEMENTS = 2_500_000


class ImportanceInfo(NamedTuple):
    """Diagnostics of one cloud.

    Attributes:
        ok: some draw had a finite loss.
        num_loss: loss evaluations.
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
    """Draws that are regenerated from their key whenever they are needed.

    Attributes:
        rng_key: the key of the noise.
        reference: the Gaussian that the cloud was drawn from.
        log_weight: `(1, draw)`, unnormalized.
        loss: `(1, draw)`.
        temperature: scalar.
        chunk_size: draws per chunk.
        antithetic: whether draws come in pairs mean ± scale ξ.
    """

    rng_key: Key
    reference: Gaussian
    log_weight: Array
    loss: Array
    temperature: Array
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
        """Reduces over chunks, each regenerated on the way."""
        draw = _sampler(self.rng_key, self.reference, self.chunk_size, antithetic=self.antithetic)
        num_samples = self.loss.shape[-1]
        num_chunks = -(-num_samples // self.chunk_size)
        padding = num_chunks * self.chunk_size - num_samples
        log_weight = jnp.pad(self.log_weight[0], (0, padding), constant_values=-jnp.inf)

        def body(carry: Carry, item: tuple[Array, Array]) -> tuple[Carry, None]:
            index, weights = item
            return fn(carry, Chunk(draw(index), weights, None)), None

        chunks = (jnp.arange(num_chunks), log_weight.reshape(num_chunks, -1))
        return lax.scan(body, init, chunks)[0]


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
        draw = _sampler(rng_key, target.reference, chunk_size, antithetic=self.antithetic)
        num_chunks = -(-self.num_samples // chunk_size)
        loss = lax.map(lambda i: jax.vmap(target.value)(draw(i)), jnp.arange(num_chunks))
        loss = loss.reshape(-1)[: self.num_samples]
        # +infinity is a wall, a legitimate weight of zero; NaN and -infinity are failures of the loss.
        rejected = jnp.isnan(loss) | (loss == -jnp.inf)
        log_weight = jnp.where(rejected, -jnp.inf, -loss / target.temperature)
        ess = weight_ess(log_weight)
        info = ImportanceInfo(
            ok=ess > 0,
            num_loss=jnp.asarray(self.num_samples),
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
        num_chunks = -(-self.num_samples // size)
        balanced = -(-self.num_samples // num_chunks)
        return -(-balanced // block) * block


@jax.jit
def _materialize(cloud: Cloud) -> Array:
    draw = _sampler(cloud.rng_key, cloud.reference, cloud.chunk_size, antithetic=cloud.antithetic)
    num_samples = cloud.loss.shape[-1]
    x = lax.map(draw, jnp.arange(-(-num_samples // cloud.chunk_size)))
    return x.reshape(1, -1, cloud.reference.dim)[:, :num_samples]


def _sampler(
    rng_key: Key, reference: Gaussian, chunk_size: int, *, antithetic: bool
) -> Callable[[Array], Array]:
    rng_key = unrolled(rng_key)

    def draw(index: Array) -> Array:
        pairs = chunk_size // 2 if antithetic else chunk_size
        noise = reference.scaled(
            random.normal(
                random.fold_in(rng_key, index), (pairs, reference.dim), reference.mean.dtype
            )
        )
        if antithetic:
            noise = jnp.stack([noise, -noise], 1).reshape(chunk_size, reference.dim)
        return reference.mean + noise

    return draw
