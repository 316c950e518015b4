# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Gaussians from NumPyro guides and guides from Gaussians."""

import functools
import pickle
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from conftest import SIGMAS, long, with_long
from jax import random
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.distributions.transforms import OrderedTransform
from numpyro.infer import SVI, Predictive, Trace_ELBO, autoguide
from numpyro.infer.util import unconstrain_fn

import numpyro_regloss as regloss
from numpyro_regloss import (
    Gaussian,
    Loss,
    LowRankGaussian,
    RegularizedLoss,
    from_guide,
    kl_divergence,
    to_guide,
)
from numpyro_regloss.guides.sampling import draw_sites

KEY = random.key(0)
NUM_DRAWS = 4000
# float32, through transforms that amplify rounding.
RTOL = 2e-4


def mixed(x, y=None):
    # Names are sorted otherwise than the sites; the simplex has fewer coordinates than values.
    zeta = numpyro.sample("zeta", dist.Gamma(4.0, 4.0))
    mix = numpyro.sample("mix", dist.Dirichlet(jnp.ones(3)))
    width = numpyro.sample("width", dist.Uniform(0.0, 2.0))
    base = dist.Normal(0.0, 1.0).expand([2]).to_event(1)
    cut = numpyro.sample("cut", dist.TransformedDistribution(base, OrderedTransform()))
    with numpyro.plate("group", 2):
        beta = numpyro.sample("beta", dist.Normal(0.0, 1.0 + zeta))
    total = numpyro.deterministic("total", beta.sum() + cut[1])
    with numpyro.plate("rows", len(x)):
        numpyro.sample("y", dist.Normal(total * x + mix[0], 0.5 + width), obs=y)


X = np.linspace(-1.0, 1.0, 12)
Y = 0.5 * X + 0.3
MIXED = Loss.from_model(mixed, X, Y)
DIM = MIXED.dim

SCHOOLS = (
    8,
    np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]),
    np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]),
)


def eight_schools(J, sigma, y=None):
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    with numpyro.plate("J", J):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.deterministic("twice", 2 * theta)
        numpyro.sample("obs", dist.Normal(theta, sigma), obs=y)


SCHOOLS_LOSS = Loss.from_model(eight_schools, *SCHOOLS)


def conjugate(y):
    # The posterior is Gaussian in unconstrained coordinates: the data say nothing about the positive site.
    positive = numpyro.sample("positive", dist.LogNormal(0.0, 0.5))
    mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
    numpyro.deterministic("ratio", mean / positive)
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(mean, 1.0), obs=y)


CONJUGATE_DATA = np.array([0.5, 1.5, 1.0])
CONJUGATE = Loss.from_model(conjugate, CONJUGATE_DATA)
POSTERIOR = Gaussian(jnp.array([0.75, 0.0]), jnp.array([0.5, 0.5]))


def batched():
    with numpyro.plate("rows", 3):
        b = numpyro.sample("b", dist.Normal(0, 1).expand([2]).to_event(1))
        numpyro.sample("a", dist.LogNormal(b[:, 0], 1.0))


def by_hand(y):
    center = numpyro.param("center", 0.75)
    scale = numpyro.param("scale", 0.5, constraint=dist.constraints.positive)
    numpyro.sample("positive", dist.LogNormal(0.0, 0.5))
    numpyro.sample("mean", dist.Normal(center, scale))


def with_point(y):
    numpyro.sample("positive", dist.Delta(1.0))
    numpyro.sample("mean", dist.Normal(0.0, 1.0))


def outside(y):
    numpyro.sample("positive", dist.Normal(0.0, 1.0))
    numpyro.sample("mean", dist.Normal(0.0, 1.0))


def half(y):
    numpyro.sample("mean", dist.Normal(0.0, 1.0))


def with_auxiliary(y):
    shift = numpyro.sample("shift", dist.Normal(0.0, 0.3), infer={"is_auxiliary": True})
    numpyro.sample("positive", dist.LogNormal(0.0, 0.5))
    numpyro.sample("mean", dist.Normal(0.75 + shift, 0.4))


def with_mutable(y):
    numpyro.primitives.mutable("count", {"n": jnp.zeros(())})
    by_hand(y)


def initialized(model, guide, *args, num_steps=0):
    svi = SVI(model, guide, numpyro.optim.Adam(0.02), Trace_ELBO())
    if num_steps:
        return svi.run(KEY, num_steps, *args, progress_bar=False).params
    # The order of eager sites, of which each operation is a program: those that check arguments are not needed.
    with numpyro.validation_enabled(is_validate=False):
        return svi.get_params(svi.init(KEY, *args))


