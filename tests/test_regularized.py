# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""The regularized loss as a density and as a NumPyro model."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from conftest import SIGMAS, long
from jax import random
from numpyro.infer import HMC, MCMC, NUTS, SVI, Predictive, Trace_ELBO, log_likelihood
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.util import log_density
from test_gaussian import gaussians
from test_loss import SIGMA, Y, eight_schools

import numpyro_regloss as regloss
from numpyro_regloss import Gaussian, Loss, RegularizedLoss, problems, to_guide
from numpyro_regloss._core.pytree import replace_fields
from numpyro_regloss.io_arviz.labels import label_sites


def quartic(params):
    return jnp.sum(params["a"] ** 4) + jnp.prod(params["b"])


def function_loss():
    return Loss.from_function(quartic, {"a": jnp.ones(3), "b": 0.5})


FUNCTION = function_loss()


def joint_density(target, eps):
    return log_density(regloss.model, (target,), {}, {"eps": eps})[0]


@jax.jit
def forms(target, eps, x):
    return (
        jax.vmap(target.log_density)(x),
        jax.vmap(lambda e: joint_density(target, e))(eps),
        jax.vmap(target.whitened_potential)(eps),
        jax.vmap(target.value)(x),
    )


@pytest.mark.parametrize("temperature", [1.0, 0.1])
@pytest.mark.parametrize("kind", gaussians())
def test_three_forms_of_one_density(kind, temperature):
    reference = gaussians()[kind]
    target = RegularizedLoss(FUNCTION, reference, temperature=temperature)
    eps = 0.5 * random.normal(random.key(0), (6, 4))
    x = reference.unwhiten(eps)
    density, joint, potential, loss = forms(target, eps, x)
    # 1e-4: float32 rounding of terms of size a hundred.
    np.testing.assert_allclose(joint, density + reference.log_det, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(joint, -potential - 2 * jnp.log(2 * jnp.pi), rtol=1e-4, atol=1e-3)
    expected = reference.log_prob(x) - loss / temperature
    np.testing.assert_allclose(density, expected, rtol=1e-4, atol=1e-3)


def counts(x, y, scale=1.0):
    """Two observed sites in plates, one of them called as a site of ours, a factor, a constraint."""
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    sd = numpyro.sample("sd", dist.HalfNormal(scale))
    numpyro.factor("soft", -jnp.abs(slope))
    with numpyro.plate("row", len(x)):
        numpyro.sample("x", dist.Normal(slope * jnp.arange(len(x)), sd), obs=x)
        numpyro.sample("count", dist.Poisson(jnp.exp(slope)), obs=y)


COUNTS = jnp.array([0.1, 1.2, 1.9]), jnp.array([1, 3, 2])


@pytest.mark.parametrize("density", ["joint", "map", "likelihood"])
@pytest.mark.parametrize("data_scale", [5.0, long(1.0)])
def test_observed_sites_have_their_part_of_the_density(density, data_scale):
    loss = Loss.from_model(counts, *COUNTS, density=density)
    target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, 0.1), temperature=2.0)
    target = replace_fields(target, data_scale=data_scale)
    observed = []

    def joint(eps):
        density, trace = log_density(regloss.model, (target,), {}, {"eps": eps})
        observed.append({name for name, site in trace.items() if site.get("is_observed")})
        return density

    def own(eps):
        return -target.whitened_potential(eps)

    @jax.jit
    @jax.vmap
    def both(eps):
        wanted = target.log_density(target.reference.unwhiten(eps)) + target.reference.log_det
        return joint(eps), wanted, jax.grad(joint)(eps), jax.grad(own)(eps)

    log_joint, wanted, gradient, wanted_gradient = both(random.normal(random.key(0), (3, 2)))
    np.testing.assert_allclose(log_joint, wanted, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(gradient, wanted_gradient, rtol=1e-4, atol=1e-4)
    # The observations are those of the user's model.
    assert all(names == {"x", "count"} for names in observed)


def test_log_likelihood_is_that_of_the_users_model():
    loss = Loss.from_model(counts, *COUNTS)
    target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, 0.1), temperature=3.0)
    draws = Predictive(regloss.model, num_samples=4)(random.key(0), target)
    own = {name: value for name, value in draws.items() if name not in ("x", "count")}
    mine = log_likelihood(regloss.model, own, target)
    user = log_likelihood(counts, {name: own[name] for name in loss.names}, *COUNTS)
    assert set(mine) == {"x", "count"}
    for name, value in mine.items():
        np.testing.assert_allclose(value, user[name], rtol=1e-5)
    function = RegularizedLoss(function_loss(), gaussians()["dense"])
    draws = Predictive(regloss.model, num_samples=2)(random.key(0), function)
    assert log_likelihood(regloss.model, draws, function) == {}


