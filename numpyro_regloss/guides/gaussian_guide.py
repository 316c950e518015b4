# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""A Gaussian as a NumPyro guide: a joint draw of the flat vector, then the latent sites as functions of it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.distributions import biject_to, constraints
from numpyro.distributions.util import sum_rightmost
from numpyro.infer.util import constrain_fn

from numpyro_regloss._core.pytree import pytree_dataclass, static_field
from numpyro_regloss._core.types import Array
from numpyro_regloss.gaussians.gaussian import AnyGaussian, Gaussian, check_gaussian
from numpyro_regloss.gaussians.low_rank import LowRankGaussian
from numpyro_regloss.losses.loss import Loss
from numpyro_regloss.losses.numpyro_model import ModelSource
from numpyro_regloss.losses.regularized import RegularizedLoss, model

__all__ = ["GaussianGuide", "to_guide"]


@pytree_dataclass
class GaussianGuide:
    """A NumPyro guide made by `to_guide`; call it with the arguments of the model.

    Attributes:
        gaussian: where training starts.
        source: the latent sites of the model, or None if the loss is a function.
        prefix: begins the names of the guide's own sites.
        trainable: whether mean and scale are `param` sites.
    """

    gaussian: AnyGaussian
    source: ModelSource | None
    prefix: str = static_field(default="gaussian")
    trainable: bool = static_field(default=True)

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Array]:
        """Draws the flat vector and emits the latent and deterministic sites.

        Args:
            *args: the model's arguments, or one `RegularizedLoss`: then the latent site is that of
                `numpyro_regloss.model`.
            **kwargs: the model's keyword arguments.

        Returns:
            The latent sites by name.

        Raises:
            TypeError: if the loss is a function and the argument is no `RegularizedLoss`.
        """
        starts = self.parameters if self.trainable else {}
        params = {
            name: numpyro.param(name, start, constraint=constraint)
            for name, (start, constraint) in starts.items()
        }
        gaussian = self.gaussian_at(params) if self.trainable else self.gaussian
        x = jnp.asarray(
            numpyro.sample(self.latent_name, gaussian.distribution, infer={"is_auxiliary": True})
        )
        if len(args) == 1 and not kwargs and isinstance(args[0], RegularizedLoss):
            trace, latent = _trace_target(x, args[0])
        elif self.source is None:
            raise TypeError(
                "to_guide: expected a RegularizedLoss as the only argument, since the loss of the guide is a "
                f"function, got {len(args)} arguments and keywords {sorted(kwargs)}; use "
                "SVI(numpyro_regloss.model, guide, ...) and pass the target."
            )
        else:
            trace, latent = _trace_model(x, self.source, args, kwargs)
        return _emit(trace, latent)

    @property
    def latent_name(self) -> str:
        """Name of the auxiliary site that holds the flat vector."""
        return f"_{self.prefix}_latent"

    @property
    def parameters(self) -> dict[str, tuple[Array, Any]]:
        """Start and constraint of each `param` site, by name."""
        loc, gaussian = (
            {f"{self.prefix}_loc": (self.gaussian.mean, constraints.real)},
            self.gaussian,
        )
        if isinstance(gaussian, LowRankGaussian):
            # NumPyro's parametrization: factors in units of the diagonal part.
            scale = jnp.sqrt(gaussian.diagonal)
            return loc | {
                f"{self.prefix}_scale": (scale, constraints.softplus_positive),
                f"{self.prefix}_cov_factor": (gaussian.factor / scale[:, None], constraints.real),
            }
        if gaussian.structure == "dense":
            lower = constraints.scaled_unit_lower_cholesky
            return loc | {f"{self.prefix}_scale_tril": (gaussian.scale, lower)}
        return loc | {f"{self.prefix}_scale": (gaussian.scale, constraints.softplus_positive)}

    def gaussian_at(self, params: dict[str, Any]) -> AnyGaussian:
        """The Gaussian at given values of the `param` sites, of the structure it started with.

        Args:
            params: as from `svi.get_params`.

        Returns:
            The Gaussian.
        """
        names = list(self.parameters)
        loc, scale, *rest = (jnp.asarray(params[name]) for name in names)
        if rest:
            return LowRankGaussian(loc, scale**2, rest[0] * scale[:, None])
        return Gaussian(loc, scale)