def shaken(params):
    # Values that no two coordinates share, without training.
    rng = np.random.default_rng(7)
    new = {}
    for name, value in params.items():
        z = 0.4 * rng.normal(size=value.shape)
        if name.endswith("scale_tril"):
            new[name] = 0.5 * (np.tril(z, -1) + np.exp(z) * np.eye(z.shape[-1]))
        else:
            new[name] = 0.5 * np.exp(z) if name.endswith("_scale") else 2 * z
    return {name: jnp.asarray(value, jnp.float32) for name, value in new.items()}


EXACT = {
    "AutoNormal": ("diagonal", autoguide.AutoNormal),
    "AutoDiagonalNormal": ("diagonal", autoguide.AutoDiagonalNormal),
    "AutoMultivariateNormal": ("dense", autoguide.AutoMultivariateNormal),
    "AutoLowRankMultivariateNormal": (
        "low_rank",
        functools.partial(autoguide.AutoLowRankMultivariateNormal, rank=2, prefix="other"),
    ),
    "AutoLaplaceApproximation": ("dense", autoguide.AutoLaplaceApproximation),
}


# That of Laplace has to be trained.
BY_NAME = with_long(EXACT, EXACT.keys() - {"AutoNormal", "AutoMultivariateNormal"})


@functools.cache
def exact_case(name):
    structure, build = EXACT[name]
    guide = build(mixed)
    if name == "AutoLaplaceApproximation":
        params = initialized(mixed, guide, X, Y, num_steps=1500)
    else:
        params = shaken(initialized(mixed, guide, X, Y))
    return structure, guide, params


def flat_draws(loss, model, args, draws):
    """Constrained draws as flat vectors, by NumPyro's own functions; a dict ravels in the order of names."""
    latent = {name: draws[name] for name in loss.names}

    def ravel(values):
        with numpyro.handlers.seed(rng_seed=0):
            return jax.flatten_util.ravel_pytree(unconstrain_fn(model, args, {}, values))[0]

    return jax.jit(jax.vmap(ravel))(latent)


def assert_moments(gaussian, x):
    """Mean and covariance of independent draws within their Monte Carlo errors."""
    x, covariance = np.asarray(x), np.asarray(gaussian.covariance)
    variance = np.diag(covariance)
    error = np.sqrt(variance / len(x))
    assert np.all(np.abs(x.mean(0) - gaussian.mean) < SIGMAS * error)
    spread = np.outer(variance, variance) + covariance**2
    difference = np.cov(x, rowvar=False) - covariance
    assert np.all(np.abs(difference) < SIGMAS * np.sqrt(spread / len(x)))


def assert_same(a, b, rtol=RTOL):
    assert type(a) is type(b)
    for one, other in zip(a, b, strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=1e-6)


# The next test has all of them.
@pytest.mark.long
@pytest.mark.parametrize("name", EXACT)
def test_exact_against_draws_of_the_guide(name):
    structure, guide, params = exact_case(name)
    gaussian, info = from_guide(guide, params, loss=MIXED)
    assert gaussian.structure == structure
    assert (info.exact, info.num_samples, info.num_loss, info.weighted) == (True, 0, 0, False)
    assert info.khat == -jnp.inf
    np.testing.assert_array_equal(info.mean_error, jnp.zeros(DIM))
    # One program instead of some hundred.
    draw = jax.jit(lambda key: guide.sample_posterior(key, params, sample_shape=(NUM_DRAWS,)))
    assert_moments(gaussian, flat_draws(MIXED, mixed, (X, Y), draw(random.key(1))))


@pytest.mark.parametrize("name", BY_NAME)
def test_exact_against_quantiles_and_posterior(name):
    _, guide, params = exact_case(name)
    gaussian = from_guide(guide, params).gaussian
    theirs = guide.quantiles(params, [0.1, 0.5, 0.9])
    for i, z in enumerate((-1.2815516, 0.0, 1.2815516)):
        ours = MIXED.constrain(gaussian.mean + z * jnp.sqrt(gaussian.variance))
        for site in MIXED.names:
            np.testing.assert_allclose(ours[site], theirs[site][i], rtol=2e-3, atol=1e-5)
    if name == "AutoNormal":
        return
    posterior = guide.get_posterior(params)
    covariance = (
        jnp.diag(posterior.variance)
        if name == "AutoDiagonalNormal"
        else posterior.covariance_matrix
    )
    assert list(guide._unpack_latent(posterior.mean)) == ["zeta", "mix", "width", "cut", "beta"]
    columns = jax.vmap(lambda row: ravel(guide._unpack_latent(row)))
    np.testing.assert_allclose(
        gaussian.covariance, columns(columns(covariance).T), rtol=2e-3, atol=1e-5
    )
    np.testing.assert_allclose(gaussian.mean, ravel(guide._unpack_latent(posterior.mean)))


