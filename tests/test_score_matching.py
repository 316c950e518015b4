# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Score matching: exact on Gaussians, no worse than batch and match elsewhere, errors, families, input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import long
from jax import random
from numpyro.infer import MCMC, NUTS
from reference_posteriors import POSTERIORS
from scipy.special import digamma, polygamma
from score_targets import DIM, batch_and_match, forward_divergence, normal, sinh_arcsinh

from numpyro_regloss import (
    Gaussian,
    Loss,
    LowRankGaussian,
    RegularizedLoss,
    TwoStep,
    kl_divergence,
    model,
    score_matching,
    shift,
)
from numpyro_regloss.draws import StoredDraws
from numpyro_regloss.fit import ScoreMatching
from numpyro_regloss.fit.score_matching.engine import fit_draws

# 95 % intervals of 300 repetitions and three coordinates or more; below 0.90 they would be by chance once in 10⁴.
REPETITIONS, COVERAGE = 300, (0.90, 0.995)


LAWS = {
    "its own": lambda rng, n, m, c: rng.multivariate_normal(m, c, n),
    "uniform": lambda rng, n, m, c: m + rng.uniform(-3.0, 3.0, (n, len(m))),
    "to one side": lambda rng, n, m, c: m + 5.0 + rng.normal(size=(n, len(m))),
}


def off(gaussian, mean, covariance):
    """Errors of mean and covariance in coordinates in which the exact one is N(0, I)."""
    root = np.linalg.cholesky(covariance)
    moved = np.linalg.solve(root, np.asarray(gaussian.mean, float) - mean)
    scale = np.linalg.solve(root, np.asarray(gaussian.scale, float))
    return np.abs(moved).max(), np.abs(scale @ scale.T - np.eye(len(mean))).max()


@pytest.mark.parametrize("law", LAWS)
def test_exact_from_dim_plus_two_points_of_a_gaussian(law):
    rng = np.random.default_rng(1)
    mean, covariance = normal()
    x = LAWS[law](rng, DIM + 2, mean, covariance)
    score = -np.linalg.solve(covariance, (x - mean).T).T
    log_weight = rng.normal(size=DIM + 2)
    # Rounding of x and score themselves, times their distance from the mean in least standard deviations and the
    # condition of twelve random points: some hundred units of the last digit.
    gaussian, info = score_matching(x, score=score, log_weight=log_weight)
    assert max(off(gaussian, mean, covariance)) < 2e-3
    with jax.enable_x64(True):
        gaussian, info = score_matching(x, score=score, log_weight=log_weight)
        assert max(off(gaussian, mean, covariance)) < 1e-11
        assert info.divergence < 1e-20
    assert info.ok
    assert not info.floored


def test_errors_and_units_follow_the_coordinates():
    rng = np.random.default_rng(2)
    y = np.log(rng.gamma(2.0, size=(400, 3)))
    score = 2.0 - np.exp(y)
    plain, info = score_matching(y, score=score)
    unit = np.array([1e-4, 1.0, 1e5])
    scaled, scaled_info = score_matching(unit * y, score=score / unit)
    np.testing.assert_allclose(scaled.mean / unit, plain.mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scaled.scale / unit[:, None], plain.scale, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scaled_info.mean_error / unit, info.mean_error, rtol=1e-3)
    np.testing.assert_allclose(scaled_info.divergence, info.divergence, rtol=1e-3)


fitted = jax.jit(lambda method, draws: fit_draws(method, draws, None))


def stored(x, score, log_weight=None, block_size=1):
    zero = jnp.zeros(x.shape[:2])
    log_weight = zero if log_weight is None else log_weight
    return StoredDraws(
        jnp.asarray(x), log_weight, zero, jnp.ones(()), jnp.asarray(score), block_size
    )


def skewed_draws(seed, count, shape=2.0):
    """Draws and scores of log y, y ~ Gamma(shape), with mixed coordinates; the mixing matrix."""
    rng = np.random.default_rng(seed)
    mix = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0] * [1.0, 2.0, 3.0]
    y = np.log(rng.gamma(shape, size=(1, count, 3)))
    score = np.linalg.solve(mix.T, (shape - np.exp(y))[..., None])[..., 0]
    return (y @ mix.T).astype(np.float32), score.astype(np.float32), mix


