# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Losses with matrix factorizations are not batched, and so end: two batched ones may wait forever."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from conftest import FAMILIES, SHIFTS, long, with_long
from jax import lax, random

from numpyro_regloss import Gaussian, Loss, RegularizedLoss, TwoStep, fit, shift
from numpyro_regloss.losses.factorizations import factorizations, is_divided

POINTS = jnp.linspace(0.0, 1.0, 5)


def processes(counts):
    """One latent Gaussian process for each row of counts."""
    gap = POINTS[:, None] - POINTS
    for k in range(len(counts)):
        scale = numpyro.sample(f"scale_{k}", dist.LogNormal(0.0, 0.3))
        covariance = jnp.exp(-0.5 * (gap / scale) ** 2) + 1e-2 * jnp.eye(len(POINTS))
        latent = numpyro.sample(f"f_{k}", dist.MultivariateNormal(0.0, covariance))
        numpyro.sample(f"y_{k}", dist.Poisson(jnp.exp(latent)), obs=counts[k])


def two_matrices(p, y):
    one = jnp.eye(3) * (1 + p[0] ** 2) + p[1] ** 2
    other = jnp.eye(3) * (2 + p[2] ** 2) + 0.1 * jnp.outer(p, p)
    return jnp.linalg.slogdet(one)[1] + y @ jnp.linalg.solve(other, y)


def stack(p, size):
    """Two covariance matrices."""
    gap = jnp.linspace(0.0, 1.0, size)[:, None] - jnp.linspace(0.0, 1.0, size)
    return jnp.exp(-0.5 * (gap / jnp.exp(p[:2, None, None])) ** 2) + 0.1 * jnp.eye(size)


def stacks(p, size):
    """Batches of matrices in the loss itself, in programs that a program holds."""
    ones = jnp.ones(size)
    half = jax.jit(
        lambda p: jnp.sum(
            jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(stack(p, size)), True), ones)
        )
    )
    other = lax.cond(
        p[2] > 5.0, jnp.sum, lambda p: jnp.sum(jnp.linalg.slogdet(stack(p, size))[1]), p
    )

    def looped(total, shift):
        return total + jnp.sum(jnp.linalg.solve(stack(p + shift, size), ones[:, None])), None

    return half(p) + other + lax.scan(looped, 0.0, p)[0]


def batched_factorizations(fn, *args):
    return [
        eqn.primitive.name
        for eqn in factorizations(jax.make_jaxpr(fn)(*args).jaxpr)
        if max(v.aval.ndim for v in eqn.invars) > 2
    ]


DATA = jnp.arange(3.0)
MATRICES = Loss.from_function(two_matrices, jnp.ones(3), DATA)
PROCESSES = Loss.from_model(processes, jnp.ones((2, 5)))


@pytest.mark.both
@pytest.mark.parametrize("derivative", [lambda f: f, jax.grad, jax.hessian], ids=[0, 1, 2])
def test_values_and_derivatives_are_those_of_the_loss(derivative):
    x = random.normal(random.key(0), (4, 3))
    mapped = jax.jit(jax.vmap(derivative(MATRICES.value)))
    plain = jax.jit(derivative(lambda p: two_matrices(p, DATA)))
    # Rounding of other orders of summation.
    np.testing.assert_allclose(mapped(x), [plain(p) for p in x], rtol=2e-4, atol=1e-5)
    assert batched_factorizations(jax.vmap(jax.vmap(derivative(MATRICES.value))), x[None]) == []


def test_no_tracer_leaks():
    with jax.checking_leaks():
        jax.make_jaxpr(jax.vmap(jax.grad(MATRICES.value)))(jnp.ones((4, 3)))


def test_gradients_for_data_are_those_of_the_loss():
    x = jnp.array([0.5, -1.0, 2.0])
    slope = jax.grad(lambda y: MATRICES.value(x, (y,)))(DATA)
    np.testing.assert_allclose(slope, jax.grad(lambda y: two_matrices(x, y))(DATA), rtol=1e-5)


@pytest.mark.both
@pytest.mark.parametrize("derivative", [lambda f: f, jax.grad, jax.hessian], ids=[0, 1, 2])
def test_one_factorization_is_not_batched(derivative):
    def loss(p):
        return jnp.sum(jnp.linalg.cholesky(jnp.eye(3) + jnp.outer(p, p)))

    value = Loss.from_function(loss, jnp.ones(3)).value
    assert len(batched_factorizations(jax.vmap(derivative(loss)), jnp.ones((4, 3)))) > 0
    assert batched_factorizations(jax.vmap(derivative(value)), jnp.ones((4, 3))) == []


@pytest.mark.both
@pytest.mark.parametrize("derivative", [lambda f: f, jax.grad, long(jax.hessian)], ids=[0, 1, 2])
def test_large_batches_of_a_loss_are_loops(derivative):
    def plain(p):
        return stacks(p, 20)

    value = Loss.from_function(plain, jnp.ones(3)).value
    x = random.normal(random.key(0), (2, 3))
    assert len(batched_factorizations(derivative(plain), x[0])) > 0
    assert batched_factorizations(jax.vmap(derivative(value)), x) == []


def test_gradients_of_large_batches_are_those_of_the_loss():
    def plain(p):
        return stacks(p, 20)

    value = Loss.from_function(plain, jnp.ones(3)).value
    x = jnp.array([0.3, -0.5, 0.1])
    slope, right = (jax.jit(jax.grad(f))(x) for f in (value, plain))
    # Rounding of other orders of summation, in solutions of systems of condition 200.
    np.testing.assert_allclose(slope, right, rtol=1e-3, atol=1e-3)