def ravel(sites):
    return jax.flatten_util.ravel_pytree(sites)[0]


def test_order_of_a_guide_initialized_under_jit():
    # There NumPyro's vector is in the order of names, eagerly in that of the model.
    guide = autoguide.AutoDiagonalNormal(mixed)
    svi = SVI(mixed, guide, numpyro.optim.Adam(0.1), Trace_ELBO())
    params = shaken(svi.get_params(jax.jit(svi.init)(KEY, X, Y)))
    np.testing.assert_array_equal(from_guide(guide, params).gaussian.mean, params["auto_loc"])
    _, eager, _ = exact_case("AutoDiagonalNormal")
    assert not jnp.array_equal(from_guide(eager, params).gaussian.mean, params["auto_loc"])


@pytest.mark.parametrize(
    ("build", "structure"),
    [
        long(autoguide.AutoBatchedMultivariateNormal, "dense"),
        long(functools.partial(autoguide.AutoBatchedLowRankMultivariateNormal, rank=1), "low_rank"),
    ],
)
def test_batched_guides_are_exact(build, structure):
    guide = build(batched, batch_ndim=1)
    params = shaken(initialized(batched, guide))
    gaussian, info = from_guide(guide, params)
    assert gaussian.structure == structure
    assert info.exact
    draw = jax.jit(lambda key: guide.sample_posterior(key, params, sample_shape=(NUM_DRAWS,)))
    draws = draw(random.key(1))
    assert_moments(gaussian, flat_draws(Loss.from_model(batched), batched, (), draws))


def test_families_of_exact_guides_match_moments():
    _, guide, params = exact_case("AutoLowRankMultivariateNormal")
    own = from_guide(guide, params).gaussian
    dense = from_guide(guide, params, covariance="dense").gaussian
    np.testing.assert_allclose(dense.covariance, own.covariance, rtol=1e-4, atol=1e-5)
    diagonal = from_guide(guide, params, covariance="diagonal").gaussian
    np.testing.assert_allclose(diagonal.variance, own.variance, rtol=1e-5)
    isotropic = from_guide(guide, params, covariance="isotropic").gaussian
    np.testing.assert_allclose(isotropic.scale**2, own.variance.mean(), rtol=1e-5)
    assert_same(from_guide(guide, params, covariance="low_rank", rank=2).gaussian, own, 0)


def test_laplace_takes_new_arguments():
    guide = autoguide.AutoLaplaceApproximation(conjugate)
    initialized(conjugate, guide, CONJUGATE_DATA)
    # The mode, in the order of the model; the posterior of both data is Gaussian.
    params = {"auto_loc": jnp.array([0.0, 0.75])}
    gaussian, info = from_guide(guide, params)
    assert info.exact
    assert gaussian.structure == "dense"
    np.testing.assert_allclose(gaussian.mean, POSTERIOR.mean, atol=1e-6)
    np.testing.assert_allclose(gaussian.covariance, POSTERIOR.covariance, atol=1e-5)
    assert_same(from_guide(guide, params, y=CONJUGATE_DATA).gaussian, gaussian)
    many = from_guide(guide, params, np.tile(CONJUGATE_DATA, 20)).gaussian
    np.testing.assert_allclose(many.variance, [1 / 61, 0.25], rtol=1e-4)


def test_subclasses_with_another_distribution_are_not_read_off():
    class Sharper(autoguide.AutoDiagonalNormal):
        def _get_posterior(self):
            base = super()._get_posterior()
            return dist.Normal(base.loc, base.scale / 10)

    guide = Sharper(conjugate)
    params = initialized(conjugate, guide, CONJUGATE_DATA)
    gaussian, info = from_guide(guide, params, rng_key=KEY, covariance="diagonal")
    assert not info.exact
    np.testing.assert_allclose(gaussian.scale, 0.01, rtol=0.1)


def within_errors(gaussian, info, exact):
    return jnp.all(jnp.abs(gaussian.mean - exact.mean) < SIGMAS * info.mean_error)


def test_right_guide_by_hand():
    gaussian, info = from_guide(by_hand, BY_HAND, loss=CONJUGATE, rng_key=KEY)
    assert info.weighted
    assert not info.exact
    assert (info.num_samples, info.num_loss) == (2000, 2000)
    assert info.khat < 0.7
    np.testing.assert_allclose(info.ess, 2000, rtol=1e-3)
    assert within_errors(gaussian, info, POSTERIOR)
    np.testing.assert_allclose(gaussian.covariance, POSTERIOR.covariance, atol=0.03)