def to_guide(
    gaussian: AnyGaussian, loss: Loss, *, trainable: bool = True, prefix: str = "gaussian"
) -> GaussianGuide:
    """A NumPyro guide that draws the unconstrained parameters from a Gaussian.

    The guide is a function of the model's arguments. It draws the flat vector at the auxiliary site
    `_{prefix}_latent` and emits the model's latent sites, constrained and with their densities, and
    its deterministic sites. Use it wherever NumPyro takes a guide: `SVI` (which starts at this Gaussian),
    `Predictive(guide, num_samples=...)`, `Predictive(model, guide=guide, params=..., num_samples=...)`. For
    forecasts data may be of another size, and observations None, as long as the latent sites are the same. A
    latent series of NumPyro's `scan` may be longer than that of the loss: the steps beyond are drawn from the
    model.

    Called with a `RegularizedLoss` instead, it is a guide of `numpyro_regloss.model`, the regularized
    loss as a NumPyro model: `SVI(numpyro_regloss.model, guide, ...)`. If the loss is a function, there is no other
    model, and this is its only use.

    Args:
        gaussian: the Gaussian over the flat unconstrained vector of the loss.
        loss: whose parameters they are.
        trainable: make mean and scale `param` sites (`{prefix}_loc`; `{prefix}_scale` for isotropic
            and diagonal structures; `{prefix}_scale_tril` for the dense one; `{prefix}_scale` and
            `{prefix}_cov_factor`, in units of that scale, for low rank). The structure is kept in
            training. False: a guide without parameters.
        prefix: begins the names of the guide's own sites.

    Returns:
        The guide, which `from_guide` turns back into the Gaussian.

    Raises:
        TypeError: if an argument is of another kind.
        ValueError: if dimensions do not fit, values are not finite, scales not positive, or the
            prefix gives a name that the model has.

    Example:
        >>> from jax import random
        >>> from numpyro.infer import Predictive
        >>> def model(y):
        ...     sd = numpyro.sample("sd", dist.HalfNormal(1.0))
        ...     numpyro.sample("y", dist.Normal(0.0, sd), obs=y)
        >>> loss = Loss.from_model(model, jnp.array([0.5, -0.5]))
        >>> guide = to_guide(Gaussian.isotropic(loss.x0, tau=0.01), loss)
        >>> draws = Predictive(guide, num_samples=10)(random.key(0), jnp.array([0.5, -0.5]))
        >>> draws["sd"].shape, bool((draws["sd"] > 0).all())
        ((10,), True)
    """
    if not isinstance(loss, Loss):
        raise TypeError(
            f"to_guide: expected a Loss, got {type(loss).__name__}; build one with Loss.from_model."
        )
    if not isinstance(trainable, bool) or not isinstance(prefix, str):
        raise TypeError(
            "to_guide: expected trainable as True or False and prefix as a string, got "
            f"{trainable!r} and {prefix!r}."
        )
    gaussian = check_gaussian(gaussian, loss.dim, "to_guide")
    source = loss.source if isinstance(loss.source, ModelSource) else None
    guide = GaussianGuide(gaussian, source, prefix, trainable)
    taken = loss.source.taken_names(loss.arguments) & {guide.latent_name, *guide.parameters}
    if taken or not prefix:
        raise ValueError(
            f"to_guide: expected a prefix that gives new names, got {prefix!r}, which gives the loss's own "
            f"{sorted(taken)}; choose another prefix."
        )
    return guide


def _trace_target(x: Array, target: RegularizedLoss) -> tuple[Any, dict[str, tuple[Array, Any]]]:
    # The one latent site of `model` is the whitened vector, or the vector itself without a reference.
    if x.shape != (target.dim,):
        raise ValueError(
            f"to_guide: expected a target of {x.size} parameters, got {target.dim}; make a guide for its loss."
        )
    value, log_density = x, jnp.zeros((), x.dtype)
    if target.reference is not None:
        value, log_density = target.reference.whiten(x), target.reference.log_det

    def substitute(site: dict[str, Any]) -> Array | None:
        return value if site["type"] == "sample" and not site["is_observed"] else None

    with handlers.block():
        trace = handlers.trace(handlers.substitute(model, substitute_fn=substitute)).get_trace(
            target
        )
    (name,) = (
        name for name, site in trace.items() if site["type"] == "sample" and not site["is_observed"]
    )
    return trace, {name: (value, log_density)}


