# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""What a run writes down beside its steps: values of both regularized losses, and whether a step was progress.

The verdict on a local-entropy step is the decrease of F_tau that the step's own draws see, cross-fitted: at no
further loss evaluation. That on a heat step is the decrease of F^H_tau, on the same noise before and after.

References: García Trillos, Kaplan & Sanz-Alonso (2019), "Variational Characterizations of Local Entropy and Heat
Regularization in Deep Learning"; Caffo, Jank & Jones (2005), "Ascent-Based Monte Carlo Expectation-Maximization".
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax, random
from jax.scipy.special import ndtri

from numpyro_regloss._core.checks import check_count, check_flag, check_positive
from numpyro_regloss._core.mesh import mapped
from numpyro_regloss._core.pytree import is_concrete, pytree_dataclass, static_field
from numpyro_regloss._core.tail import mean_with_error
from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.draws.base import Draws
from numpyro_regloss.draws.descent import CrossFitted, cross_fitted
from numpyro_regloss.fit.base import FitInfo
from numpyro_regloss.gaussians.gaussian import AnyGaussian
from numpyro_regloss.losses.regularized import RegularizedLoss
from numpyro_regloss.shift.importance import Importance
from numpyro_regloss.values.estimate import Estimate
from numpyro_regloss.values.pairs import entropy_of_pairs, heat_of_pairs

__all__ = ["VERDICTS", "Record", "RecordInfo"]

# Evaluated at once; with data in the loss more of them would not fit in memory.
CHUNK_PAIRS = 32

# The 97.5 % quantile of a chi-squared variable over its mean is 5 in one dimension, and less in more.
MOST_NOISE = 5.0

VERDICTS = {1: "decrease", 0: "not distinguishable", -1: "increase"}


class RecordInfo(NamedTuple):
    """What a `Record` writes down for one step.

    The first three are None where verdicts were not asked for.

    Attributes:
        decrease: decrease of the regularized loss by this step, in the units of the loss. If the fit works from
            draws, it is the decrease of F_tau, cross-fitted and so a little too small; otherwise it is that of
            F^H_tau. With a minibatch it is that of the batch.
        decrease_error: its standard error; infinite where the losses of a heat step have too heavy a tail.
        verdict: 1, the decrease is significant; 0, it is not distinguishable from no change; -1, the increase is
            significant, beyond what the Monte Carlo error of the centre explains. Rejected steps have 0. See
            `VERDICTS`.
        local_entropy: F_tau where the step started, on all data; NaN where it was not asked for.
        heat: F^H_tau there.
        num_loss: loss evaluations that this took.
        num_grad: zero.
    """

    decrease: Array | None
    decrease_error: Array | None
    verdict: Array | None
    local_entropy: Estimate
    heat: Estimate
    num_loss: Array
    num_grad: Array


