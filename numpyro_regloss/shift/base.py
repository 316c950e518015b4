# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Step 1 of the scheme: move the density. The protocol that every shift engine follows.

A new engine is one new file with a class that has two methods. This small engine is complete. It draws from the
reference and weights by exp(-energy):

    >>> from typing import NamedTuple
    >>> import jax, jax.numpy as jnp
    >>> from jax import random
    >>> from numpyro_regloss import Gaussian, Loss, TwoStep, fit, shift
    >>> from numpyro_regloss.draws import StoredDraws
    >>> class ToyInfo(NamedTuple):
    ...     ok: jax.Array
    ...     num_loss: jax.Array
    ...     num_grad: jax.Array
    >>> class Toy(shift.Shift):
    ...     def init(self, rng_key, target):
    ...         return ()                             # the least that the next step needs: nothing
    ...     def step(self, rng_key, state, target):
    ...         x = target.reference.sample(rng_key, (1, 1000))
    ...         loss = jax.vmap(jax.vmap(target.value))(x)
    ...         draws = StoredDraws(x, -loss / target.temperature, loss, target.temperature,
    ...                             block_size=1)
    ...         info = ToyInfo(jnp.isfinite(loss).all(), jnp.array(1000), jnp.array(0))
    ...         return state, draws, info
    >>> loss = Loss.from_function(lambda x: 0.5 * jnp.sum(x**2), jnp.array([3.0, -3.0]))
    >>> optimizer = TwoStep(loss, tau=0.5, shift=Toy(), fit=fit.ForwardKL())
    >>> result = optimizer.run(random.key(0), 20, progress_bar=False)
    >>> bool(jnp.all(jnp.abs(result.params) < 0.1))
    True

An engine with settings is a frozen pytree dataclass, as `Importance` is: numbers are leaves, counts and
functions static, so that new numbers never recompile.
"""

from typing import Any, ClassVar, Protocol, runtime_checkable

from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.draws.base import Draws
from numpyro_regloss.losses.regularized import RegularizedLoss

__all__ = ["Shift"]


@runtime_checkable
class Shift(Protocol):
    """Draws from the shifted density q of a target.

    The state has the same shapes and types going in and out. The info has a scalar boolean `ok`, the
    counts `num_loss` and `num_grad` of evaluations spent, and the engine's own diagnostics; it is
    never read back by the driver.

    A subclass needs only `init` and `step`.

    Attributes:
        uses_gradient: whether the engine differentiates the loss, so that the driver checks the
            gradient at the start.
        makes_draws: whether there are draws for a fit to work from.
        hands_scores: False for an engine whose draws never have scores; fits that need scores are then refused
            before a run.
    """

    uses_gradient: ClassVar[bool] = False
    makes_draws: ClassVar[bool] = True
    hands_scores: ClassVar[bool] = True

    def init(self, rng_key: Key, target: RegularizedLoss) -> Any:
        """The engine's state before the first step.

        Args:
            rng_key: a random key.
            target: the first target.

        Returns:
            A pytree.
        """
        ...

    def step(self, rng_key: Key, state: Any, target: RegularizedLoss) -> tuple[Any, Draws, Any]:
        """Draws from q.

        Args:
            rng_key: a random key.
            state: from `init` or the last step.
            target: the target, whose reference may have moved since.

        Returns:
            The next state, the draws and the info.
        """
        ...

    def ask(self, rng_key: Key, state: Any, target: RegularizedLoss) -> Array:
        """The points at which a step needs the loss, if the engine knows them before it has any value.

        Args:
            rng_key: of the step.
            state: of the step.
            target: of the step.

        Returns:
            `(point, dim)`, the reference's mean last.

        Raises:
            TypeError: if later points depend on values at earlier ones.
        """
        del rng_key, state, target
        raise TypeError(
            "TwoStep.ask: expected a shift that evaluates the loss on one cloud, such as shift.Importance, got "
            f"{type(self).__name__}, whose later points depend on the values at earlier ones; call the function "
            "by Loss.from_external instead."
        )

    def tell(
        self, rng_key: Key, state: Any, target: RegularizedLoss, values: Array
    ) -> tuple[Any, Draws, Any]:
        """The same as `step`, from losses that were evaluated elsewhere.

        Args:
            rng_key: as of `ask`.
            state: as of `ask`.
            target: as of `ask`.
            values: the losses at its points, `(point,)`.

        Returns:
            The next state, the draws and the info.

        Raises:
            TypeError: if `ask` does.
        """
        del values
        self.ask(rng_key, state, target)
        raise TypeError(f"TwoStep.tell: {type(self).__name__} has `ask`, but no `tell`.")

    def after_rejection(self, old: Any, new: Any) -> Any:
        """The state to go on with after a rejected step: the old one, unless adaptation must go on.

        Args:
            old: the state before the step.
            new: the state that the step returned, which may hold non-finite values.

        Returns:
            A state that is safe to step from.
        """
        del new
        return old

    def gives_up(self, state: Any) -> Any:
        """Whether a run must continue from this state with `successor`; read after every step.

        Args:
            state: of the engine.

        Returns:
            False, or a scalar boolean array.
        """
        del state
        return False

    def successor(self, state: Any) -> "Shift":
        """The engine that continues from a state; called outside of programs, so that only it is compiled.

        Args:
            state: of the engine, with values.

        Returns:
            The engine itself, or another one of the same state, info and settings.
        """
        del state
        return self

    def center_loss(self, draws: Any) -> Any:
        """The loss at the reference's mean, if the step evaluated it together with its draws.

        The driver then does not evaluate it again, and the step counts it in `num_loss`.

        Args:
            draws: of the step.

        Returns:
            A scalar, or None if it was not evaluated.
        """
        del draws
        return None

    def remedy(self, info: Any, ok: Any) -> str:
        """What is wrong by the diagnostics of a run, and what to change; for the warning at its end.

        Args:
            info: of all steps, as NumPy arrays with a leading axis.
            ok: which steps were taken, of the whole step and not of the engine alone.

        Returns:
            A sentence, or nothing.
        """
        del info, ok
        return ""
