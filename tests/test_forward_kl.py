# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Forward KL: families, control variates, standard errors, containers of samples."""

import warnings
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from conftest import OPTIMIZED, SIGMAS, long, with_long
from jax import random
from numpyro.infer import HMC, MCMC, NUTS, DiscreteHMCGibbs
from scipy.stats import norm

import numpyro_regloss as regloss
from numpyro_regloss import (
    Gaussian,
    Loss,
    LowRankGaussian,
    RegularizedLoss,
    forward_kl,
    problems,
    shift,
)
from numpyro_regloss._core.stats import split_rhat
from numpyro_regloss.diagnostics.distance import gaussian_fit
from numpyro_regloss.draws.base import StoredDraws
from numpyro_regloss.fit import ForwardKL

FAMILIES = {"isotropic": None, "diagonal": None, "dense": None, "low_rank": 2}
REPETITIONS = 200
REPETITION_KEYS = random.split(random.key(5), REPETITIONS)
# 95 % intervals of 200 repetitions: outside of 90 to 99 % they would be by chance once in a thousand.
COVERAGE = (0.90, 0.99)


def correlated(dim, seed=0):
    rng = np.random.default_rng(seed)
    factor = np.tril(rng.normal(size=(dim, dim)) * 0.4) + np.diag(rng.uniform(0.5, 2.0, dim))
    return rng.normal(size=dim), factor


def samples_of(dim, num, seed=0):
    mean, factor = correlated(dim, seed)
    x = np.random.default_rng(seed + 1).normal(size=(num, dim)) @ factor.T + mean
    return x, mean, factor @ factor.T


