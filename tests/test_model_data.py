# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Which sites of a model are data: the losses of all batches average to the full loss, whatever the model is."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from conftest import long
from jax import random
from numpyro import handlers
from numpyro.infer.autoguide import AutoDiagonalNormal
from numpyro.infer.reparam import CircularReparam, LocScaleReparam, NeuTraReparam

from numpyro_regloss import Loss, Minibatch

ROWS, BATCH = 4, 2
Y = np.array([0.3, -1.2, 2.5, 0.9])
X = np.array([[1.0, 0.2], [0.4, -1.0], [-0.7, 0.6], [0.1, 1.5]])
GROUP = np.array([0, 1, 0, 1])


def improper():
    return numpyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))


def observe(mu, y, scale=1.0):
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(mu, scale), obs=y)


def prior_in_a_factor(y):
    mu = improper()
    numpyro.factor("prior", -(mu**2))
    observe(mu, y)


def prior_that_reads_arguments(y, edges):
    phi = numpyro.sample("phi", dist.Normal(0, 1).expand([3]))
    numpyro.factor("smooth", -0.5 * jnp.sum((phi[edges[:, 0]] - phi[edges[:, 1]]) ** 2))
    observe(phi.sum(), y)


def likelihood_in_a_factor(y):
    mu = numpyro.sample("mu", dist.Normal(0, 2))
    with numpyro.plate("rows", len(y)):
        numpyro.factor("log_likelihood", -jnp.abs(y - mu))


def one_value_per_row(y):
    mu = numpyro.sample("mu", dist.Normal(0, 2))
    numpyro.factor("log_likelihood", -jnp.abs(y - mu))


def groups_as_many_as_rows(y, x):
    # One latent per group, four groups and four rows; a second observed site of two terms, as a batch has.
    with numpyro.plate("groups", 4):
        a = numpyro.sample("a", dist.Normal(0, 1))
    with numpyro.plate("pair", 2):
        numpyro.sample("pseudo", dist.Normal(a[:2], 0.5), obs=jnp.zeros(2))
    observe(a.mean() + x[:, 0], y)


def several_sites(y, x):
    b = numpyro.sample("b", dist.Normal(0, 1).expand([2]).to_event(1))
    s = numpyro.sample("s", dist.HalfNormal(1.0))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(x @ b, s), obs=y)
        numpyro.sample("x", dist.MultivariateNormal(b, jnp.eye(2)), obs=x)
    numpyro.sample("sum_to_zero", dist.Normal(b.sum(), 0.1), obs=0.0)


def nested_plates(y, x):
    m = numpyro.sample("m", dist.Normal(0, 1))
    with numpyro.plate("rows", len(y), dim=-2), numpyro.plate("columns", 2, dim=-1):
        numpyro.sample("x", dist.Normal(m, 1.0), obs=x)
    observe(m, y)


def columns_first(x):
    m = numpyro.sample("m", dist.Normal(0, 1))
    with numpyro.plate("columns", 2, dim=-2), numpyro.plate("rows", len(x), dim=-1):
        numpyro.sample("x", dist.StudentT(3.0, m, 1.0), obs=x.T)


def masked_and_scaled(y, mask):
    m = numpyro.sample("m", dist.Normal(0, 1))
    with handlers.mask(mask=mask), handlers.scale(scale=0.3):
        observe(m, y)
    with handlers.mask(mask=False):
        numpyro.sample("off", dist.Normal(m, 1.0), obs=1.0)
    with handlers.scale(scale=2.0):
        numpyro.factor("prior", -(m**2))


def random_effects(y, group):
    s = numpyro.sample("s", dist.LogNormal(0.0, 1.0))
    with numpyro.plate("groups", 2):
        a = numpyro.sample("a", dist.Normal(0, s))
    observe(a[group], y)


def direction(y):
    angle = numpyro.sample("angle", dist.VonMises(0.5, 2.0))
    observe(jnp.sin(angle), y)


circular = handlers.reparam(direction, {"angle": CircularReparam()})
decentered = handlers.reparam(random_effects, {"a": LocScaleReparam(0.2)})


def schools(y):
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    observe(mu, y, 1.0 + tau)


