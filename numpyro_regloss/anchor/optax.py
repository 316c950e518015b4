# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""An Optax optimizer in place of the plain step: the outer loop of Entropy-SGD.

    g = T Σ⁻¹ (x - fitted mean),   x ← x + update(g)

with Σ = tau I the covariance of the reference and T the temperature of the draws, which an engine with `ess` sets
anew at every step. With `fit.ForwardKL` g is the gradient of the local entropy F_tau, with the heat fits that of
the Moreau envelope of the heat-regularized loss. Plain gradient descent of rate tau / T is the plain step; other
optimizers lose its guarantee that the regularized loss falls.

Reference: Chaudhari, Choromanska, Soatto, LeCun, Baldassi, Borgs, Chayes, Sagun & Zecchina (2017), "Entropy-SGD:
Biasing Gradient Descent into Wide Valleys".
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from numpyro_regloss._core.checks import check_choice
from numpyro_regloss._core.foreign import attribute
from numpyro_regloss._core.pytree import Partition, all_finite, pytree_dataclass, static_field
from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.anchor.base import Anchor
from numpyro_regloss.draws.base import Draws
from numpyro_regloss.gaussians.gaussian import AnyGaussian
from numpyro_regloss.losses.regularized import RegularizedLoss

__all__ = ["Optax", "OptaxInfo"]


class OptaxInfo(NamedTuple):
    """Diagnostics of one outer step.

    Attributes:
        ok: the next reference is finite.
        num_loss: zero.
        num_grad: zero.
        gradient_norm: of T Σ⁻¹ (x - mean), an estimate of |∇F_tau|, in units of the loss per parameter.
        step_norm: length of the step, in units of the parameters.
        fell_back: whether the update was not finite and the plain step was taken.
    """

    ok: Array
    num_loss: Array
    num_grad: Array
    gradient_norm: Array
    step_norm: Array
    fell_back: Array


class _Methods(NamedTuple):
    init: Any
    update: Any


@pytree_dataclass
class Optax(Anchor):
    """The next reference by any Optax optimizer.

    The optimizer sees the parameters as the user wrote them, in JAX's default float (of a NumPyro model its
    unconstrained sites by name), so that masks, rates by layer and weight decay work as usual.

    Args:
        optimizer: `init(x)` and `update(gradient, state, x)`, such as `optax.adam(0.01)`; built once, since a new
            one is a new program. Its rate counts outer steps and, with `direction="gradient"`, is in squared units
            of the parameters per unit of the loss, as tau / T is.
        direction: what the optimizer gets: `"gradient"`, T Σ⁻¹ (x - mean); or `"displacement"`, x - mean. With the
            latter a rate of one is the plain step for every tau, so that schedules of tau are followed.
        safeguard: take the plain step where the update is not finite, and keep the optimizer's state; otherwise
            the step is rejected.

    Raises:
        TypeError: if `optimizer` is not an optimizer, or asks for values of the loss when a run starts.
        ValueError: if the direction is unknown, or masks do not fit the parameters when a run starts.

    Example:
        >>> import optax
        >>> Optax(optax.adam(0.01)).direction
        'gradient'
    """

    optimizer: Any
    direction: str = static_field(default="gradient")
    safeguard: bool = static_field(default=True)

    def __post_init__(self) -> None:
        known = self.optimizer
        if isinstance(known, Partition):
            known = known.tree
        if isinstance(known, type) or not all(
            callable(attribute(known, verb)) for verb in ("init", "update")
        ):
            raise TypeError(
                "anchor.Optax: expected an optimizer with init and update such as optax.adam(0.01), got "
                f"{known!r}."
            )
        if jax.tree_util.treedef_is_leaf(jax.tree.structure(known)):
            # Of a class with these methods, such as optax.MultiSteps.
            known = _Methods(known.init, known.update)
        # Functions compile, numbers are traced.
        object.__setattr__(self, "optimizer", Partition(known, "anchor.Optax: optimizer"))
        check_choice(self.direction, "anchor.Optax: direction", ("gradient", "displacement"))
        if not isinstance(self.safeguard, bool):
            raise TypeError(
                f"anchor.Optax: expected safeguard as True or False, got {self.safeguard!r}."
            )

    def init(self, target: RegularizedLoss) -> Any:
        """The optimizer's state at the first reference."""
        x = target.loss.source.as_tree(target.reference.mean)
        return _asked(lambda: self.optimizer.tree.init(x), x)

    def step(
        self,
        rng_key: Key,
        state: Any,
        target: RegularizedLoss,
        draws: Draws,
        fitted: AnyGaussian,
        fit_info: Any,
    ) -> tuple[Any, AnyGaussian, OptaxInfo]:
        """Moves the reference.

        Args:
            rng_key: unused.
            state: of the optimizer.
            target: the target of this step.
            draws: from the shift; the gradient is at their temperature.
            fitted: the fitted Gaussian.
            fit_info: unused.

        Returns:
            The optimizer's next state, the next reference and the info.
        """
        del rng_key, fit_info
        reference = target.reference
        x = reference.mean
        displacement = x - fitted.mean
        gradient = reference.unscale_transpose(reference.whiten(fitted.mean))
        gradient = -draws.temperature * gradient
        handed = displacement if self.direction == "displacement" else gradient
        source = target.loss.source
        at, handed = source.as_tree(x), source.as_tree(handed)
        update, after = _asked(lambda: self.optimizer.tree.update(handed, state, at), at)
        update = source.from_tree(update)
        # Numbers of the state too: momentum that is not finite would spoil every later step.
        floats = [
            a for a in jax.tree.leaves(after) if jnp.issubdtype(jnp.result_type(a), jnp.inexact)
        ]
        plain = ~all_finite((update, floats)) & self.safeguard
        update = jnp.where(plain, -displacement, update).astype(x.dtype)
        after = jax.tree.map(lambda old, new: jnp.where(plain, old, new), state, after)
        info = OptaxInfo(
            ok=jnp.isfinite(update).all(),
            num_loss=jnp.asarray(0),
            num_grad=jnp.asarray(0),
            gradient_norm=jnp.linalg.norm(gradient),
            step_norm=jnp.linalg.norm(update),
            fell_back=plain,
        )
        return after, reference._replace(mean=x + update), info


def _asked(call: Callable[[], Any], x: Any) -> Any:
    try:
        return call()
    except Exception as error:
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(
            f"anchor.Optax: the optimizer raised {type(error).__name__}: {error}. It is called as init(x) and "
            f"update(gradient, state, x) with trees of {jax.tree.structure(x)}: masks and labels must fit these, "
            "and optimizers that ask for values of the loss, such as optax.lbfgs, are not for this anchor."
        ) from error
