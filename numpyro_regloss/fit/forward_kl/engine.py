# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""The Gaussian that minimizes KL(q || Gaussian): moment matching, the local-entropy step.

    mean = E_q[x],   covariance = Cov_q(x) within the family

The mean is the same for every family. With the covariance of the reference kept, this is the second step of
the paper's local-entropy scheme: the mean moves by -(tau / T) ∇F_tau, and with the exact mean F_tau decreases.
Scores of the draws, where there are any, are control variates.

References: García Trillos, Kaplan & Sanz-Alonso (2019), "Variational Characterizations of Local Entropy
and Heat Regularization in Deep Learning"; Schäfer & Strimmer (2005), "A Shrinkage Approach to Large-Scale
Covariance Matrix Estimation"; and those of `draws.control_variates` and `factor_analysis`.
"""

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.util import find_stack_level

from numpyro_regloss._core.checks import check_choice
from numpyro_regloss._core.mesh import check_mesh, copied, meshed
from numpyro_regloss._core.processes import here
from numpyro_regloss._core.pytree import all_finite, is_concrete, pytree_dataclass, static_field
from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.draws.agreement import chains_rhat, disagreement
from numpyro_regloss.draws.base import Draws
from numpyro_regloss.draws.control_variates import CONTROLS
from numpyro_regloss.draws.moments import log_density_of, of_draws
from numpyro_regloss.draws.samples import as_draws
from numpyro_regloss.fit.base import Fit, FitResult
from numpyro_regloss.fit.forward_kl.projection import Projection, project, structure_of
from numpyro_regloss.gaussians.families import check_family
from numpyro_regloss.gaussians.gaussian import AnyGaussian
from numpyro_regloss.losses.loss import Loss
from numpyro_regloss.losses.regularized import RegularizedLoss

__all__ = ["ForwardKL", "ForwardKLInfo", "forward_kl"]

# Shrinkage that a user should know of.
MUCH_SHRINKAGE = 0.5
# Coordinates that a message names.
MOST_NAMES = 5


class ForwardKLInfo(NamedTuple):
    """Diagnostics of one fit.

    Attributes:
        ok: the Gaussian is finite, and not one weighted draw alone.
        num_loss: zero.
        num_grad: zero: scores come with the draws.
        mean_error: standard error of the mean, `(dim,)`; infinite when one draw carries all weight.
        covariance_error: standard errors of the covariance before shrinkage: `(dim, dim)` for a dense one,
            `(dim,)` of the variances for a diagonal or low-rank one, `()` for an isotropic one; zero for the
            reference's.
        shrinkage: how far correlations were shrunk towards zero, from 0 (not at all) to 1.
        floored: whether the covariance was singular and was raised.
        control_variate: of the mean: 0 none, 1 diagonal, 2 full, 3 quadratic.
        covariance_control_variate: the same for the covariance.
        score_compatible: False when the scores are not those of a differentiable density, and were not used.
        converged: whether factors converged; True for other families.
        names: of the coordinates, where the samples had names; None within compiled code.
        rhat: split R-hat of the chains that `forward_kl` was given, `(dim,)`, a single chain judged by its halves;
            NaN for weighted or independent draws and for fewer than four per chain. None in a two-step scheme,
            where the shift reports its own.
    """

    ok: Array
    num_loss: Array
    num_grad: Array
    mean_error: Array
    covariance_error: Array
    shrinkage: Array
    floored: Array
    control_variate: Array
    covariance_control_variate: Array
    score_compatible: Array
    converged: Array
    names: Any = None
    rhat: Any = None


@pytree_dataclass
class ForwardKL(Fit):
    """Weighted moment matching.

    Args:
        covariance: `"reference"`: fit the mean only and keep the covariance of the reference (the
            paper); `"isotropic"`, `"diagonal"`, `"dense"`: match it too; `"low_rank"`: a diagonal plus
            `rank` factors, of maximum likelihood.
        control_variates: `"auto"` chooses by leave-one-out error; `"none"`, `"diagonal"`, `"full"` and
            `"quadratic"` are for comparison. Draws without scores have none.
        rank: number of factors of `"low_rank"`.
        shrinkage: `"auto"` shrinks the correlations of a dense covariance towards zero if there are fewer than ten
            effective draws per dimension; `"none"` never does.

    Raises:
        ValueError: if a setting is unknown, or the rank does not fit the family.

    Example:
        >>> ForwardKL(covariance="dense").control_variates
        'auto'
    """

    covariance: str = static_field(default="reference")  # ty: ignore[incompatible-attribute-override]
    control_variates: str = static_field(default="auto")
    rank: int | None = static_field(default=None)
    shrinkage: str = static_field(default="auto")

    def __post_init__(self) -> None:
        check_family(self.covariance, self.rank, "ForwardKL")
        check_choice(self.control_variates, "ForwardKL: control_variates", ("auto", *CONTROLS))
        check_choice(self.shrinkage, "ForwardKL: shrinkage", ("auto", "none"))

    def init(self, rng_key: Key, target: RegularizedLoss) -> tuple[()]:
        """No state."""
        del rng_key, target
        return ()

    def step(
        self, rng_key: Key, state: tuple[()], target: RegularizedLoss, draws: Draws
    ) -> tuple[tuple[()], AnyGaussian, ForwardKLInfo]:
        """Matches the moments of the draws.

        Args:
            rng_key: unused.
            state: `()`.
            target: the target.
            draws: from the shift.

        Returns:
            `()`, the Gaussian and the info.
        """
        del rng_key
        is_used = self.control_variates != "none"
        log_density = log_density_of(target, draws) if is_used else None
        return state, *_fit(self, draws, target.reference, log_density)


def forward_kl(
    samples: Any,
    covariance: str = "dense",
    *,
    rank: int | None = None,
    log_weight: Any = None,
    score: Any = None,
    log_density: Any = None,
    control_variates: str = "auto",
    shrinkage: str = "auto",
    loss: Loss | None = None,
    space: str = "constrained",
    group_by_chain: bool = False,
    mesh: Any = None,
) -> FitResult:
    """The best Gaussian to posterior samples: minimizes KL(samples' distribution || Gaussian).

    Args:
        samples: an array `(draw, dim)` or `(chain, draw, dim)`; a dict of sites as
            `MCMC.get_samples()` returns it, flattened in sorted order of names; an `MCMC` that has run, of any
            model (its latent sites, without discrete ones) or of `numpyro_regloss.model` (the flat parameters,
            and their scores if it ran with `extra_fields=("z_grad",)`); `Draws`.
        covariance: `"isotropic"`, `"diagonal"`, `"dense"` or `"low_rank"`.
        rank: number of factors of `"low_rank"`.
        log_weight: log importance weights, of the samples' leading shape.
        score: gradient of the log density at the samples, of the shape of an array of samples. Control variates
            made from scores reduce the errors of the moments, and most of all where the density is nearly
            Gaussian.
        log_density: log density at the samples, of their leading shape; with scores it shows whether the loss
            jumps.
        control_variates: see `ForwardKL`.
        shrinkage: see `ForwardKL`.
        loss: fits in the flat unconstrained space of this loss: sites are checked against its own.
        space: `"constrained"`, or `"unconstrained"` for dicts of sites that are unconstrained already; with
            a loss only.
        group_by_chain: whether the sites of a dict are `(chain, draw, ...)`, as
            `MCMC.get_samples(group_by_chain=True)` returns them.
        mesh: devices that divide a cloud whose draws are made again from their keys, as `shift.Importance` returns
            it, see `TwoStep`. Stored draws are not divided.

    Returns:
        The Gaussian and the info, with standard errors, the split R-hat of chains and, where sites were given, the
        names of the coordinates. If chains do not agree, a warning says so: with several modes, or labels that
        switch, the moments are those of a mixture, and for draws that wander they have no meaning. Under `jax.jit`
        values are not checked and there are no warnings: look at `info.ok` and `info.rhat`.

    Raises:
        TypeError: if the samples are of another kind, or `mesh` is no mesh.
        ValueError: if shapes do not fit, values are not finite, draws are all equal or too few, one weight carries
            everything, or the mesh has other axes.

    Example:
        >>> from jax import random
        >>> x = 3.0 + 2.0 * random.normal(random.key(0), (4000, 2))
        >>> gaussian, info = forward_kl(x)
        >>> bool(jnp.all(jnp.abs(gaussian.mean - 3.0) < 4 * info.mean_error))
        True
    """
    method = ForwardKL(covariance, control_variates, rank, shrinkage)
    if covariance == "reference":
        raise ValueError(
            'forward_kl: expected covariance as "isotropic", "diagonal", "dense" or "low_rank", got '
            '"reference"; samples have no reference, and the mean is the same for every family.'
        )
    draws, names, log_density = as_draws(
        samples,
        log_weight=log_weight,
        score=score,
        log_density=log_density,
        loss=loss,
        space=space,
        group_by_chain=group_by_chain,
    )
    mesh = check_mesh(mesh, "forward_kl: mesh", external=False)
    arrays = copied(mesh, (method, draws, log_density))
    gaussian, info = here(_jitted_fit(*arrays, mesh=mesh))
    info = info._replace(names=names)
    if is_concrete(info):
        _tell(gaussian, info, draws, covariance)
    return FitResult(gaussian, info)


def _fit(
    method: ForwardKL, draws: Draws, reference: AnyGaussian | None, log_density: Array | None
) -> tuple[AnyGaussian, ForwardKLInfo]:
    dim = jax.eval_shape(lambda: draws.x).shape[-1] if reference is None else reference.dim
    if method.rank is not None and method.rank >= dim:
        raise ValueError(
            f"ForwardKL: expected a rank below the dimension {dim}, got {method.rank}; use "
            'covariance="dense".'
        )
    structure = structure_of(method.covariance, dim)
    if draws.spread is not None and (structure == "dense" or method.covariance == "low_rank"):
        raise ValueError(
            f"ForwardKL: expected stored draws for covariance={method.covariance!r}, got means of batches, which "
            'know no correlations; use shift.SGLD(keep="draws"), or covariance="diagonal" or "isotropic".'
        )
    unit = jnp.ones(dim) if reference is None else jnp.sqrt(reference.variance)
    moments = of_draws(
        draws, unit, log_density, structure=structure, control=method.control_variates
    )
    if structure is None:
        zero, false = jnp.zeros_like(moments.mean), jnp.asarray(False)
        gaussian: AnyGaussian = reference._replace(mean=moments.mean)  # ty: ignore
        projection = Projection(gaussian, zero, zero[0], false, ~false)
    else:
        projection = project(method, moments, draws, reference)
    info = ForwardKLInfo(
        ok=all_finite(projection.gaussian) & ~moments.alone,
        num_loss=jnp.asarray(0),
        num_grad=jnp.asarray(0),
        mean_error=moments.mean_error,
        covariance_error=projection.error,
        shrinkage=projection.shrinkage,
        floored=projection.floored,
        control_variate=moments.control,
        covariance_control_variate=moments.covariance_control,
        score_compatible=moments.compatible,
        converged=projection.converged,
    )
    return projection.gaussian, info


@meshed()
def _jitted_fit(
    method: ForwardKL, draws: Draws, log_density: Array | None
) -> tuple[AnyGaussian, ForwardKLInfo]:
    gaussian, info = _fit(method, draws, None, log_density)
    return gaussian, info._replace(rhat=chains_rhat(draws))


def _effective_draws(gaussian: AnyGaussian, info: ForwardKLInfo, draws: Draws) -> np.ndarray:
    error = np.asarray(info.mean_error)
    # Control variates make the errors of means smaller than draws alone could.
    known = (int(info.control_variate) == 0) & (error > 0)
    variance = np.asarray(gaussian.variance)
    if gaussian.structure == "isotropic":
        variance = np.var(np.asarray(draws.x), (0, 1))
    return np.where(known, variance / np.where(known, error, 1.0) ** 2, np.inf)


def _tell(gaussian: AnyGaussian, info: ForwardKLInfo, draws: Draws, covariance: str) -> None:
    if not bool(info.ok):
        with np.errstate(over="ignore", invalid="ignore"):
            variance = np.var(np.asarray(draws.x), (0, 1))
        huge = np.flatnonzero(~np.isfinite(variance))
        if len(huge):
            listed = ", ".join(str(info.names[i] if info.names else i) for i in huge[:MOST_NAMES])
            raise ValueError(
                "forward_kl: expected draws with a finite variance, got a range that floats cannot hold at "
                f"{listed}. If the density does not fall off along a parameter, its draws wander off: give it a "
                "proper prior or a reference, or leave it out."
            )
        raise ValueError(
            "forward_kl: expected moments of several draws, got a Gaussian that is not finite or that hangs on "
            f"one weight (largest standard error of the mean {float(jnp.max(info.mean_error)):.3g}); draw more, "
            "from a distribution nearer to the target."
        )
    level = find_stack_level()
    if not bool(info.score_compatible):
        warnings.warn(
            "forward_kl: the scores are not those of a differentiable density (they do not average to zero, "
            "or the density changes in another way than they say), so control variates were switched off; for "
            'losses that jump this is right, and control_variates="none" avoids this warning.',
            stacklevel=level,
        )
    if bool(info.floored):
        variance = np.asarray(gaussian.variance)
        names = info.names or [str(i) for i in range(len(variance))]
        smallest = names[int(np.argmin(variance))]
        warnings.warn(
            f"forward_kl: the covariance of the draws is singular, and was raised to a regular one (coordinate "
            f"{smallest} varies least); draw more, drop coordinates that are constant or repeat others, or use "
            f'covariance="diagonal" or "isotropic" instead of {covariance!r}.',
            stacklevel=level,
        )
    rhat, of_chains = np.asarray(info.rhat), None
    if not np.isnan(rhat).any():
        effective = _effective_draws(gaussian, info, draws)
        of_chains = disagreement(draws.x, rhat, effective, info.names)
    if of_chains is not None:
        warnings.warn(f"forward_kl: {of_chains}", stacklevel=level)
    elif float(info.shrinkage) > MUCH_SHRINKAGE:
        warnings.warn(
            f"forward_kl: too few effective draws for a dense covariance of dimension {gaussian.dim}, so that "
            f"correlations were shrunk by {float(info.shrinkage):.0%}; draw more, or use "
            'covariance="low_rank" or "diagonal".',
            stacklevel=level,
        )
    if not bool(info.converged):
        warnings.warn(
            "forward_kl: the factors had not converged when the iterations were used up; use fewer factors.",
            stacklevel=level,
        )
