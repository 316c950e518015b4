# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Views for ArviZ: the same under both of its generations, with every element under its own label."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from conftest import SIGMAS, long, with_long
from jax import random
from numpyro.contrib.control_flow import scan

from numpyro_regloss import (
    Gaussian,
    Loss,
    Record,
    RegularizedLoss,
    TwoStep,
    TwoStepResult,
    anchor,
    fit,
    gaussian_to_arviz,
    schemes,
    shift,
    to_arviz,
)
from numpyro_regloss.draws.base import BatchMeans, StoredDraws
from numpyro_regloss.draws.resampling import equal_weights
from numpyro_regloss.io_arviz import draws, per_draw
from numpyro_regloss.io_arviz.labels import label_sites
from numpyro_regloss.shift.sampler_stats import sampler_stats
from numpyro_regloss.two_step import outer_step

DATA = Path(__file__).parent / "data"
NUM_STEPS = 4


@pytest.fixture(scope="module")
def az():
    mpl.use("Agg")
    import arviz

    return arviz


def grid(y=None):
    """Nested plates, an event axis, a constraint, deterministic values, and a site without elements."""
    numpyro.sample("scale", dist.HalfNormal(1.0))
    with numpyro.plate("row", 3, dim=-2):
        with numpyro.plate("column", 2, dim=-1):
            cell = numpyro.sample("cell", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(cell, 1.0), obs=y)
        numpyro.deterministic("double", 2 * cell)
    with numpyro.plate("column_alone", 2):
        numpyro.sample("shares", dist.Dirichlet(jnp.ones(3)), infer={"event_dims": ["kind"]})
    numpyro.sample("nothing", dist.Normal(jnp.zeros((0,)), 1.0).to_event(1))


def without_running(optimizer):
    """A result of the right shapes at the start: distinct numbers, at the compilation of nothing."""
    state = optimizer.init(random.key(0))
    row = outer_step.step.eval_shape(optimizer, state, optimizer.loss.bind())[1]

    def fill(leaf):
        values = np.arange(NUM_STEPS * np.prod(leaf.shape)).reshape(NUM_STEPS, *leaf.shape)
        return values.astype(leaf.dtype)

    history = jax.tree.map(fill, row)
    reference = jax.tree.map(lambda a: np.stack([a] * NUM_STEPS), state.reference)
    history = history._replace(ok=np.ones(NUM_STEPS, bool), reference=reference)
    state = state._replace(step=jnp.asarray(NUM_STEPS, jnp.int32))
    return TwoStepResult(None, state, history)


@pytest.fixture(scope="module")
def model_run():
    loss = Loss.from_model(grid, jnp.arange(6.0).reshape(3, 2))
    engine = shift.HMC(num_warmup=20, num_samples=8, num_chains=2)
    optimizer = schemes.local_entropy(loss, tau=0.5, shift=engine)
    return optimizer, without_running(optimizer)


@pytest.fixture(scope="module")
def model_data(model_run):
    optimizer, result = model_run
    coords = {"row": ["a", "b", "c"], "kind": ["x", "y", "z"]}
    return to_arviz(
        result, optimizer, step_draws=[0, 3], deterministic=True, observed=True, coords=coords
    )


class Layer(NamedTuple):
    kernel: jax.Array
    bias: jax.Array


PARAMS = {"net/one": [Layer(jnp.zeros((2, 3)), jnp.zeros(3))], "draw": jnp.zeros(())}
RENAME = {"draw": "drawn"}


def bowl(params):
    flat = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(params)])
    return 0.5 * jnp.sum((flat - jnp.arange(flat.size) / 4) ** 2)


@pytest.fixture(scope="module")
def cloud_run():
    optimizer = TwoStep(
        Loss.from_function(bowl, PARAMS),
        tau=0.5,
        shift=shift.Importance(400, ess=0.4),
        fit=fit.ForwardKL(),
    )
    return optimizer, optimizer.run(random.key(0), NUM_STEPS, progress_bar=False)


@pytest.fixture(scope="module")
def cloud_data(cloud_run):
    optimizer, result = cloud_run
    return to_arviz(result, optimizer, rename=RENAME)


def by_hand(loss, num_chains=2, num_draws=8):
    """Draws of distinct numbers in every element."""
    shape = (num_chains, num_draws, loss.dim)
    x = jnp.arange(np.prod(shape), dtype=float).reshape(shape) / np.prod(shape)
    zero = jnp.zeros(shape[:2])
    return StoredDraws(x, zero, zero, jnp.ones(()))


# Names and elements.


@pytest.mark.both
def test_elements_of_a_model_have_their_labels(model_run):
    optimizer, result = model_run
    loss = optimizer.loss
    draws = by_hand(loss)
    data = to_arviz(
        result, optimizer, draws=draws, deterministic=True, coords={"row": ["a", "b", "c"]}
    )
    posterior = data["posterior"]
    assert "shift_posterior" not in (data.children if hasattr(data, "children") else data.groups())
    assert posterior["cell"].dims == ("chain", "draw", "row", "column")
    assert posterior["shares"].dims == ("chain", "draw", "column_alone", "kind")
    assert posterior["double"].dims == ("chain", "draw", "row", "double_dim_1")
    assert "nothing" not in posterior
    for chain, draw in ((0, 0), (0, 7), (1, 3)):
        wanted = loss.constrain(draws.x[chain, draw])
        here = posterior.sel(chain=chain, draw=draw)
        for name in ("scale", "cell", "shares", "double"):
            np.testing.assert_allclose(here[name], wanted[name], rtol=1e-6)
        for i, j in np.ndindex(3, 2):
            assert here["cell"].sel(row="abc"[i], column=j) == wanted["cell"][i, j]
        flat = data["unconstrained_posterior"]["x"].sel(chain=chain, draw=draw)
        np.testing.assert_array_equal(flat, draws.x[chain, draw])
        assert flat.sel(param="cell[2,1]") == wanted["cell"][2, 1]
        np.testing.assert_allclose(flat.sel(param="scale"), np.log(wanted["scale"]), atol=1e-6)