BY_HAND = {"center": jnp.array(0.75), "scale": jnp.array(0.5)}


def test_weights_correct_a_wrong_guide():
    params = {"center": jnp.array(0.3), "scale": jnp.array(0.8)}
    call = functools.partial(from_guide, by_hand, params, loss=CONJUGATE, rng_key=KEY)
    gaussian, info = call(num_samples=NUM_DRAWS)
    assert info.khat < 0.7
    assert 0.2 * NUM_DRAWS < info.ess < 0.9 * NUM_DRAWS
    assert within_errors(gaussian, info, POSTERIOR)
    np.testing.assert_allclose(gaussian.variance, POSTERIOR.variance, rtol=0.15)
    plain, info = call(weighted=False, covariance="diagonal")
    assert (info.weighted, info.num_loss, float(info.khat)) == (False, 0, -np.inf)
    assert within_errors(plain, info, Gaussian(jnp.array([0.3, 0.0]), None))
    np.testing.assert_allclose(plain.scale, [0.8, 0.5], rtol=0.1)


def test_too_narrow_a_guide_is_reported():
    params = {"center": jnp.array(0.75), "scale": jnp.array(0.05)}
    with pytest.warns(UserWarning, match=r"k-hat of .* > 0.7.*widen it"):
        _, info = from_guide(by_hand, params, loss=CONJUGATE, rng_key=KEY)
    assert info.khat > 0.7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, info = from_guide(by_hand, params, loss=CONJUGATE, rng_key=KEY, weighted=False)
    assert info.khat == -jnp.inf


def test_auxiliary_sites_leave_draws_unweighted():
    gaussian, info = from_guide(with_auxiliary, {}, loss=CONJUGATE, rng_key=KEY)
    assert not info.weighted
    np.testing.assert_allclose(gaussian.covariance, jnp.diag(jnp.array([0.25, 0.25])), atol=0.03)


@pytest.mark.long
def test_flow():
    guide = autoguide.AutoIAFNormal(mixed, num_flows=1)
    params = initialized(mixed, guide, X, Y, num_steps=20)
    gaussian, info = from_guide(guide, params, rng_key=KEY)
    assert not info.weighted
    assert gaussian.structure == "dense"

    # The same guide by the sites that it emits, as if it were written by hand.
    def by_sites(*args):
        return guide(*args)

    again = functools.partial(from_guide, by_sites, params, loss=MIXED, rng_key=random.key(1))
    other, other_info = again(weighted=False)
    error = jnp.hypot(info.mean_error, other_info.mean_error)
    assert jnp.all(jnp.abs(gaussian.mean - other.mean) < SIGMAS * error)
    error = jnp.hypot(info.covariance_error, other_info.covariance_error)
    assert jnp.all(jnp.abs(gaussian.covariance - other.covariance) < SIGMAS * error)
    family = {"covariance": "diagonal"}
    with pytest.warns(UserWarning, match="k-hat"):
        weighted = from_guide(guide, params, loss=MIXED, rng_key=KEY, **family).info
    with pytest.warns(UserWarning, match="k-hat"):
        other_info = again(**family).info
    assert weighted.weighted
    assert other_info.weighted
    np.testing.assert_allclose(weighted.ess, other_info.ess, rtol=0.5)


def test_annealed_guide_is_weighted():
    guide = autoguide.AutoDAIS(conjugate, K=2, init_scale=0.6)
    params = initialized(conjugate, guide, CONJUGATE_DATA, num_steps=200)
    gaussian, info = from_guide(guide, params, loss=CONJUGATE, rng_key=KEY)
    assert info.weighted
    assert info.khat < 0.7
    assert within_errors(gaussian, info, POSTERIOR)
    np.testing.assert_allclose(gaussian.variance, POSTERIOR.variance, rtol=0.2)


def gaussians(dim, mean=None):
    mean = jnp.zeros(dim) if mean is None else mean
    noise = 0.1 * random.normal(random.key(5), (dim, dim))
    spread = 0.2 * jnp.exp(noise[0])
    return {
        "isotropic": Gaussian(mean, jnp.asarray(0.3)),
        "diagonal": Gaussian(mean, spread),
        "dense": Gaussian(mean, jnp.diag(spread) + jnp.tril(noise, -1)),
        "low_rank": LowRankGaussian(mean, spread**2, noise[:, :2]),
    }


STRUCTURES = ("isotropic", "diagonal", "dense", "low_rank")


