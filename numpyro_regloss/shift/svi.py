# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Stochastic variational inference: any NumPyro guide of the shifted density, its draws weighted by q / guide.

The guide is one of the whitened vector ε, x = mean + scale ε, so that it moves with the reference; its
parameters and the optimizer's moments are carried from step to step. In expectation over its draws

    T E[log guide(ε) - log p(ε)] = F_tau + T KL(guide || q) ≥ F_tau,   p(ε) = N(ε; 0, I) exp(-loss(x) / T)

References: Hoffman, Blei, Wang & Paisley (2013), "Stochastic Variational Inference"; Yao, Vehtari, Simpson &
Gelman (2018), "Yes, but Did It Work? Evaluating Variational Inference".
"""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
import numpyro.infer
from jax import lax, random
from numpyro import handlers
from numpyro.infer import Trace_ELBO, init_to_mean
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.util import compute_log_probs

from numpyro_regloss._core.checks import check_count, check_differentiable, check_optimizer
from numpyro_regloss._core.mesh import divided
from numpyro_regloss._core.optimizers import adam
from numpyro_regloss._core.pareto import pareto_khat
from numpyro_regloss._core.pytree import pytree_dataclass, static_field, strip_weak_types
from numpyro_regloss._core.stats import standard_error, weight_ess
from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.draws.base import StoredDraws
from numpyro_regloss.losses.regularized import RegularizedLoss, latent_name, model
from numpyro_regloss.shift.base import Shift

__all__ = ["SVI", "SVIInfo", "SVIState"]

REMEDY = (
    "pass a function of a model such as numpyro.infer.autoguide.AutoNormal, lambda model: AutoNormal(model, "
    "init_scale=1.0), or, for a guide of your own, lambda model: guide"
)


class SVIState(NamedTuple):
    """What the next step starts from.

    Attributes:
        optimizer: the optimizer's state, the guide's parameters within.
        warm: whether the warm-up is done.
    """

    optimizer: Any
    warm: Array


class SVIInfo(NamedTuple):
    """Diagnostics of one shift.

    Attributes:
        ok: some draw had a finite loss and a positive weight.
        num_loss: loss evaluations of the draws.
        num_grad: gradient evaluations.
        negative_elbo: an upper bound of F_tau, in the units of the loss; infinite where some draw of the guide
            has no finite loss.
        negative_elbo_error: its standard error over the draws.
        ess: effective sample size 1 / Σ w² of the weights q / guide, also where they are not used.
        khat: Pareto shape of these weights; above 0.7 the guide is too far from q.
        num_rejected: optimization steps skipped because loss or gradient was not finite.
    """

    ok: Array
    num_loss: Array
    num_grad: Array
    negative_elbo: Array
    negative_elbo_error: Array
    ess: Array
    khat: Array
    num_rejected: Array


@pytree_dataclass
class SVI(Shift):
    """NumPyro's SVI on the shifted density.

    Args:
        make_guide: a function of a model that returns a guide of it; build it once. NumPyro's automatic guides,
            given as classes, start at the reference (its mean, and its width where they have an `init_scale`); a
            function such as `lambda model: AutoNormal(model)` starts where the guide says. A guide of your own
            takes the target, and has one latent site like that of the model: its name is `eps` (`eps_` if the loss
            has a site `eps`), its shape `(dim,)`, and N(0, I) stands for the reference.
        optimizer: an Optax or NumPyro optimizer, built once; default: Adam with step size 0.03.
        num_steps: optimization steps per outer step.
        num_samples: draws from the guide per outer step.
        num_warmup: additional optimization steps in the first outer step.
        num_particles: draws per optimization step.
        weighted: weight draws by q / guide, so that their mean is that of q; otherwise it is that of the guide.

    Raises:
        TypeError: if `make_guide` or `optimizer` is something else, or a count not an integer.
        ValueError: if a count is out of range.

    Example:
        >>> from numpyro.infer.autoguide import AutoNormal
        >>> from numpyro_regloss import Gaussian, Loss
        >>> loss = Loss.from_function(lambda x: 0.5 * jnp.sum(x**2), jnp.full(2, 4.0))
        >>> target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, tau=1.0))
        >>> import optax
        >>> engine = SVI(AutoNormal, optax.adam(0.05), num_steps=100)
        >>> state = engine.init(random.key(0), target)
        >>> state, draws, info = engine.step(random.key(1), state, target)
        >>> weight = jax.nn.softmax(draws.log_weight[0])
        >>> bool(jnp.all(jnp.abs(weight @ draws.x[0] - 2.0) < 0.2))  # half way to the minimum
        True
    """

    make_guide: Callable[..., Any] = static_field()
    optimizer: Any = static_field(default=None)
    num_steps: int = static_field(default=100)
    num_samples: int = static_field(default=1000)
    num_warmup: int = static_field(default=500)
    num_particles: int = static_field(default=8)
    weighted: bool = static_field(default=True)

    uses_gradient: ClassVar[bool] = True
    hands_scores: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.make_guide, AutoGuide) or not callable(self.make_guide):
            raise TypeError(
                f"SVI: expected a function that makes a guide, got {type(self.make_guide).__name__}; {REMEDY}."
            )
        check_optimizer(self.optimizer, "SVI")
        check_count(self.num_steps, "SVI: num_steps")
        check_count(self.num_samples, "SVI: num_samples", 2)
        check_count(self.num_warmup, "SVI: num_warmup", 0)
        check_count(self.num_particles, "SVI: num_particles")
        if not isinstance(self.weighted, bool):
            raise TypeError(f"SVI: expected weighted as True or False, got {self.weighted!r}.")
        self._made()

    def init(self, rng_key: Key, target: RegularizedLoss) -> SVIState:
        """The guide at its own start.

        Args:
            rng_key: a random key.
            target: the first target.

        Returns:
            The state.

        Raises:
            TypeError: if the loss returns integers or is external.
            ValueError: if the guide does not fit the model.
        """
        check_differentiable(["SVI"], target.loss, "shift.SVI")
        key_batch, rng_key = random.split(rng_key)
        _, state = self._set_up(rng_key, target.on_batch(key_batch))
        return SVIState(strip_weak_types(state.optim_state), jnp.asarray(False))

    def step(
        self, rng_key: Key, state: SVIState, target: RegularizedLoss
    ) -> tuple[SVIState, StoredDraws, SVIInfo]:
        """Trains the guide some steps, then draws from it.

        Args:
            rng_key: a random key.
            state: from `init` or the last step.
            target: the target.

        Returns:
            The next state, draws of shape `(1, num_samples, dim)` and the diagnostics.

        Raises:
            ValueError: if the guide does not fit the model.
        """
        key_init, key_train, key_draw, key_batch = random.split(rng_key, 4)
        # Fresh batches while training; one for all draws, since weights of different losses cannot be compared.
        drawn = target.on_batch(key_batch)
        svi, fresh = self._set_up(key_init, drawn)
        num_steps = jnp.where(state.warm, self.num_steps, self.num_steps + self.num_warmup)

        def update(i: Array, carry: tuple[Any, Array]) -> tuple[Any, Array]:
            svi_state, rejected = carry
            batch = target.on_batch(random.fold_in(key_train, i))
            svi_state, loss = svi.stable_update(svi_state, batch)
            return strip_weak_types(svi_state), rejected + ~jnp.isfinite(loss)

        carry = strip_weak_types(fresh._replace(optim_state=state.optimizer)), jnp.asarray(0)
        trained, rejected = lax.fori_loop(0, num_steps, update, carry)
        draw = partial(_draw, svi.guide, svi.get_params(trained), drawn)
        noise, log_guide = jax.vmap(draw)(random.split(key_draw, self.num_samples))
        x = target.reference.unwhiten(noise)
        loss = divided(drawn.value)(x)
        log_prior = -0.5 * (jnp.sum(noise**2, -1) + target.dim * math.log(2 * math.pi))
        log_ratio = log_prior - loss / target.temperature - log_guide
        failed = jnp.isnan(log_ratio) | (loss == -jnp.inf)
        log_ratio = jnp.where(failed, -jnp.inf, log_ratio)
        ess = weight_ess(log_ratio)
        used = log_ratio if self.weighted else jnp.where(log_ratio > -jnp.inf, 0.0, -jnp.inf)
        draws = StoredDraws(x[None], used[None], loss[None], target.temperature, block_size=1)
        error = target.temperature * standard_error(log_ratio)
        info = SVIInfo(
            ok=ess > 0,
            num_loss=jnp.asarray(self.num_samples),
            num_grad=num_steps * self.num_particles,
            negative_elbo=-target.temperature * jnp.mean(log_ratio),
            negative_elbo_error=jnp.where(jnp.isfinite(error), error, jnp.inf),
            ess=ess,
            khat=pareto_khat(log_ratio),
            num_rejected=rejected,
        )
        return (
            SVIState(strip_weak_types(trained.optim_state), jnp.ones_like(state.warm)),
            draws,
            info,
        )

    def _made(self) -> Callable[..., Any]:
        # NumPyro's own start is a random point and a tenth of the width. Here the reference is known.
        kind, settings = self.make_guide, {"init_loc_fn": init_to_mean, "init_scale": 1.0}
        if not (isinstance(kind, type) and issubclass(kind, AutoGuide)):
            settings = {}
        takes = inspect.signature(kind).parameters if settings else {}
        try:
            with handlers.block():
                guide = kind(model, **{key: settings[key] for key in settings if key in takes})
        except Exception as error:
            raise TypeError(
                "SVI: expected make_guide(model) to return a guide, but it raised "
                f"{type(error).__name__}: {error}; {REMEDY}."
            ) from error
        if not callable(guide):
            raise TypeError(
                f"SVI: expected make_guide(model) to return a guide, got {type(guide).__name__}; {REMEDY}."
            )
        return guide

    def _set_up(self, rng_key: Key, target: RegularizedLoss) -> tuple[numpyro.infer.SVI, Any]:
        # Within the trace of each step: automatic guides remember what they were set up with.
        optimizer = adam() if self.optimizer is None else self.optimizer
        loss = Trace_ELBO(num_particles=self.num_particles)
        svi = numpyro.infer.SVI(model, self._made(), optimizer, loss)
        with handlers.block():
            guide = handlers.seed(svi.guide, rng_key)
            _check_sites(handlers.trace(guide).get_trace(target), target, weighted=self.weighted)
            return svi, svi.init(rng_key, target)


def _draw(
    guide: Callable[..., Any], params: dict, target: RegularizedLoss, rng_key: Key
) -> tuple[Array, Array]:
    with handlers.block():
        seeded = handlers.seed(guide, rng_key)
        log_probs, trace = compute_log_probs(seeded, (target,), {}, params)
    return trace[latent_name(target)]["value"], sum(log_probs.values(), start=jnp.zeros(()))


def _check_sites(trace: dict[str, Any], target: RegularizedLoss, *, weighted: bool) -> None:
    name, what = latent_name(target), "SVI: expected a guide of the regularized model"
    mutable = sorted(key for key, site in trace.items() if site["type"] == "mutable")
    if mutable:
        raise ValueError(
            f"{what} without mutable state, got the mutable sites {mutable}; freeze them."
        )
    sampled = {key: site for key, site in trace.items() if site["type"] == "sample"}
    if name not in sampled:
        raise ValueError(
            f"{what}, with a latent site {name!r} of shape ({target.dim},), got the sites {sorted(sampled)}; "
            f"sample {name!r}, the whitened parameters (x = mean + scale {name}), in the guide."
        )
    shape = jnp.shape(sampled[name]["value"])
    if shape != (target.dim,):
        raise ValueError(
            f"{what}, with {name!r} of shape ({target.dim},), got shape {shape}; make the guide for a loss with "
            f"{target.dim} parameters."
        )
    base = sampled[name]["fn"]
    while isinstance(base, dist.Independent | dist.ExpandedDistribution | dist.MaskedDistribution):
        base = base.base_dist
    others = [site for key, site in sampled.items() if key != name and not site["is_observed"]]
    point = isinstance(base, dist.Delta)
    if point and not others:
        raise ValueError(
            f"{what} with a density, got a point (Delta) at {name!r}; use AutoNormal or another guide that "
            "spreads."
        )
    # A joint draw of which the latent site is a function, one to one, as AutoContinuous emits it.
    size = sum(site["value"].size for site in others)
    discrete = any(site["fn"].support.is_discrete for site in others)
    known = not others or (point and size == target.dim and not discrete)
    if weighted and not known:
        raise ValueError(
            f"{what} with a known density of {name!r}, got auxiliary sites of size {size} that would have to be "
            "integrated out; use a guide without them, or weighted=False."
        )
