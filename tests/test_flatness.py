# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Flatness of networks: profiles that layers cannot rescale, on batches; the verdict; use that is not meant."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import SIGMAS, long
from jax import random

from numpyro_regloss import Loss, Minibatch, fit, plots, schemes, values

RNG = np.random.default_rng(0)
INPUTS = np.float32(RNG.normal(size=(120, 4)))
LABELS = np.int32(INPUTS[:, :3].argmax(-1))
PARAMS = {
    "first": {"kernel": np.float32(RNG.normal(size=(4, 8))), "bias": np.zeros(8, np.float32)},
    "second": {"kernel": np.float32(RNG.normal(size=(8, 3))), "bias": np.ones(3, np.float32)},
}
TAUS = [1e-3, 1e-2]


def cross_entropy(params, inputs, labels):
    hidden = jax.nn.relu(inputs @ params["first"]["kernel"] + params["first"]["bias"])
    logits = hidden @ params["second"]["kernel"] + params["second"]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def rescaled(params, factor):
    first = jax.tree.map(lambda a: a * factor, params["first"])
    return {
        "first": first,
        "second": {**params["second"], "kernel": params["second"]["kernel"] / factor},
    }


@pytest.fixture(scope="module")
def loss():
    return Loss.from_function(cross_entropy, PARAMS, INPUTS, LABELS, minibatch=Minibatch(40))


def report_of(loss, params=None, **kwargs):
    settings = {"taus": TAUS, "temperature": 1.0, "method": "importance", "num_samples": 400}
    return values.profile(random.key(0), loss, params, **{**settings, **kwargs})


def heights(report):
    return np.concatenate([report.local_entropy_rise, report.heat_rise])


@pytest.mark.parametrize("scale", ["filter", long("layer")])
def test_profile_does_not_see_the_scale_of_layers(loss, scale):
    found = [heights(report_of(loss, rescaled(PARAMS, c), scale=scale)) for c in (1.0, 4.0)]
    # A power of two rounds nothing but the root of a sum of squares.
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4)
    plain = [heights(report_of(loss, rescaled(PARAMS, c))) for c in (1.0, 4.0)]
    assert np.all(np.abs(plain[1] / plain[0] - 1) > 0.5)


def test_scales_are_norms_of_filters_layers_and_groups():
    weights = {"kernel": np.array([[3.0, 0.0], [4.0, 0.0]], np.float32), "bias": np.full(2, 2.0)}
    loss = Loss.from_function(
        lambda p: jnp.sum(p["kernel"] ** 2) + jnp.sum(p["bias"] ** 2), weights
    )
    exact = {
        # The second filter is zero and rests: two weights of mean square 12.5, two biases of 4.
        "filter": 2 * 12.5 + 2 * 4.0,
        "layer": 4 * 6.25 + 2 * 4.0,
        None: 6.0,
    }
    reports = {key: report_of(loss, scale=key, temperature=100.0) for key in exact}
    groups = report_of(loss, scale={"kernel": 0.5, "bias": 2.0}, temperature=100.0)
    for report, trace in [
        *((reports[k], v) for k, v in exact.items()),
        (groups, 4 * 0.25 + 2 * 4.0),
    ]:
        error = np.abs(report.heat_rise - np.asarray(TAUS) * trace)
        assert np.all(error < SIGMAS * report.heat.error + 1e-5)
    words = {None: "loss 33", "filter": "norm of each filter", "layer": "norm of each layer"}
    assert all(word in str(reports[key]) for key, word in words.items())
    assert "scale of each group" in str(groups)
    assert "filter" in plots.profile(reports["filter"]).get_xlabel()


def test_batches_are_unbiased_for_the_heat(loss):
    full, batches = report_of(loss, scale="filter"), report_of(loss, scale="filter", batches=True)
    error = np.hypot(full.heat.error, batches.heat.error)
    assert np.all(np.abs(full.heat_rise - batches.heat_rise) < SIGMAS * error)
    # What batches differ by cancels: without that, errors are those of a batch of 40, some 0.05 / sqrt(200).
    assert np.all(batches.heat.error < 5 * full.heat.error)
    assert "fresh batches of 40 rows, F_tau on one of them" in str(batches)
    assert batches.batch_size == 40