@pytest.mark.both
@pytest.mark.parametrize("structure", STRUCTURES)
def test_round_trip(structure):
    gaussian = gaussians(DIM)[structure]
    guide = to_guide(gaussian, MIXED)
    params = initialized(mixed, guide, X, Y)
    assert all(name.startswith("gaussian_") for name in params)
    back, info = from_guide(guide, params, loss=MIXED)
    assert info.exact
    assert back.structure == structure
    assert_same(back, gaussian, rtol=1e-5)
    fixed = to_guide(gaussian, MIXED, trainable=False)
    assert initialized(mixed, fixed, X, Y) == {}
    assert_same(from_guide(fixed, {}).gaussian, gaussian, rtol=0)
    again = pickle.loads(pickle.dumps(guide))
    assert again == guide
    assert_same(from_guide(again, params).gaussian, back, rtol=0)


def test_densities_of_the_emitted_sites():
    # Joint draw, Delta sites and Jacobians together are the Gaussian's density.
    gaussian = gaussians(DIM)["dense"]
    guide = to_guide(gaussian, MIXED, trainable=False)
    draws = draw_sites(guide, {}, MIXED.source, MIXED.arguments, KEY, 50)
    np.testing.assert_allclose(draws.log_density, gaussian.log_prob(draws.x), rtol=1e-3, atol=1e-2)


# The next two have those of a run, and of the regularized loss.
@pytest.mark.long
@pytest.mark.parametrize("structure", STRUCTURES)
def test_first_elbo(structure):
    gaussian = gaussians(DIM)[structure]
    svi = SVI(mixed, to_guide(gaussian, MIXED), numpyro.optim.Adam(0.01), Trace_ELBO(1000))
    # One program instead of some hundred; below, likewise.
    first = jax.jit(lambda key: svi.evaluate(svi.init(key, X, Y), X, Y))(KEY)
    x = gaussian.sample(random.key(2), (4000,))
    terms = mixed_losses(x) + gaussian.log_prob(x)
    error = jnp.std(terms) * (1 / 1000 + 1 / 4000) ** 0.5
    assert jnp.abs(first - terms.mean()) < SIGMAS * error


mixed_losses = jax.jit(jax.vmap(MIXED.value))


def test_training_and_predictive_of_the_guide():
    start = gaussians(10, jnp.array([6.0, 1.0, *[6.0] * 8]))["dense"]
    guide = to_guide(start, SCHOOLS_LOSS)
    svi = SVI(eight_schools, guide, numpyro.optim.Adam(0.01), Trace_ELBO(num_particles=50))
    state = jax.jit(lambda key: svi.init(key, *SCHOOLS))(KEY)
    result = svi.run(KEY, 150, *SCHOOLS, init_state=state, progress_bar=False)
    noise = jnp.std(result.losses[-10:])
    assert result.losses[-10:].mean() < result.losses[0] - 5 * noise
    gaussian = from_guide(guide, result.params).gaussian
    assert gaussian.structure == "dense"
    predict = Predictive(guide, params=result.params, num_samples=2000)
    draws = jax.jit(lambda key: predict(key, *SCHOOLS))(KEY)
    assert {name: value.shape for name, value in draws.items()} == {
        "_gaussian_latent": (2000, 10),
        "mu": (2000,),
        "tau": (2000,),
        "theta": (2000, 8),
        "twice": (2000, 8),
    }
    assert jnp.all(draws["tau"] > 0)
    np.testing.assert_allclose(draws["twice"], 2 * draws["theta"])
    flat = draws["_gaussian_latent"]
    assert_moments(gaussian, flat)
    for name, column in (("mu", flat[:, 0]), ("tau", jnp.exp(flat[:, 1])), ("theta", flat[:, 2:])):
        np.testing.assert_allclose(draws[name], column, rtol=1e-5)
    predict = Predictive(eight_schools, guide=guide, params=result.params, num_samples=9)
    predicted = jax.jit(lambda key: predict(key, *SCHOOLS[:2]))(KEY)
    assert predicted["obs"].shape == (9, 8)


@pytest.mark.both
def test_predictions_for_data_of_another_size():
    guide = to_guide(gaussians(DIM)["diagonal"], MIXED)
    params = initialized(mixed, guide, X, Y)
    new = np.linspace(0.0, 3.0, 5)
    predict = Predictive(mixed, guide=guide, params=params, num_samples=NUM_DRAWS)
    predicted = jax.jit(predict)(KEY, new)
    assert predicted["y"].shape == (NUM_DRAWS, 5)
    predict = Predictive(guide, params=params, num_samples=NUM_DRAWS)
    draws = jax.jit(predict)(random.key(1), new)
    assert set(draws) == {*MIXED.names, "total", "_gaussian_latent"}
    assert draws["mix"].shape == (NUM_DRAWS, 3)
    np.testing.assert_allclose(draws["mix"].sum(-1), 1.0, rtol=1e-5)
    mean = draws["total"][:, None] * new + draws["mix"][:, :1]
    variance = predicted["y"].var(0) + mean.var(0)
    difference = jnp.abs(predicted["y"].mean(0) - mean.mean(0))
    assert jnp.all(difference < SIGMAS * jnp.sqrt(variance / NUM_DRAWS))