@pytest.mark.both
def test_elements_of_a_pytree_have_their_labels(cloud_run):
    optimizer, result = cloud_run
    draws = by_hand(optimizer.loss)
    dims = {"net/one/0/kernel": ["input", "output"]}
    data = to_arviz(result, optimizer, draws=draws, rename=RENAME, dims=dims)
    posterior, flat = data["posterior"], data["unconstrained_posterior"]["x"]
    assert set(posterior.data_vars) == {"drawn", "net.one.0.kernel", "net.one.0.bias"}
    params = optimizer.loss.constrain(draws.x[1, 2])
    here = posterior.sel(chain=1, draw=2)
    np.testing.assert_array_equal(here["net.one.0.kernel"], params["net/one"][0].kernel)
    np.testing.assert_array_equal(here["net.one.0.bias"], params["net/one"][0].bias)
    np.testing.assert_array_equal(here["drawn"], params["draw"])
    element = {"input": 1, "output": 2}
    assert here["net.one.0.kernel"].sel(element) == params["net/one"][0].kernel[1, 2]
    assert (
        flat.sel(chain=1, draw=2, param="net/one/0/kernel[1,2]") == here["net.one.0.kernel"][1, 2]
    )
    assert posterior["net.one.0.bias"].attrs["site"] == "net/one/0/bias"
    assert posterior["net.one.0.bias"].dims[2:] == ("net.one.0.bias_dim_0",)


def test_flax_sites_have_names():
    nn = pytest.importorskip("flax.linen")
    from numpyro.contrib.module import random_flax_module

    def network(x, y):
        net = random_flax_module("net", nn.Dense(2), dist.Normal(0, 1), input_shape=(3,))
        numpyro.sample("y", dist.Normal(net(x), 1.0).to_event(2), obs=y)

    loss = Loss.from_model(network, jnp.ones((4, 3)), jnp.ones((4, 2)))
    gaussian = Gaussian.isotropic(jnp.arange(8.0), 1e-12)
    posterior = gaussian_to_arviz(random.key(0), gaussian, loss, 2)["posterior"]
    assert set(posterior.data_vars) == {"net.bias", "net.kernel"}
    np.testing.assert_allclose(posterior["net.kernel"][0, 0], np.arange(2.0, 8).reshape(3, 2), 1e-4)


def test_plates_of_values_are_named_only_where_they_fit_in_one_way():
    def square(y=None):
        with numpyro.plate("row", 3):
            z = numpyro.sample("z", dist.Normal(0, 1))
            numpyro.deterministic("square", jnp.outer(z, z))
            numpyro.deterministic("pair", jnp.stack([z, z], -1))
            numpyro.deterministic("other", jnp.zeros((4, 3, 2, 2)))
            numpyro.deterministic("total", jnp.sum(z))

    loss = Loss.from_model(square)
    labels = label_sites(loss, loss.bind(), "test", deterministic=True)
    assert {site.site: site.dims for site in labels.sites} == {
        "z": ("row",),
        "square": ("square_dim_0", "square_dim_1"),
        "pair": ("row", "pair_dim_1"),
        "other": ("other_dim_0", "row", "other_dim_2", "other_dim_3"),
        "total": (),
    }


def named(*names, shape=(2,)):
    def model():
        for name in names:
            numpyro.sample(name, dist.Normal(jnp.zeros(shape), 1.0).to_event(len(shape)))

    return Loss.from_model(model)


@pytest.mark.parametrize(
    ("names", "options", "words"),
    [
        (("chain",), {}, r"a dimension of ArviZ's.*rename=\{\"chain\": \"chain_\"\}"),
        (("sample",), {}, "rename="),
        (("a", "b"), {"dims": {"a": ["b"]}}, "'b' has the name of a dimension"),
        (("a", "b"), {"rename": {"a": "b"}}, "different names of variables, got .'b'"),
        (("a", "b"), {"rename": {"c": "b"}}, r"rename of the sites \['a', 'b'\], got \['c'\]"),
        (("a",), {"rename": {"a": "b/c"}}, "without '/'"),
        (("/",), {}, "a name that files allow.*got '.'"),
        (("a",), {"dims": {"a": [None]}}, "as 1 different names"),
        (("a/b", "a.b"), {}, "different names of variables"),
        (("a",), {"dims": {"a": ["draw"]}}, "dimension 'draw'"),
        (("a",), {"dims": {"a": ["i", "j"]}}, "as 1 different names"),
        (("a",), {"coords": {"i": [1, 2]}}, r"coords of the dimensions \['a_dim_0'\], got \['i'\]"),
        (("a",), {"coords": {"a_dim_0": [1]}}, r"2 coords of the dimension 'a_dim_0'"),
        (("a",), {"dims": {"b": ["i"]}}, r"dims of the sites \['a'\]"),
    ],
)
def test_names_that_clash_are_refused(names, options, words):
    loss = named(*names)
    with pytest.raises(ValueError, match=words):
        label_sites(loss, loss.bind(), "to_arviz", **options)


def test_plates_that_files_cannot_tell_apart_are_refused():
    def twice():
        with numpyro.plate("a/b", 2, dim=-2), numpyro.plate("a.b", 2, dim=-1):
            numpyro.sample("z", dist.Normal(0, 1))

    loss = Loss.from_model(twice)
    with pytest.raises(ValueError, match="as 2 different names"):
        label_sites(loss, loss.bind(), "test")


