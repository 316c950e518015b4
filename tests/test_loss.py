# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
import dataclasses
import functools
import pickle
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from conftest import Counter, long
from jax import lax, random
from numpyro import handlers
from numpyro.infer.reparam import LocScaleReparam
from numpyro.infer.util import initialize_model, log_density, potential_energy

from numpyro_regloss import (
    Gaussian,
    Loss,
    Minibatch,
    RegularizedLoss,
    TwoStep,
    fit,
    schemes,
    shift,
    values,
)

Y = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def eight_schools(J, sigma, y=None):
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("J", J):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.deterministic("twice", 2 * theta)
        numpyro.sample("obs", dist.Normal(theta, sigma), obs=y)


def simplex_model(counts):
    p = numpyro.sample("p", dist.Dirichlet(jnp.ones(3)))
    upper = numpyro.sample("upper", dist.Exponential(1.0))
    numpyro.sample("inner", dist.Uniform(0.0, upper))
    numpyro.sample("counts", dist.Multinomial(counts.sum(), p, total_count_max=20), obs=counts)


def squares(params, y, weight=1.0):
    return weight * jnp.sum((params["a"] - y) ** 2) + jnp.sum(params["b"]) ** 2


def make(a=0.0, y=1.0):
    params = {"a": np.full(3, a), "b": jnp.ones((2, 2))}
    return Loss.from_function(squares, params, np.full(3, y), weight=2.0)


def test_function_of_a_pytree():
    loss = make()
    assert loss.dim == 7
    assert loss.names == ("a", "b")
    assert loss.x0.dtype == jnp.result_type(float)
    params = loss.constrain(loss.x0)
    assert params["a"].shape == (3,)
    assert params["b"].shape == (2, 2)
    np.testing.assert_allclose(loss.value(loss.x0), 2.0 * 3.0 + 16.0)
    np.testing.assert_allclose(loss.value(loss.x0, (np.zeros(3),), {"weight": 1.0}), 16.0)


def test_same_function_and_structure_are_the_same_program():
    first, second = make(), make(a=2.0, y=5.0)
    assert jax.tree.structure(first) == jax.tree.structure(second)
    assert first != second
    assert first == make()
    assert hash(first) == hash(make())


def test_dtypes_come_back_as_they_were():
    params = {"low": jnp.ones(2, jnp.bfloat16), "high": jnp.ones(2, jnp.float32)}
    loss = Loss.from_function(lambda p: jnp.sum(p["low"]) + jnp.sum(p["high"]), params)
    assert {k: v.dtype for k, v in loss.constrain(loss.x0).items()} == {
        "low": jnp.bfloat16,
        "high": jnp.float32,
    }


def half_network(params, x, y):
    # A product of XLA's own, which refuses factors of different types.
    hidden = jnp.tanh(lax.dot(x, params["w"]) + params["b"])
    return jnp.mean((lax.dot(hidden, params["v"])[:, 0].astype(jnp.float32) - y) ** 2)


def half_parameters(dtype):
    keys = random.split(random.key(0), 3)
    return {
        "w": (0.3 * random.normal(keys[0], (4, 8))).astype(dtype),
        "b": jnp.zeros(8, dtype),
        "v": (0.3 * random.normal(keys[1], (8, 1))).astype(dtype),
    }


@pytest.mark.parametrize("dtype", [jnp.bfloat16, long(jnp.float16)])
def test_a_network_of_16_bits_sees_its_own_types(dtype):
    x = random.normal(random.key(1), (64, 4))
    y = jnp.tanh(x[:, 0])
    params = half_parameters(dtype)
    loss = Loss.from_function(half_network, params, x.astype(dtype), y)
    assert loss.value(loss.x0) == half_network(params, x.astype(dtype), y)
    optimizer = TwoStep(loss, 0.01, shift.Importance(500), fit.ForwardKL(), temperature=0.02)
    result = optimizer.run(random.key(2), 20, progress_bar=False)
    assert {leaf.dtype for leaf in jax.tree.leaves(result.params)} == {jnp.dtype(dtype)}
    # Sums, and the centre, have the digits of JAX's default float.
    state, history = result.state, result.history
    assert state.reference.mean.dtype == history.loss.dtype == jnp.result_type(float)
    assert history.fitted.mean.dtype == jnp.result_type(float)

    plain = half_parameters(jnp.float32)
    same = Loss.from_function(half_network, plain, x, y)
    optimizer = TwoStep(same, 0.01, shift.Importance(500), fit.ForwardKL(), temperature=0.02)
    expected = optimizer.run(random.key(2), 20, progress_bar=False).history.loss
    # A weight of eight bits is off by 2^-9 at most, and so is the loss, relatively, give or take a factor.
    np.testing.assert_allclose(history.loss, expected, rtol=0.05)
    assert history.loss[-1] < 0.5 * history.loss[0]


