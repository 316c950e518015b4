# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""As many draws as the step needs: another engine, again and again, until progress is certain.

Far from the minimum a few draws show where F_tau falls; near the minimum many are needed. After 1, 2, 4, ...
rounds, and not before half of the rounds of the last step, the engine estimates by how much the draws so far lower
F_tau. The estimate is cross-fitted: one half of the draws judges the other. Drawing ends when the lower confidence
bound of the decrease is positive, or after `max_rounds`. If steps end without a significant decrease after all
rounds, the run has arrived, as far as that many draws can tell.

Reference: Caffo, Jank & Jones (2005), "Ascent-Based Monte Carlo Expectation-Maximization".
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax, random
from jax.scipy.special import ndtri

from numpyro_regloss._core.checks import check_count, check_positive
from numpyro_regloss._core.mesh import is_divided
from numpyro_regloss._core.pytree import (
    is_concrete,
    pytree_dataclass,
    replace_fields,
    static_field,
    strip_weak_types,
)
from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.draws.base import Chunk, Draws, merge
from numpyro_regloss.draws.descent import cross_fitted
from numpyro_regloss.draws.moments import log_density_of, of_draws
from numpyro_regloss.losses.regularized import RegularizedLoss
from numpyro_regloss.shift.base import Shift

__all__ = ["Adaptive", "AdaptiveInfo", "AdaptiveState", "Rounds"]

Carry = TypeVar("Carry")

# A step begins with half the rounds of the last: what it takes grows slowly on the way to a minimum.
FEWER = 2


class AdaptiveState(NamedTuple):
    """What a step passes to the next.

    Attributes:
        engine: the engine's state.
        num_rounds: of the last step.
    """

    engine: Any
    num_rounds: Array


class AdaptiveInfo(NamedTuple):
    """Diagnostics of one shift.

    Attributes:
        ok: every round was ok.
        num_loss: loss evaluations of all rounds.
        num_grad: gradient evaluations of all rounds.
        num_rounds: how often the engine drew.
        significant: whether the decrease of F_tau is significant; False only after `max_rounds` rounds.
        decrease: of F_tau by the mean of the draws, cross-fitted, in the units of the loss.
        decrease_error: its standard error.
        engine: the engine's info of the last round.
    """

    ok: Array
    num_loss: Array
    num_grad: Array
    num_rounds: Array
    significant: Array
    decrease: Array
    decrease_error: Array
    engine: Any