def test_sites_that_are_not_shown_are_not_looked_at():
    def wrong():
        z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(z, 1), obs=jnp.ones(2), infer={"event_dims": ["i", "j"]})

    loss = Loss.from_model(wrong)
    assert [site.site for site in label_sites(loss, loss.bind(), "test").sites] == ["z"]
    with pytest.raises(ValueError, match="expected 1 event_dims of the site 'y'"):
        label_sites(loss, loss.bind(), "test", observed=True)


@pytest.mark.parametrize("plate", with_long(("param", "iteration", "x0"), {"param", "iteration"}))
def test_observed_sites_do_not_take_our_labels(plate):
    def model(y):
        with numpyro.plate(plate, NUM_STEPS):
            numpyro.sample("y", dist.Normal(numpyro.sample("z", dist.Normal(0, 1)), 1), obs=y)

    loss = Loss.from_model(model, jnp.zeros(NUM_STEPS))
    optimizer = schemes.heat(loss, tau=0.5)
    result = without_running(optimizer)
    with pytest.raises(
        ValueError, match=rf"names that to_arviz uses itself in constant_data, \['{plate}'\]"
    ):
        to_arviz(result, optimizer, observed=True)
    data = to_arviz(result, optimizer, observed=True, dims={"y": ["row"]})
    assert data["constant_data"]["y"].dims == ("row",)


def test_replicas_are_a_dimension():
    def model():
        numpyro.sample("scale", dist.HalfNormal(1.0))
        with numpyro.plate("row", 2):
            numpyro.sample("cell", dist.Normal(0, 1))

    optimizer = schemes.parle(Loss.from_model(model), tau=0.5, num_replicas=2)
    draws = by_hand(optimizer.loss, 1, 3)
    data = to_arviz(without_running(optimizer), optimizer, draws=draws)
    posterior, flat = data["posterior"], data["unconstrained_posterior"]["x"]
    assert posterior["cell"].dims == ("chain", "draw", "replica", "row")
    for replica in range(2):
        here = posterior.sel(replica=replica)
        np.testing.assert_allclose(here["scale"], np.exp(flat.sel(param=f"scale@{replica}")), 1e-6)
        for row in range(2):
            element = flat.sel(param=f"cell[{row}]@{replica}")
            np.testing.assert_array_equal(here["cell"].sel(row=row), element)
    assert posterior.attrs["loss"] == "NumPyro model"


def test_names_that_clash_can_be_given_others():
    loss = named("chain", "draw")
    labels = label_sites(loss, loss.bind(), "test", rename={"chain": "link", "draw": "pull"})
    assert [site.variable for site in labels.drawn] == ["link", "pull"]
    assert labels.flat.tolist() == ["link[0]", "link[1]", "pull[0]", "pull[1]"]


# Statistics and weights.


@pytest.mark.both
def test_statistics_of_hmc(model_run, model_data):
    optimizer, result = model_run
    stats = model_data["sample_stats"]
    target = RegularizedLoss(optimizer.loss, result.state.reference)
    x = jnp.asarray(model_data["unconstrained_posterior"]["x"].values)
    both = jax.vmap(jax.vmap(lambda x: (target.log_density(x), target.value(x))))
    lp, loss = jax.jit(both)(x)
    np.testing.assert_allclose(stats["lp"], lp, rtol=1e-4)
    np.testing.assert_allclose(stats["loss"], loss, rtol=1e-4)
    # Kinetic energy is a sum of squares.
    assert (stats["energy"] + stats["lp"] > -1e-4).all()
    assert stats["diverging"].dtype == bool
    assert not stats["diverging"].any()
    assert (stats["n_steps"] > 0).all()
    assert ((stats["acceptance_rate"] > 0) & (stats["acceptance_rate"] <= 1)).all()
    assert len(np.unique(stats["step_size"])) == 1


def test_depth_of_a_tree():
    loss = named("a")
    target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, 0.5))
    steps = jnp.array([[1, 2, 3, 4, 7, 8]])
    zeros = jnp.zeros(steps.shape)
    stats = sampler_stats(target, jnp.zeros((1, 6, 2)), zeros, num_steps=steps, is_tree=True)
    assert stats["tree_depth"].tolist() == [[1, 2, 2, 3, 3, 4]]
    assert set(stats) == {"lp", "n_steps", "tree_depth"}


@pytest.mark.parametrize("kernel", [long("HMC"), "BarkerMH"])
def test_statistics_of_a_kernel(kernel):
    loss = Loss.from_function(lambda x: jnp.sum((x - 1.0) ** 2), jnp.zeros(2))
    target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, 0.5), temperature=2.0)
    engine = shift.Kernel(getattr(numpyro.infer, kernel), num_warmup=5, num_samples=4, num_chains=2)
    _, draws, _ = jax.jit(engine.step)(random.key(1), engine.init(random.key(0), target), target)
    lp = jax.vmap(jax.vmap(target.log_density))(draws.x)
    np.testing.assert_allclose(draws.stats["lp"], lp, rtol=1e-4, atol=1e-5)
    assert draws.stats["acceptance_rate"].shape == (2, 4)
    if kernel == "HMC":
        assert (draws.stats["energy"] + lp > -1e-4).all()