def test_a_wall_stays_a_wall():
    def walled(y):
        top = numpyro.sample("top", dist.Normal(0, 1))
        numpyro.sample("y", dist.Poisson(jnp.maximum(top, 0.0)), obs=y)

    loss = Loss.from_model(walled, jnp.array([2]))
    target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, 1.0))
    for eps, infinite in ((-1.0, True), (1.0, False)):
        value = log_density(regloss.model, (target,), {}, {"eps": jnp.array([eps])})[0]
        assert not jnp.isnan(value)
        assert (value == -jnp.inf) == infinite


@pytest.mark.long
def test_mcmc_with_default_initialization():
    problem = problems.quadratic(np.diag([1.0, 4.0]), center=np.array([1.0, -2.0]))
    loss = Loss.from_function(problem.loss, np.zeros(2))
    target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, 0.5))
    mcmc = MCMC(NUTS(regloss.model), num_warmup=300, num_samples=2000, progress_bar=False)
    mcmc.run(random.key(0), target)
    x = mcmc.get_samples()["x"]
    exact = problem.shift_mean(np.zeros(2), 0.5)
    sd = np.sqrt(np.diag(problem.shift_covariance(np.zeros(2), 0.5)))
    ess = numpyro.diagnostics.effective_sample_size(np.asarray(x)[None])
    assert np.all(np.abs(x.mean(0) - exact) < SIGMAS * sd / np.sqrt(ess))


@pytest.mark.both
def test_mcmc_moves_with_the_target():
    loss = Loss.from_function(lambda x: 0.5 * jnp.sum(x**2), np.zeros(2))
    mcmc = MCMC(
        NUTS(regloss.model),
        num_warmup=300,
        num_samples=500,
        progress_bar=False,
        jit_model_args=True,
    )
    for center in (0.0, 10.0):
        mcmc.run(random.key(0), RegularizedLoss(loss, Gaussian.isotropic(loss.x0 + center, 1.0)))
        # The exact mean is half the centre; 500 draws of sd 0.7 leave an error of about 0.03.
        assert np.all(np.abs(mcmc.get_samples()["x"].mean(0) - center / 2) < 0.2)


def test_sites_of_a_model():
    loss = Loss.from_model(eight_schools, 8, SIGMA, Y)
    target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, 0.1))
    draws = Predictive(regloss.model, num_samples=5)(random.key(0), target)
    assert {name: value.shape for name, value in draws.items() if value.size} == {
        "eps": (5, 10),
        "x": (5, 10),
        "mu": (5,),
        "tau": (5,),
        "theta": (5, 8),
        "twice": (5, 8),
        "obs": (5, 8),
    }
    np.testing.assert_allclose(draws["x"], target.reference.unwhiten(draws["eps"]), rtol=1e-5)
    np.testing.assert_allclose(draws["twice"], 2 * draws["theta"], rtol=1e-5)


def test_plain_posterior_without_a_reference():
    loss = Loss.from_function(lambda x: 0.5 * jnp.sum((x - 3.0) ** 2), np.zeros(2))
    target = RegularizedLoss(loss)
    assert target.log_density(loss.x0) == -9.0
    mcmc = MCMC(NUTS(regloss.model), num_warmup=300, num_samples=1000, progress_bar=False)
    mcmc.run(random.key(0), target)
    x = mcmc.get_samples()["x"]
    assert np.all(np.abs(x.mean(0) - 3.0) < 0.2)  # 1000 draws of sd 1
    assert np.all(np.abs(x.std(0) - 1.0) < 0.15)


def test_svi_runs_and_bounds_the_local_entropy():
    problem = problems.quadratic(np.diag([1.0, 4.0]), center=np.array([1.0, -2.0]))
    loss = Loss.from_function(problem.loss, np.zeros(2))
    target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, 0.5))
    svi = SVI(regloss.model, AutoNormal(regloss.model), numpyro.optim.Adam(0.05), Trace_ELBO(20))
    losses = svi.run(random.key(0), 800, target, progress_bar=False).losses
    last = losses[-200:]
    gap = last.mean() - problem.local_entropy(np.zeros(2), 0.5)
    # The diagonal guide holds the exact posterior, so the bound is tight but for the noise of the ELBO.
    assert abs(gap) < SIGMAS * last.std() / 200**0.5 + 0.01


def test_sites_that_clash_are_renamed():
    def clashing(y):
        eps = numpyro.sample("eps", dist.Normal(0, 1))
        x = numpyro.sample("x", dist.Normal(eps, 1))
        numpyro.deterministic("minus_energy", x)
        numpyro.sample("y", dist.Normal(x, 1), obs=y)

    loss = Loss.from_model(clashing, 1.0)
    target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, 0.1))
    trace = numpyro.handlers.trace(numpyro.handlers.seed(regloss.model, 0)).get_trace(target)
    assert set(trace) == {"eps_", "x_", "eps", "x", "minus_energy", "y"}