@cache
def fitted_to_samples(family):
    x, _, _ = samples_of(5, 2000)
    return x, *forward_kl(x, family, rank=FAMILIES[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_matches_the_moments_of_the_samples(family):
    x, gaussian, info = fitted_to_samples(family)
    np.testing.assert_allclose(gaussian.mean, x.mean(0), atol=1e-5)
    covariance = np.cov(x.T)
    # Each is the best of its family: the covariance, its diagonal, its mean eigenvalue, the same variances.
    if family == "dense":
        np.testing.assert_allclose(gaussian.covariance, covariance, atol=1e-5)
    elif family == "isotropic":
        np.testing.assert_allclose(gaussian.scale**2, np.trace(covariance) / 5, rtol=1e-5)
    else:
        np.testing.assert_allclose(gaussian.variance, np.diag(covariance), rtol=1e-4)
    assert info.ok
    assert info.converged
    assert not info.floored


@pytest.mark.parametrize("family", FAMILIES)
def test_no_gaussian_of_the_family_is_nearer(family):
    # KL(q || Gaussian) is minus the mean log density, up to a constant.
    x, gaussian, _ = fitted_to_samples(family)
    x = jnp.asarray(x, jnp.float32)
    rng = np.random.default_rng(3)
    noise = [0.03 * rng.normal(size=(20, *np.shape(part))) for part in gaussian]
    noise = [np.concatenate([np.zeros_like(n[:1]), n]).astype(np.float32) for n in noise]
    moved = type(gaussian)(*(p + n * np.abs(p) for p, n in zip(gaussian, noise, strict=True)))
    best, *others = jax.jit(jax.vmap(lambda g: jnp.mean(g.log_prob(x))))(moved)
    assert np.all(np.asarray(others) < best + 1e-4)


@pytest.mark.long
def test_factors_are_those_of_maximum_likelihood():
    from sklearn.decomposition import FactorAnalysis  # noqa: PLC0415

    rng = np.random.default_rng(0)
    for dim, num, rank in ((6, 400, 1), (10, 1000, 2), (30, 300, 4)):
        loading = rng.normal(size=(dim, rank))
        x = rng.normal(size=(num, rank)) @ loading.T + rng.normal(size=(num, dim)) * rng.uniform(
            0.5, 1.5, dim
        )
        gaussian, info = forward_kl(x, "low_rank", rank=rank)
        assert info.converged
        assert gaussian.factor.shape == (dim, rank)
        other = FactorAnalysis(rank, svd_method="lapack", tol=1e-4, max_iter=2000).fit(x)
        # Our covariance is the unbiased one, n / (n - 1) times theirs: of no effect at this tolerance, which is
        # a hundredth of a nat per draw.
        assert jnp.mean(gaussian.log_prob(x)) > other.score(x) - 0.01


def test_weights_are_importance_weights():
    # Draws of a wide normal, weighted to N(1, 0.5²).
    x = 2.0 * np.random.default_rng(0).normal(size=(20_000, 2)).astype(np.float32)
    log_weight = np.sum(norm.logpdf(x, 1.0, 0.5) - norm.logpdf(x, 0.0, 2.0), -1)
    gaussian, info = forward_kl(x, log_weight=log_weight)
    assert np.all(np.abs(gaussian.mean - 1.0) < SIGMAS * info.mean_error)
    error = np.abs(gaussian.covariance - 0.25 * np.eye(2))
    assert np.all(error < SIGMAS * info.covariance_error)
    assert np.all(info.covariance_error < 0.02)


def skewed(x):
    return jnp.sum(jnp.exp(x) - 0.5 * x)


@jax.jit
def nuts_draws(engine, rng_key, target):
    return engine.step(rng_key, engine.init(rng_key, target), target)[1]


def cloud_of(kind, rng_key, target):
    if kind == "nuts":
        return nuts_draws(
            shift.NUTS(num_warmup=150, num_samples=250, num_chains=2), rng_key, target
        )
    engine = shift.Importance(600, antithetic=kind == "antithetic")
    return engine.step(rng_key, (), target)[1]


SKEWED = Loss.from_function(skewed, np.zeros(3))
SKEWED_TARGET = RegularizedLoss(SKEWED, Gaussian.isotropic(SKEWED.x0 + 0.5, 0.6))


@cache
def independent_cloud():
    engine = shift.Importance(2000, antithetic=False)
    return jax.jit(engine.step)(random.key(0), (), SKEWED_TARGET)[1]


@cache
def chains_of_nuts():
    # They take longest, and serve both families with control variates and without.
    draw = partial(cloud_of, "nuts", target=SKEWED_TARGET)
    return jax.jit(lambda keys: jax.lax.map(draw, keys))(REPETITION_KEYS)


@pytest.fixture(scope="module")
def skewed_moments():
    # Coordinates are independent: one integral on a fine grid.
    grid = np.linspace(-6, 6, 20_001)
    log_q = -(np.exp(grid) - 0.5 * grid) - (grid - 0.5) ** 2 / 1.2
    weight = np.exp(log_q - log_q.max())
    weight /= weight.sum()
    mean = weight @ grid
    return mean, weight @ (grid - mean) ** 2


# Without scores there are no control variates; the isotropic variance is the mean one of the dense family. Chains
# of another law, with scores and without, are those of `test_errors_hold_for_chains_that_mix_slowly`.
COVERED = [("dense", kind, "none") for kind in ("iid", "antithetic", "weighted_array")]
COVERED += [long("isotropic", "weighted_array", "none")]
COVERED += [long(f, "nuts", c) for f in ("dense", "isotropic") for c in ("none", "auto")]


@pytest.mark.parametrize(("family", "kind", "control"), COVERED)
def test_intervals_cover_the_truth(family, kind, control, skewed_moments):
    mean, variance = skewed_moments
    method = ForwardKL(family, control_variates=control)

    def go(rng_key, draws):
        if kind == "weighted_array":
            x = 0.5 + 0.8 * random.normal(rng_key, (1, 800, 3))
            proposal = jnp.sum(dist.Normal(0.5, 0.8).log_prob(x), -1)
            log_weight = jax.vmap(jax.vmap(SKEWED_TARGET.log_density))(x) - proposal
            draws = StoredDraws(x, log_weight, 0 * log_weight, jnp.ones(()))
        elif draws is None:
            draws = cloud_of(kind, rng_key, SKEWED_TARGET)
        _, gaussian, info = method.step(rng_key, (), SKEWED_TARGET, draws)
        spread = gaussian.covariance if family == "dense" else gaussian.scale**2
        return gaussian.mean, spread, info.mean_error, info.covariance_error

    rows = (REPETITION_KEYS, chains_of_nuts() if kind == "nuts" else None)
    centers, spreads, errors, spread_errors = jax.jit(
        lambda rows: jax.lax.map(lambda row: go(*row), rows)
    )(rows)
    truth = variance * np.eye(3) if family == "dense" else variance
    for value, exact, error in ((centers, mean, errors), (spreads, truth, spread_errors)):
        covered = np.abs(np.asarray(value) - exact) < 1.96 * np.asarray(error)
        # Coordinates are alike, so that their coverage is one number.
        rate = covered.mean() if covered.ndim < 3 else covered[:, *np.tril_indices(3)].mean()
        assert COVERAGE[0] <= rate <= COVERAGE[1], rate


@pytest.fixture(scope="module")
def regression():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(300, 20)) @ (np.eye(20) + 0.3 * rng.normal(size=(20, 20)))
    y = np.sign(x @ rng.normal(size=20) + rng.normal(size=300))

    def loss(beta, x, y):
        return jnp.sum(jnp.logaddexp(0.0, -y * (x @ beta)))

    loss = Loss.from_function(loss, np.zeros(20), x, y)
    return RegularizedLoss(loss, Gaussian.isotropic(loss.x0, 0.5))


@partial(jax.jit, compiler_options=OPTIMIZED)
def plain_and_chosen(engine, rng_key, target, mean, variance):
    draws = engine.step(rng_key, engine.init(rng_key, target), target)[1]
    fits = [
        ForwardKL("diagonal", control_variates=c).step(rng_key, (), target, draws)[1:]
        for c in ("none", "auto")
    ]
    return [(jnp.mean((g.mean - mean) ** 2 / variance), info.control_variate) for g, info in fits]


def squared_errors(target, truth, engine, repetitions):
    # Of plain averages and of chosen control variates on the same draws, in units of the variances.
    rows = [
        plain_and_chosen(engine, random.key(seed), target, *truth) for seed in range(repetitions)
    ]
    (plain, _), (chosen, kind) = (
        (np.mean([r[i][0] for r in rows]), [int(r[i][1]) for r in rows]) for i in (0, 1)
    )
    return plain, chosen, kind


# In units of one over 200 draws. Chains of the low-rank metric are antithetic: plain averages are better, and
# with control variates the average is a little worse, 0.038 and 0.049 in two sets of 30 runs.
@pytest.mark.long
@pytest.mark.parametrize(
    ("metric", "most_plain", "most_chosen", "least_gain"),
    [("variance", 2.0, 0.04, 50), ("low_rank", 0.6, 0.06, 10)],
)
def test_control_variates_on_a_regression(regression, metric, most_plain, most_chosen, least_gain):
    draws = nuts_draws(
        shift.NUTS(num_warmup=500, num_samples=1500, num_chains=2), random.key(9), regression
    )
    _, exact, info = jax.jit(ForwardKL("diagonal").step)(random.key(0), (), regression, draws)
    assert info.control_variate >= 2
    plain, chosen, _ = squared_errors(
        regression,
        (exact.mean, exact.variance),
        shift.NUTS(num_warmup=200, num_samples=50, num_chains=4, metric=metric),
        30,
    )
    assert plain < most_plain / 200
    assert plain / chosen > least_gain
    assert chosen < most_chosen / 200


def of_coordinates(fn, kinks=()):
    return problems.separable(
        "zoo", lambda x: jnp.sum(fn(x)), 3, start=0.0, minimum=0.0, kinks=kinks
    )


ZOO = {
    "double well": (problems.double_well(3), 0.3, 0.5),
    "absolute values": (problems.absolute(3), 0.3, 1.0),
    "bimodal": (
        problems.gaussian_mixture(
            [0.4, 0.6], [[-1.5, 0.0, 0.0], [1.5, 0.5, 0.5]], [0.3 * np.eye(3)] * 2
        ),
        0.1,
        3.0,
    ),
    "heavy tails": (of_coordinates(lambda x: 2.0 * jnp.log1p(x**2)), 0.5, 30.0),
    "jumps": (of_coordinates(lambda x: 1.0 * (x > 0) + 0.3 * (x > 1.0), (0.0, 1.0)), 0.2, 1.0),
    "small jump": (of_coordinates(lambda x: 0.4 * (x > 0) + 0.5 * x**2, (0.0,)), 0.1, 1.0),
}


def in_the_zoo(x, which):
    # One loss, chosen by data, is one program.
    return jax.lax.switch(which.astype(int), [problem.loss for problem, *_ in ZOO.values()], x)


def target_in_the_zoo(name):
    problem, start, tau = ZOO[name]
    loss = Loss.from_function(
        in_the_zoo, np.full(problem.dim, start), np.float32(list(ZOO).index(name))
    )
    return RegularizedLoss(loss, Gaussian.isotropic(loss.x0, tau))


@jax.jit
def plain_and_chosen_of_draws(x, target):
    scores = jax.vmap(jax.vmap(jax.grad(target.log_density)))(x)
    zero = jnp.zeros(x.shape[:2])
    draws = StoredDraws(x, zero, zero, jnp.ones(()), scores)
    fits = [
        ForwardKL("diagonal", control_variates=c).step(None, (), target, draws)[1:]
        for c in ("none", "auto")
    ]
    return [(gaussian.mean, info.control_variate) for gaussian, info in fits]


@pytest.mark.parametrize("name", ["double well", "absolute values", "jumps", "small jump"])
def test_control_variates_do_no_harm_to_independent_draws(name):
    # Coordinates are alike: draws by the inverse distribution function of one, on a grid.
    problem, start, tau = ZOO[name]
    grid = np.linspace(-6, 6, 20_001)
    loss = np.array(jax.vmap(problem.loss)(jnp.asarray(grid, jnp.float32)[:, None] * np.eye(3)[0]))
    log_density = -loss - (grid - start) ** 2 / (2 * tau)
    weight = np.exp(log_density - log_density.max())
    weight /= weight.sum()
    uniform = np.random.default_rng(0).uniform(size=(40, 4, 50, 3))
    x = np.interp(uniform, np.cumsum(weight), grid).astype(np.float32)
    target = target_in_the_zoo(name)
    rows = [plain_and_chosen_of_draws(row, target) for row in x]
    truth = weight @ grid
    plain, chosen = (np.mean([(row[i][0] - truth) ** 2 for row in rows]) for i in (0, 1))
    assert chosen < 1.15 * plain
    if "jump" in name:
        assert not any(int(row[1][1]) for row in rows)
    else:
        assert chosen < plain


@pytest.mark.long
@pytest.mark.parametrize("name", ZOO)
def test_control_variates_do_no_harm(name):
    problem, start, tau = ZOO[name]
    x = np.full(problem.dim, start)
    target = target_in_the_zoo(name)
    truth = problem.shift_mean(x, tau), np.diag(problem.shift_covariance(x, tau))
    plain, chosen, kind = squared_errors(
        target,
        truth,
        # A jump makes for steps so short that whole trees would take most of this module's time.
        shift.NUTS(num_warmup=200, num_samples=50, num_chains=4, max_tree_depth=6),
        40,
    )
    # The mean over forty runs of a ratio of errors that mostly coincide.
    assert chosen < 1.15 * plain
    if "jump" in name:
        assert not any(kind)


def test_scores_that_are_none_are_found_without_the_density():
    # Scores of the normal, draws of its half: they do not average to zero.
    x = np.abs(np.random.default_rng(0).normal(size=(400, 2)))
    with pytest.warns(UserWarning, match="control variates were switched off"):
        gaussian, info = forward_kl(x, score=-x)
    assert not info.score_compatible
    np.testing.assert_allclose(gaussian.mean, x.mean(0), rtol=1e-5)


def test_control_variates_are_exact_on_a_gaussian():
    x, mean, covariance = samples_of(6, 60)
    score = -(x - mean) @ np.linalg.inv(covariance)
    gaussian, info = forward_kl(x, score=score)
    assert info.control_variate == info.covariance_control_variate == 2
    np.testing.assert_allclose(gaussian.mean, mean, atol=1e-4)
    np.testing.assert_allclose(gaussian.covariance, covariance, atol=1e-3)
    assert info.shrinkage < 1e-6


def test_few_draws_are_shrunk():
    x, _, covariance = samples_of(30, 40, seed=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        shrunk, info = forward_kl(x)
        plain, _ = forward_kl(x, shrinkage="none")
    assert 0.05 < info.shrinkage < 1.0
    exact = regloss.Gaussian(
        jnp.zeros(30), jnp.linalg.cholesky(jnp.asarray(covariance, jnp.float32))
    )
    divergences = [
        float(regloss.kl_divergence(exact, g._replace(mean=jnp.zeros(30)))) for g in (shrunk, plain)
    ]
    assert divergences[0] < 0.5 * divergences[1]
    np.testing.assert_allclose(shrunk.variance, x.var(0, ddof=1), rtol=1e-3)


def model(y=None):
    scale = numpyro.sample("b_scale", dist.HalfNormal(1.0))
    with numpyro.plate("rows", 2):
        effect = numpyro.sample("a_effect", dist.Normal(0.0, scale))
    numpyro.deterministic("twice", 2.0 * effect)
    numpyro.sample("y", dist.Normal(effect.sum(), 1.0), obs=y)


@pytest.fixture(scope="module")
def run_mcmc():
    mcmc = MCMC(
        NUTS(model),
        num_warmup=300,
        num_samples=300,
        num_chains=2,
        chain_method="sequential",
        progress_bar=False,
    )
    mcmc.run(random.key(0), y=1.0)
    return mcmc


@pytest.mark.both
def test_sites_by_name(run_mcmc):
    samples = run_mcmc.get_samples()
    loss = Loss.from_model(model, y=1.0)
    gaussian, info = forward_kl(run_mcmc)
    assert info.names == ("a_effect[0]", "a_effect[1]", "b_scale")
    np.testing.assert_allclose(gaussian.mean[2], samples["b_scale"].mean(), rtol=1e-4)
    by_dict, _ = forward_kl({k: samples[k] for k in ("b_scale", "a_effect")})
    np.testing.assert_allclose(by_dict.mean, gaussian.mean, rtol=1e-4)

    free, info = forward_kl(run_mcmc, loss=loss)
    assert info.names == loss.flat_names
    np.testing.assert_allclose(free.mean[2], np.log(samples["b_scale"]).mean(), atol=1e-4)
    grouped, _ = forward_kl(
        run_mcmc.get_samples(group_by_chain=True), loss=loss, group_by_chain=True
    )
    np.testing.assert_allclose(grouped.covariance, free.covariance, rtol=1e-3, atol=1e-5)
    unconstrained = {"a_effect": samples["a_effect"], "b_scale": jnp.log(samples["b_scale"])}
    again, _ = forward_kl(unconstrained, loss=loss, space="unconstrained")
    np.testing.assert_allclose(again.mean, free.mean, atol=1e-5)


def discrete_model(y):
    with numpyro.plate("K", 2):
        mu = numpyro.sample("mu", dist.Normal(0.0, 3.0))
    with numpyro.plate("rows", len(y)):
        z = numpyro.sample("z", dist.Categorical(jnp.array([0.5, 0.5])))
        numpyro.sample("y", dist.Normal(mu[z], 1.0), obs=y)


def test_discrete_sites_are_left_out_of_a_run():
    mcmc = MCMC(
        DiscreteHMCGibbs(HMC(discrete_model)), num_warmup=50, num_samples=60, progress_bar=False
    )
    mcmc.run(random.key(0), jnp.array([-3.0, 3.0, -3.1, 2.9]))
    with pytest.warns(UserWarning, match=r"discrete sites \['z'\] were left out.*\['mu'\]"):
        gaussian, info = forward_kl(mcmc, "diagonal")
    assert info.names == ("mu[0]", "mu[1]")
    samples = mcmc.get_samples()
    np.testing.assert_allclose(gaussian.mean, samples["mu"].mean(0), rtol=1e-4)
    with pytest.warns(UserWarning, match="were left out"):
        fit = gaussian_fit(mcmc, gaussian)
    assert fit.names == info.names
    # A dict was put together by hand: what is discrete in it is refused.
    for sites in (samples, {**samples, "z": samples["z"] > 0}):
        with pytest.raises(
            TypeError, match=r"integers or booleans in \['z'\].*pass the MCMC itself"
        ):
            forward_kl(sites)
    mcmc.last_state.z.pop("mu")
    with pytest.raises(ValueError, match="only discrete ones"):
        forward_kl(mcmc)


def test_sites_of_size_zero():
    def empty(y=1.0):
        numpyro.sample("b", dist.Normal(0.0, 1.0).expand([0]).to_event(1))
        scale = numpyro.sample("c", dist.HalfNormal(1.0))
        numpyro.sample("a", dist.Normal(0.0, scale).expand([3, 0]).to_event(2))
        numpyro.sample("y", dist.Normal(0.0, scale), obs=y)

    loss = Loss.from_model(empty)
    c = np.exp(np.random.default_rng(0).normal(size=40))
    sites = {"a": np.zeros((40, 3, 0)), "b": np.zeros((40, 0)), "c": c}
    exact = np.log(c).mean()
    np.testing.assert_allclose(forward_kl(sites, loss=loss).gaussian.mean, [exact], rtol=1e-5)
    gaussian, info = forward_kl(sites)
    assert info.names == ("c",)
    np.testing.assert_allclose(gaussian.mean, [c.mean()], rtol=1e-5)
    chains = {name: site.reshape(2, 20, *site.shape[1:]) for name, site in sites.items()}
    grouped = forward_kl(chains, loss=loss, group_by_chain=True).gaussian
    np.testing.assert_allclose(grouped.mean, [exact], rtol=1e-5)
    with pytest.raises(ValueError, match="at least one parameter"):
        forward_kl({"a": np.zeros((40, 0))})


def autoregressive(seed, shape, correlation):
    noise = np.random.default_rng(seed).normal(size=shape)
    x = noise.copy()
    for t in range(1, shape[1]):
        x[:, t] = correlation * x[:, t - 1] + np.sqrt(1 - correlation**2) * noise[:, t]
    return x


def test_chains_that_agree_give_no_warning():
    # Four chains of 200 with some fifty effective draws each, and very few draws of one of them.
    for seed in range(5):
        x = autoregressive(seed, (4, 200, 5), 0.6)
        info = forward_kl(x, "diagonal").info
        rhat = jax.jit(split_rhat)(jnp.asarray(x, jnp.float32))
        np.testing.assert_allclose(info.rhat, rhat, rtol=1e-4)
        assert np.all(info.rhat < 1.1)
        assert forward_kl(x[0, ::10], "diagonal").info.rhat.shape == (5,)
    x = x[:, :, 0]
    weight = np.where(x > 0, 0.1, 0.0)
    assert np.isnan(forward_kl(x[..., None], log_weight=weight).info.rhat).all()
    cloud = independent_cloud()
    assert np.isnan(forward_kl(cloud).info.rhat).all()
    # In a scheme the shift reports it.
    step = jax.eval_shape(ForwardKL().step, random.key(0), (), SKEWED_TARGET, cloud)
    assert step[2].rhat is None


MODES = np.array([[-4.0], [4.0], [-4.0], [4.0]])
APART = {
    "modes": (
        lambda x: x + MODES,
        r"chains do not agree.*R-hat above 1\.1 at b \(\d.*different modes",
    ),
    "labels": (lambda x: x + MODES[::-1], r"labels that can be exchanged.*order the labels"),
    "walk": (lambda x: np.cumsum(x, 1), r"draws wander at b \(\d.*density does not fall off"),
}


@pytest.mark.parametrize("name", APART)
def test_chains_that_do_not_agree_are_told(name):
    move, words = APART[name]
    x = np.random.default_rng(1).normal(size=(2, 4, 200))
    sites = {"a": x[0], "b": move(x[1])}
    with pytest.warns(UserWarning, match=words) as found:
        info = forward_kl(sites, group_by_chain=True).info
    assert len(found) == 1
    assert "a (" not in str(found[0].message)
    assert info.ok
    assert info.rhat[0] < 1.1 < info.rhat[1]
    # One chain is judged by its halves.
    if name != "walk":
        x = np.concatenate([sites["b"][0], sites["b"][1]])[:, None]
        with pytest.warns(UserWarning, match="halves of the chain do not agree"):
            forward_kl(x)


def test_a_range_that_floats_cannot_hold_is_named():
    x = np.random.default_rng(0).normal(size=(200, 2)) * [1.0, 1e25]
    with pytest.raises(ValueError, match="floats cannot hold at 1.*proper prior"):
        forward_kl(x)
    sites = {"a": x[:, 0], "b": np.where(np.arange(200) < 3, np.inf, x[:, 1])}
    with pytest.raises(
        ValueError, match="3 of 200 draws, at the coordinates b; .*does not fall off"
    ):
        forward_kl(sites)


def test_a_run_of_the_regularized_model_brings_its_scores():
    # By keyword; doctests have it by position.
    mcmc = MCMC(HMC(regloss.model), num_warmup=300, num_samples=400, progress_bar=False)
    mcmc.run(random.key(0), target=SKEWED_TARGET, extra_fields=("z_grad",))
    gaussian, info = forward_kl(mcmc)
    plain, plain_info = forward_kl(mcmc, control_variates="none")
    np.testing.assert_allclose(plain.mean, mcmc.get_samples()["x"].mean(0), atol=1e-5)
    assert info.names == SKEWED.flat_names
    assert np.all(np.abs(gaussian.mean - plain.mean) < SIGMAS * plain_info.mean_error)
    assert np.mean(info.mean_error) < 0.5 * np.mean(plain_info.mean_error)


def test_draws_of_an_engine():
    draws = independent_cloud()
    gaussian, info = forward_kl(draws)
    x, weight = draws.x[0], np.asarray(jax.nn.softmax(draws.log_weight[0]))
    np.testing.assert_allclose(gaussian.mean, weight @ x, atol=1e-4)
    expected = np.cov(np.asarray(x).T, aweights=weight)
    np.testing.assert_allclose(gaussian.covariance, expected, atol=1e-4)
    assert np.all(np.diag(info.covariance_error) > 0)


@pytest.mark.parametrize("family", with_long(FAMILIES, FAMILIES.keys() - {"low_rank"}))
def test_clouds_and_arrays_agree(family):
    draws = independent_cloud()
    method = ForwardKL(family, rank=FAMILIES[family])
    _, cloud, _ = jax.jit(method.step)(random.key(0), (), SKEWED_TARGET, draws)
    array, _ = forward_kl(draws.x, family, rank=FAMILIES[family], log_weight=draws.log_weight)
    np.testing.assert_allclose(cloud.mean, array.mean, atol=1e-5)
    np.testing.assert_allclose(cloud.covariance, array.covariance, rtol=1e-3, atol=1e-4)


def test_low_rank_in_many_dimensions():
    # Beyond a thousand dimensions factors are fitted to the draws, without a matrix.
    rng = np.random.default_rng(0)
    loading = rng.normal(size=(1500, 3))
    x = rng.normal(size=(400, 3)) @ loading.T + rng.normal(size=(400, 1500))
    gaussian, info = forward_kl(x, "low_rank", rank=3)
    assert isinstance(gaussian, LowRankGaussian)
    assert info.converged
    np.testing.assert_allclose(gaussian.variance, x.var(0, ddof=1), rtol=1e-3)
    exact = LowRankGaussian(jnp.zeros(1500), jnp.ones(1500), jnp.asarray(loading, jnp.float32))
    fitted = gaussian._replace(mean=jnp.zeros(1500))
    # About 4 x 1,500 parameters from 400 draws: half a nat per draw's share of a parameter.
    assert regloss.kl_divergence(exact, fitted) < 1500 * 5 / 400 / 2 * 2


BAD = [
    (lambda: forward_kl(np.zeros(5)), ValueError, r"\(draw, dim\)"),
    (lambda: forward_kl(np.zeros((2, 2, 2, 2))), ValueError, r"\(draw, dim\)"),
    (lambda: forward_kl(np.ones((10, 2))), ValueError, "draws that differ"),
    (lambda: forward_kl(np.ones((1, 2))), ValueError, "at least two draws"),
    (lambda: forward_kl(np.ones((4, 0))), ValueError, "at least one parameter"),
    (lambda: forward_kl("samples"), TypeError, "expected samples"),
    (lambda: forward_kl(np.ones((4, 2), complex)), TypeError, "real numbers"),
    (lambda: forward_kl(np.array([[0.0, 1], [np.nan, 2], [1, 2]])), ValueError, "1 of 3 draws"),
    (lambda: forward_kl(np.eye(3), log_weight=np.zeros(2)), ValueError, "log_weight of shape"),
    (lambda: forward_kl(np.eye(3), log_weight=np.array([0, np.nan, 0])), ValueError, "log weights"),
    (lambda: forward_kl(np.eye(3), log_weight=np.full(3, -np.inf)), ValueError, "positive weight"),
    (
        lambda: forward_kl(np.eye(3), log_weight=np.array([0, -50.0, -60])),
        ValueError,
        "one that carries",
    ),
    (lambda: forward_kl(np.eye(3), score=np.eye(2)), ValueError, "score of shape"),
    (lambda: forward_kl(np.eye(3), "reference"), ValueError, "no reference"),
    (lambda: forward_kl(np.eye(3), "full"), ValueError, "covariance"),
    (lambda: forward_kl(np.eye(3), "low_rank"), ValueError, "rank=5"),
    (lambda: forward_kl(np.eye(3), "dense", rank=2), ValueError, "rank only"),
    (lambda: forward_kl(np.eye(3), "low_rank", rank=3), ValueError, "below the dimension"),
    (lambda: forward_kl({}), ValueError, "empty dict"),
    (lambda: forward_kl({"a": np.zeros(3), "b": np.zeros(4)}), ValueError, "start with the same"),
    (lambda: forward_kl({"a": np.arange(3.0)}, loss=SKEWED), ValueError, "of the structure"),
    (
        lambda: forward_kl({"a": np.arange(3.0)}, space="unconstrained"),
        ValueError,
        "expected a loss",
    ),
    (lambda: forward_kl({"a": np.arange(3.0)}, score=np.zeros(3)), ValueError, "score only"),
    (lambda: forward_kl(np.eye(4), loss=SKEWED), ValueError, "3 flat"),
    (lambda: forward_kl(np.eye(3), space="flat"), ValueError, "space"),
    (
        lambda: forward_kl(
            {"a_effect": np.ones((5, 2)), "b_scale": np.linspace(-1, 1, 5)},
            loss=Loss.from_model(model, y=1.0),
        ),
        ValueError,
        r"\['b_scale'\] within their supports, got 3 of 5.*space=\"unconstrained\"",
    ),
    (lambda: forward_kl(np.eye(3), control_variates="best"), ValueError, "control_variates"),
    (lambda: forward_kl(MCMC(NUTS(model), num_warmup=1, num_samples=1)), ValueError, "has run"),
]


@pytest.mark.parametrize(("call", "error", "words"), BAD)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_a_constant_coordinate_is_told():
    x = np.random.default_rng(0).normal(size=(200, 2))
    x[:, 1] = 7.0
    for family in ("dense", "diagonal"):
        with pytest.warns(UserWarning, match=r"singular.*coordinate 1"):
            gaussian, info = forward_kl(x, family)
        assert info.floored
        assert np.isfinite(gaussian.covariance).all()
        np.testing.assert_allclose(gaussian.mean[1], 7.0, rtol=1e-6)


def test_infinite_weights_of_useless_draws_are_passed_over():
    x = np.random.default_rng(0).normal(size=(201, 2))
    log_weight = np.where(np.arange(201) < 100, 0.0, -np.inf)
    gaussian, _ = forward_kl(x, log_weight=log_weight)
    np.testing.assert_allclose(gaussian.mean, x[:100].mean(0), atol=1e-5)


def test_repeated_coordinates_give_a_warning_not_nan():
    x = np.random.default_rng(0).normal(size=(200, 1))
    with pytest.warns(UserWarning, match="singular"):
        gaussian, _ = forward_kl(np.concatenate([x, x], 1))
    assert np.isfinite(gaussian.scale).all()


def test_units_do_not_matter():
    x, _, _ = samples_of(2, 200)
    unit = np.array([1e-6, 1e6])
    gaussian, info = forward_kl(x)
    scaled, scaled_info = forward_kl(x * unit)
    np.testing.assert_allclose(scaled.mean / unit, gaussian.mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scaled.scale / unit[:, None], gaussian.scale, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(scaled_info.mean_error / unit, info.mean_error, rtol=1e-3)


def test_float64(x64):
    x, mean, covariance = samples_of(3, 500)
    score = -(x - mean) @ np.linalg.inv(covariance)
    gaussian, _ = forward_kl(x, score=score)
    assert gaussian.mean.dtype == jnp.float64
    np.testing.assert_allclose(gaussian.mean, mean, atol=1e-5)


# At 0.7 there are some 90 effective draws, too few for normal intervals of a variance.
@pytest.mark.parametrize(
    ("correlation", "least", "control"),
    [(0.3, COVERAGE[0], "auto"), (0.3, COVERAGE[0], "none"), long(0.7, 0.87, "auto")],
)
def test_errors_hold_for_chains_that_mix_slowly(correlation, least, control):
    # AR(1) chains of normals, bent into skewed variables whose moments and scores are known.
    def chain(rng_key):
        noise = random.normal(rng_key, (500, 4))

        def advance(z, e):
            z = correlation * z + np.sqrt(1 - correlation**2) * e
            return z, z

        z = jax.lax.scan(advance, noise[0], noise[1:])[1]
        return 1.0 + 0.3 * z + 0.05 * z**2

    mean, variance = 1.05, 0.3**2 + 2 * 0.05**2

    def score(x):
        z = (-0.3 + jnp.sqrt(0.09 + 0.2 * (x - 1.0))) / 0.1
        slope = 0.3 + 0.1 * z
        return (-z - 0.1 / slope) / slope

    def go(rng_key):
        x = chain(rng_key)[None]
        zero = jnp.zeros(x.shape[:2])
        draws = StoredDraws(x, zero, zero, jnp.ones(()), score(x))
        method = ForwardKL("diagonal", control_variates=control)
        _, gaussian, info = method.step(rng_key, (), RegularizedLoss(PLAIN), draws)
        return gaussian.mean, info.mean_error, gaussian.variance, info.covariance_error

    m, me, v, ve = jax.jit(lambda keys: jax.lax.map(go, keys))(
        random.split(random.key(3), REPETITIONS)
    )
    for value, error, exact in ((m, me, mean), (v, ve, variance)):
        rate = np.mean(np.abs(value - exact) < 1.96 * error)
        assert least <= rate <= COVERAGE[1], rate


PLAIN = Loss.from_function(lambda x: jnp.sum(x**2), np.zeros(4))


def test_what_has_no_weight_may_be_anything():
    x = np.random.default_rng(0).normal(size=(201, 2))
    expected, _ = forward_kl(x[1:])
    for value in (1e3, 1e10, 1e30):
        x[0] = value
        log_weight = np.where(np.arange(201) < 1, -np.inf, 0.0)
        gaussian, info = forward_kl(x, log_weight=log_weight, score=-x)
        plain, _ = forward_kl(x, log_weight=log_weight)
        np.testing.assert_allclose(plain.mean, expected.mean, atol=1e-5)
        np.testing.assert_allclose(plain.covariance, expected.covariance, atol=1e-5)
        assert np.all(np.abs(gaussian.mean) < SIGMAS * info.mean_error + 1e-4)


def test_a_pair_that_carries_all_weight_is_no_average():
    x = random.normal(random.key(0), (1, 100, 2))
    log_weight = jnp.where(jnp.arange(100) < 98, -jnp.inf, 0.0)[None]
    draws = StoredDraws(x, log_weight, jnp.zeros((1, 100)), jnp.ones(()), block_size=2)
    with pytest.raises(ValueError, match="hangs on"):
        forward_kl(draws)


def test_half_precision_is_raised():
    x = np.random.default_rng(0).normal(size=(200, 2)).astype(np.float16)
    gaussian, _ = forward_kl(jnp.asarray(x, jnp.bfloat16))
    assert gaussian.mean.dtype == jnp.float32
    np.testing.assert_allclose(gaussian.mean, x.mean(0), atol=1e-2)


def test_compiles_within_other_programs():
    x = random.normal(random.key(0), (8, 100, 2))
    fitted = jax.jit(jax.vmap(lambda x: forward_kl(x, score=-x)))(x)
    assert np.all(fitted.info.ok)
    assert np.max(np.abs(fitted.gaussian.mean)) < 1e-4


@pytest.mark.parametrize("covariance", ["dense", long("low_rank")])
def test_batches_of_fits_do_not_wait_for_each_other(covariance):
    # Two batched LAPACK calls at once can wait forever for the threads of two cores.
    x = random.normal(random.key(0), (64, 100, 30))
    method = ForwardKL(covariance, rank=2 if covariance == "low_rank" else None)
    scale = jnp.linalg.cholesky(jnp.eye(30) + 0.1)
    loss = Loss.from_function(lambda x: 0.0 * jnp.sum(x), np.zeros(30))
    target = RegularizedLoss(loss, Gaussian(loss.x0, scale))

    def go(x):
        zero = jnp.zeros((1, len(x)))
        draws = StoredDraws(
            target.reference.unwhiten(x)[None],
            zero,
            zero,
            jnp.ones(()),
            -target.reference.unscale_transpose(x)[None],
        )
        return method.step(None, (), target, draws)[2].ok

    program = jax.jit(jax.vmap(go))
    for _ in range(3):
        assert np.all(program(x))


def test_draws_are_checked_like_arrays():
    draws = independent_cloud()
    with pytest.raises(ValueError, match="flat unconstrained"):
        forward_kl(draws, loss=PLAIN)
    with pytest.raises(ValueError, match="log_density of shape"):
        forward_kl(draws, log_density=jnp.zeros(99))
    zero = jnp.zeros((1, 20))
    with pytest.raises(ValueError, match="draws that differ"):
        forward_kl(StoredDraws(jnp.ones((1, 20, 2)), zero, zero, jnp.ones(())))
    with pytest.raises(ValueError, match="below the dimension"):
        ForwardKL("low_rank", rank=3).step(random.key(0), (), SKEWED_TARGET, draws)
