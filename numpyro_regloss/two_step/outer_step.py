# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""One outer step, a map from Gaussian to Gaussian, compiled once with the optimizer as an argument.

These are the pure halves of `TwoStep`: module-level functions, so that two optimizers of one structure are
one program, whatever their numbers.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random

from numpyro_regloss._core.checks import usable_range
from numpyro_regloss._core.mesh import on_mesh
from numpyro_regloss._core.pytree import (
    Partition,
    all_finite,
    is_concrete,
    replace_fields,
    strip_weak_types,
)
from numpyro_regloss._core.settings import own_settings
from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.draws.base import Draws
from numpyro_regloss.fit.base import FitInfo
from numpyro_regloss.gaussians.gaussian import AnyGaussian, Gaussian
from numpyro_regloss.losses.probe import Probe, probe
from numpyro_regloss.losses.regularized import RegularizedLoss
from numpyro_regloss.two_step.chunks import history_capacity
from numpyro_regloss.two_step.motion import MotionInfo, scalars_of

__all__ = [
    "LossOfDraws",
    "TwoStepInfo",
    "TwoStepState",
    "advance",
    "ask",
    "draw",
    "draw_key",
    "first_state",
    "follows_gradient",
    "init_state",
    "next_draws",
    "revisit",
    "row_of_history",
    "scan",
    "step",
    "successor",
    "tell",
]


class TwoStepState(NamedTuple):
    """The state that determines the rest of a run; a plain pytree.

    Attributes:
        step: number of steps done.
        rng_key: the run's key; step t uses `fold_in(rng_key, t)`.
        reference: the Gaussian of the next step.
        shift: the shift's state.
        fit: the fit's state.
        anchor: the anchor's state.
        record: the record's state; `Record` needs none.
    """

    step: Array
    rng_key: Key
    reference: AnyGaussian
    shift: Any
    fit: Any
    anchor: Any
    record: Any = ()


class LossOfDraws(NamedTuple):
    """The loss over the draws of one step, those of weight zero and of no finite loss left out.

    Attributes:
        mean: average over q, in the units of the loss; of minibatches if there are any, as the others.
        sd: standard deviation over q.
        lowest: the lowest one.
        share_lower: part of q where the loss is below that at the centre; NaN of minibatches and noise, which
            differ between the two.
        temperature: the target's; an engine may have used another.
    """

    mean: Array
    sd: Array
    lowest: Array
    share_lower: Array
    temperature: Array


class TwoStepInfo(NamedTuple):
    """What one step did; stacked over steps, the history.

    Attributes:
        ok: whether the step was taken; a rejected one keeps the reference.
        loss: the loss at the reference's mean, in the user's units; on one minibatch if there is one. With
            minibatches, `RobbinsMonro` and `SGLD` report the loss that came with their first gradient: at a draw
            of the reference, and where the chains start.
        reference: the Gaussian that the step started from; `LeftOut` of a history without vectors.
        fitted: the Gaussian that was fitted to the shifted density; likewise.
        tau: variance of the regularizer, scalar or `(dim,)`, in squared units of the parameters; its mean over the
            parameters in a history without vectors.
        shift: the shift's info.
        fit: the fit's info.
        anchor: the anchor's info.
        num_loss: loss evaluations of the step.
        num_grad: gradient evaluations of the step.
        record: what the optimizer's `record` wrote down, or None.
        draws: the loss over the draws, or None where the shift makes none.
        motion: how far the centre moved, in a history without vectors; else None.
    """

    ok: Array
    loss: Array
    reference: AnyGaussian
    fitted: AnyGaussian
    tau: Array
    shift: Any
    fit: Any
    anchor: Any
    num_loss: Array
    num_grad: Array
    record: Any = None
    draws: LossOfDraws | None = None
    motion: MotionInfo | None = None


def _target(optimizer: Any, reference: AnyGaussian, arguments: Partition) -> RegularizedLoss:
    return RegularizedLoss.unchecked(optimizer.loss, reference, arguments, optimizer.temperature)


def _rescaled(optimizer: Any, reference: Any, tau: Array) -> Gaussian:
    # Tau is the optimizer's, at every step: a state may have come from a run with another one.
    if optimizer.anchor.owns_scale:
        return reference
    new = Gaussian.isotropic(reference.mean, tau)
    return new._replace(scale=jnp.where(_usable(tau), new.scale, reference.scale))


def _tau_in_force(optimizer: Any, reference: Gaussian, tau: Array) -> Array:
    # Of a dense reference the marginal variances.
    if not optimizer.anchor.owns_scale:
        return tau
    return reference.scale**2 if reference.scale.ndim == 0 else reference.variance


