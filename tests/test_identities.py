# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""The identities behind the scheme, checked on what the package computes.

F is the local entropy, H the heat regularization, q the shifted density, phi the reference, T the
temperature. Exact sides come from `problems`, estimated ones from the package.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SIGMAS, long
from jax import random
from test_engines import heat_step, one_shift, random_quadratic, setup

from numpyro_regloss import Gaussian, fit, kl_divergence, problems, schemes, shift, values
from numpyro_regloss.losses.loss import Loss

TEMPERATURES = (1.0, 0.1)
QUADRATIC = random_quadratic(3, seed=11)
WELL, FOUR = problems.double_well(2), random_quadratic(4, seed=12)
# One engine, so that identities of one problem share a program; independent draws, whose errors are plain.
CLOUD = shift.Importance(20_000, antithetic=False)


def average(draws, values, ess):
    """Mean of values of the draws under their weights, and its standard error."""
    weight = np.asarray(jax.nn.softmax(draws.log_weight[0]), float)
    values = np.asarray(values[0], float)
    mean = weight @ values
    return mean, np.sqrt(weight @ (values - mean) ** 2 / float(ess))


FIRST = np.array([0.4, -0.2, 0.1])


def quadratic_case(temperature):
    # Distances in proportion to sqrt(T), so that weights are as even at each temperature.
    start = QUADRATIC.minimizer + np.sqrt(temperature) * (FIRST - QUADRATIC.minimizer)
    x, tau = start, 0.5 * temperature
    exact = Gaussian(
        jnp.asarray(QUADRATIC.shift_mean(x, tau, temperature), jnp.float32),
        jnp.asarray(
            np.linalg.cholesky(QUADRATIC.shift_covariance(x, tau, temperature)), jnp.float32
        ),
    )
    return x, tau, setup(QUADRATIC, x, tau, temperature), exact


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_gap_identity(temperature):
    # E_p loss + T KL(p || phi) - F = T KL(p || q) for every Gaussian p; q is Gaussian here.
    x, tau, target, q = quadratic_case(temperature)
    p = Gaussian(q.mean + 0.3, q.scale * 0.7)
    noise = p.sample(random.key(0), (200_000,))
    loss = jax.vmap(target.value)(noise)
    cost = loss.mean() + temperature * kl_divergence(p, target.reference)
    gap = cost - QUADRATIC.local_entropy(x, tau, temperature)
    error = loss.std() / len(loss) ** 0.5
    assert abs(gap - temperature * kl_divergence(p, q)) < SIGMAS * error


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("problem", [QUADRATIC, WELL], ids=lambda p: p.name)
def test_decrease_identity(problem, temperature):
    # tau in proportion to T², for weights that are as even at each temperature.
    # F(x_k) - F(x_{k+1}) = T [ |step|² / (2 tau) + KL(q_k || q_{k+1}) ], and so F never rises.
    x, tau = np.full(problem.dim, 0.4), 0.3 * temperature**2
    following = problem.shift_mean(x, tau, temperature)
    decrease = problem.local_entropy(x, tau, temperature) - problem.local_entropy(
        following, tau, temperature
    )
    step_cost = temperature * np.sum((following - x) ** 2) / (2 * tau)
    # KL(q_k || q_{k+1}) from draws of q_k: log q_k - log q_{k+1} up to F, which is known.
    target, moved = setup(problem, x, tau, temperature), setup(problem, following, tau, temperature)
    draws, info, _, _ = one_shift(CLOUD, target)
    log_ratio = jax.vmap(jax.vmap(lambda z: target.log_density(z) - moved.log_density(z)))(draws.x)
    mean, error = average(draws, log_ratio, info.ess)
    kl, error = mean + decrease / temperature, temperature * error
    assert decrease > 0
    assert abs(decrease - (step_cost + temperature * kl)) < SIGMAS * error + 1e-4


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("problem", [QUADRATIC, WELL], ids=lambda p: p.name)
def test_two_forms_of_the_gradient(problem, temperature):
    # grad F = T (x - E_q x') / tau = E_q grad loss.
    x, tau = np.full(problem.dim, 0.4), 0.3 * temperature**2
    target = setup(problem, x, tau, temperature)
    draws, info, fitted, fit_info = one_shift(CLOUD, target)
    h = 1e-4
    exact = np.array([
        (
            problem.local_entropy(x + h * e, tau, temperature)
            - problem.local_entropy(x - h * e, tau, temperature)
        )
        / (2 * h)
        for e in np.eye(problem.dim)
    ])
    by_mean = temperature * (x - fitted.mean) / tau
    assert np.all(np.abs(by_mean - exact) < SIGMAS * temperature * fit_info.mean_error / tau + 1e-4)
    gradients = jax.vmap(jax.vmap(jax.grad(problem.loss)))(draws.x)
    mean, error = average(draws, gradients, info.ess)
    assert np.all(np.abs(mean - exact) < SIGMAS * error + 1e-4)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_hessian(temperature):
    # Hess F = (T / tau) (I - Cov_q / tau), with the covariance fitted to draws.
    x, tau, target, _ = quadratic_case(temperature)
    draws, info, _, _ = one_shift(CLOUD, target)
    fitted = jax.jit(fit.ForwardKL("dense").step)(random.key(0), (), target, draws)[1]
    hessian = temperature / tau * (jnp.eye(3) - fitted.covariance / tau)
    h = np.asarray(jax.hessian(QUADRATIC.loss)(jnp.zeros(3)), float)
    exact = h @ np.linalg.inv(np.eye(3) + tau / temperature * h)
    bound = SIGMAS * (2 / float(info.ess)) ** 0.5 * temperature / tau**2 * np.max(fitted.variance)
    assert np.max(np.abs(hessian - exact)) < bound


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_kl_identity_of_heat(temperature):
    # T KL(phi_x || q_y) = H(x) + T |x - y|² / (2 tau) - F(y).
    y, tau, target, q = quadratic_case(temperature)
    x = y + 0.2
    phi = Gaussian.isotropic(jnp.asarray(x, jnp.float32), tau)
    left = temperature * kl_divergence(phi, q)
    right = (
        QUADRATIC.heat(x, tau)
        + temperature * np.sum((x - y) ** 2) / (2 * tau)
        - QUADRATIC.local_entropy(y, tau, temperature)
    )
    np.testing.assert_allclose(left, right, rtol=1e-4)
    del target