def total(params):
    return jnp.sum(params["low"].astype(jnp.float32) ** 2) + jnp.sum(params["high"] ** 2)


def test_draws_that_16_bits_round_away_are_told():
    params = {"low": jnp.ones(3, jnp.bfloat16), "high": jnp.ones(2)}
    loss = Loss.from_function(total, params)
    message = (
        "RegularizedLoss: 3 of 5 parameters have types of 16 bits, .* 0.0078 apart .* 0.001 wide"
    )
    with pytest.warns(UserWarning, match=message):
        RegularizedLoss(loss, Gaussian.isotropic(loss.x0, 1e-6))
    optimizer = TwoStep(loss, 1e-6, shift.Importance(50), fit.ForwardKL())
    with pytest.warns(UserWarning, match="TwoStep: 3 of 5 parameters have types of 16 bits"):
        optimizer.init(random.key(0))
    # Silent, since warnings are errors: draws that are wide enough, and other types.
    RegularizedLoss(loss, Gaussian.isotropic(loss.x0, 1e-4))
    RegularizedLoss(loss, Gaussian.isotropic(jnp.zeros(5), 1e-6))
    wide = Loss.from_function(total, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params))
    RegularizedLoss(wide, Gaussian.isotropic(wide.x0, 1e-6))


def test_losses_of_16_bits_are_told():
    with pytest.warns(UserWarning, match="the loss returns bfloat16, whose 2 digits are too few"):
        Loss.from_function(lambda p: jnp.sum(p**2), jnp.ones(3, jnp.bfloat16))


def test_integer_valued_losses_are_cast():
    loss = Loss.from_function(lambda x: jnp.sum(x > 0), jnp.array([1.0, -1.0]))
    value = loss.value(loss.x0)
    assert value == 1
    assert value.dtype == jnp.result_type(float)


def test_static_and_traced_arguments():
    seen = []

    def fn(x, n, flag, text, function, number, array):
        seen.append((type(n), type(flag), type(text), callable(function)))
        return function(x).sum() * number + array.sum() * n * flag * len(text)

    counter = Counter(fn)
    call = jax.jit(lambda loss: loss.value(loss.x0))
    build = functools.partial(Loss.from_function, counter, jnp.ones(2))
    call(build(3, True, "ab", jnp.sin, 0.5, np.ones(2)))
    count = counter.count
    call(build(3, True, "ab", jnp.sin, 0.7, np.zeros(2)))
    assert counter.count == count
    call(build(4, True, "ab", jnp.sin, 0.7, np.zeros(2)))
    assert counter.count > count
    assert set(seen) == {(int, bool, str, True)}


def test_callable_pytrees_are_leaves():
    partial = jax.tree_util.Partial(lambda w, x: jnp.sum(w * x), jnp.array([1.0, 2.0]))
    loss = Loss.from_function(partial, jnp.ones(2))
    other = Loss.from_function(
        jax.tree_util.Partial(partial.func, jnp.array([3.0, 4.0])), jnp.ones(2)
    )
    assert jax.tree.structure(loss) == jax.tree.structure(other)
    np.testing.assert_allclose([loss.value(loss.x0), other.value(other.x0)], [3.0, 7.0])


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Network:
    """A module as equinox has them: a pytree that is called, with settings among its leaves."""

    weight: jax.Array
    activation: Callable
    rate: float = 0.1
    inference: bool = True
    layers: tuple = ({"offset": 0.5, "scale": np.ones(2)},)

    def __call__(self, x):
        if not self.inference:
            raise AssertionError
        return self.activation(self.weight * x).sum() + self.rate * self.layers[0]["scale"].sum()


def check_settings_stay(network, names, fixed):
    loss = Loss.from_function(lambda net, x: net(x) ** 2, network, jnp.ones(2))
    assert loss.names == names
    assert f"fixed={fixed}" in repr(loss)
    moved = loss.constrain(loss.x0 + 1.0)
    assert moved.rate == 0.1
    assert isinstance(moved.rate, float)
    np.testing.assert_allclose(moved.weight, network.weight + 1.0)
    np.testing.assert_allclose(loss.unconstrain(moved), loss.x0 + 1.0)
    return loss


