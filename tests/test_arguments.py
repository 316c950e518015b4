# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Arguments that would be rounded away, that must be known when a function is traced, or that are no arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from conftest import Counter
from jax import random

from numpyro_regloss import Loss, Minibatch, RegularizedLoss, TwoStep, anchor, fit, schemes, shift
from numpyro_regloss.losses.factorizations import equations
from numpyro_regloss.two_step import outer_step

pytestmark = pytest.mark.both

DAYS = 2_451_545 + np.linspace(0.0, 100.0, 50)
RNG = np.random.default_rng(0)
CHEAP = shift.Importance(16)


def of_times(x, times):
    return x * jnp.sum(times[..., 0] * 0.0)


def trend(times, y):
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(slope * (times - times[0]), 0.1), obs=y)


TOO_FINE = {
    "days": DAYS,
    "seconds": 1.7e9 + np.arange(1000.0),
    "column of days": np.stack([DAYS, np.cos(DAYS)], 1),
    "row of days": np.stack([DAYS, 3000.0 * np.cos(DAYS)]),
    "small differences": 1.0 + 1e-6 * RNG.normal(size=100),
    "below the smallest": np.array([1e-60, 2e-60]),
    "above the largest": np.array([1.0, 1e60]),
    "complex": 1e9 + np.array([0.1, 0.2, 0.3j]),
    "identifiers": np.array([1, 2**31]),
    "negative identifiers": np.array([-(2**31) - 1, 0]),
    "unsigned identifiers": np.array([2**32], np.uint64),
}
HARMLESS = {
    "ordinary": RNG.normal(size=(1000, 2)),
    "wide": RNG.uniform(size=(2, 1000)),
    "constant": np.full(20, 2_451_545.123),
    "constant but for rounding": np.array([0.1 + 0.2] * 10 + [0.3] * 10),
    "constant column": np.stack([np.ones(50) / 3, RNG.normal(size=50)], 1),
    "single number": np.array([2_451_545.123]),
    "missing": np.array([np.nan, 1.0, np.inf]),
    "days since the first": DAYS - DAYS[0],
    "years": np.arange(1900.0, 2020.0),
    "prices": 250_000 + 80_000 * RNG.normal(size=100),
    "codes": np.arange(5),
    "flags": np.array([True, False]),
    "none": np.zeros((0, 3)),
    "single precision": DAYS.astype(np.float32),
    "of JAX": jnp.asarray(DAYS),
}


@pytest.mark.parametrize("times", TOO_FINE.values(), ids=TOO_FINE)
def test_data_that_rounding_would_spoil_are_refused(times):
    with pytest.raises(ValueError, match=r"argument 'times': expected .*x64") as caught:
        Loss.from_function(of_times, 0.0, times)
    assert "subtract an offset" in str(caught.value) or "codes" in str(caught.value)


@pytest.mark.parametrize("times", HARMLESS.values(), ids=HARMLESS)
def test_data_that_rounding_leaves_are_taken(times):
    (bound,), _ = Loss.from_function(lambda x, times: 1.0 * x, 0.0, times).arguments.tree
    np.testing.assert_allclose(bound, times, rtol=1e-6)


def test_numbers_whose_digits_are_lost_are_told():
    day, first = 2_459_000.625, 2_459_000.5

    def model(day):
        numpyro.sample("level", dist.Normal(0.0, 1.0))
        numpyro.deterministic("later", day - first)

    with pytest.warns(
        UserWarning, match=r"argument 'day': 2459000.625 becomes 2459000.5 in .*partial"
    ):
        loss = Loss.from_model(model, day)
    assert loss.constrain(loss.x0)["later"] == 0.0
    # What the warning advises.
    exact = Loss.from_model(functools.partial(model, day))
    assert exact.constrain(exact.x0)["later"] == 0.125
    with pytest.raises(ValueError, match="argument 'day': expected a number that float32 can hold"):
        Loss.from_model(model, np.float64(1e40))
    for harmless in (0.1, np.inf, 1e9, np.float64(250_000.1), np.array([day])):
        Loss.from_model(model, harmless)