@pytest.mark.parametrize("family", ["dense", long("diagonal"), long("isotropic"), long("low_rank")])
def test_errors_cover(family):
    method = ScoreMatching(family, 1 if family == "low_rank" else None)
    found, covered = [], []
    for seed in range(REPETITIONS):
        x, score, mix = skewed_draws(seed, 60)
        gaussian, info = fitted(method, stored(x, score))
        # Draws of the density: the mean is its mean.
        found.append(
            np.abs(gaussian.mean - mix @ np.full(3, digamma(2.0))) < 1.96 * info.mean_error
        )
        if family == "dense":
            # Cov(x) = ψ'(2) M Mᵀ and Cov(s) = 2 M⁻ᵀ M⁻¹, so that C = sqrt(ψ'(2) / 2) M Mᵀ.
            exact = np.sqrt(polygamma(1, 2.0) / 2.0) * mix @ mix.T
            covered.append(np.abs(gaussian.covariance - exact) < 1.96 * info.covariance_error)
    assert COVERAGE[0] < np.mean(found) < COVERAGE[1]
    if family == "dense":
        assert COVERAGE[0] < np.mean(covered) < COVERAGE[1]


@pytest.mark.parametrize("family", ["dense", "diagonal", "isotropic", "low_rank"])
def test_no_gaussian_of_the_family_has_less_divergence(family):
    x, score, _ = skewed_draws(3, 500)
    method = ScoreMatching(family, 1 if family == "low_rank" else None)
    gaussian, info = fitted(method, stored(x, score))
    x, score = x[0].astype(float), score[0].astype(float)

    def divergence(mean, covariance):
        residual = score + np.linalg.solve(covariance, (x - mean).T).T
        return np.mean(np.sum(residual * (residual @ covariance), -1)) / 3

    least = divergence(gaussian.mean, np.asarray(gaussian.covariance, float))
    np.testing.assert_allclose(least, info.divergence, rtol=1e-3)
    rng = np.random.default_rng(0)
    for _ in range(20):
        moved = jax.tree.map(
            lambda p: p * (1.0 + 0.05 * rng.normal(size=p.shape)).astype(p.dtype), gaussian
        )
        # Rounding of the parameters.
        assert divergence(moved.mean, np.asarray(moved.covariance, float)) > least - 1e-6


def test_the_reference_family_steps_down_the_average_gradient():
    x, score, _ = skewed_draws(4, 200)
    reference = Gaussian.isotropic(jnp.ones(3), tau=0.5)
    gaussian, info = fit_draws(ScoreMatching(), stored(x, score), reference)
    np.testing.assert_allclose(gaussian.mean, x[0].mean(0) + 0.5 * score[0].mean(0), rtol=1e-4)
    assert gaussian.scale == reference.scale
    assert info.covariance_error is None
    residual = x[0] + 0.5 * score[0]
    np.testing.assert_allclose(info.mean_error, residual.std(0) / np.sqrt(200), rtol=0.1)


def bowl(x, mean, precision):
    return 0.5 * (x - mean) @ precision @ (x - mean)


@pytest.mark.parametrize("double", [False, True])
def test_a_gaussian_target_for_few_scores(double):
    # BaM's level is 2e-7 standard deviations; in single precision the loss's own gradient has a few times that.
    with jax.enable_x64(double):
        mean, covariance = normal(condition=10.0)
        loss = Loss.from_function(bowl, np.zeros(DIM), mean, np.linalg.inv(covariance))
        gaussian, info = score_matching(loss, rng_key=random.key(0))
        sd = np.sqrt(np.diag(covariance))
        error = np.max(np.abs(np.asarray(gaussian.mean, float) - mean) / sd)
        assert info.num_grad <= 2_000
        assert info.converged
        assert error < (2e-13 if double else 2e-6)
        assert off(gaussian, mean, covariance)[1] < (1e-12 if double else 2e-5)


SKEWED = {
    "skewed": (0.2, 1.1),
    "more skewed": (1.0, 1.1),
    "heavy tails": (0.2, 0.9),
    "light tails": (0.0, 1.7),
    "eight schools": None,
    "regression": None,
}
NAMES = {
    "eight schools": "eight_schools-eight_schools_noncentered",
    "regression": "mesquite-logmesquite",
}