def _usable(tau: Array) -> Array:
    # Of a schedule that may fall to zero or turn NaN under way.
    least, most = usable_range(tau.dtype)
    return jnp.all((tau >= least) & (tau <= most))


@jax.jit
@own_settings
def first_state(optimizer: Any, rng_key: Key, arguments: Partition) -> TwoStepState:
    """The first state."""
    key_run, key_shift, key_fit = random.split(rng_key, 3)
    x0 = optimizer.loss.x0
    reference = Gaussian.isotropic(x0, optimizer.tau_at(jnp.asarray(0)))
    reference = optimizer.anchor.first_reference(reference)
    target = _target(optimizer, reference, arguments)
    state = TwoStepState(
        step=jnp.asarray(0, jnp.int32),
        rng_key=key_run,
        reference=reference,
        shift=optimizer.shift.init(key_shift, target),
        fit=optimizer.fit.init(key_fit, target),
        anchor=optimizer.anchor.init(target),
        record=() if optimizer.record is None else optimizer.record.init(target),
    )
    # Weak types in a fresh state would compile the second step anew.
    return strip_weak_types(state)


@jax.jit
@own_settings
def init_state(
    optimizer: Any, rng_key: Key, arguments: Partition
) -> tuple[TwoStepState, Array, Array, Probe | None]:
    """The first state, the loss at the start, whether its gradient is finite, and a probe if one is used."""
    state = first_state(optimizer, rng_key, arguments)
    x0, target = optimizer.loss.x0, _target(optimizer, state.reference, arguments)
    gradient_ok, found = jnp.asarray(True), None
    if not follows_gradient(optimizer):
        value = target.value(x0)
    elif optimizer.loss.minibatch is None:
        found = probe(rng_key, target)
        value, gradient_ok = found.values[0], found.gradient_finite[0]
    else:
        # The start is checked on all rows; passes over them are too dear for the rest.
        value, gradient = jax.value_and_grad(target.value)(x0)
        gradient_ok = jnp.isfinite(gradient).all()
        found = probe(rng_key, target.on_batch(rng_key))
    return state, value, gradient_ok, found


def follows_gradient(optimizer: Any) -> bool:
    """Whether an engine differentiates the loss."""
    return optimizer.shift.uses_gradient or optimizer.fit.uses_gradient


@jax.jit
@own_settings
def step(
    optimizer: Any, state: TwoStepState, arguments: Partition
) -> tuple[TwoStepState, TwoStepInfo]:
    """Reference → draws → fitted Gaussian → next reference; a rejected step keeps what was before."""
    return _step(optimizer, state, arguments)[:2]


@jax.jit
@own_settings
def _step_and_draws(
    optimizer: Any, state: TwoStepState, arguments: Partition
) -> tuple[TwoStepState, TwoStepInfo, Draws]:
    return _step(optimizer, state, arguments)


@jax.jit
@own_settings
def ask(optimizer: Any, state: TwoStepState, arguments: Partition) -> Array:
    """The points at which the next step needs the loss, `(point, dim)`."""
    key, target = _keys(state.rng_key, state.step)[0], _next_target(optimizer, state, arguments)
    return optimizer.shift.ask(key, state.shift, target)


@jax.jit
@own_settings
def tell(
    optimizer: Any, state: TwoStepState, arguments: Partition, values: Array
) -> tuple[TwoStepState, TwoStepInfo]:
    """`step` with the losses at the points of `ask`."""
    return _step(optimizer, state, arguments, values)[:2]


def _next_target(optimizer: Any, state: TwoStepState, arguments: Partition) -> RegularizedLoss:
    here = _rescaled(optimizer, state.reference, optimizer.tau_at(state.step))
    return _target(optimizer, here, arguments)


def _step(
    optimizer: Any, state: TwoStepState, arguments: Partition, values: Array | None = None
) -> tuple[TwoStepState, TwoStepInfo, Draws]:
    return on_mesh(optimizer.mesh, _one_step)(optimizer, state, arguments, values)