def test_every_door_looks_at_data():
    days = np.stack([DAYS, DAYS], 1)
    loss = Loss.from_function(of_times, 0.0, np.zeros((50, 2)))
    optimizer = schemes.local_entropy(loss, 0.1, shift=CHEAP)
    state = optimizer.init(random.key(0))
    for call in (
        lambda: optimizer.run(random.key(0), 2, days),
        lambda: optimizer.init(random.key(0), times=days),
        lambda: optimizer.step(state, days),
        lambda: RegularizedLoss(loss, args=(days,)),
        lambda: loss.value(loss.x0, kwargs={"times": days}),
        lambda: loss.bind((), {"times": days}),
        lambda: Loss.from_model(trend, DAYS, np.zeros(50)),
        lambda: Loss.from_model(trend, times=DAYS, y=np.zeros(50)),
    ):
        with pytest.raises(ValueError, match="argument 'times'"):
            call()
    with pytest.raises(ValueError, match=r"params.*spread"):
        Loss.from_function(jnp.sum, DAYS)


def test_exact_data_stay_exact(x64):
    loss = Loss.from_function(lambda x, times: 1.0 * x, 0.0, DAYS, minibatch=None)
    np.testing.assert_array_equal(loss.arguments.tree[0][0], DAYS)


def test_captured_data_are_exact_where_numpy_computes():
    def model(y):
        slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(slope * (DAYS - DAYS[0]), 1.0), obs=y)

    loss = Loss.from_model(model, np.linspace(0.0, 100.0, 50))
    value = jax.jit(lambda loss: loss.value(jnp.ones(1)))(loss)
    # Normal densities at zero residual, and the prior at one.
    np.testing.assert_allclose(value, 51 * 0.5 * np.log(2 * np.pi) + 0.5, rtol=1e-6)


GROUP, Y = np.array([5, 5, 7, 9]), np.array([1.0, np.nan, 2.0, 3.0], np.float32)


def grouped(group, y, scale):
    codes, index = np.unique(group, return_inverse=True)
    mean = numpyro.sample("mean", dist.Normal(0.0, 1.0).expand([len(codes)]).to_event(1))
    seen = ~np.isnan(y)
    numpyro.sample("y", dist.Normal(mean[index][seen], scale), obs=y[seen])


def mean_by_group(x, group, y):
    means = [jnp.mean(y[group == code]) for code in sorted(set(group.tolist()))]
    return jnp.sum((x - jnp.stack(means)) ** 2)


def test_arrays_that_must_be_known_are_constants():
    loss = Loss.from_model(grouped, GROUP, Y, scale=2.0)
    assert "constant int64[4]" in repr(loss)
    assert "constant float32[4]" in repr(loss)
    assert loss.arguments.constants == {"argument 'group'", "argument 'y'"}
    assert loss.dim == 3
    expected = -dist.Normal(0.0, 2.0).log_prob(np.array([1.0, 2.0, 3.0])).sum()
    expected = expected - 3 * dist.Normal(0.0, 1.0).log_prob(0.0)
    call = jax.jit(lambda loss: loss.value(loss.x0))
    np.testing.assert_allclose(call(loss), expected, rtol=1e-6)
    # Other values are another program, and never the old one.
    other = Loss.from_model(
        grouped, GROUP, np.array([1.0, 2.0, np.nan, np.nan], np.float32), scale=2.0
    )
    np.testing.assert_allclose(
        call(other), expected + dist.Normal(0.0, 2.0).log_prob(3.0), rtol=1e-6
    )
    optimizer = schemes.local_entropy(loss, 0.1, shift=CHEAP)
    result = optimizer.run(random.key(0), 2, GROUP, Y + 1, progress_bar=False)
    assert result.params["mean"].shape == (3,)
    assert set(loss.constrain(loss.x0, (GROUP[::-1].copy(), Y))) == {"mean"}
    with pytest.raises(ValueError, match="other latent sites"):
        optimizer.run(random.key(0), 2, np.arange(4), Y)


def test_what_need_not_be_known_is_traced():
    counter = Counter(mean_by_group)
    loss = Loss.from_function(counter, np.zeros(3), GROUP, np.arange(4.0, dtype=np.float32))
    call = jax.jit(lambda loss: loss.value(loss.x0))
    assert call(loss) == 0.25 + 4.0 + 9.0
    assert repr(loss.arguments) == "(('constant int64[4]', 'float32[4]'), {})"
    count = counter.count
    assert (
        call(Loss.from_function(counter, np.zeros(3), loss.arguments.tree[0][0], np.ones(4))) == 3.0
    )
    assert counter.count == count