@pytree_dataclass
class Record:
    """Turns on verdicts, and values at an interval, in the history of a run (`history.record`).

    Args:
        values_every: interval in steps at which both regularized losses are evaluated, from the first step on; 0
            for never.
        num_samples: loss evaluations for the two values together, and for the verdict on a heat step.
        confidence: of the verdicts: the level of the two-sided interval of the decrease.
        centers_every: interval in steps at which `result.centers` has a centre if the history has no vectors
            (`history` of `TwoStep.run`); 0 for never. This takes no evaluations.
        verdicts: whether every step gets a verdict. In heat steps this takes further evaluations.

    Raises:
        TypeError: if a setting is of the wrong kind.
        ValueError: if a setting is out of range.

    Example:
        >>> from numpyro_regloss import Loss, schemes, shift
        >>> loss = Loss.from_function(lambda x: jnp.sum((x - 1.0) ** 2), jnp.zeros(2))
        >>> optimizer = schemes.local_entropy(
        ...     loss, tau=0.5, shift=shift.Importance(1000), record=Record(values_every=5)
        ... )
        >>> record = optimizer.run(random.key(0), 6, progress_bar=False).history.record
        >>> VERDICTS[int(record.verdict[0])]
        'decrease'
        >>> bool(record.local_entropy.value[5] < record.local_entropy.value[0])
        True
    """

    values_every: int = static_field(default=0)
    num_samples: int = static_field(default=1000)
    confidence: Any = 0.95
    centers_every: int = static_field(default=0)
    verdicts: bool = static_field(default=True)

    def __post_init__(self) -> None:
        check_count(self.values_every, "Record: values_every", 0)
        check_count(self.num_samples, "Record: num_samples", 4)
        check_count(self.centers_every, "Record: centers_every", 0)
        check_flag(self.verdicts, "Record: verdicts")
        confidence = check_positive(self.confidence, "Record: confidence")
        if is_concrete(confidence) and confidence >= 1:
            raise ValueError(
                f"Record: expected confidence between 0 and 1, such as 0.95, got {confidence}."
            )
        object.__setattr__(self, "confidence", confidence)

    def init(self, target: RegularizedLoss) -> tuple[()]:
        """No state.

        Args:
            target: the first target.

        Returns:
            `()`.
        """
        del target
        return ()

    def step(
        self,
        rng_key: Key,
        state: tuple[()],
        index: Array,
        target: RegularizedLoss,
        draws: Draws | None,
        propose: Callable[[Draws], tuple[Array, Array]],
        after: AnyGaussian,
        fit_info: Any,
        ok: Array,
    ) -> tuple[tuple[()], RecordInfo]:
        """Writes down one step.

        Args:
            rng_key: a random key.
            state: from `init` or the last step.
            index: of the step.
            target: of the step.
            draws: of the step, on the data of its batch; None where the fit did not use them.
            propose: from draws to the centre that this fit and this anchor would choose, and whether the fit used
                scores.
            after: the next reference.
            fit_info: of the step.
            ok: whether the step was taken.

        Returns:
            The state and the record.
        """
        keys = random.split(rng_key)
        said, num_loss = (None, None, None), 0
        if self.verdicts:
            if draws is None:
                change: Any = self._heat_change(keys[0], target, after)
                num_loss = 4 * self._num_pairs
            else:
                change = cross_fitted(target, draws, propose)
            said = self._verdict(target, change, fit_info, ok)
        unknown = jnp.asarray(jnp.nan, target.reference.mean.dtype)
        nothing = Estimate(unknown, unknown, unknown, unknown)
        pair, due = (nothing, nothing), jnp.asarray(False)
        if self.values_every:
            due = index % self.values_every == 0
            pair = lax.cond(due, lambda: self._values(keys[1], target), lambda: pair)
        info = RecordInfo(
            *said,
            *pair,
            num_loss=num_loss + 2 * self._num_pairs * due,
            num_grad=jnp.asarray(0),
        )
        return state, info

    @property
    def writes(self) -> bool:
        """Whether something of the steps is written down, beside centres."""
        return self.verdicts or self.values_every > 0

    @property
    def _num_pairs(self) -> int:
        return -(-self.num_samples // 2)

    def _verdict(
        self, target: RegularizedLoss, change: CrossFitted, fit_info: Any, ok: Array
    ) -> tuple[Array, Array, Array]:
        margin = ndtri(0.5 + 0.5 * self.confidence) * change.error
        verdict = jnp.where(change.value > margin, 1, 0)
        rise = -change.value - MOST_NOISE * _noise(target, change, fit_info)
        verdict = jnp.where(rise > margin, -1, verdict)
        return (
            jnp.where(ok, change.value, jnp.nan),
            jnp.where(ok, change.error, jnp.nan),
            jnp.where(ok, verdict, 0),
        )

    def _values(self, rng_key: Key, target: RegularizedLoss) -> tuple[Estimate, Estimate]:
        cloud = Importance(2 * self._num_pairs)
        loss = cloud.losses(rng_key, target.without_batches())
        # One type, whatever the method: a step without values has none.
        return Estimate(*entropy_of_pairs(loss, target.temperature)), heat_of_pairs(loss)

    def _heat_change(
        self, rng_key: Key, target: RegularizedLoss, after: AnyGaussian
    ) -> CrossFitted:
        reference = target.reference
        step = after.mean - reference.mean

        def pair_change(key: Key) -> Array:
            offset = reference.scaled(random.normal(key, (reference.dim,), step.dtype))
            points = reference.mean + jnp.stack([offset, -offset])
            return jnp.mean(jax.vmap(target.value)(points) - jax.vmap(target.value)(points + step))

        keys = random.split(rng_key, self._num_pairs)
        change = mapped(pair_change, keys, CHUNK_PAIRS)
        mean, error, _ = mean_with_error(change, jnp.max(jnp.abs(change)))
        return CrossFitted(mean, error, jnp.zeros_like(error))


def _noise(target: RegularizedLoss, change: CrossFitted, fit_info: Any) -> Array:
    # By how much the error of a centre from half of the draws raises F_tau, on average.
    error = FitInfo.of(fit_info).mean_error
    error = jnp.zeros_like(target.reference.mean) if error is None else error
    known = target.temperature * jnp.sum(error**2 / target.reference.variance)
    return jnp.maximum(change.noise, known)
