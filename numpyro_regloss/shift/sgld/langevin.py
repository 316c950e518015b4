# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""What a Langevin step is made of: noise, preconditioners, the limit of its step size, averages.

A step z ← z - η P ∇U(z) + sqrt(2 η T P) ξ of a quadratic U with Hessian A is stable if and only if no eigenvalue
of η P A reaches 2. The largest is found by a power iteration on differences of gradients of one batch.

References: Li, Chen, Carlson & Carin (2016), "Preconditioned Stochastic Gradient Langevin Dynamics for Deep Neural
Networks"; Milstein & Tretyakov (2004), "Stochastic Numerics for Mathematical Physics", on weak schemes with
two-point noise.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax, random

from numpyro_regloss._core.checks import cast_fields, check_positive
from numpyro_regloss._core.mesh import divided
from numpyro_regloss._core.pytree import is_concrete, pytree_dataclass, strip_weak_types
from numpyro_regloss._core.stats import normalize_log_weight
from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.draws.batches import batch_size_of, in_batches
from numpyro_regloss.gaussians.gaussian import AnyGaussian, Gaussian
from numpyro_regloss.losses.regularized import RegularizedLoss

__all__ = [
    "NOISES",
    "BatchSums",
    "LangevinChains",
    "RMSprop",
    "SecondMoment",
    "decaying_weights",
    "diagnose",
    "draw_noise",
    "gradients",
    "pull",
    "store",
    "sum_up",
]

NOISES = ("normal", "two_point")


class SecondMoment(NamedTuple):
    """Running average of squared gradients.

    Attributes:
        sum: weighted sum of the squares, `(dim,)`.
        weight: sum of the weights, from 0 to 1.
    """

    sum: Array
    weight: Array


@pytree_dataclass
class RMSprop:
    """A diagonal preconditioner 1 / (damping + sqrt(V)) with V a running mean of squared gradients.

    The preconditioner changes along the chain, and the correction for that is left out, as in the paper. So,
    unlike with a fixed preconditioner, the bias of averages does not vanish with the step size.

    Args:
        decay: of the running mean per inner step, between 0 and 1.
        damping: in units of the gradient of the loss.

    Raises:
        TypeError: if a setting is no number.
        ValueError: if a setting is out of range.

    Example:
        >>> RMSprop(decay=0.5)
        RMSprop(decay=array(0.5, dtype=float32), damping=array(1.e-05, dtype=float32))
    """

    decay: Any = 0.99
    damping: Any = 1e-5

    def __post_init__(self) -> None:
        cast_fields(self, ("decay", "damping"), check_positive)
        if is_concrete(self.decay) and self.decay >= 1:
            raise ValueError(f"RMSprop: expected decay between 0 and 1, got {self.decay}.")

    def init(self, like: Array) -> SecondMoment:
        """No gradients yet, for parameters `like`, `(dim,)`."""
        return SecondMoment(jnp.zeros_like(like), jnp.zeros((), like.dtype))

    def update(self, moment: SecondMoment, gradient: Array) -> SecondMoment:
        """Counts one more gradient of every chain, `(chain, dim)`."""
        share = jnp.asarray(1.0 - self.decay, gradient.dtype)
        square = jnp.mean(gradient**2, 0)
        return SecondMoment(
            moment.sum + share * (square - moment.sum),
            moment.weight + share * (1.0 - moment.weight),
        )

    def diagonal(self, moment: SecondMoment) -> Array:
        """The preconditioner, `(dim,)`."""
        weight = jnp.where(moment.weight > 0, moment.weight, 1.0)
        return 1.0 / (self.damping + jnp.sqrt(moment.sum / weight))


class LangevinChains(NamedTuple):
    """Where chains stand.

    Attributes:
        x: `(chain, dim)`.
        gradient: of the loss there, `(chain, dim)`; None where it is met with the next step alone.
        loss: `(chain,)`, there, or with minibatches where the last step began.
        first: the loss where the chains began, `(chain,)`.
        moment: of the gradients so far, for `RMSprop`, or None.
    """

    x: Array
    gradient: Array | None
    loss: Array
    first: Array
    moment: Any