def test_settings_of_modules_are_no_parameters():
    network = Network(jnp.array([1.0, 2.0]), jnp.tanh)
    names = ("weight", "layers/0/scale")
    loss = check_settings_stay(network, names, ("rate", "inference", "layers/0/offset"))
    estimate, gradient = values.value_and_grad(loss, 0.1, num_samples=100)(network, random.key(0))
    assert np.isfinite(estimate.value)
    assert (gradient.rate, gradient.inference) == (0.0, False)
    # Another setting is another program; in a plain pytree floats are parameters.
    other = Loss.from_function(
        loss.source.user.fn, dataclasses.replace(network, rate=1), jnp.ones(2)
    )
    assert jax.tree.structure(other) != jax.tree.structure(loss)
    assert Loss.from_function(lambda p: p["net"](1.0) * p["a"], {"net": network, "a": 1.0}).dim == 5
    with pytest.raises(ValueError, match="in a module as arrays"):
        Loss.from_function(lambda net: net.rate, Network(0.5, jnp.tanh, layers=()))
    replicas = schemes.parle(loss, 0.1, num_replicas=2).loss
    assert replicas.constrain(replicas.x0).rate == 0.1


def test_settings_of_equinox_modules():
    eqx = pytest.importorskip("equinox")

    class Net(eqx.Module):
        weight: jax.Array
        dropout: eqx.nn.Dropout
        rate: float = 0.1

        def __call__(self, x):
            return jnp.sum(self.dropout(self.weight * x)) + self.rate

    check_settings_stay(
        Net(jnp.ones(2), eqx.nn.Dropout(0.5, inference=True)),
        ("weight",),
        ("dropout/p", "dropout/inference", "rate"),
    )


@pytest.mark.parametrize(
    "model_args", [(eight_schools, (8, SIGMA, Y)), (simplex_model, (np.array([3, 1, 2]),))]
)
def test_joint_density_is_what_nuts_sees(model_args):
    model, args = model_args
    loss = Loss.from_model(model, *args, rng_key=random.key(0))

    # One program instead of some hundred.
    @jax.jit
    def start():
        info = initialize_model(random.key(1), model, model_args=args)
        position, _ = jax.flatten_util.ravel_pytree(info.param_info.z)  # sites sorted by name
        z = info.param_info.z
        return position, info.potential_fn(z), info.postprocess_fn(z)

    position, potential, theirs = start()
    assert loss.dim == position.size
    np.testing.assert_allclose(jax.jit(loss.value)(position), potential, rtol=1e-5)
    ours = loss.constrain(position)
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-5)


def with_param(y):
    s = numpyro.param("s", 2.0, constraint=dist.constraints.positive)
    a = numpyro.sample("a", dist.Normal(0.0, s))
    numpyro.sample("y", dist.Normal(a, s), obs=y)


def learned_centering(y):
    t = numpyro.sample("t", dist.HalfNormal(1.0))
    with numpyro.plate("groups", 3), numpyro.handlers.reparam(config={"a": LocScaleReparam()}):
        a = numpyro.sample("a", dist.Normal(0.5, t))
    numpyro.sample("y", dist.Normal(a, 1.0), obs=y)


@pytest.mark.parametrize(
    "model",
    [
        handlers.substitute(with_param, data={"s": 3.0}),
        long(handlers.lift(with_param, prior={"s": dist.Gamma(2.0, 1.0)})),
        handlers.lift(learned_centering, prior={"a_centered": dist.Uniform(0.0, 1.0)}),
        long(handlers.substitute(learned_centering, data={"a_centered": 0.3})),
        handlers.substitute(
            handlers.reparam(with_param, {"a": LocScaleReparam(0.2)}), data={"s": 0.7}
        ),
    ],
)
def test_param_sites_given_or_lifted(model):
    y = np.array([0.5, -1.0, 2.0])
    x = 0.3 * jnp.cos(jnp.arange(5.0))
    loss = Loss.from_model(model, y)
    x = x[: loss.dim]
    sites = loss.source.unravel(x)
    potential = potential_energy(handlers.seed(model, 0), (y,), {}, sites)
    np.testing.assert_allclose(loss.value(x), potential, rtol=1e-6)
    latent = {name: loss.constrain(x)[name] for name in loss.names}
    log_joint, _ = log_density(model, (y,), {}, latent)
    mode = Loss.from_model(model, y, density="map")
    np.testing.assert_allclose(mode.value(x), -log_joint, rtol=1e-6)


