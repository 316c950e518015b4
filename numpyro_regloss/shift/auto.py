# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Adaptive importance sampling where q is nearly Gaussian, and a sampler elsewhere.

A step of adaptive importance sampling is one batch of gradients, but q must be nearly Gaussian; its own
diagnostics say where it is not. Every refused step adds one to a count, and every accepted step subtracts a tenth.
When the count reaches `patience`, the sampler takes over. It is another program, which is compiled only then: the
run asks for the successor of its shift.
"""

from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np

from numpyro_regloss._core.checks import check_choice, check_count
from numpyro_regloss._core.pytree import (
    fields_of,
    pytree_dataclass,
    replace_fields,
    static_field,
    strip_weak_types,
)
from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.draws.base import StoredDraws
from numpyro_regloss.losses.regularized import RegularizedLoss
from numpyro_regloss.shift.adaptive_importance import (
    AdaptiveImportance,
    AdaptiveImportanceInfo,
    AdaptiveImportanceState,
)
from numpyro_regloss.shift.base import Shift
from numpyro_regloss.shift.hmc import HMC, NUTS, HMCInfo, HMCState

__all__ = ["Auto", "AutoInfo", "AutoState"]

# What a step that is taken forgives.
FORGIVEN = 0.1


class AutoState(NamedTuple):
    """What the next step starts from.

    Attributes:
        importance: state of importance sampling.
        sampler: state of the sampler, at the centre until it draws.
        refused: the count of refused steps, reduced by later accepted steps.
    """

    importance: AdaptiveImportanceState
    sampler: HMCState
    refused: Array


class AutoInfo(NamedTuple):
    """Diagnostics of one shift; what the engine that drew does not report is NaN or zero.

    Attributes:
        ok: the engine's.
        num_loss: loss evaluations without a gradient.
        num_grad: evaluations of the loss and its gradient.
        sampled: whether the sampler drew.
        ess: effective sample size: of the weights, or the sampler's least over the coordinates.
        khat: Pareto shape of the weights.
        num_rounds: rounds of importance sampling.
        num_rejected: draws of its last round whose loss or gradient was not a number.
        proposal_shift: largest change of the proposal's mean in the last round, in its standard deviations.
        local_entropy: F_tau at the reference's mean, in the units of the loss.
        local_entropy_error: its standard error.
        accept_prob: of the sampler, mean acceptance probability.
        step_size: of the sampler, in whitened units.
        num_divergent: of the sampler, divergent transitions; a float, for the NaN.
        num_steps: of the sampler, mean number of leapfrog steps per transition.
        rhat: of the sampler, greatest split R-hat over the coordinates.
    """

    ok: Array
    num_loss: Array
    num_grad: Array
    sampled: Array
    ess: Array
    khat: Array
    num_rounds: Array
    num_rejected: Array
    proposal_shift: Array
    local_entropy: Array
    local_entropy_error: Array
    accept_prob: Array
    step_size: Array
    num_divergent: Array
    num_steps: Array
    rhat: Array


@pytree_dataclass
class Auto(Shift):
    """`AdaptiveImportance`, and after refused steps a sampler, by default `NUTS`; for losses with a gradient.

    Within `run`, and wherever a state has values, the sampler takes over automatically. Inside of `jax.jit` and
    `jax.vmap` no other program can be compiled. There importance sampling goes on, and its refused steps are
    rejected.

    Args:
        importance: an `AdaptiveImportance`; None for `AdaptiveImportance.for_dimension` of the loss.
        sampler: the `NUTS` or `HMC` that takes over.
        patience: refused steps in a row before the sampler takes over; each accepted step in between reduces the
            count by 0.1.
        begin: `"importance"`, or `"sampler"` to use the sampler from the start.

    Raises:
        TypeError: if an engine is of another kind.
        ValueError: if a setting is out of range.

    Example:
        >>> import jax
        >>> from jax import random
        >>> from numpyro_regloss import Loss, TwoStep, fit
        >>> loss = Loss.from_function(lambda x: 0.5 * jnp.sum(x**2), jnp.full(2, 4.0))
        >>> optimizer = TwoStep(loss, 1.0, shift=Auto(), fit=fit.ForwardKL())
        >>> result = optimizer.run(random.key(0), 10, progress_bar=False)
        >>> bool(jax.numpy.all(abs(result.params) < 0.1)), bool(result.history.shift.sampled.any())
        (True, False)
    """

    importance: Any = None
    sampler: Any = NUTS()  # noqa: RUF009
    patience: int = static_field(default=5)
    begin: str = static_field(default="importance")

    uses_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.importance is not None and not isinstance(self.importance, AdaptiveImportance):
            raise TypeError(
                "Auto: expected importance as a shift.AdaptiveImportance or None, got "
                f"{self.importance!r}."
            )
        if not isinstance(self.sampler, NUTS | HMC):
            raise TypeError(
                f"Auto: expected sampler as a shift.NUTS or shift.HMC, got {self.sampler!r}; another engine "
                "can be the shift itself."
            )
        check_count(self.patience, "Auto: patience")
        check_choice(self.begin, "Auto: begin", ("importance", "sampler"))

    def init(self, rng_key: Key, target: RegularizedLoss) -> AutoState:
        """Both engines' states.

        Args:
            rng_key: a random key.
            target: the first target.

        Returns:
            The state.

        Raises:
            TypeError: if the loss returns integers or is external.
        """
        refused = jnp.full_like(target.reference.mean[0], self.patience if self._samples else 0.0)
        importance = self._importance(target).init(rng_key, target)
        return strip_weak_types(AutoState(importance, self.sampler.init(rng_key, target), refused))

    def step(
        self, rng_key: Key, state: AutoState, target: RegularizedLoss
    ) -> tuple[AutoState, StoredDraws, AutoInfo]:
        """Draws from q with the engine whose turn it is.

        Args:
            rng_key: a random key.
            state: from `init` or the last step.
            target: the target.

        Returns:
            The next state, that engine's draws, diagnostics.
        """
        if self._samples:
            sampler, draws, info = self.sampler.step(rng_key, state.sampler, target)
            return state._replace(sampler=sampler), draws, _info(info, state)
        engine = self._importance(target)
        importance, draws, info = engine.step(rng_key, state.importance, target)
        refused = jnp.maximum(state.refused + jnp.where(info.ok, -FORGIVEN, 1.0), 0.0)
        # The sampler, if it must, begins where the centre is then.
        x = jnp.broadcast_to(target.reference.mean, state.sampler.x.shape)
        sampler = state.sampler._replace(x=x)
        return strip_weak_types(AutoState(importance, sampler, refused)), draws, _info(info, state)

    def gives_up(self, state: AutoState) -> Any:
        """Whether it is the sampler's turn."""
        return False if self._samples else state.refused >= self.patience

    def successor(self, state: AutoState) -> "Auto":
        """This engine, with the sampler where it is its turn."""
        return replace_fields(self, begin="sampler") if self.gives_up(state) else self

    def after_rejection(self, old: AutoState, new: AutoState) -> AutoState:
        """Each engine's own."""
        importance = AdaptiveImportance().after_rejection(old.importance, new.importance)
        sampler = old.sampler
        if self._samples:
            sampler = self.sampler.after_rejection(old.sampler, new.sampler)
        return AutoState(importance, sampler, new.refused)

    def remedy(self, info: AutoInfo, ok: Any) -> str:
        """Where the sampler took over, and the remedies of both engines.

        Args:
            info: of all steps, as NumPy arrays with a leading axis.
            ok: which steps were taken.

        Returns:
            A sentence, or nothing.
        """
        ok, sampled = np.asarray(ok), np.asarray(info.sampled)
        engine = AdaptiveImportance() if self.importance is None else self.importance
        parts = [engine.remedy(_part(AdaptiveImportanceInfo, info), ok | sampled)]
        if sampled.any():
            name = type(self.sampler).__name__
            if not sampled.all():
                parts.append(
                    f"Auto: {name} made the draws from step {int(np.argmax(sampled))} of this run on; with "
                    f"shift.{name} as the shift there are no refused steps before."
                )
            parts.append(self.sampler.remedy(_part(HMCInfo, info), ok | ~sampled))
        return " ".join(filter(None, parts))

    @property
    def _samples(self) -> bool:
        return self.begin == "sampler"

    def _importance(self, target: RegularizedLoss) -> AdaptiveImportance:
        engine = self.importance
        return AdaptiveImportance.for_dimension(target.dim) if engine is None else engine


def _info(info: AdaptiveImportanceInfo | HMCInfo, state: AutoState) -> AutoInfo:
    nan, none = jnp.full_like(state.refused, jnp.nan), jnp.zeros_like(info.num_grad)
    counts = ("num_rounds", "num_rejected")
    found = {name: none if name in counts else nan for name in AutoInfo._fields} | fields_of(info)
    found["num_divergent"] = jnp.asarray(found["num_divergent"], nan.dtype)
    return AutoInfo(**found | {"sampled": jnp.asarray(isinstance(info, HMCInfo))})


def _part(kind: Any, info: AutoInfo) -> Any:
    known = info._asdict()
    return kind(**{name: known[name] for name in kind._fields})