@pytest.mark.both
def test_weighted_draws_are_resampled(cloud_run, cloud_data):
    optimizer, result = cloud_run
    key = outer_step.draw_key(result.state.rng_key, result.state.step)
    draws = optimizer.draw(key, result.state)
    weight = np.asarray(jax.nn.softmax(draws.log_weight[0].astype(float)))
    shown = cloud_data["sample_stats"]["draw_index"].values[0]
    counts = np.bincount(shown, minlength=400)
    # Systematic resampling rounds up or down; a hair more, for cumulative sums round too.
    assert (np.abs(counts - 400 * weight) < 1 + 1e-3).all()
    np.testing.assert_allclose(
        cloud_data["sample_stats"]["log_weight"][0], np.log(weight[shown]), atol=1e-4
    )
    x = cloud_data["unconstrained_posterior"]["x"][0]
    np.testing.assert_array_equal(x, draws.x[0, shown])
    attrs = cloud_data["posterior"].attrs
    assert attrs["resampled"] == 1
    assert attrs["temperature_mode"] == "set by the effective sample size"


def test_equal_weights_keep_chains_where_they_are_chains():
    halves = np.log([[3.0, 1.0, 1.0, 3.0], [1.0, 3.0, 3.0, 1.0]])
    index, resampled = equal_weights(halves)
    assert resampled
    assert index.shape == (2, 4)
    assert (index[0] < 4).all()
    assert (index[1] >= 4).all()
    pooled, resampled = equal_weights(halves + np.array([[0.0], [2.0]]))
    assert resampled
    assert pooled.shape == (1, 8)
    rounds, resampled = equal_weights(np.array([[0.0, 0.0, -np.inf], [0.0, 0.0, -np.inf]]))
    assert not resampled
    assert rounds.tolist() == [[0, 1], [3, 4]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_none_are_refused(bad):
    with pytest.raises(ValueError, match="finite log weights"):
        equal_weights(np.full((1, 3), bad))


# Observations.


COUNT = jnp.array(2)
MISSING = jnp.array([1.0, jnp.nan, 2.0])


def survey(y):
    """Plates, an event axis, a value that several terms share, data without a plate, a missing one, a factor."""
    level = numpyro.sample("level", dist.Normal(0, 1))
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    numpyro.factor("soft", -(level**2))
    with numpyro.plate("row", len(y)):
        numpyro.sample("y", dist.Normal(level, scale), obs=y)
        pair = dist.MultivariateNormal(jnp.stack([level, scale]), jnp.eye(2))
        numpyro.sample("pair", pair, obs=jnp.stack([y, y], -1), infer={"event_dims": ["part"]})
    numpyro.sample("count", dist.Poisson(jnp.exp(level) * jnp.ones(4)), obs=COUNT)
    numpyro.sample("bare", dist.Normal(level, scale), obs=y)
    with numpyro.plate("visit", 3):
        seen = ~jnp.isnan(MISSING)
        numpyro.sample("gap", dist.Normal(level, 1.0), obs=MISSING, obs_mask=seen)


SURVEY = jnp.array([0.5, -1.0, 2.0, 0.0, 1.5])


@pytest.fixture(scope="module")
def survey_run():
    optimizer = TwoStep(
        Loss.from_model(survey, SURVEY), 0.5, shift.Importance(400, ess=0.4), fit.ForwardKL()
    )
    return optimizer, without_running(optimizer)


@pytest.fixture(scope="module")
def survey_data(survey_run):
    optimizer, result = survey_run
    return to_arviz(result, optimizer, log_likelihood=True, posterior_predictive=True)


@pytest.mark.both
def test_log_likelihood_is_numpyros(survey_run, survey_data):
    optimizer, _ = survey_run
    assert survey_data["posterior"].attrs["resampled"] == 1
    draws = {name: jnp.asarray(survey_data["posterior"][name][0]) for name in optimizer.loss.names}
    wanted = numpyro.infer.log_likelihood(survey, draws, SURVEY)
    found = survey_data["log_likelihood"]
    assert set(found.data_vars) == set(wanted) - {"soft"}
    for name, values in found.data_vars.items():
        np.testing.assert_allclose(values[0], wanted[name], rtol=1e-4, atol=1e-5)
    assert {name: values.dims[2:] for name, values in found.data_vars.items()} == {
        "y": ("row",),
        "pair": ("row",),
        "count": ("count_dim_0",),
        "bare": ("bare_dim_0",),
        "gap_observed": ("visit",),
    }
    assert "not of the model's posterior" in found.attrs["description"]
    assert "terms of gap_observed are zero at all draws" in found.attrs["description"]
    assert found.attrs["shift"] == "Importance"


@pytest.mark.both
def test_predictions_are_those_of_the_draws(survey_run, survey_data):
    optimizer, result = survey_run
    posterior, found = survey_data["posterior"], survey_data["posterior_predictive"]
    assert found["pair"].dims == ("chain", "draw", "row", "part")
    assert found["count"].shape == (1, 400, 4)
    assert found["count"].dtype.kind == "i"
    # The data have an axis that the distribution has not: they are independent all the same.
    assert found["bare"].shape == (1, 400, 5)
    both = ("chain", "draw")
    for name in ("y", "gap_observed", "bare"):
        scale = 1.0 if name == "gap_observed" else posterior["scale"]
        residual = (found[name] - posterior["level"]) / scale
        assert (np.abs(residual.mean(both)) < SIGMAS / 20).all()
        # Of a standard normal.
        assert (np.abs(residual.std(both) - 1) < SIGMAS / np.sqrt(800)).all()
    observed = survey_data["observed_data"]
    np.testing.assert_array_equal(observed["y"], SURVEY)
    assert set(observed.data_vars) == set(found.data_vars)
    assert "y" not in survey_data["constant_data"]
    again = to_arviz(result, optimizer, posterior_predictive=True)
    assert "log_likelihood" not in again
    np.testing.assert_array_equal(again["posterior_predictive"]["y"], found["y"])
    other = to_arviz(result, optimizer, posterior_predictive=True, rng_key=random.key(5))
    assert (other["posterior_predictive"]["y"] != found["y"]).any()


@pytest.mark.both
# ArviZ 0.23 uses what later releases of matplotlib give up.
@pytest.mark.filterwarnings("ignore::matplotlib.MatplotlibDeprecationWarning")
# Five observations: one of them has much weight.
@pytest.mark.filterwarnings("ignore:Estimated shape parameter:UserWarning")
def test_arviz_compares_with_data(az, survey_data):
    from matplotlib import pyplot as plt

    values = survey_data["log_likelihood"]["y"].values.reshape(400, -1)
    result = az.loo(survey_data, var_name="y")
    in_sample = np.log(np.exp(values.astype(float)).mean(0)).sum()
    assert result.n_data_points == len(SURVEY)
    # An observation is harder to predict without itself.
    assert float(getattr(result, "elpd", getattr(result, "elpd_loo", np.inf))) < in_sample
    plot = az.plot_ppc_dist if hasattr(az, "plot_ppc_dist") else az.plot_ppc
    try:
        assert plot(survey_data, var_names=["y"]) is not None
    finally:
        plt.close("all")


def test_other_data_and_chunks(survey_run, monkeypatch):
    optimizer, result = survey_run
    draws = by_hand(optimizer.loss)
    options = {"draws": draws, "log_likelihood": True, "posterior_predictive": True}
    whole = to_arviz(result, optimizer, SURVEY + 1, **options)
    monkeypatch.setattr(per_draw, "CHUNK_NUMBERS", 100)  # of some thirty numbers: three draws
    parts = to_arviz(result, optimizer, SURVEY + 1, **options)
    for group in ("log_likelihood", "posterior_predictive", "observed_data", "posterior"):
        for name, values in whole[group].data_vars.items():
            np.testing.assert_allclose(values, parts[group][name], rtol=1e-6)
    np.testing.assert_array_equal(whole["observed_data"]["y"], SURVEY + 1)
    here = whole["posterior"].isel(chain=1, draw=2)
    wanted = dist.Normal(here["level"].values, here["scale"].values).log_prob(SURVEY + 1)
    found = whole["log_likelihood"]["y"].isel(chain=1, draw=2)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_predictions_of_a_series_are_one_step_ahead():
    def series(y):
        pull = numpyro.sample("pull", dist.Normal(0, 1))

        def step(before, _):
            now = numpyro.sample("y", dist.Normal(pull * before, 0.1))
            return now, None

        with numpyro.handlers.condition(data={"y": y}):
            scan(step, 1.0, None, length=len(y))

    y = jnp.array([2.0, -3.0, 1.0])
    loss = Loss.from_model(series, y)
    narrow = Gaussian(jnp.array([0.5]), jnp.array(1e-6))
    data = gaussian_to_arviz(
        random.key(0), narrow, loss, 400, log_likelihood=True, posterior_predictive=True
    )
    wanted = 0.5 * jnp.array([1.0, 2.0, -3.0])
    error = 0.1 / np.sqrt(400)
    found = data["posterior_predictive"]["y"].mean(("chain", "draw"))
    assert (np.abs(found - wanted) < SIGMAS * error).all()
    np.testing.assert_allclose(
        data["log_likelihood"]["y"][0, 0], dist.Normal(wanted, 0.1).log_prob(y), rtol=1e-3
    )


def test_replicas_have_observations_of_their_own():
    def model(y):
        level = numpyro.sample("level", dist.Normal(0, 1))
        with numpyro.plate("row", len(y)):
            numpyro.sample("y", dist.Normal(level, 1.0), obs=y)

    optimizer = schemes.parle(Loss.from_model(model, SURVEY), tau=0.5, num_replicas=2)
    draws = by_hand(optimizer.loss, 1, 3)
    data = to_arviz(
        without_running(optimizer),
        optimizer,
        draws=draws,
        log_likelihood=True,
        posterior_predictive=True,
    )
    found = data["log_likelihood"]["y"]
    assert found.dims == ("chain", "draw", "replica", "row")
    for replica in range(2):
        wanted = dist.Normal(draws.x[0, :, replica, None], 1.0).log_prob(SURVEY)
        np.testing.assert_allclose(found.sel(replica=replica)[0], wanted, rtol=1e-5)
    assert "select one before" in data["log_likelihood"].attrs["description"]
    predicted = data["posterior_predictive"]["y"]
    assert (predicted.sel(replica=0) != predicted.sel(replica=1)).all()


def test_losses_without_observations_are_refused(cloud_run):
    optimizer, result = cloud_run
    for option in ("log_likelihood", "posterior_predictive"):
        with pytest.raises(ValueError, match="from a NumPyro model for log_likelihood"):
            to_arviz(result, optimizer, rename=RENAME, **{option: True})

    def factors():
        numpyro.factor("soft", -(numpyro.sample("z", dist.Normal(0, 1)) ** 2))

    loss = Loss.from_model(factors)
    with pytest.raises(ValueError, match="observed sites .*got none .a numpyro.factor is no"):
        gaussian_to_arviz(random.key(0), Gaussian(loss.x0, jnp.ones(())), loss, log_likelihood=True)
    loss = Loss.from_model(survey, SURVEY)
    optimizer = TwoStep(loss, tau=0.5, shift=shift.Implicit(), fit=fit.RobbinsMonro(3))
    with pytest.raises(ValueError, match="expected draws for log_likelihood"):
        to_arviz(without_running(optimizer), optimizer, log_likelihood=True)


# Many sites.


def long_model(y):
    """Sites and observations one by one; of three kinds of support."""
    for i in range(len(y)):
        z = numpyro.sample(
            f"z{i}", (dist.Normal(0, 1), dist.HalfNormal(1), dist.Uniform(0, 2))[i % 3]
        )
        numpyro.sample(f"y{i}", dist.Normal(z, 1.0), obs=y[i])


@pytest.fixture(scope="module")
def long_loss():
    return Loss.from_model(long_model, jnp.arange(60.0))


def test_many_sites_are_one_output(long_loss):
    # Each output of a program would take as long to compile as a small program.
    loss, arguments = long_loss, long_loss.bind()
    x = random.normal(random.key(0), (2, 3, loss.dim))
    found = draws.position_groups(
        np.asarray(x), loss, arguments, label_sites(loss, arguments, "test")
    )["posterior"]
    shapes = per_draw._many.eval_shape(draws._named, loss.names, loss, arguments, x[0])
    assert len(jax.tree.leaves(shapes)) == 1
    params = loss.constrain(x[1, 2])
    assert all(isinstance(value, jax.Array) for value in params.values())
    here = dict(zip(loss.names, x[1, 2], strict=True))
    for i, to in enumerate([lambda z: z, jnp.exp, lambda z: 2 * jax.nn.sigmoid(z)]):
        for name in (f"z{i}", f"z{i + 30}"):
            np.testing.assert_allclose(params[name], to(here[name]), rtol=1e-5)
            np.testing.assert_allclose(found[name][1, 2], to(here[name]), rtol=1e-5)


@pytest.mark.both
def test_data_that_are_read_one_by_one_stay_in_their_loop(long_loss):
    assert long_loss.fenced

    def total(loss, x, arguments):
        return jax.lax.map(lambda x: loss.evaluate(x, arguments), x)

    x = random.normal(random.key(0), (4, long_loss.dim))
    compiled = jax.jit(total).lower(long_loss, x, long_loss.arguments).compile()
    (loop,) = re.findall(r"= \((.*)\) while\(", compiled.as_text())
    # Hoisted, each of sixty numbers would be a variable of the loop.
    assert loop.count("f32[") < 20


def test_large_computations_on_data_leave_their_loop():
    def loss(params, y):
        gram = jnp.linalg.cholesky(jnp.outer(y, y) + jnp.eye(len(y)))
        return sum(params[i] * y[i] for i in range(len(y))) + jnp.sum(gram @ params)

    y = jnp.ones(60)
    assert not Loss.from_function(loss, y, y).fenced
    assert not Loss.from_function(lambda p, y: jnp.sum((p - y) ** 2), y, y).fenced


# Steps.


@pytest.mark.both
def test_history_is_one_dataset(cloud_run, cloud_data):
    _, result = cloud_run
    history, data = result.history, cloud_data["optimization"]
    np.testing.assert_array_equal(data["iteration"], np.arange(NUM_STEPS))
    np.testing.assert_array_equal(data["center"], history.reference.mean)
    np.testing.assert_array_equal(data["shift_ess"], history.shift.ess)
    np.testing.assert_array_equal(data["fit_mean_error"], history.fit.mean_error)
    assert data["fit_mean_error"].dims == ("iteration", "param")
    assert list(data["param"].values)[0] == "drawn"
    last = np.linalg.norm(result.state.reference.mean - history.reference.mean[-1])
    np.testing.assert_allclose(data["step_norm"][-1], last, rtol=1e-6)
    np.testing.assert_array_equal(data["seconds"], result.seconds)


def test_history_of_a_scan_is_shown_whole(cloud_run, cloud_data):
    optimizer, result = cloud_run
    on_device = result._replace(history=jax.device_put(result.history), seconds=None)
    data = to_arviz(on_device, optimizer, draws=by_hand(optimizer.loss), rename=RENAME)
    wanted = set(cloud_data["optimization"].data_vars) - {"seconds"}
    assert set(data["optimization"].data_vars) == wanted
    for name in wanted:
        np.testing.assert_array_equal(data["optimization"][name], cloud_data["optimization"][name])


def test_values_of_a_record_have_their_errors():
    loss = Loss.from_function(bowl, PARAMS)
    optimizer = schemes.heat(loss, tau=0.5, record=Record(values_every=2))
    result = without_running(optimizer)
    data = to_arviz(result, optimizer, draws=by_hand(loss), rename=RENAME)["optimization"]
    record = result.history.record
    np.testing.assert_array_equal(data["record_heat"], record.heat.value)
    np.testing.assert_array_equal(data["record_heat_error"], record.heat.error)
    np.testing.assert_array_equal(data["record_verdict"], record.verdict)


def test_a_continued_run_counts_on(cloud_run):
    optimizer, result = cloud_run
    more = optimizer.run(random.key(9), 2, init_state=result.state, progress_bar=False)
    draws = by_hand(optimizer.loss)
    data = to_arviz(more, optimizer, draws=draws, step_draws=[5], rename=RENAME)
    assert data["optimization"]["iteration"].values.tolist() == [4, 5]
    assert data["shift_posterior"]["iteration"].values.tolist() == [5]
    with pytest.raises(ValueError, match=r"among the steps 4 to 5 of the history, got \[3\]"):
        to_arviz(more, optimizer, draws=draws, step_draws=[3], rename=RENAME)


def test_a_cloud_of_a_step_is_made_again(cloud_run):
    optimizer, result = cloud_run
    step = jnp.asarray(2, jnp.int32)
    reference = jax.tree.map(lambda a: jnp.asarray(a[2]), result.history.reference)
    arguments = optimizer.loss.bind()
    state = outer_step.revisit(optimizer, result.state, step, reference, arguments)
    draws = optimizer.draw(outer_step.draw_key(result.state.rng_key, step), state)
    mean = jnp.einsum("cd,cdi->i", jax.nn.softmax(draws.log_weight), draws.x)
    # The very draws of the step: equal but for rounding.
    np.testing.assert_allclose(mean, result.history.fitted.mean[2], atol=1e-5)
    np.testing.assert_allclose(draws.temperature, result.history.shift.temperature[2], rtol=1e-6)


@pytest.mark.both
def test_steps_have_diagnostics_of_their_own(az, model_data):
    for statistic in (az.ess, az.rhat):
        values = statistic(model_data["shift_posterior"]["x"])
        values = values["x"] if "x" in getattr(values, "data_vars", ()) else values
        assert values.dims == ("iteration", "param")
        assert values["iteration"].values.tolist() == [0, 3]
        assert np.isfinite(values).all()


# ArviZ itself.


@pytest.mark.both
def test_summary(az, model_data):
    table = az.summary(model_data)
    assert {"scale", "cell[a, 0]", "cell[c, 1]", "shares[1, z]", "double[b, 1]"} <= set(table.index)
    assert np.isfinite(table["r_hat"].astype(float)).all()
    mean = model_data["posterior"]["cell"].mean(("chain", "draw"))
    # Tables round.
    assert abs(float(table.loc["cell[b, 1]", "mean"]) - float(mean.sel(row="b", column=1))) < 0.01


@pytest.mark.both
# ArviZ 0.23 uses what later releases of matplotlib give up.
@pytest.mark.filterwarnings("ignore::matplotlib.MatplotlibDeprecationWarning")
@pytest.mark.parametrize(
    "name", ["plot_trace", "plot_rank", "plot_forest", "plot_energy", "plot_pair"]
)
def test_plots(az, model_data, name):
    from matplotlib import pyplot as plt

    options = (
        {} if name == "plot_energy" else {"var_names": ["scale", "shares"], "coords": {"kind": "x"}}
    )
    try:
        assert getattr(az, name)(model_data, **options) is not None
        assert plt.get_fignums()
    finally:
        plt.close("all")


@pytest.mark.both
def test_one_chain_and_one_draw(az, cloud_run):
    optimizer, result = cloud_run
    for shape in ((1, 1), (1, 8), (2, 1)):
        draws = by_hand(optimizer.loss, *shape)
        data = to_arviz(result, optimizer, draws=draws, rename=RENAME)
        assert data["posterior"]["drawn"].shape == shape
    table = az.summary(
        to_arviz(result, optimizer, draws=by_hand(optimizer.loss, 1, 8), rename=RENAME)
    )
    assert table["r_hat"].isna().all()


@pytest.mark.both
@pytest.mark.skipif(sys.version_info < (3, 12), reason="ArviZ 0.23 has no modules that load late")
def test_arviz_may_be_imported_first():
    code = "import arviz, numpyro_regloss, numpyro; print(numpyro.distributions.distribution.Unit.__name__)"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "Unit", done.stderr


# Files.


def compare(one, other, rtol=0.0):
    for group in (
        "posterior",
        "unconstrained_posterior",
        "sample_stats",
        "optimization",
        "constant_data",
    ):
        a, b = one[group], other[group]
        assert set(a.data_vars) == set(b.data_vars)
        for name in a.data_vars:
            np.testing.assert_allclose(a[name].values, b[name].values, rtol=rtol)
            assert a[name].dims == b[name].dims


@pytest.mark.both
def test_netcdf_round_trip(az, model_data, tmp_path):
    path = tmp_path / "run.nc"
    model_data.to_netcdf(str(path), engine="h5netcdf")
    back = az.from_netcdf(str(path))
    compare(model_data, back)
    assert back["posterior"].attrs == model_data["posterior"].attrs | {
        "seed": pytest.approx(model_data["posterior"].attrs["seed"])
    }


@pytest.mark.both
def test_zarr_round_trip(model_data, tmp_path):
    import xarray as xr

    tree = model_data if hasattr(model_data, "children") else model_data.to_datatree()
    tree.to_zarr(tmp_path / "run.zarr", consolidated=False)
    compare(model_data, xr.open_datatree(tmp_path / "run.zarr", engine="zarr", consolidated=False))


@pytest.mark.both
@pytest.mark.parametrize("container", ["inferencedata", "datatree"])
def test_files_of_both_generations_are_read(az, container):
    """Written by `python tests/test_arviz.py FILE` under ArviZ 0.23 and 1.x."""
    data = az.from_netcdf(str(DATA / f"arviz_{container}.nc"))
    # Releases of JAX round the last digit in other ways.
    compare(data, small_data(), rtol=1e-6)


def small_data():
    optimizer = TwoStep(
        Loss.from_function(bowl, PARAMS), tau=0.5, shift=shift.Implicit(), fit=fit.RobbinsMonro(1)
    )
    draws = by_hand(optimizer.loss)
    return to_arviz(without_running(optimizer), optimizer, draws=draws, rename=RENAME)


# What says what it is.


@pytest.mark.both
def test_attributes(model_data):
    attrs = model_data["posterior"].attrs
    assert "not the model's posterior" in attrs["description"]
    wanted = {
        "inference_library": "numpyro_regloss",
        "loss": "NumPyro model",
        "density": "joint",
        "shift": "HMC",
        "fit": "ForwardKL",
        "anchor": "Proximal",
        "tau": 0.5,
        "temperature": 1.0,
        "temperature_mode": "fixed",
        "resampled": 0,
        "num_steps": NUM_STEPS,
    }
    assert {name: attrs[name] for name in wanted} == wanted
    sites = json.loads(attrs["sites"])
    assert sites["cell"] == {
        "variable": "cell",
        "kind": "latent",
        "shape": [3, 2],
        "dims": ["row", "column"],
    }
    assert sites["nothing"]["shape"] == [0]
    observed = model_data["constant_data"]["y"]
    assert observed.dims == ("row", "column")
    np.testing.assert_array_equal(observed, np.arange(6.0).reshape(3, 2))


@pytest.mark.both
def test_a_gaussian(model_run):
    loss = model_run[0].loss
    gaussian = Gaussian(jnp.linspace(-1, 1, loss.dim), jnp.full(loss.dim, 0.3))
    data = gaussian_to_arviz(random.key(0), gaussian, loss, 500, deterministic=True)
    x = data["unconstrained_posterior"]["x"]
    assert x.shape == (1, 500, loss.dim)
    error = 0.3 / np.sqrt(500)
    assert (np.abs(x.mean(("chain", "draw")) - gaussian.mean) < SIGMAS * error).all()
    posterior = data["posterior"]
    assert (posterior["scale"] > 0).all()
    np.testing.assert_allclose(posterior["shares"].sum("kind"), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(posterior["double"], 2 * posterior["cell"])
    assert "fitted Gaussian" in posterior.attrs["description"]


@pytest.mark.both
def test_an_engine_without_draws():
    loss = Loss.from_function(bowl, PARAMS)
    optimizer = TwoStep(loss, tau=0.5, shift=shift.Implicit(), fit=fit.RobbinsMonro(3))
    data = to_arviz(without_running(optimizer), optimizer, rename=RENAME)
    assert "gaussian_to_arviz" in data["optimization"].attrs["description"]
    groups = set(data.children if hasattr(data, "children") else data.groups())
    assert groups == {"optimization", "constant_data"}
    with pytest.raises(ValueError, match="no step_draws of Implicit"):
        to_arviz(without_running(optimizer), optimizer, rename=RENAME, step_draws=True)


def test_means_of_draws_of_a_step_are_refused():
    engine = shift.SGLD(0.01, 200, keep="batch_means")
    loss = Loss.from_function(bowl, PARAMS)
    optimizer = schemes.local_entropy(loss, tau=0.5, shift=engine)
    draws = by_hand(loss)
    with pytest.raises(ValueError, match="means of batches"):
        to_arviz(without_running(optimizer), optimizer, draws=draws, step_draws=[1], rename=RENAME)


def test_tau_that_is_no_number_says_why(cloud_run):
    optimizer, result = cloud_run
    loss, draws = optimizer.loss, by_hand(optimizer.loss)
    parts = {"shift": optimizer.shift, "fit": fit.ForwardKL()}
    groups, own = np.full(loss.dim, 0.5), anchor.AdaptTau(anchor.Proximal())
    for other, wanted in (
        (TwoStep(loss, groups, **parts), "per parameter"),
        (TwoStep(loss, lambda step: 0.5, **parts), "schedule"),
        (TwoStep(loss, 0.5, **parts, anchor=own), "set by the anchor"),
    ):
        data = to_arviz(result, other, draws=draws, rename=RENAME)
        assert data["optimization"].attrs["tau"] == wanted


@pytest.mark.both
def test_groups_have_names_without_a_meaning_to_arviz(model_data):
    groups = set(
        model_data.children if hasattr(model_data, "children") else model_data.groups()
    ) - {"constant_data"}
    assert len(groups) == 5
    for word in ("data", "warmup", "predictions", "log_likelihood"):
        assert not [group for group in groups if word in group]


def test_wrong_kinds_are_refused(cloud_run):
    optimizer, result = cloud_run
    draws = by_hand(optimizer.loss)
    with pytest.raises(TypeError, match="the TwoStep that ran as second argument, got Loss"):
        to_arviz(result, optimizer.loss)
    with pytest.raises(TypeError, match=r"result of TwoStep.run, got tuple"):
        to_arviz((result.state, result.history), optimizer)
    with pytest.raises(TypeError, match="draws as an engine makes them, got dict"):
        to_arviz(result, optimizer, draws={}, rename=RENAME)
    with pytest.raises(ValueError, match="from a NumPyro model for deterministic"):
        to_arviz(result, optimizer, deterministic=True)
    with pytest.raises(ValueError, match="draws of 10 parameters, got x of shape"):
        to_arviz(result, optimizer, draws=by_hand(named("a")), rename=RENAME)
    means = BatchMeans(draws.x, draws.log_weight, draws.loss, draws.temperature, spread=draws.x)
    with pytest.raises(ValueError, match=r"keep=\"draws\""):
        to_arviz(result, optimizer, draws=means, rename=RENAME)
    several = jax.tree.map(lambda a: np.stack([a, a]), result.history)
    with pytest.raises(ValueError, match="history of one run"):
        to_arviz(result._replace(history=several), optimizer)
    with pytest.raises(TypeError, match="Loss as third argument"):
        gaussian_to_arviz(random.key(0), result.history.fitted, optimizer)
    with pytest.raises(TypeError, match=r"numbers of steps such as \[0, 10\].*got 3"):
        to_arviz(result, optimizer, draws=draws, rename=RENAME, step_draws=3)
    with pytest.raises(TypeError, match="as dictionaries, got list"):
        to_arviz(result, optimizer, rename=["a"])


if __name__ == "__main__":
    written = small_data()
    # Compressed, small arrays are larger.
    options = {} if hasattr(written, "children") else {"compress": False}
    written.to_netcdf(sys.argv[1], engine="h5netcdf", **options)