class BatchSums(NamedTuple):
    """Running sums of one batch of consecutive draws.

    Attributes:
        weight: of the batch, relative to its last draw.
        mean: `(chain, dim)`.
        spread: variance within the batch, `(chain, dim)`.
        loss: mean loss, `(chain,)`.
    """

    weight: Array
    mean: Array
    spread: Array
    loss: Array

    @classmethod
    def zero(cls, x: Array, loss: Array) -> "BatchSums":
        """Sums of these types and shapes."""
        return cls(jnp.zeros((), x.dtype), x, jnp.zeros_like(x), loss)

    def add(self, x: Array, loss: Array, fresh: Array, decay: Array | float) -> "BatchSums":
        """The sums with one more draw.

        Args:
            x: `(chain, dim)`.
            loss: `(chain,)`.
            fresh: whether it is the first of its batch.
            decay: weight of a draw relative to the next one.

        Returns:
            The sums.
        """
        weight = jnp.where(fresh, 0.0, decay * self.weight).astype(x.dtype) + 1.0
        share = 1.0 / weight
        mean, mean_loss = jnp.where(fresh, x, self.mean), jnp.where(fresh, loss, self.loss)
        change = x - mean
        # Welford's recursion, with weights.
        spread = (1.0 - share) * (jnp.where(fresh, 0.0, self.spread) + share * change**2)
        return BatchSums(
            weight, mean + share * change, spread, mean_loss + share * (loss - mean_loss)
        )


Advance = Callable[[Array, LangevinChains], LangevinChains]
Now = tuple[LangevinChains, BatchSums]


def store(
    advance: Advance, chains: LangevinChains, num_warmup: int, num_samples: int
) -> tuple[LangevinChains, Array, Array]:
    """Advances chains and stores their draws.

    Args:
        advance: the step of a number, from zero.
        chains: where they start.
        num_warmup: steps that are thrown away.
        num_samples: steps after them.

    Returns:
        Where the chains are, their draws `(chain, draw, dim)` and losses `(chain, draw)`.
    """

    def body(
        j: Array, now: tuple[LangevinChains, Array, Array]
    ) -> tuple[LangevinChains, Array, Array]:
        chains, x, loss = advance(j, now[0]), now[1], now[2]
        row = jnp.maximum(j - num_warmup, 0)
        return chains, x.at[:, row].set(chains.x), loss.at[:, row].set(chains.loss)

    num_chains, dim = chains.x.shape
    x = jnp.zeros((num_chains, num_samples, dim), chains.x.dtype)
    loss = jnp.zeros((num_chains, num_samples), chains.loss.dtype)
    return lax.fori_loop(0, num_warmup + num_samples, body, (chains, x, loss))


def sum_up(
    advance: Advance,
    chains: LangevinChains,
    num_warmup: int,
    num_samples: int,
    size: int,
    count: int,
    decay: Array | float,
) -> tuple[LangevinChains, BatchSums]:
    """Advances chains and keeps sums of batches of their draws.

    Args:
        advance: the step of a number, from zero.
        chains: where they start.
        num_warmup: steps that are thrown away.
        num_samples: steps after them.
        size: draws per batch.
        count: number of batches, of which the last may be shorter.
        decay: weight of a draw relative to the next one.

    Returns:
        Where the chains are, and the sums with axes `(chain, batch, ...)`.
    """

    def body(j: Array, now: Now) -> Now:
        chains = advance(j, now[0])
        # A batch starts anew with its first draw, and at every step of the warm-up.
        i = j - num_warmup
        fresh = (i <= 0) | (i % size == 0)
        return chains, now[1].add(chains.x, chains.loss, fresh, decay)

    def one_batch(now: Now, b: Array) -> tuple[Now, BatchSums]:
        # The first one has the warm-up before it, so that the loop is compiled once.
        first = jnp.where(b == 0, 0, num_warmup + b * size)
        end = num_warmup + jnp.minimum((b + 1) * size, num_samples)
        now = lax.fori_loop(first, end, body, now)
        return now, now[1]

    # Summed up in the loop's own variables: to read and write a row of a buffer takes longer.
    now = (chains, strip_weak_types(BatchSums.zero(chains.x, chains.loss)))
    (last, _), sums = lax.scan(one_batch, now, jnp.arange(count))
    swapped = (jnp.swapaxes(a, 0, 1) for a in (sums.mean, sums.spread, sums.loss))
    return last, BatchSums(sums.weight, *swapped)


def decaying_weights(num_samples: int, size: int, decay: Array | float) -> Array:
    """Log weights decay^age of draws, of their batches of `size`, `(batch,)`."""
    age = jnp.arange(num_samples - 1, -1, -1)
    log_weight = age * jnp.log(jnp.asarray(decay, float))
    log_weight = jnp.pad(log_weight, (0, -num_samples % size), constant_values=-jnp.inf)
    return jax.nn.logsumexp(log_weight.reshape(-1, size), 1)


