# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""The two losses of the outer-loop benchmarks."""

import jax.numpy as jnp
import numpy as np


def breast_cancer():
    """Summed logistic loss of scikit-learn's breast-cancer data, 569 rows, 30 standardized inputs."""
    from sklearn.datasets import load_breast_cancer  # noqa: PLC0415

    inputs, labels = load_breast_cancer(return_X_y=True)
    inputs = (inputs - inputs.mean(0)) / inputs.std(0)
    return (
        logistic,
        np.zeros(30),
        (inputs.astype(np.float32), (2.0 * labels - 1.0).astype(np.float32)),
    )


def logistic(x, inputs, signs):
    return jnp.sum(jnp.logaddexp(0.0, -signs * (inputs @ x)))


def quartic():
    """A correlated Gaussian in 20 dimensions plus 0.1 Σ x⁴."""
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(20, 20)) / 20**0.5
    return (
        perturbed_quadratic,
        np.full(20, 2.0),
        ((factor @ factor.T + 0.1 * np.eye(20)).astype(np.float32),),
    )


def perturbed_quadratic(x, precision):
    return 0.5 * x @ precision @ x + 0.1 * jnp.sum(x**4)


TARGETS = {"logistic regression, 30-d": breast_cancer, "non-Gaussian, 20-d": quartic}