@pytest.mark.parametrize(
    "name", [n if n in ("skewed", "eight schools") else long(n) for n in SKEWED]
)
# That some of these are strongly skewed is the subject here.
@pytest.mark.filterwarnings("ignore:score_matching. along .* far from Gaussian")
def test_never_worse_than_batch_and_match(name):
    # In double precision, which the plain one needs.
    with jax.enable_x64(True):
        if SKEWED[name] is not None:
            fn, x = sinh_arcsinh(*SKEWED[name])
            mean, covariance = x.mean(0), np.cov(x.T)
            loss = Loss.from_function(fn, np.zeros(DIM))
        else:
            posterior = POSTERIORS[NAMES[name]]
            mean, covariance = posterior.unconstrained.mean, posterior.unconstrained.covariance
            loss = Loss.from_model(posterior.model, *posterior.args, **posterior.kwargs)
        gradients = jax.jit(jax.vmap(jax.grad(lambda x: -loss.value(x))))
        ours, plain = [], []
        for seed in range(5):
            gaussian, info = score_matching(loss, rng_key=random.key(seed))
            assert info.ok
            steps = int(info.num_grad) // 32
            found = batch_and_match(seed, lambda x: np.asarray(gradients(x)), loss.x0, steps)
            ours.append((np.asarray(gaussian.mean), np.asarray(gaussian.covariance)))
            plain.append(found)

        def typical(fits):
            far = [forward_divergence(*one, mean, covariance) for one in fits]
            sd = np.sqrt(np.diag(covariance))
            moved = [np.max(np.abs(one[0] - mean) / sd) for one in fits]
            return np.median(far), np.median(moved)

        assert np.all(np.array(typical(ours)) < np.array(typical(plain)))


def factors(dim, rank=3, seed=0):
    rng = np.random.default_rng(seed)
    parts = rng.normal(size=dim), rng.uniform(0.5, 2.0, dim), rng.normal(size=(dim, rank))
    return LowRankGaussian(*(jnp.asarray(part, jnp.float32) for part in parts))


def test_factors_from_fewer_draws_than_dimensions():
    exact = factors(300)
    x = exact.sample(random.key(0), (60,))
    score = jax.vmap(jax.grad(exact.log_prob))(x)
    gaussian, info = score_matching(x, "low_rank", rank=3, score=score)
    assert info.ok
    assert info.converged
    # Rounding of 1,500 parameters; moment matching leaves some 10 nats at 60 draws.
    assert kl_divergence(exact, gaussian) < 1e-3
    sd = np.sqrt(exact.variance)
    assert np.max(np.abs(gaussian.mean - exact.mean) / sd) < 1e-3


@pytest.mark.long
def test_ten_thousand_dimensions():
    # A matrix would have 400 MB, and its decomposition 10¹² operations.
    exact = factors(10_000)
    loss = Loss.from_function(lambda x, exact: -exact.log_prob(x), np.zeros(10_000), exact)
    gaussian, info = score_matching(loss, "low_rank", rank=3, rng_key=random.key(0))
    assert info.ok
    assert info.num_grad < 10_000
    # In nats, of 50,000 parameters in single precision.
    assert kl_divergence(exact, gaussian) < 0.5


def test_one_skewed_coordinate_of_many_is_told():
    # The logarithm of a gamma variable, whose moments are known, and nine normal ones.
    def density(x, shape):
        return 0.5 * jnp.sum(x[1:] ** 2) + jnp.exp(x[0]) - shape * x[0]

    skewed, nearly_normal = (
        Loss.from_function(density, np.zeros(10), np.float32(shape)) for shape in (0.3, 3.0)
    )
    with pytest.warns(UserWarning, match=r"along params\[0\] .* far from Gaussian"):
        gaussian, info = score_matching(skewed, rng_key=random.key(0))
    # The mean over coordinates hardly shows it.
    assert info.divergence < 0.2
    assert np.all(np.asarray(info.coordinate_divergence[1:]) < 0.05)
    # As the page on the three directions says, up to the noise of 1,280 draws.
    np.testing.assert_allclose(info.coordinate_divergence[0], 0.95, atol=0.1)
    np.testing.assert_allclose(np.sqrt(gaussian.variance[0] / polygamma(1, 0.3)), 0.63, atol=0.05)
    # Hardly skewed: no warning, which would be an error here.
    gaussian, info = score_matching(nearly_normal, rng_key=random.key(0))
    assert info.coordinate_divergence[0] < 0.3
    np.testing.assert_allclose(gaussian.variance[0], polygamma(1, 3.0), rtol=0.15)


def test_fewer_draws_than_dimensions_are_told():
    mean, covariance = normal()
    x = np.random.default_rng(0).multivariate_normal(mean, covariance, 6)
    score = -np.linalg.solve(covariance, (x - mean).T).T
    with pytest.warns(UserWarning, match=r"fewer samples than dim \+ 2"):
        gaussian, info = score_matching(x, score=score)
    assert info.floored
    assert np.isfinite(gaussian.scale).all()
    # What the draws say is kept: the Gaussian's scores are theirs, to the strength of the diagonal, 1 / 60.
    own = -np.linalg.solve(np.asarray(gaussian.covariance), (x - np.asarray(gaussian.mean)).T).T
    assert np.abs(own - score).max() < 0.05 * np.abs(score).max()


