# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Importance sampling from a Gaussian that the scores of its own draws adapt: a step in one batch.

A round draws from the proposal and evaluates losses and gradients of all draws at once. It fits the next proposal
to them, with weights tempered to an effective sample size of half the draws. Once the full weights are as even,
the draws are used. The proposal is carried from step to step, and moves with the reference, so that after the
first step one round is mostly enough. It is a little wider than the fitted Gaussian, and a few draws come from the
reference. Since q has no heavier tails than exp(-loss) times the reference, weights are then bounded, and modes
that the proposal does not reach are seen. Scouts find modes that are too narrow for that.

References: Cornuet, Marin, Mira & Robert (2012), "Adaptive Multiple Importance Sampling"; Bugallo, Elvira,
Martino, Luengo, Míguez & Djurić (2017), "Adaptive Importance Sampling: The Past, the Present, and the Future";
Paananen, Piironen, Bürkner & Vehtari (2021), "Implicitly Adaptive Importance Sampling"; South, Riabiz, Teymur &
Oates (2022), "Postprocessing of MCMC"; Owen & Zhou (2000), "Safe and Effective Importance Sampling".
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random

from numpyro_regloss._core.checks import (
    cast_fields,
    check_choice,
    check_count,
    check_differentiable,
    check_flag,
    check_positive,
)
from numpyro_regloss._core.mesh import divided
from numpyro_regloss._core.pareto import MAX_KHAT, pareto_smooth
from numpyro_regloss._core.pytree import (
    all_finite,
    is_concrete,
    pytree_dataclass,
    static_field,
    strip_weak_types,
)
from numpyro_regloss._core.stats import tempered, weight_ess
from numpyro_regloss._core.tail import with_rounding
from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.draws.base import StoredDraws
from numpyro_regloss.gaussians.gaussian import AnyGaussian
from numpyro_regloss.losses.regularized import RegularizedLoss
from numpyro_regloss.shift.adaptive_importance.dense import DenseProposal
from numpyro_regloss.shift.adaptive_importance.diagonal import DiagonalProposal
from numpyro_regloss.shift.adaptive_importance.low_rank import LowRankProposal
from numpyro_regloss.shift.adaptive_importance.mixture import draw
from numpyro_regloss.shift.adaptive_importance.normalizer import mean_weight
from numpyro_regloss.shift.adaptive_importance.proposal import NEAREST, Proposal
from numpyro_regloss.shift.adaptive_importance.scouts import (
    UNKNOWN,
    Scouts,
    led,
    moved,
    send,
    walked,
)
from numpyro_regloss.shift.base import Shift

__all__ = ["AdaptiveImportance", "AdaptiveImportanceInfo", "AdaptiveImportanceState"]

FAMILIES = {"dense": DenseProposal, "diagonal": DiagonalProposal, "low_rank": LowRankProposal}
# "auto" is dense up to so many dimensions, if there are so many draws for each.
MOST_DENSE, DRAWS_PER_DIM = 500, 4
# Directions of low rank, if there are so many draws for each.
MOST_RANK, DRAWS_PER_DIRECTION = 64, 8
NUM_SAMPLES, MOST_SCOUTS = 256, 8
# Below, k-hat has no tail to look at.
LEAST_DRAWS = 32
# Effective share of the draws from which on one round is enough. Below, two in a row must pass, unless the last
# step was taken.
SURE = 0.7
# Of the draws, to which weights are tempered.
TEMPERED = 0.5
# Steps of the mean, one after another, up to what no target needs.
LONGER, FARTHEST = 2.0, 1e6


class AdaptiveImportanceState(NamedTuple):
    """What the next step starts from.

    Attributes:
        proposal: in coordinates where the reference is N(0, I).
        scouts: in the same coordinates; None without defensive draws.
        reach: longest step of the proposal's mean, in lengths of a draw's noise.
        reference: of these coordinates.
        passed: whether the last step was ok.
    """

    proposal: Proposal
    scouts: Scouts | None
    reach: Array
    reference: AnyGaussian
    passed: Array