def walk(length, y=None):
    """A latent series, positive and real, of which the observations may be the first few."""
    step = numpyro.sample("step", dist.HalfNormal(1.0))

    def move(level, _):
        level = numpyro.sample("level", dist.Normal(level, step))
        rate = numpyro.sample("rate", dist.LogNormal(level, 0.1))
        numpyro.sample("y", dist.Normal(rate, 0.1))
        return level, rate

    with handlers.condition(data={} if y is None else {"y": y}):
        numpyro.deterministic("rates", scan(move, 0.0, None, length=length)[1])


def test_forecasts_of_a_series():
    loss = Loss.from_model(walk, 3, jnp.ones(3))
    gaussian = Gaussian(jnp.arange(7.0) / 7, jnp.full(7, 0.01))
    guide = to_guide(gaussian, loss, trainable=False)
    # One program instead of some hundred; below, likewise.
    draw = Predictive(guide, num_samples=500)
    draws = jax.jit(lambda key: draw(key, 5, jnp.ones(3)))(KEY)
    assert draws["level"].shape == draws["rate"].shape == draws["rates"].shape == (500, 5)
    np.testing.assert_allclose(draws["rates"], draws["rate"])
    # The steps of the loss are the Gaussian's; those beyond are drawn from the model.
    flat = draws["_gaussian_latent"]
    np.testing.assert_allclose(draws["level"][:, :3], flat[:, :3], rtol=1e-5)
    np.testing.assert_allclose(draws["rate"][:, :3], jnp.exp(flat[:, 3:6]), rtol=1e-5)
    moves = jnp.diff(draws["level"][:, 2:], axis=1) / draws["step"][:, None]
    assert jnp.all(jnp.abs(moves.mean(0)) < SIGMAS / 500**0.5)
    assert jnp.all(jnp.abs(moves.std(0) - 1) < SIGMAS / 1000**0.5)
    predict = Predictive(walk, guide=guide, num_samples=5)
    predicted = jax.jit(lambda key: predict(key, 5, jnp.ones(3))["y"])(KEY)
    np.testing.assert_array_equal(predicted[:, :3], 1.0)
    assert jnp.all(predicted[:, 3:].std(0) > 0)

    def emitted(length):
        trace = handlers.trace(handlers.seed(guide, 0)).get_trace(length)
        return trace, sum(
            jnp.sum(site["fn"].log_prob(site["value"]))
            for name, site in trace.items()
            if name in loss.names
        )

    # The emitted densities are those of the parts: the Gaussian's change of variables, then the model.
    short, (trace, longer) = emitted(3)[1], emitted(5)
    level, rate, step = (trace[name]["value"] for name in ("level", "rate", "step"))
    beyond = dist.Normal(level[2:4], step).log_prob(level[3:])
    beyond += dist.LogNormal(level[3:], 0.1).log_prob(rate[3:])
    np.testing.assert_allclose(longer - short, beyond.sum(), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="to_guide: the model raised .* but not shorter"):
        Predictive(guide, num_samples=2)(KEY, 2)


def test_arguments_with_which_the_model_does_not_run():
    def line(x, y):
        slope = numpyro.sample("slope", dist.Normal(0, 1))
        with numpyro.plate("row", len(y)):
            numpyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)

    x = jnp.arange(3.0)
    guide = to_guide(gaussians(1)["dense"], Loss.from_model(line, x, x), trainable=False)
    for kind, new in (
        (TypeError, (jnp.arange(5.0),)),
        (TypeError, (jnp.arange(5.0), None)),
        (ValueError, (jnp.arange(5.0), x)),
    ):
        with pytest.raises(kind, match=r"to_guide: the model raised .* or None"):
            Predictive(guide, num_samples=2)(KEY, *new)


def test_supports_that_depend_on_other_sites():
    def nested(upper_scale):
        upper = numpyro.sample("upper", dist.Exponential(upper_scale))
        numpyro.sample("inner", dist.Uniform(0.0, upper))

    loss = Loss.from_model(nested, 1.0)
    guide = to_guide(gaussians(2)["dense"], loss, trainable=False)
    draws = jax.jit(Predictive(guide, num_samples=200))(KEY, 1.0)
    assert jnp.all((draws["inner"] > 0) & (draws["inner"] < draws["upper"]))
    cloud = draw_sites(guide, {}, loss.source, loss.arguments, KEY, 50)
    np.testing.assert_allclose(
        cloud.log_density, guide.gaussian.log_prob(cloud.x), rtol=1e-3, atol=1e-3
    )