def _one_step(
    optimizer: Any, state: TwoStepState, arguments: Partition, values: Array | None
) -> tuple[TwoStepState, TwoStepInfo, Draws]:
    keys = _keys(state.rng_key, state.step)
    tau = optimizer.tau_at(state.step)
    here = _rescaled(optimizer, state.reference, tau)
    target = _target(optimizer, here, arguments)
    if values is None:
        shift, draws, shift_info = optimizer.shift.step(keys[0], state.shift, target)
    else:
        shift, draws, shift_info = optimizer.shift.tell(keys[0], state.shift, target, values)
    fit, fitted, fit_info = optimizer.fit.step(keys[1], state.fit, target, draws)
    anchor, reference, anchor_info = optimizer.anchor.step(
        keys[2], state.anchor, target, draws, fitted, fit_info
    )
    infos = (shift_info, fit_info, anchor_info)
    ok = all_finite(reference) & _usable(tau) & shift_info.ok & fit_info.ok & anchor_info.ok
    old_anchor, old_reference = optimizer.anchor.after_rejection(state.anchor, here)
    keep = partial(_select, ok)
    reference = keep(reference, old_reference)
    reference = _rescaled(optimizer, reference, optimizer.tau_at(state.step + 1))
    record, record_info = state.record, None
    if optimizer.record is not None and optimizer.record.writes:

        def propose(some: Draws) -> tuple[Array, Array]:
            _, fitted, info = optimizer.fit.step(keys[1], state.fit, target, some)
            _, after, _ = optimizer.anchor.step(keys[2], state.anchor, target, some, fitted, info)
            control = FitInfo.of(info).control_variate
            return after.mean, jnp.asarray(False) if control is None else control > 0

        used = draws if optimizer.fit.uses_draws else None
        record, record_info = optimizer.record.step(
            keys[4], record, state.step, target, used, propose, reference, fit_info, ok
        )
        infos = (*infos, record_info)
    loss = optimizer.shift.center_loss(draws)
    loss = optimizer.fit.center_loss(fit_info) if loss is None else loss
    num_loss = 0 if loss is not None else 1
    if loss is None:
        loss = target.on_batch(keys[3]).value(here.mean)
    info = TwoStepInfo(
        ok=ok,
        loss=loss,
        reference=here,
        fitted=fitted,
        tau=_tau_in_force(optimizer, here, tau),
        shift=shift_info,
        fit=fit_info,
        anchor=anchor_info,
        num_loss=sum((i.num_loss for i in infos), start=jnp.asarray(num_loss)),
        num_grad=sum((i.num_grad for i in infos), start=jnp.asarray(0)),
        record=record_info,
        draws=_loss_of_draws(target, draws, loss),
    )
    state = TwoStepState(
        step=state.step + 1,
        rng_key=state.rng_key,
        reference=reference,
        shift=keep(shift, optimizer.shift.after_rejection(state.shift, shift)),
        fit=keep(fit, optimizer.fit.after_rejection(state.fit, fit)),
        anchor=keep(anchor, old_anchor),
        record=record,
    )
    return state, info, draws


@partial(jax.jit, static_argnames="num_steps")
@own_settings
def scan(
    optimizer: Any, state: TwoStepState, arguments: Partition, num_steps: int
) -> tuple[TwoStepState, TwoStepInfo]:
    """Several steps as one `lax.scan`, and their infos."""

    def body(state: TwoStepState, _: None) -> tuple[TwoStepState, TwoStepInfo]:
        return step(optimizer, state, arguments)

    return lax.scan(body, state, None, length=num_steps)


@partial(jax.jit, static_argnames=("capacity", "vectors"))
@own_settings
def advance(
    optimizer: Any,
    state: TwoStepState,
    arguments: Partition,
    num_steps: Array,
    capacity: int,
    vectors: bool = True,  # noqa: FBT001, FBT002
) -> tuple[TwoStepState, TwoStepInfo, Draws | None]:
    """`num_steps` steps or fewer, buffers whose first rows are their infos, a long loss's last draws."""
    # Fewer where the shift gives up: the state's step tells.
    # The number of steps is an argument: one program serves chunks of every length, and none of them
    # is compiled differently from another, which keeps a chunked run equal to a whole one.
    one = _step_and_draws if optimizer.loss.is_long else step
    shorten = _whole if vectors else scalars_of
    _, row, *draws = one.eval_shape(optimizer, state, arguments)
    row = jax.eval_shape(shorten, row, state.reference)
    buffers = jax.tree.map(lambda a: jnp.zeros((capacity, *a.shape), a.dtype), row)
    draws = jax.tree.map(partial(_blank, state.rng_key), draws)

    def unfinished(carry: Any) -> Array:
        i, state, *_ = carry
        return (i < num_steps) & jnp.logical_not(optimizer.shift.gives_up(state.shift))

    def body(carry: Any) -> Any:
        i, state, buffers, _ = carry
        state, info, *draws = one(optimizer, state, arguments)
        info = shorten(info, state.reference)
        write = partial(lax.dynamic_update_index_in_dim, index=i, axis=0)
        return i + 1, state, jax.tree.map(write, buffers, info), draws

    start = (jnp.zeros_like(num_steps), state, buffers, draws)
    _, state, buffers, draws = lax.while_loop(unfinished, body, start)
    return state, buffers, draws[0] if draws else None


