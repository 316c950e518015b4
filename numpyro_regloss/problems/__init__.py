# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Problems with known answers, for tests, notebooks and benchmarks.

A `Problem` is a JAX loss f with the exact values of what the engines estimate: both regularized
losses, the moments of the shifted density q ∝ exp(-f/T) N(x, tau I), and both exact two-step
updates. Answers are closed forms, or quadrature and root finding in float64 on the host.

References:
    N. García Trillos, Z. Kaplan, D. Sanz-Alonso (2019). Variational Characterizations of Local
    Entropy and Heat Regularization in Deep Learning. Entropy 21(5), 511.
"""

from numpyro_regloss.problems.base import Problem
from numpyro_regloss.problems.classifier import zero_one
from numpyro_regloss.problems.coordinatewise import (
    absolute,
    double_well,
    rastrigin,
    relu,
    separable,
)
from numpyro_regloss.problems.gaussian import gaussian_mixture, linear, quadratic
from numpyro_regloss.problems.landscapes import ackley, alpine, drop_wave, griewank, levy
from numpyro_regloss.problems.valley import rosenbrock

__all__ = [
    "Problem",
    "absolute",
    "ackley",
    "alpine",
    "double_well",
    "drop_wave",
    "gaussian_mixture",
    "griewank",
    "levy",
    "linear",
    "quadratic",
    "rastrigin",
    "relu",
    "rosenbrock",
    "separable",
    "zero_one",
]
