# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Warm-up: NumPyro's own adapter is the oracle for one chain, and short warm-ups end at a usable step size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import long
from jax import lax, random
from numpyro.infer.hmc import IntegratorState
from numpyro.infer.hmc_util import build_adaptation_schedule, warmup_adapter

from numpyro_regloss import Loss, TwoStep, fit, problems, shift
from numpyro_regloss.shift.hmc.warm_up import Places, Tuning, WarmUp
from numpyro_regloss.shift.metric import Metric

DIM = 3


def first_tuning(metric):
    return Tuning(jnp.asarray(0.5), metric.identity(DIM, jnp.zeros(()).dtype))


def mass_matrix(coordinates):
    """The inverse of the mass matrix in the coordinates z: F Fᵀ, where z = F y."""
    columns = coordinates.forth(jnp.eye(DIM))
    return columns.T @ columns


@pytest.mark.both
@pytest.mark.parametrize("dense", [False, True])
def test_one_chain_adapts_as_numpyros(dense):
    num_steps = 40
    init, update = warmup_adapter(num_steps, dense_mass=dense, target_accept_prob=0.7)
    metric = Metric("variance", dense)
    tuning, warm_up = first_tuning(metric), WarmUp(num_steps, 0.7, metric)
    blank = jnp.zeros((1, DIM))
    adaptation = warm_up.init(tuning, Places(blank, blank))
    update, mine = jax.jit(update), jax.jit(warm_up.update)
    mass = jnp.eye(DIM) if dense else jnp.ones(DIM)
    expected = init((jnp.zeros(DIM),), random.key(0), 0.5, mass)
    rng = np.random.default_rng(0)
    # Behind the first estimate of the mass matrix the two go on from different step sizes.
    for i in range(build_adaptation_schedule(num_steps)[1].end + 1):
        accept_prob, x = rng.uniform(), jnp.asarray(rng.normal(size=DIM) * [1.0, 2.0, 5.0])
        expected = update(i, accept_prob, IntegratorState(x, None, None, None), expected)
        places = Places(tuning.coordinates.back(x[None]), blank)
        places, tuning, adaptation = mine(i, accept_prob, places, tuning, adaptation)
        np.testing.assert_allclose(tuning.coordinates.forth(places.y), x[None], rtol=1e-5)
        np.testing.assert_allclose(tuning.step_size, expected.step_size, rtol=1e-5)
        inverse = expected.inverse_mass_matrix
        inverse = inverse if dense else jnp.diag(inverse)
        np.testing.assert_allclose(mass_matrix(tuning.coordinates), inverse, rtol=1e-5, atol=1e-6)
    assert not np.allclose(mass_matrix(tuning.coordinates), np.eye(DIM))


def test_mass_matrix_of_all_chains():
    num_steps, num_chains = 40, 4
    start, middle, _ = build_adaptation_schedule(num_steps)
    x = np.random.default_rng(1).normal(size=(num_steps, num_chains, DIM)) * [0.1, 1.0, 3.0]
    metric = Metric("variance", dense=False)
    tuning, warm_up, blank = (
        first_tuning(metric),
        WarmUp(num_steps, 0.8, metric),
        jnp.zeros((num_chains, DIM)),
    )
    adaptation, update = warm_up.init(tuning, Places(blank, blank)), jax.jit(warm_up.update)
    for i in range(num_steps):
        places = Places(tuning.coordinates.back(jnp.asarray(x[i])), blank)
        _, tuning, adaptation = update(i, 0.8, places, tuning, adaptation)
    seen = x[middle.start : middle.end + 1].reshape(-1, DIM)
    assert middle.start == start.end + 1
    # Stan's shrinkage, with the weight of five draws.
    count = len(seen)
    expected = (count * seen.var(0, ddof=1) + 5 * 1e-3) / (count + 5)
    np.testing.assert_allclose(tuning.coordinates.scale, expected**0.5, rtol=1e-4)


@pytest.mark.parametrize("num_warmup", [20, long(25)])
def test_no_warm_up_is_too_short(num_warmup):
    # Stan's windows shrink with the warm-up, from 20 iterations on: two are left behind the mass matrix then.
    engine = shift.NUTS(num_warmup=num_warmup, num_samples=10, num_chains=2, max_tree_depth=6)
    well = problems.double_well(2).loss
    # A size of zero makes it flat.
    loss = Loss.from_function(lambda x, size: size * well(x), np.zeros(2), np.float32(1.0))
    optimizer = TwoStep(loss, 0.5, engine, fit.ForwardKL())

    @jax.jit
    def run(keys, size):
        return lax.map(lambda key: optimizer.scan(optimizer.init(key, size), 2, size)[1], keys)

    for size in np.float32([0.0, 1.0]):
        history = run(random.split(random.key(0), 40), size)
        assert history.ok.all()
        # Acceptance of 20 draws has an error of about 0.07 a run, and a short warm-up its own; the mean of 40
        # runs lies between half the target and what a step much too small would have.
        assert 0.6 < jnp.mean(history.shift.accept_prob[:, 0]) < 0.97