def test_names_of_ours_in_the_users_function():
    def model(y, density=1.0):
        m = numpyro.sample("m", dist.Normal(0.0, density))
        numpyro.sample("y", dist.Normal(m, 1.0), obs=y)

    x = jnp.ones(1)
    value = Loss.from_model(model, 1.0, 2.0).value(x)
    bound = functools.partial(model, density=2.0)
    for density in ("joint", "map"):  # of one real site: the same
        np.testing.assert_allclose(Loss.from_model(bound, 1.0, density=density).value(x), value)
        np.testing.assert_allclose(
            Loss.from_model(model, 1.0, 2.0, density=density).value(x), value
        )
    assert Loss.from_model(model, 1.0).value(x) < value


def test_densities_differ_by_jacobian_and_prior():
    x = 0.3 * jnp.arange(10.0)
    joint, without_jacobian, likelihood = (
        Loss.from_model(eight_schools, 8, SIGMA, Y, density=d).value(x)
        for d in ("joint", "map", "likelihood")
    )
    # tau = exp(x[1]) is the only constrained site, so log |Jacobian| = x[1].
    np.testing.assert_allclose(joint, without_jacobian - x[1], rtol=1e-5)
    theta = x[2:]
    np.testing.assert_allclose(likelihood, -dist.Normal(theta, SIGMA).log_prob(Y).sum(), rtol=1e-5)


def test_canonical_eight_schools_comes_back_by_name():
    loss = Loss.from_model(eight_schools, 8, SIGMA, y=Y)
    params = loss.constrain(loss.x0)
    assert {name: value.shape for name, value in params.items()} == {
        "mu": (),
        "tau": (),
        "theta": (8,),
        "twice": (8,),
    }
    assert params["tau"] > 0


def test_random_start_is_in_numpyros_range():
    loss = Loss.from_model(eight_schools, 8, SIGMA, Y, rng_key=random.key(3))
    assert jnp.all(jnp.abs(loss.x0) < 2)
    assert jnp.std(loss.x0) > 0.5


def test_models_run_once_per_shape():
    counter = Counter(eight_schools)
    Loss.from_model(counter, 8, SIGMA, Y)
    count = counter.count
    Loss.from_model(counter, 8, SIGMA + 1, Y * 2)
    assert counter.count == count


def test_outer_handlers_do_not_see_the_users_sites():
    loss = Loss.from_model(eight_schools, 8, SIGMA, Y)
    with numpyro.handlers.trace() as trace, numpyro.handlers.seed(rng_seed=0):
        value = loss.value(loss.x0)
        loss.constrain(loss.x0)
    assert not trace
    np.testing.assert_allclose(value, loss.value(loss.x0))


def test_minibatch_of_a_function():
    inputs, labels = np.arange(12.0).reshape(6, 2), np.arange(6)

    def fn(x, inputs, labels, scale):
        return jnp.mean(inputs @ x - labels) * scale

    loss = Loss.from_function(fn, np.ones(2), inputs, labels, 2.0, minibatch=Minibatch(4))
    batch, factor = loss.draw_batch(random.key(0), loss.arguments)
    (batch_inputs, batch_labels, scale), _ = batch.tree
    assert factor == 1.5
    assert batch_inputs.shape == (4, 2)
    assert scale == 2.0
    np.testing.assert_allclose(batch_inputs[:, 0], 2 * batch_labels)  # rows stay together
    values = jax.vmap(lambda key: loss.evaluate(loss.x0, loss.draw_batch(key, loss.arguments)[0]))(
        random.split(random.key(1), 4000)
    )
    error = jnp.std(values) / len(values) ** 0.5
    assert jnp.abs(values.mean() - loss.value(loss.x0)) < 4 * error


def test_minibatch_of_a_model_is_unbiased():
    def model(y, scale=1.0):
        m = numpyro.sample("m", dist.Normal(0, scale))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Normal(m, 1.0), obs=y)

    y = np.linspace(-1, 3, 20)
    for density in ("joint", "map", "likelihood"):
        loss = Loss.from_model(model, y, density=density, minibatch=Minibatch(5, argnums=0))
        x = jnp.array([0.7])
        values = jax.vmap(
            lambda key, loss=loss, x=x: loss.evaluate(x, *loss.draw_batch(key, loss.arguments))
        )(random.split(random.key(2), 4000))
        assert jnp.abs(values.mean() - loss.value(x)) < 4 * jnp.std(values) / 4000**0.5