def gradients(target: RegularizedLoss, keys: Key, j: Array | int, x: Array) -> tuple[Array, Array]:
    """Losses and gradients of the chains, each on a batch of its own.

    Args:
        target: the target.
        keys: of the chains; more than there are rows of `x` are passed over.
        j: which of their batches.
        x: `(chain, dim)`.

    Returns:
        `(chain,)` and `(chain, dim)`.
    """

    def single(rng_key: Key, x: Array) -> tuple[Array, Array]:
        batch = target.on_batch(random.fold_in(rng_key, j))
        return jax.value_and_grad(batch.value)(x)

    if len(x) == 1:
        # Without a batch axis, which makes other and often slower products of matrices.
        return jax.tree.map(lambda a: a[None], single(keys[0], x[0]))
    return divided(single)(keys, x)


def pull(reference: AnyGaussian, temperature: Array | float) -> Callable[[Array], Array]:
    """The gradient T Σ⁻¹ (x - mean) of the regularizer, as a function of `(chain, dim)`."""
    if isinstance(reference, Gaussian) and reference.structure != "dense":
        # One product instead of two divisions.
        precision = temperature * reference.precision_diagonal
        return lambda x: precision * (x - reference.mean)
    return lambda x: temperature * reference.unscale_transpose(reference.whiten(x))


def draw_noise(kind: str, rng_key: Key, shape: tuple[int, ...], dtype: Any) -> Array:
    """Numbers of mean zero and variance one.

    Args:
        kind: `"normal"`, or `"two_point"` for -1 and 1, of which one random word makes 32.
        rng_key: a random key.
        shape: of the numbers.
        dtype: of the numbers.

    Returns:
        The numbers.
    """
    if kind == "normal":
        return random.normal(rng_key, shape, dtype)
    count = math.prod(shape)
    words = random.bits(rng_key, (-(-count // 32),), jnp.uint32)
    bits = (words >> jnp.arange(32, dtype=jnp.uint32)[:, None]) & jnp.uint32(1)
    return (2.0 * bits.reshape(-1)[:count].astype(dtype) - 1.0).reshape(shape)


def diagnose(x: Array, log_weight: Array, spread: Array | None) -> tuple[Array, Array]:
    """How fast chains mix and whether they diverge, from means of a few dozen batches of their draws.

    Args:
        x: draws or means of successive ones, `(chain, draw, dim)`.
        log_weight: of them, `(chain, draw)`.
        spread: variances within what the means are of, like `x`, or None.

    Returns:
        The effective sample size of the weighted mean over all coordinates together, total variance over total
        squared error; zero where a draw is not finite. And how much longer the moves of the means are in the
        second half than in the first, as a ratio of root mean squares; one for fewer than four moves, infinite
        where a draw is not finite.
    """
    size = batch_size_of(x.shape[1])
    whole = x.shape[1] // size
    if size > 1:
        x, log_weight, spread = in_batches(x, log_weight, size)
    weight = normalize_log_weight(log_weight).reshape(-1)
    offset = (x - x[0, 0]).reshape(weight.size, -1)
    square = offset**2 if spread is None else offset**2 + spread.reshape(offset.shape)
    # Sums over draws are products: XLA compiles a reduction over leading axes without vector instructions.
    mean = weight @ offset
    variance = weight @ jnp.sum(square, -1) - jnp.sum(mean**2)
    error = weight**2 @ jnp.sum((offset - mean) ** 2, -1)
    error = error / jnp.maximum(1.0 - jnp.sum(weight**2), 1e-3)
    ess = variance / jnp.where(error > 0, error, 1.0)
    # Without a last batch that is shorter.
    return jnp.where(jnp.isfinite(ess), ess, 0.0), _growth(x[:, :whole])


def _growth(x: Array) -> Array:
    square = jnp.mean(jnp.diff(x, axis=1) ** 2, (0, 2))
    if square.size < 4:
        return jnp.where(jnp.isfinite(x).all(), 1.0, jnp.inf).astype(x.dtype)
    first, second = jnp.mean(square[: square.size // 2]), jnp.mean(square[square.size // 2 :])
    ratio = jnp.sqrt(second / jnp.where(first > 0, first, 1.0))
    return jnp.where(jnp.isfinite(ratio), jnp.where(first > 0, ratio, 1.0), jnp.inf)
