# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""How flat a minimum is: both regularized losses of given parameters over a range of tau.

    rise of F_tau = F_tau(x) - loss(x),   rise of F^H_tau = F^H_tau(x) - loss(x)

At a minimum with Hessian H the heat rises by tau tr(H) / 2 and F_tau by T log det(I + tau H / T) / 2: little where
the minimum is flat on the scale sqrt(tau). Where F_tau falls below the loss there is lower ground within reach. At
a kink, as networks of ReLUs have, the heat rises as sqrt(tau) at first, whatever the Hessian beside it.

References: García Trillos, Kaplan & Sanz-Alonso (2019), "Variational Characterizations of Local Entropy and Heat
Regularization in Deep Learning"; Li, Xu, Taylor, Studer & Goldstein (2018), "Visualizing the Loss Landscape of
Neural Nets" (scales by filter).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

from numpyro_regloss._core.checks import (
    check_choice,
    check_count,
    check_flag,
    check_key,
    check_positive,
)
from numpyro_regloss._core.html import as_html
from numpyro_regloss._core.mesh import check_mesh
from numpyro_regloss._core.pareto import MAX_KHAT
from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.gaussians.gaussian import Gaussian
from numpyro_regloss.losses.groups import check_scale
from numpyro_regloss.losses.loss import Loss
from numpyro_regloss.losses.regularized import RegularizedLoss
from numpyro_regloss.values.estimate import Estimate
from numpyro_regloss.values.estimators import METHODS, estimate_entropy, estimate_heat
from numpyro_regloss.values.pairs import heat_of_means, warn_of_errors
from numpyro_regloss.values.rise import check_average, pairs

__all__ = ["SCALE_WORDS", "Profile", "is_known", "profile"]

SCALE_WORDS = {
    "filter": "the norm of each filter",
    "layer": "the norm of each layer",
    "groups": "the scale of each group",
}