def test_no_site_has_the_name_of_data():
    def observed(x=None):
        m = numpyro.sample("m", dist.Normal(0, 1))
        with numpyro.plate("minus_energy", 3):
            eps = numpyro.sample("eps", dist.Normal(m, 1), obs=x)
            numpyro.sample("x", dist.Normal(eps, 1e-3), obs=x)

    data = jnp.array([4.0, 5.0, 6.0])
    loss = Loss.from_model(observed, data)
    target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, 0.1))
    samples = Predictive(regloss.model, num_samples=7)(random.key(0), target)
    assert set(samples) == {"eps_", "x_", "m", "eps", "x"}
    np.testing.assert_array_equal(samples["x"], np.tile(data, (7, 1)))
    # Samples of the one model go into the other: nothing is taken for data.
    again = Predictive(regloss.model, samples)(random.key(1), target)
    np.testing.assert_allclose(again["m"], samples["m"])
    samples = {name: samples[name] for name in ("eps_", "x_", "m")}
    predicted = Predictive(observed, samples)(random.key(2))
    assert predicted["x"].shape == predicted["eps"].shape == (7, 3)
    flat = numpyro.handlers.substitute(regloss.model, data={"x_": jnp.zeros(1)})
    trace = numpyro.handlers.trace(flat).get_trace(RegularizedLoss(loss))
    assert set(trace) == {"x_", "m", "eps", "x"}
    with pytest.raises(ValueError, match=r"loss's own \['_eps_latent'\]"):
        to_guide(target.reference, Loss.from_model(clashing_guide, data), prefix="eps")


def clashing_guide(y):
    m = numpyro.sample("m", dist.Normal(0, 1))
    with numpyro.plate("_eps_latent", len(y)):
        numpyro.sample("y", dist.Normal(m, 1), obs=y)


@pytest.mark.both
def test_paths_of_the_same_name():
    params = {"a": {"b": 1.0}, "a/b": 2.0, "c": jnp.array([3.0]), "c[0]": 4.0}
    loss = Loss.from_function(
        lambda p: p["a"]["b"] + 10 * p["a/b"] + 100 * p["c"][0] + 1000 * p["c[0]"], params
    )
    assert loss.names == ("a/b", "a~1b", "c", "c[0]")
    assert loss.flat_names == ("a/b", "a~1b", "c[0]", "c[0]_")
    target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, 0.1))
    samples = Predictive(regloss.model, num_samples=5)(random.key(0), target)
    named = {name: samples[name] for name in loss.names}
    np.testing.assert_allclose(jax.vmap(loss.unconstrain)(named), samples["x"])
    labels = label_sites(loss, loss.bind(), "test", rename={"c[0]": "d"})
    assert [site.variable for site in labels.sites] == ["a.b", "a~1b", "c", "d"]
    assert list(labels.flat) == ["a/b", "a~1b", "c[0]", "d"]
    with warnings.catch_warnings():
        # ArviZ 0.23 announces its refactoring once a day at import.
        warnings.simplefilter("ignore", FutureWarning)
        import arviz as az  # noqa: PLC0415
    loss = Loss.from_model(eight_schools, 8, SIGMA, Y)
    target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, 0.1))
    mcmc = MCMC(
        HMC(regloss.model), num_warmup=200, num_samples=100, num_chains=2, chain_method="vectorized",
        progress_bar=False,
    )  # fmt: skip
    mcmc.run(random.key(0), target)
    data = az.from_numpyro(mcmc, log_likelihood=True)
    assert {"mu", "tau", "theta", "x"} <= set(data.posterior.data_vars)
    # As of the user's own model: eight observations, each with its own likelihood.
    assert set(data.log_likelihood.data_vars) == set(data.observed_data.data_vars) == {"obs"}
    draws = data.posterior.isel(chain=1, draw=7)
    np.testing.assert_allclose(
        data.log_likelihood["obs"].isel(chain=1, draw=7),
        dist.Normal(draws["theta"].values, SIGMA).log_prob(Y),
        rtol=1e-4,
    )
    assert az.loo(data).n_data_points == 8
    assert dict(data.posterior["theta"].sizes)["chain"] == 2
    assert "mu" in az.summary(data, var_names=["mu"]).index


def test_overridden_arguments():
    loss = Loss.from_function(
        lambda x, y, w=1.0: w * jnp.sum((x - y) ** 2), np.zeros(2), np.ones(2)
    )
    reference = Gaussian.isotropic(loss.x0, 1.0)
    assert RegularizedLoss(loss, reference).energy(loss.x0) == 2.0
    assert RegularizedLoss(loss, reference, args=(np.full(2, 3.0),)).energy(loss.x0) == 18.0
    assert (
        RegularizedLoss(loss, reference, kwargs={"w": 5.0}, temperature=2.0).energy(loss.x0) == 5.0
    )