def test_minibatch_chooses_arguments():
    def fn(x, a, b, c=None):
        return jnp.sum(a) * jnp.sum(b) * jnp.sum(x) * jnp.sum(c)

    args, kwargs = (np.ones(6), np.ones(3)), {"c": np.ones(6)}
    batch = Minibatch(2, argnums=0, argnames="c")
    loss = Loss.from_function(fn, np.ones(1), *args, minibatch=batch, **kwargs)
    (a, b), rest = loss.draw_batch(random.key(0), loss.arguments)[0].tree
    assert (a.shape, b.shape, rest["c"].shape) == ((2,), (3,), (2,))
    with pytest.raises(ValueError, match="share one leading axis"):
        Loss.from_function(fn, np.ones(1), *args, minibatch=Minibatch(2), **kwargs)


def test_unconstrain_is_the_inverse_of_constrain():
    x = jnp.linspace(-1.0, 1.0, 4)
    loss = Loss.from_model(simplex_model, np.array([3, 5, 2]))
    # p has two free coordinates of three, and the support of inner depends on upper.
    np.testing.assert_allclose(loss.unconstrain(loss.constrain(x)), x, atol=1e-5)
    assert loss.flat_names == ("inner", "p[0]", "p[1]", "upper")
    sites = loss.constrain(x)
    _, jacobian = loss.source.unconstrain_with_jacobian(sites, *loss.arguments.tree)
    densities = [
        Loss.from_model(simplex_model, np.array([3, 5, 2]), density=d) for d in ("joint", "map")
    ]
    values = [each.value(x) for each in densities]
    np.testing.assert_allclose(values[1] - values[0], jacobian, atol=1e-4)
    with pytest.raises(ValueError, match=r"missing \['inner'\].*unknown \['outer'\]"):
        loss.unconstrain({"p": sites["p"], "upper": sites["upper"], "outer": 1.0})

    schools = Loss.from_model(eight_schools, 8, SIGMA, Y)
    named = schools.constrain(schools.x0 + 0.3)  # "twice", which is deterministic, among them
    np.testing.assert_allclose(schools.unconstrain(named), schools.x0 + 0.3, atol=1e-5)

    loss = make()
    np.testing.assert_allclose(loss.unconstrain(loss.constrain(loss.x0 + 1.0)), loss.x0 + 1.0)
    assert loss.flat_names[:4] == ("a[0]", "a[1]", "a[2]", "b[0,0]")
    with pytest.raises(ValueError, match="structure"):
        loss.unconstrain({"a": jnp.zeros(3)})
    with pytest.raises(ValueError, match=r"'a' of shape \(3,\)"):
        loss.unconstrain({"a": jnp.zeros(2), "b": jnp.ones((2, 2))})


def test_pickles_with_its_data():
    loss = make(a=0.5)
    again = pickle.loads(pickle.dumps(loss))  # noqa: S301
    assert again.value(again.x0) == loss.value(loss.x0)


def test_double_precision(x64):
    loss = Loss.from_function(lambda p: jnp.sum(p["a"] ** 2), {"a": jnp.ones(3, jnp.float32)})
    assert loss.x0.dtype == jnp.float64
    assert loss.constrain(loss.x0)["a"].dtype == jnp.float32
    assert loss.value(loss.x0).dtype == jnp.float64


def test_other_sizes_of_data_are_refused():
    loss = Loss.from_model(eight_schools, 8, SIGMA, Y)
    with pytest.raises(ValueError, match="other latent sites"):
        loss.value(loss.x0, (5, SIGMA[:5], Y[:5]))


def test_a_function_that_does_not_use_its_parameters_is_told():
    captured = {"w": jnp.ones((3, 2))}
    rows = np.ones((4, 3), np.float32)
    with pytest.warns(UserWarning, match="does not use its parameters"):
        Loss.from_function(lambda p, rows: jnp.sum(jnp.tanh(rows @ captured["w"])), captured, rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Used by one of several, in a loop, in one branch, in an inner function, with no slope.
        Loss.from_function(lambda p: p["w"] ** 2, {"w": 1.0, "v": jnp.ones(3)})
        Loss.from_function(
            lambda x: jax.lax.fori_loop(0, 3, lambda _, c: c + x[0], 0.0), jnp.ones(2)
        )
        Loss.from_function(lambda x: jax.lax.cond(x[0] > 0, lambda: 1.0, lambda: 2.0), jnp.ones(2))
        Loss.from_function(lambda x: jax.jit(jnp.sum)(x), jnp.ones(2))
        Loss.from_function(lambda x: 0.0 * jnp.sum(x), jnp.ones(2))