class Profile(NamedTuple):
    """A flatness report; prints as a table.

    Attributes:
        tau: variances of the regularizer, `(k,)`, in squared units of the parameters, or relative to the squares
            of what `scale` says.
        loss: the plain loss at the parameters.
        local_entropy: F_tau, an `Estimate` of arrays `(k,)`.
        heat: F^H_tau, also an `Estimate`.
        method: how each F_tau was found, k names.
        scale: `"filter"`, `"layer"`, `"groups"` of the user's own, or None.
        batch_size: rows of the batches that it was found on; None for all rows.
    """

    tau: Array
    loss: Array
    local_entropy: Estimate
    heat: Estimate
    method: tuple[str, ...]
    scale: str | None = None
    batch_size: int | None = None

    @property
    def trusted(self) -> np.ndarray:
        """The widths at which both values have a finite error, since no k-hat is above 0.7, `(k,)`."""
        return is_known(self.local_entropy) & is_known(self.heat)

    @property
    def local_entropy_rise(self) -> Array:
        """F_tau less the plain loss, `(k,)`; its error is that of F_tau."""
        return self.local_entropy.value - self.loss

    @property
    def heat_rise(self) -> Array:
        """F^H_tau less the plain loss, `(k,)`; its error is that of F^H_tau."""
        return self.heat.value - self.loss

    def __str__(self) -> str:
        title, (head, *rows) = self._table()
        lines = [("{:>10} {:>24} {:>24} {:>7}  {}{}".format(*head))]
        for width, *rises, khat, method, mark in rows:
            # A sign of plus or minus below the other.
            shown = [f"{rise:>12} ± {error:<9}" for rise, error in (r.split(" ± ") for r in rises)]
            lines.append(f"{width:>10} {' '.join(shown)} {khat:>7}  {method}{mark and '  ' + mark}")
        return "\n".join([title, *lines])

    def _repr_html_(self) -> str:
        title, rows = self._table()
        return as_html(title, rows)

    def _table(self) -> tuple[str, list[list[str]]]:
        cells = [["sqrt(tau)", "F_tau - loss", "heat - loss", "k-hat", "method", ""]]
        columns = self.tau, self.local_entropy_rise, self.heat_rise, self.method
        for i, (tau, rise, heat_rise, method) in enumerate(zip(*columns, strict=True)):
            entropy, heat = _row(self.local_entropy, i), _row(self.heat, i)
            doubtful = [
                name for name, one in (("F_tau", entropy), ("heat", heat)) if not is_known(one)
            ]
            cells.append([
                f"{np.sqrt(tau):.4g}",
                f"{rise:.5g} ± {entropy.error:.2g}",
                f"{heat_rise:.5g} ± {heat.error:.2g}",
                f"{np.maximum(entropy.khat, heat.khat):.2f}",
                method,
                f"! do not trust {' and '.join(doubtful)}" if doubtful else "",
            ])
        title = f"loss {float(self.loss):.6g}"
        if self.scale is not None:
            title += f"; sqrt(tau) relative to {SCALE_WORDS[self.scale]}"
        if self.batch_size is not None:
            title += f"; heat on fresh batches of {self.batch_size} rows, F_tau on one of them"
        return title, cells


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
    scale: Any = None,
    batches: bool = False,
) -> Profile:
    """Both regularized losses of any trained parameters over a range of tau.

    The same random key is used for every tau, so that the curve is smooth.

    With `scale="filter"` each weight moves by sqrt(tau) times the root mean square of its filter, and with
    `"layer"` by that of its whole array. So sqrt(tau) = 0.1 is a tenth of their norms, and if layers of a network
    of ReLUs are rescaled without a change of its function, the profile does not change. Filters are the last axis
    of arrays with two or more axes, as in Flax; biases and gains use the norm of their vector. Weights that are
    all zero do not move.

    With `batches=True` each pair of draws of the heat sees a fresh minibatch, at both of its points and at the
    centre. The heat is then unbiased for averaged losses. An average over a batch is biased within exp(-loss / T),
    so F_tau is that of one batch, less the loss of that batch, and its error says nothing about other batches.

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
        scale: `"filter"`, `"layer"`, or standard deviations by group of parameters in units of sqrt(tau) (a pytree
            prefix of the parameters), to give each layer a tau of its own.
        batches: whether draws use batches in place of all rows.

    Returns:
        The report. Where k-hat is above 0.7 the error is infinite and the table has a mark.

    Raises:
        TypeError: if the loss is not a `Loss`, or is that of a model where norms of its parameters are asked for.
        ValueError: if there is no tau, one is not positive, or the plain loss is not finite at the parameters; if
            the scale is out of range; if batches are asked for of a loss without a minibatch, with a mesh, or of
            a loss whose batches do not average to it.

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
    widths = check_scale(scale, loss, x, f"{what}: scale") ** 2
    check_flag(batches, f"{what}: batches")
    batch_size = _check_batches(loss, mesh, what) if batches else None
    key_entropy, key_heat = random.split(rng_key)
    key_batch = random.fold_in(rng_key, 2)
    entropies, heats = [], []
    for tau in values:
        reference = Gaussian.isotropic(x, tau * widths)
        target = RegularizedLoss(loss, reference, temperature=temperature)
        shown, offset = target, 0.0
        if batches:
            shown = target.on_batch(key_batch)
            offset = plain - _value(shown, x)
        entropy = estimate_entropy(
            key_entropy,
            shown,
            method=method,
            num_samples=num_samples,
            chunk_size=chunk_size,
            mesh=mesh,
        )
        entropies.append(_sure(entropy._replace(value=entropy.value + offset)))
        if batches:
            found = _pairs(key_heat, target, num_pairs=-(-num_samples // 2))
            check_average(found, plain, what)
            rise = heat_of_means(found.rise, found.largest)
            heat = rise._replace(value=plain + rise.value)
        else:
            heat = estimate_heat(
                key_heat, target, num_samples=num_samples, chunk_size=chunk_size, mesh=mesh
            )
        heats.append(_sure(heat))
    report = Profile(
        jnp.asarray(values, x.dtype),
        plain,
        _stacked(entropies),
        _stacked(heats),
        tuple(estimate.method for estimate in entropies),
        scale if scale is None or isinstance(scale, str) else "groups",
        batch_size,
    )
    judged = {"F_tau": report.local_entropy, "the heat": report.heat}
    warn_of_errors(what, judged, "Use smaller taus or more draws.")
    return report


@jax.jit
def _value(target: RegularizedLoss, x: Array) -> Array:
    return target.value(x)


_pairs = jax.jit(pairs, static_argnames="num_pairs")


def _check_batches(loss: Loss, mesh: Any, what: str) -> int:
    if loss.minibatch is None:
        raise ValueError(
            f"{what}: expected a loss with a minibatch for batches=True, got one without; build it with "
            "Loss.from_function(..., minibatch=Minibatch(256))."
        )
    if mesh is not None:
        raise ValueError(f"{what}: expected no mesh with batches=True; leave one of them out.")
    return loss.minibatch.batch_size


def is_known(estimate: Estimate) -> Any:
    """Where an estimate of arrays has a finite error, and no k-hat above 0.7."""
    return np.isfinite(estimate.error) & ~(np.asarray(estimate.khat) > MAX_KHAT)


def _sure(estimate: Estimate) -> Estimate:
    # Whatever the method says of itself: above 0.7 there is no small error.
    error = jnp.where(estimate.khat > MAX_KHAT, jnp.inf, estimate.error)
    return estimate._replace(error=error)


def _row(estimate: Estimate, index: int) -> Estimate:
    return jax.tree.map(lambda a: a[index], estimate)


def _stacked(estimates: list[Estimate]) -> Estimate:
    plain = [Estimate(*estimate) for estimate in estimates]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *plain)