def test_small_batches_of_a_loss_are_none():
    loss = Loss.from_function(lambda p: stacks(p, 3), jnp.ones(3))
    calls = factorizations(jax.make_jaxpr(jax.grad(loss.value))(jnp.ones(3)).jaxpr)
    assert [is_divided(eqn) for eqn in calls].count(True) == 0
    assert len(batched_factorizations(jax.vmap(loss.value), jnp.ones((4, 3)))) > 0


ENGINES = {name: (SHIFTS[name], fit.ForwardKL) for name in (*FAMILIES, "smc", "kernel")}
# Covariances of islands, one after the other.
OWN = {"smc": ["cholesky", "triangular_solve"]}
ENGINES["heat"] = (shift.Implicit, lambda: fit.RobbinsMonro(3))
ENGINES["reverse"] = (shift.Implicit, fit.ReverseKL)


@pytest.mark.parametrize("name", with_long(ENGINES, {"kernel", "nuts"}))
def test_no_engine_batches_several_factorizations(name):
    make_shift, make_fit = ENGINES[name]
    optimizer = TwoStep(PROCESSES, tau=1e-3, shift=make_shift(), fit=make_fit())
    state = jax.eval_shape(optimizer.init, random.key(0))
    assert batched_factorizations(optimizer.step, state) == OWN.get(name, [])


def test_no_conversion_batches_several_factorizations():
    target = RegularizedLoss(PROCESSES, Gaussian.isotropic(PROCESSES.x0, 1e-3))
    x = target.reference.sample(random.key(0), (4,))
    assert batched_factorizations(jax.vmap(target.constrain), x) == []


# 60 draws of two processes of 40 points stood still in most runs before; it takes some seconds.
PREPARE = """
import jax, jax.numpy as jnp
from jax import random
import test_one_at_a_time as here
from numpyro_regloss import Gaussian, Loss, RegularizedLoss, fit, schemes, shift, values

here.POINTS = jnp.linspace(0.0, 1.0, {points})
loss = Loss.from_model(here.processes, jnp.ones(({kernels}, {points})))
target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, 1e-4))
key = random.key(0)

def run(engine):
    assert schemes.local_entropy(loss, 1e-4, engine).run(key, 3, progress_bar=False).history.ok.all()

def value(method):
    found = values.local_entropy(key, target, method=method, num_samples=1_000)
    heat = values.heat(key, target, num_samples=1_000)
    assert abs(found.value - heat.value) < 1.0  # nearly linear within so small a tau

"""
STAGES = {
    "importance": "run(shift.Importance(1000))",
    "nuts": "run(shift.NUTS(num_warmup=20, num_samples=20, num_chains=4))",
    "hmc": "run(shift.HMC(num_warmup=20, num_samples=20, num_chains=4))",
    "smc": "run(shift.SMC(100))",
    "sgld": "run(shift.SGLD(2e-5, num_samples=50, num_chains=4))",
    "heat": "assert schemes.heat(loss, 1e-4, fit=fit.RobbinsMonro(20))"
    ".run(key, 3, progress_bar=False).history.ok.all()",
    "value by importance": 'value("importance")',
    "value by smc": 'value("smc")',
    "value by gaussian": 'value("gaussian")',
    "value by bridge": 'value("bridge")',
    "landscape": "values.landscape(key, loss, loss.constrain(loss.x0), tau=1e-4, "
    'directions=["scale_0"], num_points=3, num_samples=100)',
}
# Values of large processes take minutes, of which the evaluations are most.
LARGE = ("importance", "nuts", "heat", "landscape")
CASES = [
    pytest.param(40, 2, "importance"),
    *(
        pytest.param(points, kernels, stage, marks=pytest.mark.long)
        for points, kernels in [(25, 4), (60, 2), (60, 4), (120, 1), (120, 2)]
        for stage in (STAGES if points * kernels <= 120 else LARGE)
    ),
]


@pytest.mark.both
@pytest.mark.parametrize(("points", "kernels", "stage"), CASES)
def test_it_ends(points, kernels, stage):
    code = PREPARE.format(points=points, kernels=kernels) + STAGES[stage] + "\nprint('done')"
    assert_ends(code, 600)


def assert_ends(code, seconds):
    """Runs a program in a process of its own, within a limit."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=__file__.rsplit("/", 1)[0],
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.stdout.endswith("done\n"), done.stderr


# 40 draws of eight stacks of eight matrices stood still in every run while only draws were loops.
STACKS = """
import jax, jax.numpy as jnp
from jax import random
from numpyro_regloss import Loss

gap = jnp.linspace(0.0, 1.0, 60)[:, None] - jnp.linspace(0.0, 1.0, 60)

def log_determinants(p):
    total = 0.0
    for k in range(8):
        kernels = jnp.exp(-0.5 * (gap / jnp.exp(p[k, :, None, None])) ** 2) + 0.01 * (k + 1) * jnp.eye(60)
        diagonals = jnp.diagonal(jnp.linalg.cholesky(kernels), axis1=-2, axis2=-1)
        total += jnp.sum(jnp.log(diagonals))
    return total

loss = Loss.from_function(log_determinants, jnp.zeros((8, 8)))
values = jax.jit(jax.vmap(loss.value))
for i in range(20):
    jax.block_until_ready(values(0.1 * random.normal(random.key(i), (40, 64))))
print("done")
"""


@pytest.mark.long
def test_stacks_of_matrices_end():
    assert_ends(STACKS, 120)