def _trace_model(
    x: Array, source: ModelSource, args: tuple, kwargs: dict
) -> tuple[Any, dict[str, tuple[Array, Any]]]:
    # The model runs here, so that supports may depend on other sites and on these arguments.
    expected = {site.name: site.shape for site in source.sites}

    def check(site: dict[str, Any]) -> None:
        if site["name"] in expected and "_scan_current_index" not in site["infer"]:
            shape = site["kwargs"].get("sample_shape", ()) + site["fn"].shape()
            found = biject_to(site["fn"].support).inverse_shape(shape)
            _check_site(site["name"], expected[site["name"]], found)

    def substitute_fn(site: dict[str, Any]) -> None:
        if site["type"] == "sample" and not site["is_observed"]:
            check(site)

    # Sites that are no parameters, such as data to be predicted, need a key; their draws are not emitted.
    key = numpyro.prng_key()
    unconstrained = source.unravel(x)
    with handlers.block():
        seeded = handlers.seed(source.model, 0 if key is None else key)
        checked = handlers.substitute(seeded, substitute_fn=substitute_fn)
        values = _explained(constrain_fn, checked, args, kwargs, unconstrained)
        replayed = handlers.substitute(seeded, data=values)
        trace = _explained(handlers.trace(replayed).get_trace, *args, **kwargs)
    latent = {}
    for name, site in trace.items():
        if name in expected and not site["is_observed"]:
            latent[name] = (values[name], _log_density(site, values[name], unconstrained[name]))
    for name in expected:
        if name not in latent:
            _check_site(name, expected[name], None)
    return trace, latent


def _log_density(site: dict[str, Any], value: Array, unconstrained: Array) -> Array:
    fn, support = site["fn"], site["fn"].support
    num_steps = jnp.shape(value)[:1]
    known = biject_to(support).inverse_shape(jnp.shape(value))
    extra = None
    if known != jnp.shape(unconstrained):
        # A series that goes on: NumPyro's scan has drawn the steps beyond those of the loss from the model.
        _check_site(site["name"], jnp.shape(unconstrained)[1:], known[1:])
        length = jnp.shape(unconstrained)[0]
        extra = fn.log_prob(value)[length:]
        value = value[:length]
        support = jax.tree.map(
            lambda a: a[:length] if jnp.shape(a)[:1] == num_steps else a, support
        )
    jacobian = biject_to(support).log_abs_det_jacobian(unconstrained, value)
    log_density = -sum_rightmost(jacobian, jnp.ndim(jacobian) - jnp.ndim(value) + fn.event_dim)
    return log_density if extra is None else jnp.concatenate([log_density, extra])


def _explained(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return call(*args, **kwargs)
    except Exception as error:
        if str(error).startswith("to_guide"):
            raise
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(
            f"to_guide: the model raised {type(error).__name__} when it was run with these arguments: {error}. "
            "Data of another size must be such that the model runs with them: sizes from the inputs (len(x)), "
            "observations of that size or None (def model(x, y=None)); a series may be longer than that of "
            "the loss, but not shorter."
        ) from error


def _check_site(name: str, expected: tuple[int, ...], found: Any) -> None:
    if found != expected:
        got = "no such latent site" if found is None else f"shape {found}"
        raise ValueError(
            f"to_guide: expected a latent site {name!r} of unconstrained shape {expected}, as in the loss, got "
            f"{got} with these arguments; make a new loss and guide for data with other latent sites."
        )


def _emit(trace: Any, latent: dict[str, tuple[Array, Any]]) -> dict[str, Array]:
    result = {}
    for name, site in trace.items():
        if name in latent:
            value, log_density = latent[name]
            delta = dist.Delta(value, log_density=log_density, event_dim=site["fn"].event_dim)
            result[name] = jnp.asarray(numpyro.sample(name, delta))
        elif site["type"] == "deterministic":
            numpyro.deterministic(name, site["value"])
    return result