class AdaptiveImportanceInfo(NamedTuple):
    """Diagnostics of one shift.

    Attributes:
        ok: the weights are even enough, and k-hat is low enough for them to have a mean.
        num_loss: loss evaluations without a gradient.
        num_grad: evaluations of the loss and its gradient.
        ess: effective sample size 1 / Σ w² of the weights, not smoothed.
        khat: Pareto shape of the largest weights; above 0.7 the Gaussian is too far from q.
        num_rounds: how often the proposal drew.
        num_rejected: draws of the last round whose loss or gradient was not a number.
        proposal_shift: largest change of the proposal's mean in the last round, in its standard deviations.
        local_entropy: F_tau at the reference's mean, in the units of the loss; of a minibatch if there is one.
        local_entropy_error: its standard error; infinite where the step is not ok.
    """

    ok: Array
    num_loss: Array
    num_grad: Array
    ess: Array
    khat: Array
    num_rounds: Array
    num_rejected: Array
    proposal_shift: Array
    local_entropy: Array
    local_entropy_error: Array


class _Batch(NamedTuple):
    e: Array
    loss: Array
    potential: Array
    gradient: Array
    log_weight: Array
    control: Array
    num_rejected: Array


class _Round(NamedTuple):
    count: Array
    proposal: Proposal
    scouts: Scouts | None
    reach: Array
    depth: Array
    batch: _Batch
    smoothed: Array
    khat: Array
    ess: Array
    shift: Array
    passed: Array
    ok: Array


