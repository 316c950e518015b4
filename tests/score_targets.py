# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Targets whose moments are known, and batch and match as published, for tests and benchmark of score matching."""

import jax.numpy as jnp
import numpy as np

DIM = 10


def normal(dim=DIM, seed=0, condition=100.0):
    """A Gaussian with random axes: mean, covariance."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    return rng.normal(size=dim), (axes * np.geomspace(1.0, condition, dim)) @ axes.T


def sinh_arcsinh(skew, tail, dim=DIM):
    """Minus the log density of sinh((arcsinh(z) + skew) / tail), z ~ N(0, C), and draws."""
    root = np.linalg.cholesky(0.3 * np.ones((dim, dim)) + 0.7 * np.eye(dim))
    inverse = np.linalg.inv(root)

    def loss(x):
        u = tail * jnp.arcsinh(x) - skew
        return 0.5 * jnp.sum((inverse @ jnp.sinh(u)) ** 2) - jnp.sum(
            jnp.log(jnp.cosh(u)) - 0.5 * jnp.log1p(x**2)
        )

    z = np.random.default_rng(0).normal(size=(200_000, dim)) @ root.T
    return loss, np.sinh((np.arcsinh(z) + skew) / tail)


def batch_and_match(seed, gradients, start, num_steps, batch=32):
    """Algorithm 1 of Cai et al. (2024), from the standard normal about the start, in NumPy."""
    rng, dim = np.random.default_rng(seed), len(start)
    mean, covariance = np.array(start, float), np.eye(dim)
    for t in range(num_steps):
        rate = batch * dim / (t + 1.0)
        x = mean + rng.normal(size=(batch, dim)) @ np.linalg.cholesky(covariance).T
        score = gradients(x)
        center, slope = x.mean(0), score.mean(0)
        part, gap = rate / (1.0 + rate), mean - center
        u = rate * np.cov(score.T, bias=True) + part * np.outer(slope, slope)
        v = covariance + rate * np.cov(x.T, bias=True) + part * np.outer(gap, gap)
        lower = np.linalg.cholesky(v)
        value, vector = np.linalg.eigh(lower.T @ u @ lower)
        root = lower @ vector * np.sqrt(2.0 / (1.0 + np.sqrt(1.0 + 4.0 * np.maximum(value, 0.0))))
        covariance = root @ root.T
        mean = mean / (1.0 + rate) + part * (covariance @ slope + center)
    return mean, covariance


def forward_divergence(mean, covariance, exact_mean, exact):
    """KL(q || Gaussian) less that of the best Gaussian, by the moments of q."""
    gap = mean - exact_mean
    trace = np.trace(np.linalg.solve(covariance, exact)) + gap @ np.linalg.solve(covariance, gap)
    log_det = np.linalg.slogdet(covariance)[1] - np.linalg.slogdet(exact)[1]
    return 0.5 * (trace - len(mean) + log_det)
