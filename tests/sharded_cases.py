# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Runs what takes data on data that lie on four simulated devices, for `test_sharded.py`.

    JAX_NUM_CPU_DEVICES=4 python tests/sharded_cases.py GROUP

A process of its own: JAX counts its devices once, and what goes wrong there may end Python
without an exception. One line of JSON per case and kind of mesh: its name, the kind, and the largest difference
from the numbers of the same data on one device, as a multiple of what rounding (or the Monte Carlo error, of
chains that take another way after a rounding) allows. The kinds are a mesh of Auto axes, one of
Explicit axes (the default of `jax.make_mesh`), and the latter within `jax.set_mesh`.
"""

import contextlib
import json
import sys
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax import random
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numpyro.infer import HMC, MCMC, NUTS, SVI, BarkerMH, Predictive, Trace_ELBO
from numpyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal, AutoNormal

from numpyro_regloss import (
    Gaussian,
    Loss,
    Minibatch,
    Record,
    RegularizedLoss,
    TwoStep,
    anchor,
    diagnostics,
    fit,
    forward_kl,
    from_guide,
    kl_divergence,
    model,
    reverse_kl,
    schemes,
    shift,
    to_arviz,
    to_guide,
    values,
)
from numpyro_regloss._core.pareto import pareto_smooth
from numpyro_regloss._core.pytree import with_context_axes

# Sums over 400 rows and draws in float32, in another order.
TOLERANCE = 5e-5
SIGMAS = 5.0
KEY = random.key(0)
INPUTS = random.normal(random.key(1), (64, 2))
OUTPUTS = INPUTS @ jnp.array([1.0, -1.0]) + 0.3 * random.normal(random.key(2), (64,))
CLOUD = random.normal(random.key(3), (400, 2)) @ jnp.array([[1.0, 0.0], [0.5, 0.5]])
ADAM = optax.adam(0.05)
AXES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit, "context": AxisType.Explicit}


def put_on(mesh):
    """A function that divides arrays among the devices where their axis allows it, and copies others."""

    def put(tree, axis=0):
        def place(leaf):
            divisible = np.ndim(leaf) > axis and np.shape(leaf)[axis] % 4 == 0
            spec = P(*[None] * axis, "rows") if divisible else P()
            return jax.device_put(leaf, NamedSharding(mesh, spec))

        return jax.tree.map(place, tree)

    return put


def keep(tree, axis=0):
    del axis
    return tree


class Rough(NamedTuple):
    """What a rounding changes by as much as another seed does, and its standard error."""

    value: Any
    error: Any


def squares(params, x, y):
    return jnp.mean((x @ params["w"] - y) ** 2)


def regression(x, y):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    sd = numpyro.sample("sd", dist.HalfNormal(1.0))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(x @ w, sd), obs=y)


def function_loss(put, minibatch=None):
    params = {"w": jnp.zeros(2)}
    return Loss.from_function(squares, params, put(INPUTS), put(OUTPUTS), minibatch=minibatch)


def model_loss(put, minibatch=None):
    return Loss.from_model(regression, put(INPUTS), put(OUTPUTS), minibatch=minibatch)


def target_of(loss):
    return RegularizedLoss(loss, Gaussian.isotropic(loss.x0, 0.1), temperature=0.1)


def run(engine, method=None, at=None, make_loss=function_loss, temperature=0.1, **options):
    def case(put):
        loss = make_loss(put)
        parts = engine, method or fit.ForwardKL(), at or anchor.Proximal()
        optimizer = TwoStep(loss, 0.1, *parts, temperature=temperature, **options)
        result = optimizer.run(KEY, 3, progress_bar=False)
        return result.history.reference.mean, result.history.loss, result.params

    return case


def first_step(engine, **options):
    """Of chains that take another way after a rounding: they have their own error."""

    def case(put):
        optimizer = TwoStep(model_loss(put), 0.1, engine, fit.ForwardKL(), **options)
        history = optimizer.run(KEY, 1, progress_bar=False).history
        return Rough(history.fitted.mean, history.fit.mean_error)

    return case


def in_batches(put):
    return function_loss(put, Minibatch(16))


def model_in_batches(put):
    return model_loss(put, Minibatch(16))


def of_scheme(make, **options):
    def case(put):
        result = make(function_loss(put), 0.1, **options).run(KEY, 3, progress_bar=False)
        return result.params, result.history.loss

    return case


def arguments_of_a_run(put):
    loss = Loss.from_function(squares, {"w": jnp.zeros(2)}, INPUTS, OUTPUTS)
    optimizer = schemes.local_entropy(loss, 0.1, shift.Importance(200), temperature=0.1)
    data = put(INPUTS), put(OUTPUTS)
    result = optimizer.run(KEY, 2, *data, progress_bar=False)
    before = put(result.state)
    after = optimizer.run(KEY, 1, *data, init_state=before, progress_bar=False)
    state, info = optimizer.step(optimizer.init(KEY, *data), *data)
    history = optimizer.scan(state, 2, *data)[1]
    draws = optimizer.draw(KEY, before, *data)
    traced = jax.jit(lambda *data: optimizer.scan(before, 2, *data)[1].loss)(*data)
    ends = loss.value(jnp.ones(2), data), optimizer.get_params(before, *data)
    return result.params, after.params, info.loss, history.loss, draws.x, traced, ends


def parameters(put):
    # The start, tau and the reference lie on several devices, too.
    loss = Loss.from_function(
        lambda p: jnp.sum((p["a"] - 1.0) ** 2), {"a": put(jnp.arange(4.0) / 10)}
    )
    optimizer = schemes.local_entropy(loss, put(jnp.full(4, 0.1)), shift.Importance(200))
    ones = put(jnp.ones(4))
    reference = Gaussian(ones, put(jnp.full(4, 0.3)))
    target = RegularizedLoss(loss, reference)
    return (
        optimizer.run(KEY, 2, progress_bar=False).params,
        (loss.unconstrain({"a": ones}), loss.value(ones), loss.constrain(ones)),
        (target.log_density(jnp.zeros(4)), kl_divergence(reference, reference)),
        values.heat(KEY, target, num_samples=200),
    )


def entropy(method):
    def case(put):
        target = target_of(function_loss(put))
        estimate = values.local_entropy(KEY, target, method=method, num_samples=400)
        return Rough(estimate.value, estimate.error)

    return case


def heat(put):
    return values.heat(KEY, target_of(model_loss(put)), num_samples=400)


def profile(put):
    params = put({"w": jnp.array([1.0, -1.0])})
    settings = dict(taus=[0.01, 0.1], temperature=0.1, num_samples=400)
    report = values.profile(KEY, function_loss(put), params, **settings)
    return report.loss, report.local_entropy, report.heat


def landscape(put):
    settings = dict(tau=0.1, num_points=4, num_samples=20, temperature=0.1)
    report = values.landscape(KEY, function_loss(put), put({"w": jnp.ones(2)}), **settings)
    return report.loss, report.local_entropy, report.heat


def gradients(put):
    loss, params = function_loss(put), put({"w": jnp.ones(2)})
    data = put(INPUTS), put(OUTPUTS)
    settings = dict(temperature=0.1, num_samples=200)
    return [
        values.value_and_grad(loss, 0.1, kind=kind, **settings)(params, KEY, *data)
        for kind in ("local_entropy", "heat")
    ]


def fits_of_arrays(put):
    x, log_weight = put(CLOUD), put(-0.1 * jnp.sum(CLOUD**2, -1))
    score = put(-CLOUD @ jnp.linalg.inv(jnp.cov(CLOUD.T)))
    fits = [
        forward_kl(x),
        forward_kl(x, log_weight=log_weight),
        forward_kl(x, score=score, log_density=log_weight),
        forward_kl(put(CLOUD.reshape(4, 100, 2)), "diagonal"),
        forward_kl({"b": x[:, 0], "a": x[:, 1]}),
    ]
    gaussian = Gaussian(*put(tuple(fits[0].gaussian)))
    return [(f.gaussian, f.info.mean_error) for f in fits], diagnostics.gaussian_fit(x, gaussian)[
        4:12
    ]


def fits_of_sites(put):
    loss = model_loss(put)
    sites = {"w": put(CLOUD), "sd": put(jnp.exp(CLOUD[:, 0]))}
    fitted = forward_kl(sites, loss=loss).gaussian
    return fitted, diagnostics.gaussian_fit(sites, fitted)[4:12]


def of_draws(fitted, report):
    kl = report.forward_kl
    return Rough(fitted.gaussian.mean, fitted.info.mean_error), Rough(kl.value, kl.error)


def run_of_parallel_chains(put):
    # Chains that run in parallel divide their draws among the devices, on a mesh of NumPyro's own.
    mcmc = MCMC(
        # The default path of 2 π is a full period of a whitened Gaussian.
        HMC(regression, trajectory_length=1.5),
        num_warmup=100,
        num_samples=100,
        num_chains=4,
        chain_method="vectorized" if put is keep else "parallel",
        progress_bar=False,
    )
    mcmc.run(KEY, INPUTS, OUTPUTS)
    return mcmc


def fit_of_parallel_chains(put):
    fitted = forward_kl(run_of_parallel_chains(put))
    return Rough(fitted.gaussian.mean, fitted.info.mean_error)


def parallel_chains(put):
    mcmc, loss = run_of_parallel_chains(put), model_loss(put)
    fitted = forward_kl(mcmc, loss=loss)
    report = diagnostics.gaussian_fit(mcmc, fitted.gaussian, RegularizedLoss(loss), rng_key=KEY)
    assert report.findings
    return of_draws(fitted, report)


def draws_of_numpyro(put):
    target = target_of(function_loss(put))
    mcmc = MCMC(NUTS(model), num_warmup=50, num_samples=50, progress_bar=False)
    mcmc.run(KEY, target, extra_fields=("z_grad",))
    fitted = forward_kl(mcmc)
    return of_draws(fitted, diagnostics.gaussian_fit(mcmc, fitted.gaussian, target, rng_key=KEY))


def views_of_a_run(put):
    engine = shift.NUTS(num_warmup=50, num_samples=52, num_chains=4)
    optimizer = schemes.local_entropy(model_loss(put), 0.01, engine, record=Record(1, 100))
    result = optimizer.run(KEY, 2, progress_bar=False)
    draws = put(optimizer.draw(KEY, result.state), 1)
    fitted = forward_kl(draws)
    data = to_arviz(result, optimizer, draws=draws)
    report = diagnostics.gaussian_fit(
        draws, fitted.gaussian, target_of(optimizer.loss), rng_key=KEY
    )
    assert str(diagnostics.summary(result._replace(state=put(result.state)), optimizer, draws))
    values = result.history.record.local_entropy
    assert data["posterior"]["w"].shape == (4, 52, 2)
    return of_draws(fitted, report), Rough(values.value[0], values.error[0])


def reverse(*settings, plain=False):
    def case(put):
        loss = function_loss(put)
        init = None if plain else Gaussian(*put((loss.x0, jnp.asarray(0.3))))
        target = RegularizedLoss(loss, temperature=0.1) if plain else target_of(loss)
        covariance, method = settings
        return reverse_kl(KEY, target, covariance, method=method, init=init, num_steps=20).gaussian

    return case


def guides(put):
    loss, found = model_loss(put), []
    for make in (AutoNormal, AutoMultivariateNormal, AutoIAFNormal):
        guide = make(regression)
        svi = SVI(regression, guide, numpyro.optim.Adam(0.02), Trace_ELBO())
        params = svi.run(KEY, 200, INPUTS, OUTPUTS, progress_bar=False).params
        fitted = from_guide(guide, put(params), loss=loss, rng_key=KEY, num_samples=400)
        found.append(fitted.gaussian)
    guide = to_guide(Gaussian(*put((jnp.zeros(3), jnp.full(3, 0.1)))), loss)
    return found, Predictive(guide, num_samples=4)(KEY, INPUTS, OUTPUTS)


def smoothed_weights(put):
    # The entrances of the package do the same to what they are given.
    one, both = with_context_axes((put(CLOUD[:, 0]), put(CLOUD.T, 1)))
    return pareto_smooth(one), jax.vmap(pareto_smooth)(both)


HMC_SIZES = dict(num_warmup=50, num_samples=50)
ENGINES = {
    "importance": run(shift.Importance(400)),
    "importance_ess": run(shift.Importance(399, antithetic=False, ess=0.2)),
    "importance_smoothed": run(shift.Importance(400, chunk_size=100, pareto_smoothing=True)),
    "importance_sobol": run(shift.Importance(512, noise="sobol")),
    "importance_batches": run(shift.Importance(400), make_loss=in_batches),
    "importance_record": run(shift.Importance(400), record=Record(1, 100)),
    "importance_model": run(shift.Importance(400), make_loss=model_loss, temperature=10.0),
    "nuts": run(shift.NUTS(**HMC_SIZES)),
    "nuts_model": first_step(shift.NUTS(**HMC_SIZES), temperature=10.0),
    "nuts_batches": run(shift.NUTS(**HMC_SIZES), make_loss=model_in_batches, temperature=10.0),
    "hmc": run(shift.HMC(**HMC_SIZES)),
    "sgld": run(shift.SGLD(0.02, num_samples=50)),
    "sgld_batches": run(shift.SGLD(0.02, num_samples=50), make_loss=in_batches),
    "sgld_model_batches": run(
        shift.SGLD(3e-4, num_samples=50), make_loss=model_in_batches, temperature=100.0
    ),
    "svi": run(shift.SVI(AutoMultivariateNormal, ADAM, 20, 100)),
    "kernel": run(shift.Kernel(BarkerMH, num_warmup=50, num_samples=100)),
    "smc": run(shift.SMC(400)),
    "adaptive": run(shift.Adaptive(shift.Importance(100), max_rounds=4)),
    "robbins_monro": run(shift.Implicit(), fit.RobbinsMonro(20)),
    "robbins_monro_score": run(shift.Implicit(), fit.RobbinsMonro(20, gradient="score")),
    "robbins_monro_batches": run(shift.Implicit(), fit.RobbinsMonro(20), make_loss=in_batches),
    "reverse_kl_step": run(shift.Implicit(), fit.ReverseKL()),
    "reverse_kl_natural": run(shift.Implicit(), fit.ReverseKL("dense", "natural")),
    "reverse_kl_svi": run(shift.Implicit(), fit.ReverseKL(method="svi", num_steps=20)),
    "newton": run(shift.Importance(400), at=anchor.Newton()),
    "anderson": run(shift.Importance(400), at=anchor.Anderson(memory=2)),
    "optax": run(shift.Importance(400), at=anchor.Optax(ADAM)),
    "keep_covariance": run(
        shift.Importance(400), fit.ForwardKL("dense"), anchor.KeepCovariance("dense")
    ),
    "adapt_tau": run(shift.Importance(400), at=anchor.AdaptTau(anchor.Proximal())),
    "entropy_sgd": of_scheme(schemes.entropy_sgd, temperature=0.1),
    "parle": of_scheme(schemes.parle, temperature=0.1),
    "anneal": lambda put: (
        schemes
        .anneal(function_loss(put), 0.3, 3, num_samples=100)
        .run(KEY, 3, progress_bar=False)
        .params
    ),
    "arguments": arguments_of_a_run,
    "parameters": parameters,
}
VALUES_AND_FITS = {
    **{f"entropy_{m}": entropy(m) for m in values.METHODS},
    "heat": heat,
    "profile": profile,
    "landscape": landscape,
    "gradients": gradients,
    "fits_of_arrays": fits_of_arrays,
    "fits_of_sites": fits_of_sites,
    "fit_of_parallel_chains": fit_of_parallel_chains,
    "parallel_chains": parallel_chains,
    "draws_of_numpyro": draws_of_numpyro,
    "views_of_a_run": views_of_a_run,
    "reverse_kl": reverse("dense", "sample_average"),
    "reverse_kl_plain": reverse("dense", "sample_average", plain=True),
    "reverse_kl_diagonal_svi": reverse("diagonal", "svi"),
    "reverse_kl_natural_fit": reverse("dense", "natural"),
    "guides": guides,
    "smoothed_weights": smoothed_weights,
}
CASES = ENGINES | VALUES_AND_FITS
GROUPS = {
    "few": ["importance_batches", "fit_of_parallel_chains"],
    "engines": [*ENGINES],
    "values_and_fits": [*VALUES_AND_FITS],
}


def difference(expected, found):
    """The largest difference of two trees, relative to what is allowed."""
    largest = 0.0
    kinds = dict(is_leaf=lambda node: isinstance(node, Rough))
    for a, b in zip(*(jax.tree.leaves(tree, **kinds) for tree in (expected, found)), strict=True):
        if isinstance(a, Rough):
            allowed = SIGMAS * np.hypot(a.error, b.error)
            if np.isfinite(allowed).all():
                largest = max(largest, np.max(np.abs(a.value - b.value) / allowed))
                continue
            # Of an average that hangs on few draws the error is not known; a rounding is all that may differ.
            assert np.array_equal(a.error, b.error)
            a, b = a.value, b.value
        a, b = np.asarray(a, float), np.asarray(b, float)
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        size = max(1.0, np.max(np.abs(a), where=np.isfinite(a), initial=0.0))
        distance = np.max(np.where(same, 0.0, np.abs(a - b)), initial=0.0)
        largest = max(largest, distance / (size * TOLERANCE))
    return float(largest)


def main(group):
    warnings.simplefilter("ignore")
    # Not at the import, which has one device where doctests are looked for.
    meshes = {k: jax.make_mesh((4,), ("rows",), axis_types=(a,)) for k, a in AXES.items()}
    if group == "few":
        del meshes["auto"]  # whose programs are those of Explicit axes
    for name in GROUPS.get(group, [group]):
        expected = None
        for kind, mesh in {"plain": None, **meshes}.items():
            inside = jax.set_mesh(mesh) if kind == "context" else contextlib.nullcontext()
            try:
                with inside:
                    found = jax.device_get(CASES[name](put_on(mesh) if mesh else keep))
                expected = found if kind == "plain" else expected
                found = difference(expected, found)
            except Exception as error:  # noqa: BLE001
                found = f"{type(error).__name__}: {error}"
            print(json.dumps([name, kind, found]), flush=True)
        jax.clear_caches()  # before the system's room for mapped programs is used up


if __name__ == "__main__":
    main(*sys.argv[1:])