@pytest.mark.parametrize(
    ("problem", "temperature"),
    [(WELL, 1.0), *(long(*c) for c in ((QUADRATIC, 1.0), (QUADRATIC, 0.1), (WELL, 0.1)))],
)
def test_jensen_gap(problem, temperature):
    # H - F = T KL(phi || q) >= 0, from the package's own estimates.
    target = setup(problem, np.full(problem.dim, 0.4), 0.3 * temperature, temperature)
    local_entropy, heat = (
        values.local_entropy(random.key(0), target),
        values.heat(random.key(1), target),
    )
    assert local_entropy.value < heat.value + SIGMAS * float(
        jnp.hypot(local_entropy.error, heat.error)
    )


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_ess_of_a_linear_loss(temperature):
    # ESS / J = exp(-tau |slope / T|²).
    slope = np.array([1.0, -2.0, 0.5]) * temperature
    tau, num = 0.2, 100_000
    target = setup(problems.linear(slope), np.zeros(3), tau, temperature)
    _, info, _, _ = one_shift(shift.Importance(num, antithetic=False), target)
    expected = np.exp(-tau * np.sum((slope / temperature) ** 2))
    np.testing.assert_allclose(
        info.ess / num, expected, rtol=0.03
    )  # 100,000 draws, a third of them effective