@pytree_dataclass
class AdaptiveImportance(Shift):
    """Importance sampling from a Gaussian that follows q, for a q that is nearly Gaussian.

    Most regularized targets are nearly Gaussian. Where q is not (several modes, funnels, heavy skew), weights are
    uneven and the step is rejected: use `NUTS` or `SMC` there. *Scouts* are points that walk downhill from draws
    of the reference. They look for modes that the proposal misses. Before a first step is accepted, they walk for
    eight rounds, or until 24 walks have ended at the only mode. A mode is not found if its valley contains hardly
    any of the reference. Where q is strongly skewed, or a curve that the Gaussian covers in part, a step may be
    taken although some of q was hardly seen. The errors of its mean and of F_tau are then smaller than they should
    be, most of all where few draws are effective.

    Args:
        num_samples: draws of a round, an even number: antithetic pairs.
        covariance: of the proposal: `"dense"`, `"diagonal"`, `"low_rank"` (diagonal plus a direction for every
            eight draws, at most 64), or `"auto"`: dense up to 500 dimensions where there are four draws for each,
            and else of low rank, or diagonal without gradients.
        max_rounds: the largest number of rounds in a step.
        defensive: share of the draws, from 0 to 0.5, of which one half comes from the reference and one half from
            around another mode. With 0 there are no scouts.
        gradient: whether the proposal follows scores. Without them it follows the moments of the draws, and that
            takes more draws.
        ess: effective sample size of the weights, as a share of the draws, below which a step is rejected. Below
            0.7 two rounds in a row must pass, unless the last step was taken.

    Raises:
        TypeError: if a setting is of the wrong kind.
        ValueError: if a setting is out of range.

    Example:
        >>> from numpyro_regloss import Gaussian, Loss
        >>> loss = Loss.from_function(lambda x: 0.5 * jnp.sum(x**2), jnp.full(2, 4.0))
        >>> target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, tau=1.0))
        >>> engine = AdaptiveImportance(num_samples=64)
        >>> state = engine.init(random.key(0), target)
        >>> state, draws, info = engine.step(random.key(1), state, target)
        >>> weight = jax.nn.softmax(draws.log_weight[0])
        >>> bool(jnp.all(jnp.abs(weight @ draws.x[0] - 2.0) < 0.3))  # half way to the minimum
        True
    """

    num_samples: int = static_field(default=NUM_SAMPLES)
    covariance: str = static_field(default="auto")
    max_rounds: int = static_field(default=8)
    defensive: float = static_field(default=0.0625)
    gradient: bool = static_field(default=True)
    ess: Any = 0.5

    def __post_init__(self) -> None:
        check_count(self.num_samples, "AdaptiveImportance: num_samples", LEAST_DRAWS)
        if self.num_samples % 2:
            raise ValueError(
                "AdaptiveImportance: expected an even num_samples, since draws come in pairs, got "
                f"{self.num_samples}."
            )
        check_choice(self.covariance, "AdaptiveImportance: covariance", ("auto", *FAMILIES))
        check_count(self.max_rounds, "AdaptiveImportance: max_rounds")
        cast_fields(self, ("gradient",), check_flag)
        if self.covariance == "low_rank" and not self.gradient:
            raise ValueError(
                "AdaptiveImportance: expected covariance 'dense', 'diagonal' or 'auto' with gradient=False, got "
                "'low_rank', whose directions are found from gradients."
            )
        share = self.defensive
        if isinstance(share, bool) or not isinstance(share, int | float | np.number):
            raise TypeError(
                f"AdaptiveImportance: expected defensive as a number, got {type(share).__name__}."
            )
        if not 0.0 <= share <= 0.5:
            raise ValueError(
                f"AdaptiveImportance: expected defensive from 0 to 0.5, a share of the draws, got {share}."
            )
        object.__setattr__(self, "defensive", float(share))
        object.__setattr__(self, "ess", check_positive(self.ess, "AdaptiveImportance: ess"))
        if is_concrete(self.ess) and not self.ess < 1 - share:
            raise ValueError(
                "AdaptiveImportance: expected ess as a share of the draws, below what the defensive ones leave "
                f"({1 - share:g}), got {self.ess}; 0.5 is common."
            )

    @classmethod
    def for_dimension(cls, dim: int) -> "AdaptiveImportance":
        """The engine with so many draws that its proposal can be dense.

        Args:
            dim: of the parameters.

        Returns:
            One with 256 draws, or four per dimension from 65 up to 500.
        """
        wanted = DRAWS_PER_DIM * dim if dim <= MOST_DENSE else 0
        return cls(max(NUM_SAMPLES, wanted))

    @property
    def uses_gradient(self) -> bool:  # ty: ignore
        """Whether the proposal follows scores."""
        return self.gradient

    @property
    def hands_scores(self) -> bool:  # ty: ignore
        """The same: draws then come with them."""
        return self.gradient

    def init(self, rng_key: Key, target: RegularizedLoss) -> AdaptiveImportanceState:
        """The reference as the first proposal.

        Args:
            rng_key: unused.
            target: the first target.

        Returns:
            The state.

        Raises:
            TypeError: if the loss returns integers or is external and `gradient` is True.
        """
        del rng_key
        if self.gradient:
            check_differentiable(["AdaptiveImportance"], target.loss, "shift.AdaptiveImportance")
        return strip_weak_types(self._fresh(target.reference))

    def step(
        self, rng_key: Key, state: AdaptiveImportanceState, target: RegularizedLoss
    ) -> tuple[AdaptiveImportanceState, StoredDraws, AdaptiveImportanceInfo]:
        """Rounds until the weights are even enough, and the draws of the last round.

        Args:
            rng_key: a random key.
            state: from `init` or the last step.
            target: the target.

        Returns:
            The next state, draws of shape `(1, num_samples, dim)` with scores and weights, diagnostics.
        """
        key_batch, rng_key = random.split(rng_key)
        # One batch for all draws: weights of different losses cannot be compared.
        target = target.on_batch(key_batch)
        fresh = self._fresh(target.reference)
        proposal = state.proposal.moved(state.reference, target.reference)
        scouts = state.scouts
        if scouts is not None:
            scouts = moved(scouts, state.reference, target.reference)
        usable = all_finite(proposal)
        proposal = jax.tree.map(lambda a, b: jnp.where(usable, a, b), proposal, fresh.proposal)

        def unfinished(now: _Round) -> Array:
            young = False if now.scouts is None else now.scouts.young
            return (now.count < self.max_rounds) & (~now.ok | young)

        def one_more(now: _Round) -> _Round:
            key = random.fold_in(rng_key, now.count)
            batch = self._evaluate(key, now.proposal, now.scouts, target)
            ess = weight_ess(batch.log_weight)
            depth = batch.potential[-1]
            # Steps that lower -log q may be longer, and the first one is no longer than its draws.
            longer = jnp.where(depth < now.depth, LONGER * now.reach, now.reach / LONGER)
            reach = jnp.where(now.count == 0, now.reach, jnp.clip(longer, NEAREST, FARTHEST))
            after = self._adapted(now.proposal, batch, reach)
            scouts, after = self._walked(now.scouts, now.proposal, after, batch)
            sd = jnp.sqrt(after.variance)
            shift = jnp.max(jnp.abs(after.mean - now.proposal.mean) / sd)
            smoothed, khat = pareto_smooth(batch.log_weight)
            # A tail with an end has no large weight that was not drawn, and to smooth it is a bias.
            smoothed = jnp.where(khat > 0, smoothed, batch.log_weight)
            passed = (ess >= self.ess * self.num_samples) & (khat <= MAX_KHAT)
            if scouts is not None:
                passed &= ~scouts.rivals(depth)
            # Where weights are not very even, one of several rounds may look well by chance.
            sure = state.passed | (ess >= SURE * self.num_samples)
            ok = passed & (now.passed | sure)
            return strip_weak_types(
                _Round(
                    now.count + 1,
                    after,
                    scouts,
                    reach,
                    depth,
                    batch,
                    smoothed,
                    khat,
                    ess,
                    shift,
                    passed,
                    ok,
                )
            )

        zero, no = jnp.zeros_like(target.reference.mean[0]), jnp.asarray(False)
        blank = self._blank(proposal, scouts)
        first = _Round(
            jnp.asarray(0),
            proposal,
            scouts,
            state.reach,
            zero,
            blank,
            blank.log_weight,
            zero,
            zero,
            zero,
            no,
            no,
        )
        last = lax.while_loop(unfinished, one_more, strip_weak_types(first))
        draws, info = self._result(last, target)
        reach = jnp.where(last.ok, NEAREST, last.reach)
        after = AdaptiveImportanceState(
            last.proposal, last.scouts, reach, target.reference, last.ok
        )
        return strip_weak_types(after), draws, info

    def after_rejection(
        self, old: AdaptiveImportanceState, new: AdaptiveImportanceState
    ) -> AdaptiveImportanceState:
        """Goes on with the new proposal, if it is valid: a far target may take more rounds than a step has."""
        usable = all_finite((new.proposal, new.reference))
        return jax.tree.map(lambda a, b: jnp.where(usable, a, b), new, old)

    def remedy(self, info: AdaptiveImportanceInfo, ok: Any) -> str:
        """What to use where q is not nearly Gaussian.

        Args:
            info: of all steps, as NumPy arrays with a leading axis.
            ok: which steps were taken.

        Returns:
            A sentence, or nothing.
        """
        bad = ~np.asarray(ok) & ~np.asarray(info.ok)
        if not bad.any():
            return ""
        # Of what was evaluated: `Auto` asks without knowing how many draws there were.
        evaluated = (np.asarray(info.num_loss) + np.asarray(info.num_grad))[bad]
        share = np.asarray(info.ess)[bad] * np.asarray(info.num_rounds)[bad] / evaluated
        others = "shift.NUTS or shift.SMC" if self.gradient else "shift.SMC"
        return (
            f"AdaptiveImportance: in {bad.sum()} rejected steps no Gaussian was near enough to q: effective draws "
            f"down to {np.min(share):.0%} of all, where "
            f"{float(np.max(self.ess)):.0%} are asked for, k-hat up to {np.max(np.asarray(info.khat)[bad]):.2g}, "
            f"where {MAX_KHAT} is allowed. Use {others}, which need no such Gaussian; or a smaller tau, under "
            "which q is nearer to one."
        )

    @property
    def _num_pairs(self) -> tuple[int, ...]:
        # Of the proposal, the reference and the witness. Of a single one the variance would not be known.
        if not self.defensive:
            return (self.num_samples // 2,)
        each = max(2, round(self.defensive * self.num_samples / 4))
        return (self.num_samples // 2 - 2 * each, each, each)

    def _fresh(self, reference: AnyGaussian) -> AdaptiveImportanceState:
        zero, scouts = jnp.zeros_like(reference.mean), None
        if self.defensive:
            num_scouts = min(MOST_SCOUTS, 2 * self._num_pairs[1])
            scouts = send(num_scouts, zero)
        reach = jnp.full_like(zero[0], NEAREST)
        rank = min(MOST_RANK, self.num_samples // DRAWS_PER_DIRECTION, zero.size)
        proposal = FAMILIES[self._family(zero.size)].start(zero, rank)
        return AdaptiveImportanceState(proposal, scouts, reach, reference, jnp.asarray(False))

    def _family(self, dim: int) -> str:
        if self.covariance != "auto":
            return self.covariance
        if dim <= MOST_DENSE and DRAWS_PER_DIM * dim <= self.num_samples:
            return "dense"
        return "low_rank" if self.gradient else "diagonal"

    def _evaluate(
        self, rng_key: Key, proposal: Proposal, scouts: Scouts | None, target: RegularizedLoss
    ) -> _Batch:
        about, more = (), [proposal.mean[None]]
        if scouts is not None:
            about = (jnp.where(scouts.known, scouts.witness, proposal.mean), scouts.width)
            more = [scouts.next_place, *more]
        drawn = draw(rng_key, proposal, self._num_pairs, *about)
        e = jnp.concatenate([drawn.e, *more])
        x = target.reference.unwhiten(e)
        if self.gradient:
            loss, slope = divided(jax.value_and_grad(target.value))(x)
            gradient = e + target.reference.scaled_transpose(slope) / target.temperature
            failed = ~jnp.all(jnp.isfinite(gradient), -1) & (loss < jnp.inf)
        else:
            loss, gradient = divided(target.value)(x), jnp.zeros_like(e)
            failed = jnp.zeros(loss.shape, bool)
        loss = loss.astype(x.dtype)
        # +infinity is a wall, a legitimate weight of zero; NaN and -infinity are failures of the loss.
        failed |= jnp.isnan(loss) | (loss == -jnp.inf)
        potential = 0.5 * jnp.sum(e**2, -1) + loss / target.temperature
        potential = jnp.where(failed, jnp.inf, potential)
        gradient = jnp.where((potential < jnp.inf)[:, None], gradient, 0.0)
        n = self.num_samples
        log_weight = -potential[:n] - drawn.log_density
        return _Batch(
            e, loss[:n], potential, gradient, log_weight, drawn.control, jnp.sum(failed[:n])
        )

    def _blank(self, proposal: Proposal, scouts: Scouts | None) -> _Batch:
        # By hand: to ask `_evaluate` would trace the loss once more.
        n, dim = self.num_samples, proposal.mean.size
        every = n + 1 + (0 if scouts is None else len(scouts.place))

        def zeros(*shape: int) -> Array:
            return jnp.zeros(shape, proposal.mean.dtype)

        return _Batch(
            e=zeros(every, dim),
            loss=zeros(n),
            potential=zeros(every),
            gradient=zeros(every, dim),
            log_weight=zeros(n),
            control=zeros(n),
            num_rejected=jnp.asarray(0),
        )

    def _walked(
        self, scouts: Scouts | None, before: Proposal, after: Proposal, batch: _Batch
    ) -> tuple[Scouts | None, Proposal]:
        if scouts is None:
            return None, after
        own, wide, _ = (2 * count for count in self._num_pairs)
        places = (slice(own, own + len(scouts.place)), slice(self.num_samples, -1))
        fresh, looked = (
            (batch.e[part], batch.potential[part], batch.gradient[part]) for part in places
        )
        about = slice(own + wide, self.num_samples)
        share = jnp.sum(jax.nn.softmax(batch.log_weight)[about])
        rise = batch.potential[about] - scouts.depth
        rise /= scouts.expected_rise(before.widened(), batch.e[about])
        at_mean = batch.potential[-1]
        after, level, left = led(scouts, before, after, share, at_mean)
        e, potential, gradient = looked
        looked = (
            jnp.where(left[:, None], batch.e[-1], e),
            jnp.where(left, at_mean, potential),
            jnp.where(left[:, None], batch.gradient[-1], gradient),
        )
        scouts = scouts._replace(potential=jnp.where(left, UNKNOWN, scouts.potential))
        return walked(scouts, after, at_mean, level, looked, fresh, rise), after

    def _adapted(self, proposal: Proposal, batch: _Batch, reach: Array) -> Proposal:
        # Of its own draws: others are far where the proposal is narrow, and would decide alone.
        own = slice(None, 2 * self._num_pairs[0])
        e, gradient, log_weight = batch.e[own], batch.gradient[own], batch.log_weight[own]
        weight = tempered(log_weight, TEMPERED * len(e))
        after = (
            proposal.from_scores(e, gradient, weight, reach)
            if self.gradient
            else proposal.from_moments(e, weight)
        )
        usable = all_finite(after)
        return jax.tree.map(lambda a, b: jnp.where(usable, a, b), after, proposal)

    def _result(
        self, last: _Round, target: RegularizedLoss
    ) -> tuple[StoredDraws, AdaptiveImportanceInfo]:
        batch = last.batch
        log_weight = last.smoothed
        score = None
        if self.gradient:
            score = -target.reference.unscale_transpose(batch.gradient[: self.num_samples])[None]
        draws = StoredDraws(
            target.reference.unwhiten(batch.e[: self.num_samples])[None],
            log_weight[None],
            batch.loss[None],
            target.temperature,
            score,
            block_size=2,
        )
        peak = jnp.max(log_weight)
        peak = jnp.where(jnp.isfinite(peak), peak, 0.0)
        # The density of N(0, I) is in the weights: their mean is E exp(-loss / T) over the reference.
        weight = jnp.exp(log_weight - peak)
        mean, error = mean_weight(weight, batch.control)
        value = -target.temperature * (jnp.log(mean) + peak)
        # The heaviest draw's weight is a difference of these, and the logarithm of one has a rounding too.
        heaviest = jnp.argmax(log_weight)
        loss = batch.loss[heaviest]
        rest = target.temperature * (1.0 + batch.potential[heaviest]) - loss
        size = jnp.abs(value) + jnp.abs(loss) + rest
        error = with_rounding(target.temperature * error / mean, size)
        evaluations = last.count * len(batch.e)
        none = jnp.zeros_like(evaluations)
        info = AdaptiveImportanceInfo(
            ok=last.ok,
            num_loss=none if self.gradient else evaluations,
            num_grad=evaluations if self.gradient else none,
            ess=last.ess,
            khat=last.khat,
            num_rounds=last.count,
            num_rejected=batch.num_rejected,
            proposal_shift=last.shift,
            local_entropy=value,
            local_entropy_error=jnp.where(last.ok, error, jnp.inf),
        )
        return draws, info