def neural():
    guide = AutoDiagonalNormal(schools, init_scale=0.3)
    with handlers.seed(rng_seed=0):
        guide(Y)
    params = {"auto_loc": jnp.array([0.2, -0.3]), "auto_scale": jnp.array([0.5, 0.8])}
    return NeuTraReparam(guide, params).reparam(schools)


EDGES = np.array([[0, 1], [1, 2]])
MODELS = {
    "prior in a factor": (prior_in_a_factor, (Y,)),
    "prior that reads arguments": (prior_that_reads_arguments, (Y, EDGES)),
    "likelihood in a factor": (likelihood_in_a_factor, (Y,)),
    "one value per row": (one_value_per_row, (Y,)),
    "groups as many as rows": (groups_as_many_as_rows, (Y, X)),
    "several sites": (several_sites, (Y, X)),
    "nested plates": (nested_plates, (Y, X)),
    "columns first": (columns_first, (X,)),
    "masked and scaled": (masked_and_scaled, (Y, np.array([True, False, True, True]))),
    "random effects": (random_effects, (Y, GROUP)),
    "decentered": (decentered, (Y, GROUP)),
    "circular": (circular, (Y,)),
    "neural": (neural(), (Y,)),
}


def batch_values(loss, x):
    """The loss of every batch that can be drawn."""
    rows = loss.minibatch.is_row(loss.arguments)

    def value(index):
        flags = iter(rows)
        batch = loss.arguments.map(lambda leaf: leaf[index] if next(flags) else leaf)
        return loss.evaluate(x, batch, ROWS / BATCH)

    indices = jnp.array(list(itertools.product(range(ROWS), repeat=BATCH)))
    return jax.jit(jax.vmap(value))(indices)


# Sites that are read as those of another model are.
LONG = {"nested plates", "columns first", "random effects", "decentered", "circular"}
CASES = [long(name, "joint") if name in LONG else (name, "joint") for name in MODELS]
CASES += [
    ("prior that reads arguments", "likelihood"),
    long("several sites", "likelihood"),
    long("neural", "likelihood"),
    long("random effects", "map"),
    ("masked and scaled", "map"),
]


@pytest.mark.parametrize(("name", "density"), CASES)
def test_batches_average_to_the_full_loss(name, density):
    model, args = MODELS[name]
    whole = functools.partial(Loss.from_model, model, *args, density=density)
    argnums = tuple(i for i, a in enumerate(args) if len(a) == ROWS)
    loss = whole(minibatch=Minibatch(BATCH, argnums=argnums))
    x = 0.4 * jnp.cos(jnp.arange(loss.dim, dtype=float))
    values = batch_values(loss, x)
    assert jnp.ptp(values) > 0.01
    np.testing.assert_allclose(values.mean(), loss.value(x), rtol=2e-5)
    # A loss has the same value on all rows, with batches and without.
    if density != "likelihood" or name != "prior that reads arguments":
        np.testing.assert_allclose(whole().value(x), loss.value(x), rtol=1e-6)


def likelihood(model, *args, **kwargs):
    return Loss.from_model(model, *args, density="likelihood", **kwargs)


def test_a_prior_in_a_factor_is_not_scaled():
    y = jnp.zeros(40)
    loss = Loss.from_model(prior_in_a_factor, y, minibatch=Minibatch(8))
    value = loss.evaluate(jnp.ones(1), *loss.draw_batch(random.key(0), loss.arguments))
    np.testing.assert_allclose(value, 57.7575, atol=1e-4)  # 40 * (1/2 + log(2 pi) / 2) + 1