def rows_summed(params, inputs, labels):
    return len(labels) * cross_entropy(params, inputs, labels)


def test_batches_of_a_sum_are_refused():
    summed = Loss.from_function(rows_summed, PARAMS, INPUTS, LABELS, minibatch=Minibatch(20))
    with pytest.raises(ValueError, match="average over the rows.*jnp.mean"):
        report_of(summed, batches=True)


@pytest.mark.long
def test_verdict_compares_curvature_with_slope(loss):
    @jax.jit
    def trained(params):
        for_step = optax.sgd(0.5)

        def update(carry, _):
            params, state = carry
            gradient = jax.grad(cross_entropy)(params, INPUTS, LABELS)
            updates, state = for_step.update(gradient, state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(update, (params, for_step.init(params)), length=3000)[0][0]

    start, end = loss.constrain(loss.x0), trained(loss.constrain(loss.x0))
    early = values.flatness_verdict(random.key(0), loss, start)
    late = values.flatness_verdict(random.key(0), loss, end)
    assert (early.answer, late.answer) == ("does not pay", "pays")
    assert "would not pay" in str(early)
    assert "would pay" in str(late)
    # On all rows at once, and with layers that are scaled, it is the same number within its error.
    whole = Loss.from_function(cross_entropy, PARAMS, INPUTS, LABELS)
    for other in (
        values.flatness_verdict(random.key(1), whole, end),
        values.flatness_verdict(random.key(1), whole, rescaled(end, 4.0)),
    ):
        assert abs(other.ratio - late.ratio) < SIGMAS * np.hypot(other.error, late.error)
        np.testing.assert_allclose(other.slope, late.slope, rtol=1e-3)


def test_verdict_is_exact_on_a_quadratic():
    x = np.full(30, 2.0, np.float32)
    loss = Loss.from_function(lambda x: 0.5 * jnp.sum(x**2), x)
    verdict = values.flatness_verdict(random.key(0), loss, num_samples=2000)
    width = 0.05 * 2.0
    np.testing.assert_allclose(verdict.slope, width * np.linalg.norm(x), rtol=1e-5)
    assert abs(verdict.rise.value - 30 * width**2 / 2) < SIGMAS * verdict.rise.error


def test_verdict_needs_gradients_that_tell_what_values_do():
    def stairs(params):
        return jnp.sum(jnp.floor(4 * params["w"] ** 2)) + jnp.sum(params["v"])

    w, v = np.linspace(0.5, 2.0, 20, dtype=np.float32), np.ones(3, np.float32)
    only = Loss.from_function(lambda w: stairs({"w": w, "v": v}), w)
    with pytest.raises(ValueError, match="the slope follows gradients.*exactly zero"):
        values.flatness_verdict(random.key(0), only)
    with pytest.warns(UserWarning, match="exactly zero for 20 of 23 parameters"):
        values.flatness_verdict(random.key(0), Loss.from_function(stairs, {"w": w, "v": v}))


@pytest.mark.parametrize("ask", [values.flatness_verdict, values.profile])
def test_widths_of_parameters_that_are_not_finite(ask):
    loss = Loss.from_function(lambda x: jnp.sum(x**2), np.ones(3, np.float32))
    more = {} if ask is values.flatness_verdict else {"taus": [0.1], "scale": "filter"}
    with pytest.raises(ValueError, match="finite"):
        ask(random.key(0), loss, np.array([1.0, np.nan, 1.0], np.float32), **more)


def test_verdict_that_is_not_known():
    # exp of a wide normal number: the rise hangs on draws that are not there.
    loss = Loss.from_function(lambda x: jnp.exp(200.0 * (x[0] - 0.4)), np.full(1, 0.4))
    verdict = values.flatness_verdict(random.key(0), loss)
    assert verdict.answer == "cannot tell"
    assert verdict.error == np.inf
    assert str(verdict).startswith("Cannot tell")


IMAGES = RNG.integers(0, 256, size=(50, 6, 6)).astype(np.uint8)
TARGETS = np.zeros(50, np.float32)
WEIGHTS = np.zeros(36, np.float32)


def raw(w, images, targets):
    return jnp.mean((images.reshape(len(images), -1) @ w - targets) ** 2)


def scaled(w, images, targets):
    return raw(w, images / 255.0, targets)


def jitted(w, images, targets):
    return jax.jit(raw)(w, images.astype(float), targets)


def embedded(w, images, targets):
    return jnp.mean((jnp.ones((256, 3)) @ jnp.ones(3))[images]) * jnp.sum(w**2) + jnp.sum(targets)


@pytest.mark.parametrize("images", [IMAGES, IMAGES.astype(np.int32), IMAGES.astype(np.float32)])
def test_raw_images_are_told_once(images):
    for fn in (raw, jitted, lambda w, targets: raw(w, jnp.asarray(images), targets)):
        data = (TARGETS,) if fn not in (raw, jitted) else (images, TARGETS)
        with pytest.warns(UserWarning, match=r"Loss: .*\[50, 6, 6\].*from 0 to 255.*/ 255") as told:
            Loss.from_function(fn, WEIGHTS, *data)
        assert len(told) == 1


def test_images_that_are_well_are_not():
    # Warnings are errors here.
    Loss.from_function(scaled, WEIGHTS, IMAGES, TARGETS)
    Loss.from_function(embedded, WEIGHTS, IMAGES.astype(np.int32), TARGETS)
    Loss.from_function(raw, WEIGHTS, np.float32(IMAGES / 255.0), TARGETS)
    Loss.from_function(raw, WEIGHTS, np.float32(IMAGES > 100), TARGETS)
    Loss.from_function(raw, WEIGHTS, np.float32(IMAGES) - 128.0, TARGETS)


def started(fn, temperature, **kwargs):
    loss = Loss.from_function(fn, PARAMS, INPUTS, LABELS, **kwargs)
    robbins_monro = fit.RobbinsMonro(2)
    return schemes.heat(loss, 1e-3, robbins_monro, temperature=temperature).init(random.key(0))


@pytest.mark.parametrize("minibatch", [None, Minibatch(40)])
def test_a_sum_with_the_temperature_of_a_mean_is_told_once(minibatch):
    words = (
        "TwoStep: the loss is a sum over 120 rows .*temperature of 0.00833.*jnp.mean.*temperature=1"
    )
    with pytest.warns(UserWarning, match=words) as told:
        started(rows_summed, 1 / 120, minibatch=minibatch)
    assert len(told) == 1


@pytest.mark.parametrize(
    ("fn", "temperature"),
    [
        (rows_summed, 1.0),
        (cross_entropy, 1 / 120),
        # Large, but no sum.
        (lambda *args: 1e4 * cross_entropy(*args), 1 / 120),
    ],
)
def test_other_temperatures_are_not(fn, temperature):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        started(fn, temperature)


def test_a_cloud_of_fewer_draws_than_parameters_is_told_once():
    wide = Loss.from_function(lambda x: jnp.sum(x**2), np.ones(200))
    with pytest.warns(UserWarning, match='50 draws.*200 parameters.*kind="heat"') as told:
        values.value_and_grad(wide, 1e-6, num_samples=50)
    assert len(told) == 1
    values.value_and_grad(wide, 1e-6, kind="heat", num_samples=50)


@pytest.mark.long
def test_a_cloud_of_few_effective_draws_is_told_once():
    steep = Loss.from_function(lambda x: jnp.sum(x), np.ones(1))
    call = values.value_and_grad(steep, 1.0, temperature=0.4, num_samples=60)
    with pytest.warns(UserWarning, match="value_and_grad:.*(effective|error)") as told:
        estimate, _ = call(jnp.ones(1), random.key(0))
    assert estimate.ess < 20
    assert len(told) == 1