def test_ess_of_a_quadratic_loss():
    g, h, tau, num = 1.5, 2.0, 0.2, 100_000
    target = setup(
        problems.quadratic(np.array([h]), center=np.array([-g / h])), np.zeros(1), tau, 1.0
    )
    _, info, _, _ = one_shift(shift.Importance(num, antithetic=False), target)
    a, b = 1 + tau * h, 1 + 2 * tau * h
    expected = np.sqrt(b) / a * np.exp(tau * g**2 / a - 2 * tau * g**2 / b)
    np.testing.assert_allclose(info.ess / num, expected, rtol=0.02)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_both_steps_are_the_proximal_step_of_a_quadratic(temperature):
    x, tau, target, q = quadratic_case(temperature)
    heat, _ = heat_step(fit.RobbinsMonro(3000), random.key(0), target)
    np.testing.assert_allclose(heat.mean, q.mean, atol=0.01)
    _, _, fitted, info = one_shift(CLOUD, target)
    assert np.all(np.abs(fitted.mean - q.mean) < SIGMAS * info.mean_error)
    h = np.asarray(jax.hessian(QUADRATIC.loss)(jnp.zeros(3)), float)
    gradient = np.asarray(jax.grad(QUADRATIC.loss)(jnp.asarray(q.mean)), float)
    # prox_{(tau/T) f}: x⁺ + (tau / T) grad f(x⁺) = x.
    np.testing.assert_allclose(q.mean + tau / temperature * gradient, x, atol=1e-4)
    assert h.shape == (3, 3)


def test_small_tau_is_gradient_descent_with_rate_tau_over_temperature():
    temperature, tau = 0.25, 1e-4
    target = setup(WELL, np.full(2, 0.4), tau, temperature)
    slope = jax.grad(WELL.loss)(jnp.full(2, 0.4))
    _, _, fitted, info = one_shift(shift.Importance(100_000), target)
    step = (fitted.mean - 0.4) / (tau / temperature)
    assert np.all(np.abs(step + slope) < SIGMAS * info.mean_error / (tau / temperature) + 0.01)
    heat, _ = heat_step(fit.RobbinsMonro(200), random.key(0), target)
    np.testing.assert_allclose((heat.mean - 0.4) / (tau / temperature), -slope, rtol=0.05)


def test_scale_of_loss_and_temperature_cancel():
    # Only loss / T matters: an average over rows with T / rows is the sum with T.
    rows = np.random.default_rng(0).normal(size=(50, 2))

    def squares(x, d, weight):
        return 0.5 * weight * jnp.sum((d - x) ** 2)

    summed, averaged = (
        Loss.from_function(squares, np.zeros(2), rows, weight) for weight in (1.0, 1 / 50)
    )
    engine = shift.Importance(2000)
    a = schemes.local_entropy(summed, 0.05, shift=engine).run(random.key(0), 5, progress_bar=False)
    b = schemes.local_entropy(averaged, 0.05, shift=engine, temperature=1 / 50)
    b = b.run(random.key(0), 5, progress_bar=False)
    np.testing.assert_allclose(a.params, b.params, atol=1e-3)


TEN_STEPS = [
    (name, temperature) if temperature == 1.0 and name != "nuts" else long(name, temperature)
    for name in ("importance", "heat", "nuts")
    for temperature in TEMPERATURES
]


@pytest.mark.parametrize(("name", "temperature"), TEN_STEPS)
def test_ten_steps_follow_the_exact_iterates(name, temperature):
    problem, tau = FOUR, 0.3
    loss = Loss.from_function(problem.loss, np.zeros(4))
    if name == "heat":
        optimizer = schemes.heat(loss, tau, temperature=temperature, fit=fit.RobbinsMonro(2000))
    else:
        engine = shift.NUTS(num_samples=250) if name == "nuts" else CLOUD
        optimizer = schemes.local_entropy(loss, tau, temperature=temperature, shift=engine)
    history = optimizer.run(random.key(0), 10, progress_bar=False).history
    x, total = np.zeros(4), np.zeros(4)
    h = np.asarray(jax.hessian(problem.loss)(jnp.zeros(4)), float)
    contraction = np.linalg.inv(np.eye(4) + tau / temperature * h)
    for k in range(10):
        x = problem.shift_mean(x, tau, temperature)
        error = np.full(4, 0.005) if name == "heat" else history.fit.mean_error[k]
        # Errors of earlier steps are contracted by the later ones.
        total = np.sqrt(np.diag(contraction @ np.diag(total**2) @ contraction) + error**2)
        assert np.all(np.abs(history.fitted.mean[k] - x) < SIGMAS * total), k