def rows_loss(params, y):
    return jnp.sum((params["a"] - y) ** 2) + jnp.sum(params["b"] ** 4)


FUNCTION = Loss.from_function(rows_loss, {"a": jnp.zeros(3), "b": jnp.ones(2)}, np.arange(3.0))


@pytest.mark.parametrize(
    ("loss", "reference"),
    [long(FUNCTION, "none"), long(FUNCTION, "dense"), (SCHOOLS_LOSS, "isotropic")],
    ids=["function-none", "function-dense", "model-isotropic"],
)
def test_guide_of_the_regularized_loss(loss, reference):
    gaussian = gaussians(loss.dim)["dense"]
    prior = None if reference == "none" else gaussians(loss.dim, loss.x0 + 0.1)[reference]
    target = RegularizedLoss(loss, prior, temperature=2.0)
    guide = to_guide(gaussian, loss)
    svi = SVI(regloss.model, guide, numpyro.optim.Adam(0.01), Trace_ELBO(num_particles=1000))
    state = jax.jit(svi.init)(KEY, target)
    x = gaussian.sample(random.key(2), (4000,))
    energy = jax.jit(jax.vmap(target.energy))(x)
    if prior is None:
        bound = energy + gaussian.log_prob(x)
        expected = bound.mean()
    else:
        bound = energy + gaussian.log_prob(x) - prior.log_prob(x)
        expected = energy.mean() + kl_divergence(gaussian, prior)
    error = jnp.std(bound) * (1 / 1000 + 1 / 4000) ** 0.5
    assert jnp.abs(jax.jit(svi.evaluate)(state, target) - expected) < SIGMAS * error
    assert_same(from_guide(guide, svi.get_params(state)).gaussian, gaussian, rtol=1e-5)
    draws = jax.jit(Predictive(guide, num_samples=7))(KEY, target)
    assert set(loss.constrain(loss.x0)) <= set(draws)
    np.testing.assert_allclose(draws["x"], draws["_gaussian_latent"], rtol=1e-4, atol=1e-5)


NEVER_RUN = autoguide.AutoNormal(conjugate)


@functools.cache
def trained():
    guide = autoguide.AutoDiagonalNormal(conjugate)
    return guide, initialized(conjugate, guide, CONJUGATE_DATA)


def flat_direction(y):
    a = numpyro.sample("a", dist.ImproperUniform(dist.constraints.real, (), ()))
    b = numpyro.sample("b", dist.ImproperUniform(dist.constraints.real, (), ()))
    numpyro.sample("y", dist.Normal(a + b, 1.0), obs=y)


def flat_laplace():
    guide = autoguide.AutoLaplaceApproximation(flat_direction)
    return from_guide(guide, initialized(flat_direction, guide, 1.0))


def laplace_under_jit():
    guide = autoguide.AutoLaplaceApproximation(conjugate)
    svi = SVI(conjugate, guide, numpyro.optim.Adam(0.02), Trace_ELBO())
    return from_guide(guide, svi.get_params(jax.jit(svi.init)(KEY, CONJUGATE_DATA)))


def with_trained(**changes):
    guide, params = trained()
    return from_guide(guide, {**params, **changes})


def drawn(guide=by_hand, params=BY_HAND, loss=CONJUGATE, rng_key=KEY, **kwargs):
    return from_guide(guide, params, loss=loss, rng_key=rng_key, **kwargs)


def guide_of(kind, *args, **kwargs):
    return from_guide(kind(conjugate, *args, **kwargs), {})


def likelihood_loss():
    return Loss.from_model(conjugate, CONJUGATE_DATA, density="likelihood")


def called(*args, loss=CONJUGATE):
    guide = to_guide(gaussians(loss.dim)["diagonal"], loss)
    return numpyro.handlers.trace(numpyro.handlers.seed(guide, 0)).get_trace(*args)


UNIT = Gaussian(jnp.zeros(2), jnp.asarray(1.0))