def test_constants_are_not_drawn_in_batches():
    for batch in (Minibatch(2), Minibatch(2, argnums=0)):
        with pytest.raises(ValueError, match=r"argument 'group'.*functools.partial"):
            Loss.from_function(mean_by_group, np.zeros(3), GROUP, np.ones(4), minibatch=batch)
    rows = Loss.from_function(
        lambda x, group, y: jnp.mean((x[np.unique(group)[0]] - y) ** 2),
        np.zeros(3),
        np.array([2, 2]),
        np.ones(6),
        minibatch=Minibatch(2, argnums=1),
    )
    assert rows.arguments.constants == {"argument 'group'"}
    batch, scale = rows.draw_batch(random.key(0), rows.arguments)
    assert (scale, float(rows.evaluate(rows.x0, batch, scale))) == (3.0, 1.0)


def test_what_depends_on_parameters_cannot_be_known():
    with pytest.raises(TypeError, match=r"known only when the program runs.*jnp.where"):
        Loss.from_function(lambda x: x if x > 0 else -x, 1.0)


class Table:
    """As a data frame: no array, but it has one."""

    def to_numpy(self):
        return np.ones(3)


@pytest.mark.parametrize(
    ("argument", "remedy"),
    [
        (Table(), r"data.to_numpy\(\)"),
        (object(), "functools.partial"),
        (np.array(["a", "b"]), "functools.partial"),
        (np.array(["2020-01-01"], "datetime64[D]"), "days since"),
    ],
)
def test_what_is_no_array_is_named_by_its_parameter(argument, remedy):
    for call in (
        lambda: Loss.from_function(lambda x, n, df: 1.0 * x, 0.0, 3, argument),
        lambda: Loss.from_function(lambda x, n, df: 1.0 * x, 0.0, 3, df=argument),
        lambda: Loss.from_function(lambda x, df: 1.0 * x, 0.0, np.ones(2)).bind((argument,)),
        lambda: Loss.from_model(lambda df: numpyro.sample("m", dist.Normal()), argument),
    ):
        with pytest.raises(TypeError, match=rf"argument 'df'.*{remedy}") as caught:
            call()
        assert "closure" not in str(caught.value)
    with pytest.raises(TypeError, match=r"argument 'df'\['x'\]\[1\]"):
        Loss.from_function(lambda x, df: 1.0 * x, 0.0, {"x": [1.0, argument]})
    with pytest.raises(TypeError, match="argument 2"):
        Loss.from_function(lambda *args: 1.0 * args[0], 0.0, 3.0, argument)


def test_data_of_any_kind_bound_by_partial():
    loss = Loss.from_function(
        functools.partial(lambda x, df: x * df.to_numpy().sum(), df=Table()), 2.0
    )
    assert jax.jit(lambda loss: loss.value(loss.x0))(loss) == 6.0


def test_ranks_may_not_be_promoted_by_the_user():
    with jax.numpy_rank_promotion("raise"):
        loss = Loss.from_function(lambda x: jnp.sum((x - 1.0) ** 2), np.zeros(3))
        for optimizer in (
            schemes.local_entropy(loss, 0.1, shift=CHEAP),
            schemes.heat(loss, 0.1),
        ):
            assert optimizer.run(random.key(0), 1, progress_bar=False).state.step == 1


@pytest.mark.parametrize("chosen", [None, "bfloat16"])
def test_products_are_in_full_precision_and_the_loss_as_the_user_chose(chosen):
    rows, dim = 7, 5
    matrix = np.ones((rows, dim), np.float32)
    with jax.default_matmul_precision(chosen):
        loss = Loss.from_function(lambda x: jnp.sum((matrix @ x) ** 2), np.zeros(dim))
        optimizer = TwoStep(loss, 0.1, shift.Auto(), fit.ForwardKL("dense"), anchor.Newton())
        program = outer_step.step.trace(optimizer, optimizer.init(random.key(0)), loss.bind())
    seen = {True: set(), False: set()}
    for equation in equations(program.jaxpr.jaxpr):
        if equation.primitive.name == "dot_general":
            users = any(rows in variable.aval.shape for variable in equation.invars)
            seen[users].add(str(equation.params["precision"]))
    assert len(seen[True]) == 1
    assert ("HIGHEST" in seen[True].pop()) is False
    assert len(seen[False]) == 1
    assert "HIGHEST" in seen[False].pop()