def test_what_has_no_weight_may_be_anything():
    x, score, _ = skewed_draws(5, 100)
    expected, _ = score_matching(x[0, 1:], score=score[0, 1:])
    x[0, 0], score[0, 0] = 1e10, -1e20
    log_weight = np.where(np.arange(100) < 1, -np.inf, 0.0)
    gaussian, _ = score_matching(x[0], score=score[0], log_weight=log_weight)
    np.testing.assert_allclose(gaussian.mean, expected.mean, atol=1e-5)
    np.testing.assert_allclose(gaussian.scale, expected.scale, atol=1e-5)


LOSS = Loss.from_function(bowl, np.zeros(2), np.ones(2), np.array([[2.0, 1.0], [1.0, 3.0]]))


def test_scores_come_from_a_loss_or_a_run():
    exact = np.linalg.inv([[2.0, 1.0], [1.0, 3.0]])
    mcmc = MCMC(NUTS(model), num_warmup=50, num_samples=50, progress_bar=False)
    mcmc.run(random.key(0), RegularizedLoss(LOSS), extra_fields=("z_grad",))
    by_run, info = score_matching(mcmc)
    x = mcmc.get_samples()["x"]
    by_loss, counted = score_matching(x, loss=LOSS)
    for gaussian in (by_run, by_loss):
        np.testing.assert_allclose(gaussian.mean, [1.0, 1.0], atol=1e-4)
        np.testing.assert_allclose(gaussian.covariance, exact, atol=1e-4)
    assert (info.num_grad, counted.num_grad) == (0, 50)
    mcmc.run(random.key(0), RegularizedLoss(LOSS))
    with pytest.raises(ValueError, match="z_grad"):
        score_matching(mcmc)


def test_in_a_scheme():
    optimizer = TwoStep(LOSS, 0.5, shift.HMC(50, 20, num_chains=2), ScoreMatching("dense"))
    result = optimizer.run(random.key(0), 12, progress_bar=False)
    # A Gaussian q: every step is exact, and ten halve the distance each.
    np.testing.assert_allclose(result.params, [1.0, 1.0], atol=1e-2)
    q = np.linalg.inv(np.array([[2.0, 1.0], [1.0, 3.0]]) + 2.0 * np.eye(2))
    np.testing.assert_allclose(result.history.fitted.covariance[-1], q, rtol=1e-4)


def test_a_start_that_is_nowhere_is_told():
    # A ridge that bends: no Gaussian nearby says where to go.
    def loss(x):
        return jnp.sum(jnp.exp(2.0 * jnp.sinh(x)) - x)

    with pytest.warns(UserWarning, match="had not settled after 2"):
        _, info = score_matching(
            Loss.from_function(loss, np.full(2, 3.0)), rng_key=random.key(0), num_steps=2
        )
    assert not info.converged


X, SCORE = np.eye(3), -np.eye(3)
BAD = [
    (lambda: score_matching(X), ValueError, "give score"),
    (lambda: score_matching(X, score=np.eye(2)), ValueError, "score of shape"),
    (lambda: score_matching(X, "reference", score=SCORE), ValueError, "no reference"),
    (lambda: score_matching(X, "low_rank", score=SCORE), ValueError, "rank=5"),
    (lambda: score_matching(X, "low_rank", rank=3, score=SCORE), ValueError, "below the dimension"),
    (lambda: score_matching(X, score=SCORE, num_steps=5), ValueError, "draw from a target"),
    (lambda: score_matching(LOSS), ValueError, "random key"),
    (lambda: score_matching(LOSS, score=SCORE, rng_key=random.key(0)), ValueError, "to samples"),
    (
        lambda: score_matching(LOSS, "reference", rng_key=random.key(0)),
        ValueError,
        "with a reference",
    ),
    (lambda: ScoreMatching("full"), ValueError, "covariance"),
    (
        lambda: TwoStep(LOSS, 0.5, shift.Importance(100), ScoreMatching()),
        ValueError,
        "needs draws with scores.*shift.NUTS",
    ),
    (
        lambda: TwoStep(LOSS, 0.5, shift.Adaptive(shift.Importance(100)), ScoreMatching()),
        ValueError,
        "needs draws with scores",
    ),
    (
        lambda: fit_draws(
            ScoreMatching(),
            StoredDraws(X[None], np.zeros((1, 3)), np.zeros((1, 3)), np.ones(())),
            None,
        ),
        ValueError,
        "come with those of shift.NUTS, HMC or AdaptiveImportance",
    ),
]


@pytest.mark.parametrize(("call", "error", "words"), BAD)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
