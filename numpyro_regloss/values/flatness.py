# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""How flat a minimum is: both regularized losses of given parameters over a range of tau.

    rise of F_tau = F_tau(x) - loss(x),   rise of F^H_tau = F^H_tau(x) - loss(x)

At a minimum with Hessian H the heat rises by tau tr(H) / 2 and F_tau by T log det(I + tau H / T) / 2: little where
the minimum is flat on the scale sqrt(tau). Where F_tau falls below the loss there is lower ground within reach.

Reference: García Trillos, Kaplan & Sanz-Alonso (2019), "Variational Characterizations of Local Entropy and Heat
Regularization in Deep Learning".
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

from numpyro_regloss._core.checks import check_choice, check_count, check_key, check_positive
from numpyro_regloss._core.mesh import check_mesh
from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.gaussians.gaussian import Gaussian
from numpyro_regloss.losses.loss import Loss
from numpyro_regloss.losses.regularized import RegularizedLoss
from numpyro_regloss.values.estimate import Estimate
from numpyro_regloss.values.estimators import METHODS, estimate_entropy, estimate_heat
from numpyro_regloss.values.pairs import warn_of_errors

__all__ = ["Profile", "profile"]


class Profile(NamedTuple):
    """A flatness report; prints as a table.

    Attributes:
        tau: variances of the regularizer, `(k,)`, in squared units of the parameters.
        loss: the plain loss at the parameters.
        local_entropy: F_tau, an `Estimate` of arrays `(k,)`.
        heat: F^H_tau, likewise.
        method: how each F_tau was found, k names.
    """

    tau: Array
    loss: Array
    local_entropy: Estimate
    heat: Estimate
    method: tuple[str, ...]

    @property
    def local_entropy_rise(self) -> Array:
        """F_tau less the plain loss, `(k,)`; its error is that of F_tau."""
        return self.local_entropy.value - self.loss

    @property
    def heat_rise(self) -> Array:
        """F^H_tau less the plain loss, `(k,)`; its error is that of F^H_tau."""
        return self.heat.value - self.loss

    def __str__(self) -> str:
        head = f"{'sqrt(tau)':>10} {'F_tau - loss':>24} {'heat - loss':>24} {'k-hat':>7}  method"
        rows = [
            f"{np.sqrt(tau):10.4g} {rise:12.5g} ± {error:<9.2g} {heat_rise:12.5g} ± {heat_error:<9.2g} "
            f"{khat:7.2f}  {method}"
            for tau, rise, error, heat_rise, heat_error, khat, method in zip(
                self.tau,
                self.local_entropy_rise,
                self.local_entropy.error,
                self.heat_rise,
                self.heat.error,
                self.local_entropy.khat,
                self.method,
                strict=True,
            )
        ]
        return "\n".join([f"loss {float(self.loss):.6g}", head, *rows])


def profile(
    rng_key: Key,
    loss: Loss,
    params: Any = None,
    *,
    taus: Sequence[float] | Array,
    temperature: Any = 1.0,
    method: str = "auto",
    num_samples: int = 2_000,
    chunk_size: int | None = None,
    mesh: Any = None,
) -> Profile:
    """Both regularized losses of any trained parameters over a range of tau.

    The same random key serves every tau, so that neighbors share their noise and the curve is smooth.

    Args:
        rng_key: a random key.
        loss: the loss, with its data.
        params: as the user wrote them (the pytree of the function, the constrained sites of the model); default:
            the loss's start.
        taus: variances, in squared units of the (unconstrained) parameters.
        temperature: T, in the units of the loss.
        method: of `values.local_entropy`.
        num_samples: see `values.local_entropy` and `values.heat`.
        chunk_size: evaluations at once.
        mesh: devices that divide the draws, see `TwoStep`.

    Returns:
        The report.

    Raises:
        TypeError: if the loss is not a `Loss`.
        ValueError: if there is no tau, one is not positive, or the plain loss is not finite at the parameters.

    Example:
        >>> loss = Loss.from_function(lambda x: 0.5 * jnp.sum(x**2), jnp.zeros(2))
        >>> report = profile(random.key(0), loss, taus=[0.01, 1.0])
        >>> bool(jnp.all(jnp.abs(report.heat_rise - report.tau) < 4 * report.heat.error))
        True
    """
    what = "values.profile"
    if not isinstance(loss, Loss):
        raise TypeError(
            f"{what}: expected a Loss, got {type(loss).__name__}; wrap it with Loss.from_function(fn, params)."
        )
    rng_key = check_key(rng_key, what)
    check_count(num_samples, f"{what}: num_samples", 4)
    check_choice(method, f"{what}: method", METHODS)
    values = np.atleast_1d(np.asarray(taus, float))
    if values.ndim != 1 or not values.size:
        raise ValueError(
            f"{what}: expected taus as a sequence of variances, such as np.geomspace(1e-4, 1, 9), got {taus!r}."
        )
    for tau in values:
        check_positive(tau, f"{what}: taus")
    mesh = check_mesh(mesh, f"{what}: mesh", external=loss.is_external)
    x = loss.x0 if params is None else loss.unconstrain(params)
    plain = loss.value(x)
    if not np.isfinite(plain):
        raise ValueError(f"{what}: expected a finite loss at the parameters, got {plain}.")
    key_entropy, key_heat = random.split(rng_key)
    entropies, heats = [], []
    for tau in values:
        target = RegularizedLoss(loss, Gaussian.isotropic(x, tau), temperature=temperature)
        entropies.append(
            estimate_entropy(
                key_entropy,
                target,
                method=method,
                num_samples=num_samples,
                chunk_size=chunk_size,
                mesh=mesh,
            )
        )
        heats.append(
            estimate_heat(
                key_heat, target, num_samples=num_samples, chunk_size=chunk_size, mesh=mesh
            )
        )
    report = Profile(
        jnp.asarray(values, x.dtype),
        plain,
        _stacked(entropies),
        _stacked(heats),
        tuple(estimate.method for estimate in entropies),
    )
    judged = {"F_tau": report.local_entropy, "the heat": report.heat}
    warn_of_errors(what, judged, "Use smaller taus or more draws.")
    return report


def _stacked(estimates: list[Estimate]) -> Estimate:
    plain = [Estimate(*estimate) for estimate in estimates]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *plain)