@pytree_dataclass
class Rounds:
    """Draws of several rounds of one engine, one after another along each chain.

    Attributes:
        rounds: the engine's draws, every array with a leading axis of rounds.
        log_weight: `(chain, round * draw)`; -inf for rounds that were not drawn.
        temperature: scalar.
        center: `(dim,)`, of the chunks.
    """

    rounds: Any
    log_weight: Array
    temperature: Array
    center: Array

    @property
    def block_size(self) -> int | None:
        """That of one round."""
        return self.rounds.block_size

    @property
    def loss(self) -> Array:
        """`(chain, round * draw)`."""
        return _joined(self.rounds.loss)

    @property
    def x(self) -> Array:
        """`(chain, round * draw, dim)`."""
        return _joined(lax.map(lambda draws: draws.x, self.rounds))

    @property
    def score(self) -> Array | None:
        """`(chain, round * draw, dim)`, or None."""
        score = self.rounds.score
        return None if score is None else _joined(score)

    @property
    def stats(self) -> dict[str, Array] | None:
        """Statistics of the draws, `(chain, round * draw)` each, or None."""
        stats = self.rounds.stats
        return None if stats is None else {name: _joined(a) for name, a in stats.items()}

    @property
    def spread(self) -> Array | None:
        """Variances within what `x` are means of, see `BatchMeans`, or None."""
        return None if self.rounds.spread is None else _joined(self.rounds.spread)

    def fold(self, fn: Callable[[Carry, Chunk], Carry], init: Carry) -> Carry:
        """Reduces over the chunks of every round."""
        num_chains, count = self.log_weight.shape
        num_rounds = self.rounds.log_weight.shape[0]
        weights = self.log_weight.reshape(num_chains, num_rounds, count // num_rounds)

        def add(carry: Carry, item: tuple[Draws, Array]) -> tuple[Carry, None]:
            draws, log_weight = item
            draws = replace_fields(draws, log_weight=log_weight)
            # On a mesh the chunks of a round are added apart.
            begin = init if is_divided() else carry
            found = draws.fold(lambda inner, chunk: fn(inner, self._centered(chunk)), begin)
            return merge(carry, found) if is_divided() else found, None

        return lax.scan(add, init, (self.rounds, jnp.moveaxis(weights, 1, 0)))[0]

    def _centered(self, chunk: Chunk) -> Chunk:
        # Chunks share one center. Pairs lie about the reference's mean, which is ours, already.
        if chunk.sign.size > 1:
            return chunk
        return chunk._replace(
            center=self.center, offset=chunk.offset + (chunk.center - self.center)
        )


@pytree_dataclass
class Adaptive(Shift):
    """Repeats an engine until the decrease of F_tau is significant, or `max_rounds` times.

    For `fit.ForwardKL`. Each round is one step of the engine with its own number of draws, which should be
    small: the draws of all rounds are used together.

    Args:
        engine: a shift that makes draws.
        max_rounds: the cap, rounded up to a power of two.
        confidence: level of the two-sided interval of the decrease. At 0.5 drawing ends when the decrease is
            positive with a probability of three quarters; later steps average out the remaining noise.

    Raises:
        TypeError: if a setting is of the wrong kind.
        ValueError: if a setting is out of range.

    Example:
        >>> from numpyro_regloss.shift import NUTS
        >>> Adaptive(NUTS(num_warmup=200, num_samples=12), max_rounds=16).max_rounds
        16
    """

    engine: Any
    max_rounds: int = static_field(default=16)
    confidence: Any = 0.5

    def __post_init__(self) -> None:
        if not isinstance(self.engine, Shift) or isinstance(self.engine, type):
            raise TypeError(
                f"Adaptive: expected engine as a shift, such as shift.NUTS(200, 12), got {self.engine!r}."
            )
        if not self.engine.makes_draws:
            raise ValueError(
                f"Adaptive: expected an engine that makes draws, got {self.engine!r}; use shift.NUTS or "
                "shift.Importance."
            )
        cap = check_count(self.max_rounds, "Adaptive: max_rounds")
        object.__setattr__(self, "max_rounds", 1 << (cap - 1).bit_length())
        confidence = check_positive(self.confidence, "Adaptive: confidence")
        if is_concrete(confidence) and confidence >= 1:
            raise ValueError(
                f"Adaptive: expected confidence between 0 and 1, such as 0.95, got {confidence}."
            )
        object.__setattr__(self, "confidence", confidence)

    @property
    def hands_scores(self) -> bool:  # ty: ignore
        """Whether the engine's draws may have scores."""
        return self.engine.hands_scores

    @property
    def uses_gradient(self) -> bool:  # ty: ignore
        """Whether the engine differentiates the loss."""
        return self.engine.uses_gradient

    def init(self, rng_key: Key, target: RegularizedLoss) -> AdaptiveState:
        """The engine's state, and one round to begin with."""
        return AdaptiveState(self.engine.init(rng_key, target), jnp.asarray(1))

    def remedy(self, info: AdaptiveInfo, ok: Any) -> str:
        """The remedy of the engine for its last rounds."""
        return self.engine.remedy(info.engine, ok)

    def after_rejection(self, old: AdaptiveState, new: AdaptiveState) -> AdaptiveState:
        """The state of the engine after a rejected step."""
        return old._replace(engine=self.engine.after_rejection(old.engine, new.engine))

    def step(
        self, rng_key: Key, state: AdaptiveState, target: RegularizedLoss
    ) -> tuple[AdaptiveState, Rounds, AdaptiveInfo]:
        """Draws until progress is certain.

        Args:
            rng_key: a random key.
            state: the engine's.
            target: the target.

        Returns:
            The engine's state, the draws of all rounds and the diagnostics.

        Raises:
            ValueError: if the engine's draws do not fill blocks of equal length.
        """
        key_batch, rng_key = random.split(rng_key)
        # One batch for all rounds: draws of different losses cannot be joined.
        target = target.on_batch(key_batch)
        whole = target.without_batches()
        row = jax.eval_shape(self.engine.step, rng_key, state.engine, whole)[1:]
        _check_blocks(row[0])
        buffers = jax.tree.map(lambda a: jnp.zeros((self.max_rounds, *a.shape), a.dtype), row)
        level = ndtri(0.5 + 0.5 * self.confidence)
        zero = jnp.zeros_like(target.reference.mean[0])
        # Each look is a chance of significance by luck, at which a step would be mostly noise.
        # A state may come from a run with another cap.
        least = jnp.minimum(state.num_rounds, self.max_rounds) // FEWER

        def unfinished(carry: tuple) -> Array:
            count, _, infos, _, (value, error) = carry
            ok = (count == 0) | infos.ok[count - 1]
            return (count < self.max_rounds) & ok & ~(value > level * error)

        def draw(carry: tuple) -> tuple:
            count, draws, infos, state, change = carry
            key = random.fold_in(rng_key, count)
            state, *new = self.engine.step(key, state, whole)
            first = count == 0

            def write(buffer: Array, row: Array) -> Array:
                # Rounds to come are copies of the first, without weight: nothing in them is out of place.
                after = lax.dynamic_update_index_in_dim(buffer, row, count, 0)
                return jnp.where(first, row[None], after)

            draws, infos = jax.tree.map(write, (draws, infos), tuple(new))
            count = count + 1

            def judge() -> tuple[Array, Array]:
                rounds = _rounds(draws, count, target)
                found = cross_fitted(target, rounds, lambda some: _center(target, some))
                return found.value, found.error

            due = ((count & (count - 1)) == 0) & (count >= least)
            change = lax.cond(due, judge, lambda: change)
            return strip_weak_types((count, draws, infos, state, change))

        start = strip_weak_types((jnp.asarray(0), *buffers, state.engine, (zero, zero + jnp.inf)))
        count, draws, infos, engine, (value, error) = lax.while_loop(unfinished, draw, start)
        drawn = jnp.arange(self.max_rounds) < count
        info = AdaptiveInfo(
            ok=jnp.all(infos.ok | ~drawn),
            num_loss=jnp.sum(jnp.where(drawn, infos.num_loss, 0)),
            num_grad=jnp.sum(jnp.where(drawn, infos.num_grad, 0)),
            num_rounds=count,
            significant=value > level * error,
            decrease=value,
            decrease_error=error,
            engine=jax.tree.map(lambda a: a[count - 1], infos),
        )
        return AdaptiveState(engine, count), _rounds(draws, count, target), info

    def center_loss(self, draws: Rounds) -> Any:
        """The loss at the reference's mean, if the engine evaluated it with its draws.

        Args:
            draws: of `step`.

        Returns:
            A scalar, or None.
        """
        found = self.engine.center_loss(draws.rounds)
        return None if found is None else found[0]


def _rounds(draws: Any, count: Array, target: RegularizedLoss) -> Rounds:
    drawn = jnp.arange(draws.log_weight.shape[0]) < count
    log_weight = jnp.where(drawn[:, None, None], draws.log_weight, -jnp.inf)
    temperature = jnp.asarray(target.temperature)
    return Rounds(draws, _joined(log_weight), temperature, target.reference.mean)


def _joined(values: Array) -> Array:
    # (round, chain, draw, ...) -> (chain, round * draw, ...)
    values = jnp.moveaxis(values, 0, 1)
    return values.reshape(values.shape[0], -1, *values.shape[3:])


def _check_blocks(draws: Any) -> None:
    chains, count = draws.log_weight.shape
    if draws.block_size is not None and count % draws.block_size:
        raise ValueError(
            f"Adaptive: expected an engine whose draws fill blocks of {draws.block_size}, got {count} draws; "
            "use an even number of antithetic ones."
        )
    if chains * count < 2:
        raise ValueError(
            "Adaptive: expected at least two draws in a round, got one; its halves are judged by each other."
        )


def _center(target: RegularizedLoss, draws: Draws) -> tuple[Array, Array]:
    moments = of_draws(
        draws, jnp.ones_like(target.reference.mean), log_density_of(target, draws), control="auto"
    )
    return moments.mean, moments.control > 0
