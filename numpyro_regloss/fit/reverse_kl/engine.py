# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""The Gaussian that minimizes KL(Gaussian || q): variational inference on the shifted density.

    B(N) = E_N loss + T KL(N || reference) = T KL(N || q) + F_tau

is minimized over a family of Gaussians N, and is an upper bound of F_tau. With the covariance of the reference
kept, it is the second step of the paper's heat scheme: a proximal step on the heat-regularized loss.

The mean depends on the family. In the other direction, KL(q || N), the best mean is that of q whatever the
covariance; here it solves E_N ∇loss + T Σ_ref⁻¹ (mean - centre) = 0, where the expectation is over N itself, so
where the loss is skewed a Gaussian of another width has another best mean. See the example of `reverse_kl`.

References: García Trillos, Kaplan & Sanz-Alonso (2019), "Variational Characterizations of Local Entropy and
Heat Regularization in Deep Learning"; Opper & Archambeau (2009), "The Variational Gaussian Approximation
Revisited"; and those of the three methods.
"""

import warnings
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from numpyro.util import find_stack_level

from numpyro_regloss._core.checks import (
    check_choice,
    check_count,
    check_differentiable,
    check_key,
    check_optimizer,
    differentiating,
)
from numpyro_regloss._core.pytree import (
    all_finite,
    is_concrete,
    pytree_dataclass,
    static_field,
    strip_weak_types,
)
from numpyro_regloss._core.settings import own_settings
from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.draws.base import Draws
from numpyro_regloss.draws.base_draws import round_up
from numpyro_regloss.draws.first_width import best_width
from numpyro_regloss.fit.base import Fit, FitResult
from numpyro_regloss.fit.reverse_kl.coordinates import (
    Solution,
    coordinates_of,
    draw,
    evaluator,
    from_relative,
    noise_for,
    summarize,
    to_relative,
)
from numpyro_regloss.fit.reverse_kl.guide import guide_fit
from numpyro_regloss.fit.reverse_kl.improper import (
    Guard,
    guarded,
    most_growth,
    still_growing,
    warn_improper,
)
from numpyro_regloss.fit.reverse_kl.natural_gradient import first_stage, natural_gradient, unused
from numpyro_regloss.fit.reverse_kl.sample_average import sample_average
from numpyro_regloss.gaussians.families import check_family, nearest_in_reverse_kl
from numpyro_regloss.gaussians.gaussian import AnyGaussian, check_gaussian
from numpyro_regloss.losses.probe import Probe, check_gradient, probe
from numpyro_regloss.losses.regularized import RegularizedLoss

__all__ = ["ReverseKL", "ReverseKLInfo", "ReverseKLState", "reverse_kl"]

METHODS = ("sample_average", "natural", "svi")
DEFAULT_STEPS = {"sample_average": 200, "natural": 200, "svi": 1000}
# Draws at the end of a fit, and during the fit where they are fixed; per parameter where they span a matrix.
DEFAULT_DRAWS, DRAWS_PER_PARAMETER = 256, 4
# Of very many parameters the default is fewer draws, but 16 at least: so many numbers are 128 MB.
MAX_NUMBERS, LEAST_DRAWS = 2**25, 16
SVI_PARTICLES = 16
# Of the residual on fixed draws: about so many standard deviations the mean may be off.
MOST_LEFT = 0.1


class ReverseKLState(NamedTuple):
    """The last solution, from which the next one starts, in units of the reference.

    Attributes:
        loc: the mean, whitened by the reference, `(dim,)`.
        scale: None with the covariance of the reference, else the scale relative to the reference's:
            `()` isotropic, `(dim,)` diagonal, `(dim, dim)` dense, the pair `(dim,)` (variances) and
            `(dim, rank)` of low rank.
    """

    loc: Array
    scale: Any


class ReverseKLInfo(NamedTuple):
    """Diagnostics of one fit.

    Attributes:
        ok: Gaussian, bound and its error are finite, and the target has a finite Gaussian.
        num_loss: zero.
        num_grad: gradient evaluations, including those of line searches.
        bound: E loss + T KL(Gaussian || reference), in the units of the loss: an upper bound of F_tau(centre);
            without a reference E loss - T entropy, an upper bound of -T log ∫ exp(-loss / T).
        bound_error: its standard error. Draws that are spread out evenly count as if they were independent, so
            in few dimensions it is too large.
        residual: norm of the gradient of bound / T with respect to mean and (logarithmic) scale, in standard
            deviations of the Gaussian: how far it is from stationary on the draws of the fit.
        num_steps: steps done; of `"sample_average"` and `"natural"` evaluations of all draws.
        num_rejected: steps that met a loss or gradient that was not finite.
        improper: coordinates in which the target has no finite Gaussian, `(dim,)` booleans, or None where it has a
            reference. The bound is then -inf, and a weak constraint kept these coordinates finite. Their mean and
            variance have no meaning. Those of the other coordinates are right, unless the density even grows in
            these directions.
    """

    ok: Array
    num_loss: Array
    num_grad: Array
    bound: Array
    bound_error: Array
    residual: Array
    num_steps: Array
    num_rejected: Array
    improper: Any = None


@pytree_dataclass
class ReverseKL(Fit):
    """Gaussian variational inference on the shifted density.

    There are three methods:

    - `"sample_average"`: quasi-Newton minimization on draws that are fixed during the fit, spread out evenly and
      of exact moments. Quadratic losses are solved exactly where there are twice as many draws as parameters.
    - `"natural"`: natural gradients on such draws, with the Hessian from gradients by Stein's identity. It needs
      the fewest gradients if the loss is smooth, and memory of dim² for every family.
    - `"svi"`: NumPyro's SVI with an Optax optimizer and fresh draws in every step. It is for minibatches of large
      data, and for optimizers of your own.

    With minibatches, the first two methods give each antithetic pair of draws its own batch for the whole fit.

    Args:
        covariance: the family of covariances, in the coordinates of the parameters. `"reference"`: the mean
            only (the heat step); `"isotropic"`, `"diagonal"`, `"dense"`; `"low_rank"`: a diagonal plus `rank`
            factors, at a cost of dim · rank per draw. The mean depends on it.
        method: how to minimize.
        rank: number of factors with `covariance="low_rank"`, else None.
        num_steps: steps at most, of `"sample_average"` and `"natural"` evaluations of all draws. Default: 200;
            with `"svi"` 1000.
        num_particles: draws, rounded up to a power of two and to at least four; with `"svi"` per step, rounded
            up to an even number. Default: 256, or four per parameter with `"dense"` or `"natural"` if that is
            more, or fewer with more than a hundred thousand parameters; with `"svi"` 16.
        optimizer: an Optax or NumPyro optimizer for `"svi"`, built once; default: Adam whose rate falls from 0.1
            (in standard deviations of the start) to zero along a cosine.

    Raises:
        TypeError: if a setting is of the wrong kind.
        ValueError: if a setting is out of range, or settings do not go together.

    Example:
        >>> ReverseKL(covariance="dense").method
        'sample_average'
    """

    covariance: str = static_field(default="reference")  # ty: ignore[incompatible-attribute-override]
    method: str = static_field(default="sample_average")
    rank: int | None = static_field(default=None)
    num_steps: int | None = static_field(default=None)
    num_particles: int | None = static_field(default=None)
    optimizer: Any = static_field(default=None)

    uses_gradient: ClassVar[bool] = True
    uses_draws: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_family(self.covariance, self.rank, "ReverseKL")
        check_choice(self.method, "ReverseKL: method", METHODS)
        for name, count in (("num_steps", self.num_steps), ("num_particles", self.num_particles)):
            if count is not None:
                check_count(count, f"ReverseKL: {name}")
        check_optimizer(self.optimizer, "ReverseKL")
        if self.optimizer is not None and self.method != "svi":
            raise ValueError(
                f'ReverseKL: expected an optimizer only with method="svi", got one with {self.method!r}, which '
                "has steps of its own; leave it out."
            )
        if self.covariance == "low_rank" and self.method == "natural":
            raise ValueError(
                'ReverseKL: expected covariance="low_rank" with method="sample_average" or "svi", got "natural", '
                "whose updates of the precision do not keep the rank."
            )

    def init(self, rng_key: Key, target: RegularizedLoss) -> ReverseKLState:
        """The reference itself, or the nearest Gaussian of the family.

        Args:
            rng_key: draws first factors where there are none.
            target: the first target.

        Returns:
            The state.
        """
        frame = self._frame(target)
        return self._relative(
            nearest_in_reverse_kl(frame, self.covariance, self.rank, rng_key), frame
        )

    def step(
        self, rng_key: Key, state: ReverseKLState, target: RegularizedLoss, draws: Draws
    ) -> tuple[ReverseKLState, AnyGaussian, ReverseKLInfo]:
        """Minimizes the bound from the last solution.

        Args:
            rng_key: a random key.
            state: the last solution.
            target: the target.
            draws: unused.

        Returns:
            The solution in units of the reference, the Gaussian and the info.
        """
        del draws
        return self._step(rng_key, state, target)

    def _step(
        self,
        rng_key: Key,
        state: ReverseKLState,
        target: RegularizedLoss,
        guard: Guard | None = None,
        limit: Array | None = None,
    ) -> tuple[ReverseKLState, AnyGaussian, ReverseKLInfo]:
        frame = self._frame(target)
        start = from_relative(state.loc, state.scale, frame, self._unit(frame))
        key_noise, key_fit, key_batch = random.split(rng_key, 3)
        reference, evaluate = target.reference, guarded(evaluator(key_batch, target), guard)
        noise = noise_for(key_noise, start, self.covariance, self._num_draws(target))
        if self.method == "svi":
            pairs = -(-(self.num_particles or SVI_PARTICLES) // 2)
            settings = (self._num_steps, pairs, self.optimizer, guard)
            gaussian, rejected = guide_fit(key_fit, target, start, self.covariance, *settings)
            evaluation = evaluate(draw(gaussian, noise))
            solution = Solution(gaussian, evaluation, jnp.asarray(self._num_steps), rejected)
            num_grad = jnp.asarray(self._num_steps * 2 * pairs + len(noise))
        else:
            minimize = sample_average if self.method == "sample_average" else natural_gradient
            solution = minimize(evaluate, start, self.covariance, noise, reference, self._num_steps)
            num_grad = solution.num_steps * len(noise)
        gaussian = solution.gaussian
        summary = summarize(gaussian, self.covariance, noise, solution.evaluation, reference)
        bound = target.temperature * summary.bound
        bound_error = target.temperature * summary.bound_error
        after = self._relative(gaussian, frame)
        ok, improper = all_finite((gaussian, after, bound, bound_error)), None
        if reference is None:
            if limit is None:
                limit = most_growth(noise.dtype) * jnp.sqrt(start.variance)
            at = (noise, draw(gaussian, noise), solution.evaluation.gradient)
            improper = still_growing(gaussian, *at, guard, limit)
            endless = jnp.where(jnp.any(improper), jnp.inf, 0.0)
            ok, bound, bound_error = ok & (endless == 0), bound - endless, bound_error + endless
        info = ReverseKLInfo(
            ok=ok,
            num_loss=jnp.asarray(0),
            num_grad=num_grad,
            bound=bound,
            bound_error=bound_error,
            residual=jnp.where(jnp.isfinite(summary.residual), summary.residual, jnp.inf),
            num_steps=solution.num_steps,
            num_rejected=solution.num_rejected,
            improper=improper,
        )
        return strip_weak_types(_select(info.ok, after, state)), gaussian, strip_weak_types(info)

    @property
    def _num_steps(self) -> int:
        return self.num_steps or DEFAULT_STEPS[self.method]

    def _num_draws(self, target: RegularizedLoss) -> int:
        spans = self.covariance == "dense" or self.method == "natural"
        count = min(DEFAULT_DRAWS, max(LEAST_DRAWS, MAX_NUMBERS // target.dim))
        if spans:
            count = max(DEFAULT_DRAWS, DRAWS_PER_PARAMETER * target.dim)
        if self.num_particles is not None and self.method != "svi":
            count = self.num_particles
        least = 2 * target.dim
        unbounded = self.covariance == "dense" and target.reference is None
        if (self.method == "natural" or unbounded) and round_up(count) < least:
            raise ValueError(
                f"ReverseKL: expected num_particles of at least twice the number of parameters, {least}, with "
                f'method="natural", or a dense covariance without a reference, got {count}; leave it out for '
                "the default."
            )
        return round_up(count)

    def _frame(self, target: RegularizedLoss) -> AnyGaussian:
        if self.covariance == "reference" and target.reference is None:
            raise ValueError(
                'ReverseKL: expected a target with a reference for covariance="reference", got one without; use '
                'covariance="dense", or RegularizedLoss(loss, Gaussian.isotropic(x, tau)).'
            )
        return coordinates_of(target)

    def _unit(self, frame: AnyGaussian) -> AnyGaussian:
        # Of the factors only the shape matters: variances are what scales are relative to.
        return nearest_in_reverse_kl(frame, self.covariance, self.rank, random.key(0))

    def _relative(self, gaussian: AnyGaussian, frame: AnyGaussian) -> ReverseKLState:
        loc, scale = to_relative(gaussian, frame, self._unit(frame))
        return strip_weak_types(
            ReverseKLState(loc, None if self.covariance == "reference" else scale)
        )


def reverse_kl(
    rng_key: Key,
    target: RegularizedLoss,
    covariance: str = "dense",
    *,
    rank: int | None = None,
    method: str = "sample_average",
    init: AnyGaussian | None = None,
    num_steps: int | None = None,
    num_particles: int | None = None,
    optimizer: Any = None,
) -> FitResult:
    """Fits a Gaussian to a target by KL(Gaussian || target), outside of a two-step scheme.

    Without a reference the target is the plain posterior exp(-loss / T). The fit then starts at the loss's start,
    with the best of some widths. If 256 draws span the parameters, or the family is `"dense"`, it takes natural
    gradients before the method's own steps; they do not depend on the units of the parameters. Otherwise give
    parameters of similar units, or `init`.

    A density that does not fall off along some direction (a flat prior without data, two parameters of which only
    the sum counts) has no finite Gaussian: `info.improper` and a warning name the coordinates. Directions across
    several coordinates are found only where natural gradients are used. Elsewhere only parameters that nothing
    depends on are found.

    Args:
        rng_key: a random key.
        target: loss, reference or None, and temperature.
        covariance: the family: `"dense"`, `"diagonal"`, `"isotropic"`, `"low_rank"`, or `"reference"`, which
            keeps the covariance of the reference.
        rank: number of factors with `covariance="low_rank"`.
        method: `"sample_average"`, `"natural"` or `"svi"`, see `ReverseKL`.
        init: where to start; default: the reference.
        num_steps: see `ReverseKL`.
        num_particles: see `ReverseKL`.
        optimizer: see `ReverseKL`.

    Returns:
        The Gaussian and the info, a pair. Under `jax.jit` there are no warnings: look at `info.ok`.

    Raises:
        TypeError: if an argument is of the wrong kind, or the loss returns integers or is external.
        ValueError: if an argument is out of range, arguments do not go together, or the gradient is zero
            everywhere around the start, though the loss is not constant.

    Example:
        The mean depends on the family. Here q ∝ exp(-(e^x - x)) N(x; 0, 1) is skewed, so that a narrower Gaussian
        has a mean further to the right than the one with the reference's width:

        >>> from numpyro_regloss import Gaussian, Loss
        >>> loss = Loss.from_function(lambda x: jnp.sum(jnp.exp(x) - x), jnp.zeros(1))
        >>> target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, tau=1.0))
        >>> for covariance in ("reference", "dense"):
        ...     gaussian, info = reverse_kl(random.key(0), target, covariance)
        ...     print(f"{float(gaussian.mean[0]):.2f} {float(gaussian.variance[0]):.2f}")
        -0.26 1.00
        -0.12 0.47
    """
    engine = ReverseKL(covariance, method, rank, num_steps, num_particles, optimizer)
    rng_key = check_key(rng_key, "reverse_kl")
    if not isinstance(target, RegularizedLoss):
        raise TypeError(
            f"reverse_kl: expected a RegularizedLoss, got {type(target).__name__}; build "
            "RegularizedLoss(loss, Gaussian.isotropic(x, tau)), or RegularizedLoss(loss) for the posterior."
        )
    target.loss.check_captured()
    target.loss.check_precision("reverse_kl")
    remedy = "shift.Importance with fit.ForwardKL"
    check_differentiable(["ReverseKL"], target.loss, "reverse_kl", remedy)
    if init is not None:
        init = check_gaussian(init, target.dim, "reverse_kl: init")
    with differentiating(["ReverseKL"], target.loss, "reverse_kl", remedy):
        gaussian, info, found = _fit(engine, rng_key, target, init)
    if is_concrete(found):
        check_gradient(jax.device_get(found), ["ReverseKL"], "reverse_kl")
        unsettled = method != "svi" and MOST_LEFT < info.residual < np.inf
        if info.improper is not None and np.any(info.improper):
            warn_improper(info.improper, target.loss.flat_names, settled=not unsettled)
        elif unsettled:
            warnings.warn(_unsettled(info, engine), stacklevel=find_stack_level())
    return FitResult(gaussian, info)


@jax.jit
@own_settings
def _fit(
    engine: ReverseKL, rng_key: Key, target: RegularizedLoss, init: AnyGaussian | None
) -> tuple[AnyGaussian, ReverseKLInfo, Probe]:
    frame = engine._frame(target)  # noqa: SLF001
    key_width, key_first, key_step = random.split(rng_key, 3)
    start, num_loss, num_grad = frame if init is None else init, jnp.asarray(0), jnp.asarray(0)
    if init is None and target.reference is None:
        start, num_loss = best_width(key_width, target)
    seen = probe(rng_key, target.on_batch(rng_key), around=start)
    guard = limit = None
    if target.reference is None:
        limit = most_growth(start.mean.dtype) * jnp.sqrt(start.variance)
        # Natural gradients do not depend on units, of which nothing is known; their draws must span the space.
        count = max(DEFAULT_DRAWS, DRAWS_PER_PARAMETER * target.dim)
        if engine.covariance == "dense" or 2 * target.dim <= DEFAULT_DRAWS:
            steps, size = DEFAULT_STEPS["natural"], round_up(count)
            found, guard, num_grad = first_stage(key_first, target, start, limit, steps, size)
            start = found if init is None else start
        else:
            guard, num_grad = unused(key_first, target, start)
    key_start, key_step = random.split(key_step)
    start = nearest_in_reverse_kl(start, engine.covariance, engine.rank, key_start)
    state = engine._relative(start, frame)  # noqa: SLF001
    _, gaussian, info = engine._step(key_step, state, target, guard, limit)  # noqa: SLF001
    num_grad = info.num_grad + num_grad + seen.values.size
    return gaussian, strip_weak_types(info._replace(num_loss=num_loss, num_grad=num_grad)), seen


def _unsettled(info: ReverseKLInfo, engine: ReverseKL) -> str:
    return (
        f"reverse_kl: the Gaussian had not settled after {int(info.num_steps)} of {engine._num_steps} steps: the "  # noqa: SLF001
        f"gradient of its bound (info.residual) is {float(info.residual):.3g} in its standard deviations, where "
        f'at most {MOST_LEFT} is small. Allow more num_steps, start nearer (init=), use covariance="dense" where '
        "directions differ much in width, or write parameters in units in which they vary by about one."
    )


def _select(ok: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)