BAD = {
    "never run": (lambda: from_guide(NEVER_RUN, {}), ValueError, "never ran; call svi.init"),
    "class": (lambda: from_guide(autoguide.AutoNormal, {}), TypeError, "an object or a function"),
    "no guide": (lambda: from_guide(3, {}), TypeError, "got int"),
    "delta": (lambda: guide_of(autoguide.AutoDelta), TypeError, "AutoLaplaceApproximation"),
    "list": (lambda: guide_of(autoguide.AutoGuideList), TypeError, "each part"),
    "semi": (
        lambda: guide_of(autoguide.AutoSemiDAIS, local_model=conjugate),
        TypeError,
        "sample_posterior",
    ),
    "surrogate": (
        lambda: guide_of(autoguide.AutoSurrogateLikelihoodDAIS, surrogate_model=conjugate),
        TypeError,
        "sample_posterior",
    ),
    "missing params": (lambda: from_guide(trained()[0], {}), ValueError, "without .*auto_loc"),
    "shape": (lambda: with_trained(auto_loc=jnp.zeros(3)), ValueError, "of shape"),
    "negative": (lambda: with_trained(auto_scale=-jnp.ones(2)), ValueError, "svi.get_params"),
    "nan": (lambda: with_trained(auto_loc=jnp.full(2, jnp.nan)), ValueError, "finite params"),
    "result": (lambda: from_guide(trained()[0], trained()), TypeError, "as a dict, got tuple"),
    "other loss": (lambda: from_guide(*trained(), loss=MIXED), ValueError, "same model"),
    "function loss": (lambda: from_guide(*trained(), loss=FUNCTION), TypeError, "leave loss out"),
    "loss kind": (lambda: from_guide(*trained(), loss=conjugate), TypeError, "as a Loss"),
    "family": (lambda: from_guide(*trained(), covariance="full"), ValueError, "covariance"),
    "reference": (lambda: from_guide(*trained(), covariance="reference"), ValueError, "covariance"),
    "rank": (lambda: from_guide(*trained(), rank=2), ValueError, "rank only"),
    "low rank": (
        lambda: from_guide(*trained(), covariance="low_rank", rank=1),
        ValueError,
        "exactly diagonal",
    ),
    "flat": (flat_laplace, ValueError, r"entries \[0, 1\].*hessian_fn"),
    "endless": (
        lambda: with_trained(auto_scale=jnp.array([1.0, 1e25])),
        ValueError,
        r"entries \[1\].*proper prior",
    ),
    "under jit": (laplace_under_jit, ValueError, "the model's arguments"),
    "no key": (lambda: drawn(rng_key=None), TypeError, r"rng_key=jax.random.key\(0\)"),
    "bad key": (lambda: drawn(rng_key=0), TypeError, "random key"),
    "no loss": (lambda: drawn(loss=None), TypeError, "Loss.from_model"),
    "one draw": (lambda: drawn(num_samples=1), ValueError, "num_samples"),
    "weighted kind": (lambda: drawn(weighted="yes"), TypeError, "True, False or None"),
    "weighted without loss": (
        lambda: from_guide(*trained(), weighted=True),
        ValueError,
        "expected loss for weighted",
    ),
    "weighted auxiliary": (
        lambda: drawn(with_auxiliary, {}, weighted=True),
        ValueError,
        "auxiliary sites",
    ),
    "density": (lambda: drawn(loss=likelihood_loss()), ValueError, "density='joint'"),
    "param site": (lambda: drawn(params={"center": 0.0}), ValueError, "without .*scale"),
    "missing site": (lambda: drawn(half, {}), ValueError, "without .*positive"),
    "point": (lambda: drawn(with_point, {}), TypeError, "no covariance"),
    "outside": (lambda: drawn(outside, {}), ValueError, "same supports"),
    "mutable": (lambda: drawn(with_mutable), ValueError, "mutable sites"),
    "to: loss": (lambda: to_guide(UNIT, conjugate), TypeError, "expected a Loss"),
    "to: gaussian": (lambda: to_guide(dist.Normal(), CONJUGATE), TypeError, "from_distribution"),
    "to: dim": (lambda: to_guide(UNIT, MIXED), ValueError, f"over {DIM} parameters"),
    "to: nan": (lambda: to_guide(Gaussian(UNIT.mean, jnp.nan), CONJUGATE), ValueError, "finite"),
    "to: upper": (
        lambda: to_guide(Gaussian(UNIT.mean, jnp.ones((2, 2))), CONJUGATE),
        ValueError,
        "lower triangular",
    ),
    "to: trainable": (lambda: to_guide(UNIT, CONJUGATE, trainable=1), TypeError, "trainable"),
    "to: prefix": (lambda: to_guide(UNIT, CONJUGATE, prefix=""), ValueError, "another prefix"),
    "call: function": (lambda: called(1.0, loss=FUNCTION), TypeError, "a RegularizedLoss"),
    "call: size": (lambda: called(5, *SCHOOLS[1:], loss=SCHOOLS_LOSS), ValueError, "'theta'"),
    "call: target": (lambda: called(RegularizedLoss(MIXED)), ValueError, "a guide for its loss"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, error, words = BAD[case]
    with pytest.raises(error, match=words):
        call()
