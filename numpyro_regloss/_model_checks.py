# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""What a NumPyro model must not have in it, and what to do instead."""

from typing import Any

from numpyro.distributions import biject_to
from numpyro.infer.util import helpful_support_errors
from numpyro.primitives import Messenger

__all__ = ["GivenParams", "bijection", "param_remedy"]


class GivenParams(Messenger):
    """Names of the `param` sites whose values come from `handlers.substitute` within the model."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def process_message(self, msg: dict[str, Any]) -> None:
        """For NumPyro: handlers within the model have seen the site before."""
        if msg["type"] == "param" and msg["value"] is not None:
            self.names.add(msg["name"])


def param_remedy(kind: str, name: str) -> str:
    """What to do about a site that NumPyro would optimize rather than sample.

    Args:
        kind: `"param"` or `"mutable"`.
        name: of the site.

    Returns:
        The end of an error message.
    """
    if kind == "mutable":
        return (
            "run the layer in evaluation mode, or write the loss as a function and use "
            "Loss.from_function"
        )
    substitute = f"handlers.substitute(model, data={{{name!r}: ...}})"
    if name.endswith("_centered"):
        return (
            "give LocScaleReparam a number, LocScaleReparam(0.2), or make it latent: "
            f"handlers.lift(model, prior={{{name!r}: dist.Uniform(0.0, 1.0)}})"
        )
    if name.endswith("$params"):
        return (
            "random_flax_module (random_nnx_module, random_eqx_module) makes a network's weights latent, and "
            f"{substitute} fixes them"
        )
    return (
        "write it as a sample site, make it latent with handlers.lift(model, "
        f"prior={{{name!r}: dist.Normal(...)}}), or fix it with {substitute}"
    )


def bijection(site: dict[str, Any]) -> Any:
    """The transform from unconstrained values to the support of a sample site.

    Args:
        site: of a trace.

    Returns:
        The transform.

    Raises:
        ValueError: if there is none; it names NumPyro's reparametrizer where one is known.
    """
    name, support = site["name"], site["fn"].support
    try:
        with helpful_support_errors(site):
            return biject_to(support)
    except (NotImplementedError, ValueError) as error:
        remedy = str(error) or (
            f"Its support, {support}, has no bijection from real numbers; reparametrize it with "
            "handlers.reparam, or register one with numpyro.distributions.biject_to."
        )
        raise ValueError(
            f"Loss.from_model: expected sites that can be made unconstrained, got {name!r} with "
            f"{type(site['fn']).__name__}. {remedy}"
        ) from error