def successor(optimizer: Any, state: TwoStepState) -> Any:
    """The optimizer with the shift that goes on from a state; of tracers nothing is known, and it is the same."""
    shift = optimizer.shift.successor(state.shift) if is_concrete(state) else optimizer.shift
    return optimizer if shift is optimizer.shift else replace_fields(optimizer, shift=shift)


def row_of_history(optimizer: Any, state: TwoStepState, arguments: Partition) -> TwoStepInfo:
    """Shapes and types of one step's info."""
    one = _step_and_draws if optimizer.loss.is_long else step
    return one.eval_shape(optimizer, state, arguments)[1]


def next_draws(optimizer: Any, state: TwoStepState, arguments: Partition) -> Draws:
    """The draws of the step that a run does next, up to rounding; of a long loss by a whole step of it."""
    if not optimizer.loss.is_long or not is_concrete((optimizer, state, arguments)):
        return draw(optimizer, draw_key(state.rng_key, state.step), state, arguments)
    # After a run without a callback its program is there already; another one would hold the loss again.
    capacity = history_capacity(row_of_history(optimizer, state, arguments))
    draws = advance(optimizer, state, arguments, np.int32(1), capacity)[2]
    assert draws is not None
    return draws


@jax.jit
@own_settings
def draw(optimizer: Any, rng_key: Key, state: TwoStepState, arguments: Partition) -> Draws:
    """The shift's draws at the state's reference."""

    def drawn(optimizer: Any, rng_key: Key, state: TwoStepState, arguments: Partition) -> Draws:
        target = _next_target(optimizer, state, arguments)
        return optimizer.shift.step(rng_key, state.shift, target)[1]

    return on_mesh(optimizer.mesh, drawn)(optimizer, rng_key, state, arguments)


@jax.jit
@own_settings
def draw_key(rng_key: Key, step: Array) -> Key:
    """The key from which the run with this key makes the draws of a step."""
    return _keys(rng_key, step)[0]


@jax.jit
@own_settings
def revisit(
    optimizer: Any, state: TwoStepState, step: Array, reference: AnyGaussian, arguments: Partition
) -> TwoStepState:
    """A state from which `draw` draws at an earlier step's reference: the shift begins anew there."""
    key = random.fold_in(draw_key(state.rng_key, step), 1)
    target = _target(optimizer, reference, arguments)
    shift = optimizer.shift.init(key, target)
    return strip_weak_types(state._replace(step=step, reference=reference, shift=shift))


def _whole(info: TwoStepInfo, after: AnyGaussian) -> TwoStepInfo:
    del after
    return info


def _loss_of_draws(target: RegularizedLoss, draws: Draws, center_loss: Array) -> LossOfDraws | None:
    if not draws.loss.size:
        return None
    loss, log_weight = draws.loss.reshape(-1), draws.log_weight.reshape(-1)
    counts = jnp.isfinite(loss) & (log_weight > -jnp.inf)
    weight = jax.nn.softmax(jnp.where(counts, log_weight, -jnp.inf))
    lowest = jnp.min(jnp.where(counts, loss, jnp.inf))
    # From the lowest one: means of large numbers that differ by little lose their digits.
    above = jnp.where(counts, loss - lowest, 0.0)
    mean = jnp.sum(weight * above)
    share = jnp.sum(jnp.where(counts & (loss < center_loss), weight, 0.0))
    return LossOfDraws(
        mean=lowest + mean,
        sd=jnp.sqrt(jnp.sum(weight * (above - mean) ** 2)),
        lowest=lowest,
        share_lower=jnp.full_like(share, jnp.nan) if target.loss.is_random else share,
        temperature=jnp.asarray(target.temperature, loss.dtype),
    )


def _keys(rng_key: Key, step: Array) -> Key:
    return random.split(random.fold_in(rng_key, step), 5)


def _blank(rng_key: Key, like: Any) -> Array:
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(rng_key, like.shape)
    return jnp.zeros(like.shape, like.dtype)


def _select(ok: Array, new: Any, old: Any) -> Any:
    def choose(a: Any, b: Array) -> Array:
        a = jnp.asarray(a)
        return jnp.where(ok, a if a.dtype == b.dtype else a.astype(b.dtype), b)

    return jax.tree.map(choose, new, old)