def test_likelihood_counts_data_only():
    x = jnp.array([0.7])
    normal = -dist.Normal(x[0], 1.0).log_prob(Y).sum()
    for minibatch in (None, Minibatch(2)):
        loss = likelihood(prior_in_a_factor, Y, minibatch=minibatch)
        np.testing.assert_allclose(loss.value(x), normal, rtol=1e-6)
    np.testing.assert_allclose(
        likelihood(circular, Y).value(x),
        -dist.Normal(jnp.sin(x[0]), 1.0).log_prob(Y).sum(),
        rtol=1e-6,
    )
    z = jnp.array([0.1, -0.4])
    sites = likelihood(neural(), Y).constrain(z)
    np.testing.assert_allclose(
        likelihood(neural(), Y).value(z),
        -dist.Normal(sites["mu"], 1.0 + sites["tau"]).log_prob(Y).sum(),
        rtol=1e-6,
    )
    # Data may be in factors alone; an observed site is data though it reads no argument.
    np.testing.assert_allclose(
        likelihood(one_value_per_row, Y).value(x), jnp.abs(Y - x).sum(), rtol=1e-6
    )
    several = likelihood(several_sites, Y, X)
    assert several.source.counted == ("sum_to_zero", "x", "y")
    # The prior's arguments bound to the model: then it reads none.
    bound = functools.partial(prior_that_reads_arguments, edges=EDGES)
    assert likelihood(bound, Y).source.counted == ("y",)


def sums_in_a_factor(y):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    numpyro.factor("log_likelihood", -jnp.sum((y - mu) ** 2))
    observe(mu, y)


def sums_within_the_plate(y):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    with numpyro.plate("rows", len(y)):
        numpyro.factor("log_likelihood", -jnp.sum((y - mu) ** 2))


def rows_as_an_event(y):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(mu, 1.0).expand([len(y)]).to_event(1), obs=y)


def summary_statistic(y):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    numpyro.sample("mean", dist.Normal(mu, 1.0), obs=y.mean())
    observe(mu, y)


def prior_of_the_data(y):
    mu = numpyro.sample("mu", dist.Normal(y.mean(), 1))
    observe(mu, y)


def differences(y):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    observe(mu, jnp.diff(y))


def pairs(y):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    numpyro.factor("pairs", -mu * jnp.abs(y[:, None] - y))
    observe(mu, y)


def standardized(y):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    observe(mu, (y - y.mean()) / y.std())


def averaged(y):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    with handlers.scale(scale=1 / len(y)):
        observe(mu, y)


def prior_of_the_number_of_rows(y):
    mu = numpyro.sample("mu", dist.Normal(0, len(y)))
    observe(mu, y)


def only_a_prior(y):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    numpyro.factor("prior", -(mu**2))


REFUSED = {
    sums_in_a_factor: r"'log_likelihood' with 1 terms for 4 rows and 1 for 2.*one value per row",
    sums_within_the_plate: r"do not change with the minibatch.*'log_likelihood'",
    rows_as_an_event: r"'y' with 1 terms.*without to_event",
    summary_statistic: "'mean' with 1 terms",
    prior_of_the_data: "'mu', whose prior does",
    differences: r"'y' with 3 terms for 4 rows and 1 for 2",
    pairs: r"'pairs' with 16 terms for 4 rows and 4 for 2",
    standardized: "Standardize data before",
    averaged: "1 / rows into temperature",
    prior_of_the_number_of_rows: "latent site 'mu'",
    only_a_prior: "got none",
}


@pytest.mark.parametrize("model", REFUSED)
def test_what_cannot_be_told_apart_is_refused(model):
    with pytest.raises(ValueError, match=REFUSED[model]):
        Loss.from_model(model, Y, minibatch=Minibatch(BATCH))


def two_factors(y, z):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    numpyro.factor("first", -jnp.sum((y - mu) ** 2))
    numpyro.factor("second", -jnp.sum((z - mu) ** 2))


def test_likelihood_refuses_factors_that_could_be_priors():
    for model, args in ((prior_that_reads_arguments, (Y, EDGES)), (two_factors, (Y, Y))):
        with pytest.raises(ValueError, match=r"could be priors.*functools.partial"):
            likelihood(model, *args)
    with pytest.raises(ValueError, match="a factor that depends on no argument is a prior"):
        likelihood(only_a_prior, Y)


def test_batches_of_all_rows():
    loss = Loss.from_model(prior_in_a_factor, Y, minibatch=Minibatch(ROWS))
    assert loss.source.rows == ("y",)
    # More rows later on, by the same program.
    x = jnp.ones(1)
    arguments = loss.bind((np.zeros(2 * ROWS),))
    value = loss.evaluate(x, *loss.draw_batch(random.key(0), arguments))
    np.testing.assert_allclose(value, loss.value(x, (np.zeros(2 * ROWS),)), rtol=1e-6)
