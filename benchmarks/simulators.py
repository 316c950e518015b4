# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Simulators that JAX cannot trace, in a module of their own: processes import it, and it imports no JAX."""

import os
import time

import numpy as np
from scipy.integrate import solve_ivp

TIMES = np.linspace(0.0, 60.0, 21)
TRUTH = {"log_infection": np.log(0.4), "log_recovery": np.log(0.1)}


def infected(params):
    """Share of people who are infected, by an SIR model, at `TIMES`."""
    infection, recovery = np.exp(params["log_infection"]), np.exp(params["log_recovery"])

    def slope(t, y):
        del t
        new = infection * y[0] * y[1]
        return [-new, new - recovery * y[1]]

    found = solve_ivp(slope, (0.0, TIMES[-1]), [0.99, 0.01], t_eval=TIMES, rtol=1e-6)
    return found.y[1]


OBSERVED = infected(TRUTH)


def misfit(params, observed):
    """Mean square, in units of a noise of 0.02; infections that no epidemic has are refused."""
    if params["log_infection"] > -0.3:
        raise ValueError("an infection faster than any")
    return np.mean((infected(params) - observed) ** 2) / 0.02**2


def slow_misfit(params, observed):
    """The same by a simulator of 20 milliseconds more."""
    time.sleep(0.02)
    return misfit(params, observed)


def sleep(params):
    """Square distance from one, by a simulator of 50 milliseconds."""
    time.sleep(0.05)
    return np.sum((params - 1.0) ** 2)


def process(params):
    """Which process was called."""
    del params
    return float(os.getpid())
