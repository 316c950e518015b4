# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Catalogue of bad input: what was given, the exception, words of its message.

Every row must raise before anything is compiled for long, with a message that says what was expected, what
came and what to do; never a JAX traceback, never a silent NaN.
"""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from numpyro.infer.reparam import LocScaleReparam

import numpyro_regloss as regloss
from numpyro_regloss import (
    Gaussian,
    Loss,
    Minibatch,
    RegularizedLoss,
    TwoStep,
    anchor,
    fit,
    schemes,
    shift,
    values,
)

pytestmark = pytest.mark.both

KEY = random.key(0)
CHEAP = shift.Importance(50)
DATA = np.zeros((6, 2))


def bowl(x):
    return jnp.sum(x**2)


def rows_loss(x, rows, scale=1.0):
    return scale * jnp.mean((rows - x) ** 2)


def model(y, scale=1.0):
    m = numpyro.sample("m", dist.Normal(0.0, scale))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(m, 1.0), obs=y)


def no_latents(y):
    numpyro.sample("y", dist.Normal(0.0, 1.0), obs=y)


def discrete(y):
    z = numpyro.sample("z", dist.Bernoulli(0.5))
    numpyro.sample("y", dist.Normal(z, 1.0), obs=y)


def with_param(y):
    s = numpyro.param("s", 1.0)
    m = numpyro.sample("m", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(m, s), obs=y)


def with_learned_centering(y):
    with numpyro.handlers.reparam(config={"a": LocScaleReparam()}):
        a = numpyro.sample("a", dist.Normal(1.0, 2.0))
    numpyro.sample("y", dist.Normal(a, 1.0), obs=y)


def with_network(y):
    weights = numpyro.param("net$params", {"w": jnp.ones(2)})
    m = numpyro.sample("m", dist.Normal(weights["w"].sum(), 1.0))
    numpyro.sample("y", dist.Normal(m, 1.0), obs=y)


def on_the_sphere(y):
    direction = numpyro.sample("direction", dist.ProjectedNormal(jnp.ones(2)))
    numpyro.sample("y", dist.Normal(direction[0], 1.0), obs=y)


class Odd(dist.Normal):
    """A distribution whose support NumPyro cannot map."""

    support = type("Odd", (), {"is_discrete": False})()


def without_bijection(y):
    a = numpyro.sample("a", Odd(0.0, 1.0))
    numpyro.sample("y", dist.Normal(a, 1.0), obs=y)


def named_as_ours(y, density=1.0, rng_key=0.0):
    m = numpyro.sample("m", dist.Normal(rng_key, density))
    numpyro.sample("y", dist.Normal(m, 1.0), obs=y)


def needs_density(y, density):
    named_as_ours(y, density)


def with_mutable(y):
    numpyro.primitives.mutable("count", {"n": jnp.zeros(())})
    m = numpyro.sample("m", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(m, 1.0), obs=y)


def subsampled(y):
    m = numpyro.sample("m", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", 6, subsample_size=2):
        numpyro.sample("y", dist.Normal(m, 1.0), obs=y[:2])


def fixed_plate(y):
    m = numpyro.sample("m", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", 6):
        numpyro.sample("y", dist.Normal(m, 1.0), obs=y)


def local_latents(y):
    with numpyro.plate("rows", len(y)):
        m = numpyro.sample("m", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(m, 1.0), obs=y)


def only_prior(scale):
    numpyro.sample("m", dist.Normal(0.0, scale))


def delta_site(y):
    m = numpyro.sample("m", dist.Delta(0.0))
    s = numpyro.sample("s", dist.HalfNormal(1.0))
    numpyro.sample("y", dist.Normal(m, s), obs=y)


WITH_NAN = np.where(np.arange(12).reshape(6, 2) == 0, np.nan, 0.0)
LOSS = Loss.from_function(bowl, np.zeros(2))
ROWS = Loss.from_function(rows_loss, np.zeros(2), DATA)
REFERENCE = Gaussian.isotropic(jnp.zeros(2), 1.0)
TARGET = RegularizedLoss(LOSS, REFERENCE)
GROUPS = Loss.from_function(lambda p: p["a"] ** 2 + p["b"] ** 2, {"a": 1.0, "b": 1.0})


def function(fn=bowl, params=None, *args, **kwargs):
    return lambda: Loss.from_function(
        fn, np.zeros(2) if params is None else params, *args, **kwargs
    )


def from_model(fn, *args, **kwargs):
    return lambda: Loss.from_model(fn, *(args or (np.zeros(6),)), **kwargs)


class Lonely:
    def init(self, rng_key, target):
        return ()

    def step(self, rng_key, state, target):
        return state, None, None


def scheme(loss=LOSS, tau=0.1, engine=CHEAP, projection=None, **kwargs):
    return TwoStep(
        loss, tau, engine, fit.ForwardKL() if projection is None else projection, **kwargs
    )


def run(*args, loss=LOSS, engine=CHEAP, **kwargs):
    return lambda: scheme(loss, engine=engine).run(
        *(args or (KEY, 2)), progress_bar=False, **kwargs
    )


def start(fn, params, engine=CHEAP):
    return run(loss=Loss.from_function(fn, params), engine=engine)


def heat(fn, params, **kwargs):
    loss = Loss.from_function(fn, params)
    return lambda: schemes.heat(loss, 0.1, **kwargs).run(KEY, 2, progress_bar=False)


def halve_until_small(x):
    return jax.lax.while_loop(lambda y: jnp.sum(y**2) > 1, lambda y: y / 2, x).sum()


COUNTED = RegularizedLoss(
    Loss.from_function(lambda x: jnp.sum(x > 0), np.zeros(2)), Gaussian.isotropic(jnp.zeros(2), 1.0)
)
STAIRCASE = Loss.from_function(lambda x: jnp.sum(jnp.floor(3 * x) ** 2), np.zeros(2))
ERRORS = Loss.from_function(
    lambda x, rows: jnp.mean(jnp.where(rows @ x > 0, 1.0, 0.0)),
    np.ones(2),
    np.random.default_rng(0).normal(size=(60, 2)),
    minibatch=Minibatch(20),
)
# As BlackJAX has them.
ALGORITHM = collections.namedtuple("SamplingAlgorithm", ["init", "step"])(  # noqa: PYI024
    lambda position, rng_key=None: position, lambda rng_key, state: (state, None)
)


def hidden_root(x):
    """Of finite values; away from zero the gradient of the branch that is not taken is NaN."""
    never = jnp.sqrt(jnp.where(x == 0, 1.0, -jnp.abs(x)))
    return jnp.sum(jnp.where(x < 1e9, x**2, never))


LOOP = RegularizedLoss(
    Loss.from_function(halve_until_small, np.ones(2)), Gaussian.isotropic(jnp.zeros(2), 1.0)
)


def on_host(x):
    return jax.pure_callback(np.sum, jax.ShapeDtypeStruct((), x.dtype), x)


def from_state(**changes):
    state = scheme().init(KEY)
    return run(KEY, 2, init_state=state._replace(**changes))


def duplicated():
    numpyro.sample("m", dist.Normal(0.0, 1.0))
    numpyro.sample("m", dist.Normal(0.0, 1.0))


CATALOGUE = {
    # Losses of a function
    "loss is no function": (function(3.0), TypeError, "expected a function"),
    "vector loss": (function(lambda x: x), TypeError, r"scalar, got shape \(2,\)"),
    "loss of shape (1,)": (function(lambda x: x[:1]), TypeError, "sum or average"),
    "loss with auxiliary output": (function(lambda x: (x.sum(), x)), TypeError, "got tuple"),
    "loss returns nothing": (function(lambda x: None), TypeError, "scalar, got NoneType"),
    "loss in a dict": (function(lambda x: {"loss": x.sum()}), TypeError, "got dict"),
    "loss returns a string": (function(lambda x: "low"), TypeError, "the loss raised"),
    "loss returns a key": (function(lambda x: KEY), TypeError, "real scalar"),
    "loss branches in Python": (
        function(lambda x: x.sum() if x.sum() > 0 else 0.0),
        TypeError,
        "under jax.jit",
    ),
    "loss is a Loss": (function(LOSS), TypeError, "expected a function"),
    "complex loss": (function(lambda x: 1j * x.sum()), TypeError, "real scalar"),
    "loss raises": (function(lambda x: x["w"].sum()), (TypeError, ValueError), "the loss raised"),
    "loss does not take its arguments": (
        function(bowl, None, DATA),
        TypeError,
        "the loss raised TypeError",
    ),
    "loss is not traceable": (
        function(lambda x: float(x[0])),
        (TypeError, ValueError),
        "under jax.jit",
    ),
    "integer parameters": (function(bowl, np.arange(2)), TypeError, "floating-point"),
    "boolean parameters": (function(bowl, np.array([True])), TypeError, "floating-point"),
    "complex parameters": (function(bowl, np.zeros(2, complex)), TypeError, "floating-point"),
    "string parameters": (function(bowl, {"a": "text"}), TypeError, r"params\['a'\] of type str"),
    "random key as parameter": (function(bowl, {"key": KEY}), TypeError, "floating-point"),
    "integer parameter among others": (
        function(bowl, {"a": np.zeros(2), "n": 3}),
        TypeError,
        r"params\['n'\]",
    ),
    "parameters are None": (
        lambda: Loss.from_function(bowl, None),
        ValueError,
        "at least one parameter",
    ),
    "parameters beyond the float type": (
        function(bowl, np.array([1e300])),
        ValueError,
        "finite starting values",
    ),
    "no parameters": (function(bowl, {}), ValueError, "at least one parameter"),
    "parameters of size zero": (
        function(bowl, np.zeros((0, 3))),
        ValueError,
        "at least one parameter",
    ),
    "NaN parameters": (
        function(bowl, np.array([0.0, np.nan])),
        ValueError,
        "finite starting values",
    ),
    "infinite parameters": (
        function(bowl, np.array([0.0, np.inf])),
        ValueError,
        "finite starting values",
    ),
    "progress bar of the loss's own": (
        lambda: scheme().run(KEY, 2, progress_bar=0.5),
        TypeError,
        "progress_bar as True or False",
    ),
    "set as data": (function(lambda x, d: x.sum(), None, {1, 2}), TypeError, "got set"),
    "object as data": (function(lambda x, d: x.sum(), None, object()), TypeError, "got object"),
    "dates as data": (
        function(lambda x, d: x.sum(), None, np.array(["2020-01-01"], "datetime64[D]")),
        TypeError,
        "numbers",
    ),
    "array of strings as data": (
        function(lambda x, d: x.sum(), None, np.array(["a"])),
        TypeError,
        "numbers",
    ),
    # Losses of a model
    "model is no function": (from_model("model"), TypeError, "expected a NumPyro model"),
    "model without latents": (from_model(no_latents), ValueError, "got none"),
    "discrete latents": (from_model(discrete), ValueError, "marginalize"),
    "param site": (from_model(with_param), ValueError, "param site 's'"),
    "learned centering": (
        from_model(with_learned_centering),
        ValueError,
        r"LocScaleReparam\(0.2\).*handlers.lift",
    ),
    "weights that are not latent": (from_model(with_network), ValueError, "random_flax_module"),
    "param site, its remedies": (
        from_model(with_param),
        ValueError,
        r"handlers.lift.*handlers.substitute\(model, data=\{'s'",
    ),
    "site on a sphere": (from_model(on_the_sphere), ValueError, "ProjectedNormalReparam"),
    "site without a bijection": (
        from_model(without_bijection),
        ValueError,
        "'a' with Odd.*reparam",
    ),
    "density of the model's own": (
        from_model(named_as_ours, np.zeros(6), density=2.0),
        TypeError,
        r"'density'.*by position.*functools.partial",
    ),
    "key of the model's own": (
        from_model(named_as_ours, np.zeros(6), rng_key=0.5),
        TypeError,
        r"'rng_key'.*functools.partial",
    ),
    "density that the model needs": (from_model(needs_density), TypeError, "'density'"),
    "minibatch of the function's own": (
        function(lambda x, minibatch=1: x.sum(), minibatch=2),
        TypeError,
        "'minibatch'.*by position",
    ),
    "mutable site": (from_model(with_mutable), ValueError, "mutable site 'count'"),
    "subsampled plate": (from_model(subsampled), ValueError, "Minibatch"),
    "delta site": (from_model(delta_site), ValueError, "numpyro.deterministic"),
    "model with a site twice": (
        lambda: Loss.from_model(duplicated),
        ValueError,
        "unique names",
    ),
    "model of no rows": (from_model(model, np.zeros(0)), ValueError, "should be positive"),
    "density a list": (from_model(model, density=["joint"]), ValueError, "expected density in"),
    "missing arguments": (lambda: Loss.from_model(model), TypeError, "missing 1 required"),
    "unknown keyword": (from_model(model, DATA[:, 0], wide=True), TypeError, "unexpected keyword"),
    "unknown density": (from_model(model, density="prior"), ValueError, "expected density in"),
    "likelihood without data": (
        from_model(only_prior, 1.0, density="likelihood"),
        ValueError,
        "obs=",
    ),
    "key of the wrong kind": (from_model(model, rng_key=3), TypeError, "random key"),
    # Minibatches
    "minibatch is a number": (function(rows_loss, None, DATA, minibatch=3), TypeError, "Minibatch"),
    "positions that are names": (lambda: Minibatch(2, argnums="rows"), TypeError, "argnums"),
    "batch larger than the data": (
        function(rows_loss, None, DATA, minibatch=Minibatch(7)),
        ValueError,
        "at least batch_size=7 rows, got 6",
    ),
    "batch larger than the data of a run": (
        run(
            KEY,
            2,
            DATA[:3],
            loss=Loss.from_function(rows_loss, np.zeros(2), DATA, minibatch=Minibatch(4)),
        ),
        ValueError,
        "at least batch_size=4 rows, got 3",
    ),
    "batch of no rows": (
        function(rows_loss, None, DATA[:0], minibatch=Minibatch(1)),
        ValueError,
        "at least batch_size=1 rows, got 0",
    ),
    "minibatch is a class": (
        function(rows_loss, None, DATA, minibatch=Minibatch),
        TypeError,
        "Minibatch",
    ),
    "data of different lengths": (
        function(lambda x, a, b: x.sum(), None, DATA, DATA[:3], minibatch=Minibatch(2)),
        ValueError,
        "share one leading axis",
    ),
    "minibatch without data": (function(minibatch=Minibatch(2)), ValueError, "no array argument"),
    "minibatch of a missing position": (
        function(rows_loss, None, DATA, minibatch=Minibatch(2, argnums=1)),
        ValueError,
        "position 1",
    ),
    "minibatch of a missing name": (
        function(rows_loss, None, DATA, minibatch=Minibatch(2, argnames="columns")),
        ValueError,
        "'columns'",
    ),
    "lists as data of a minibatch": (
        function(rows_loss, None, [1.0, 2.0, 3.0], minibatch=Minibatch(2, argnums=0)),
        ValueError,
        "jnp.asarray",
    ),
    "plate that does not follow the batch": (
        from_model(fixed_plate, minibatch=Minibatch(1)),
        ValueError,
        "take plate sizes from the data",
    ),
    "one latent per row of a batch": (
        from_model(local_latents, minibatch=Minibatch(2)),
        ValueError,
        "other latent sites",
    ),
    # Regularized losses and Gaussians
    "target of a function": (
        lambda: RegularizedLoss(bowl, REFERENCE),
        TypeError,
        "expected a Loss",
    ),
    "reference is an array": (
        lambda: RegularizedLoss(LOSS, jnp.zeros(2)),
        TypeError,
        "Gaussian.isotropic",
    ),
    "reference of another dimension": (
        lambda: RegularizedLoss(LOSS, Gaussian.isotropic(jnp.zeros(3), 1.0)),
        ValueError,
        r"mean \(2,\)",
    ),
    "scale of the wrong shape": (
        lambda: RegularizedLoss(LOSS, Gaussian(jnp.zeros(2), jnp.ones(3))),
        ValueError,
        r"scale \(3,\)",
    ),
    "negative scale": (
        lambda: RegularizedLoss(LOSS, Gaussian(jnp.zeros(2), jnp.array([1.0, -1.0]))),
        ValueError,
        "positive standard deviations",
    ),
    "singular Cholesky factor": (
        lambda: RegularizedLoss(LOSS, Gaussian(jnp.zeros(2), jnp.zeros((2, 2)))),
        ValueError,
        "Cholesky diagonal",
    ),
    "covariance given as scale": (
        lambda: RegularizedLoss(LOSS, Gaussian(jnp.zeros(2), jnp.array([[1.0, 0.5], [0.5, 1.0]]))),
        ValueError,
        "lower triangular",
    ),
    "NaN mean": (
        lambda: RegularizedLoss(LOSS, Gaussian(jnp.array([0.0, jnp.nan]), jnp.array(1.0))),
        ValueError,
        "finite",
    ),
    "infinite scale": (
        lambda: RegularizedLoss(LOSS, Gaussian(jnp.zeros(2), jnp.array(jnp.inf))),
        ValueError,
        "finite reference scale",
    ),
    "negative Cholesky diagonal": (
        lambda: RegularizedLoss(LOSS, Gaussian(jnp.zeros(2), -jnp.eye(2))),
        ValueError,
        "Cholesky diagonal",
    ),
    "reference of negative tau": (
        lambda: RegularizedLoss(LOSS, Gaussian.isotropic(jnp.zeros(2), -1.0)),
        ValueError,
        "finite reference scale",
    ),
    "keyword arguments that are no dict": (
        lambda: RegularizedLoss(ROWS, REFERENCE, kwargs=[1]),
        TypeError,
        "kwargs as a dict",
    ),
    "temperature None": (
        lambda: RegularizedLoss(LOSS, REFERENCE, temperature=None),
        TypeError,
        "positive number",
    ),
    "temperature of a vector": (
        lambda: RegularizedLoss(LOSS, REFERENCE, temperature=jnp.ones(2)),
        ValueError,
        "temperature",
    ),
    "arguments that are no tuple": (
        lambda: RegularizedLoss(ROWS, REFERENCE, args=DATA),
        TypeError,
        "args as a tuple",
    ),
    "point of another shape": (
        lambda: LOSS.evaluate(jnp.zeros(5), LOSS.arguments),
        ValueError,
        r"shape \(2,\)",
    ),
    "several points at once": (
        lambda: LOSS.evaluate(jnp.zeros((3, 2)), LOSS.arguments),
        (ValueError, TypeError),
        "jax.vmap|dim",
    ),
    "parameters from a point of another shape": (
        lambda: LOSS.constrain(jnp.zeros(3)),
        ValueError,
        r"shape \(2,\)",
    ),
    "model of a loss": (lambda: regloss.model(LOSS), TypeError, "expected a RegularizedLoss"),
    "distribution that is no Gaussian": (
        lambda: Gaussian.from_distribution(dist.Gamma(1.0, 1.0)),
        TypeError,
        "MultivariateNormal",
    ),
    # Parts of the scheme
    "scheme of a class": (lambda: scheme(Loss), TypeError, "got type"),
    "scheme of a function": (lambda: scheme(bowl), TypeError, "Loss.from_function"),
    "tau missing": (lambda: TwoStep(LOSS, shift=CHEAP, fit=fit.ForwardKL()), TypeError, "tau"),
    "tau None": (lambda: scheme(tau=None), TypeError, "tau"),
    "tau zero": (lambda: scheme(tau=0.0), ValueError, "positive"),
    "tau negative": (lambda: scheme(tau=-0.1), ValueError, "positive"),
    "tau NaN": (lambda: scheme(tau=np.nan), ValueError, "finite"),
    "tau infinite": (lambda: scheme(tau=np.inf), ValueError, "finite"),
    "tau a string": (lambda: scheme(tau="0.1"), TypeError, "positive number"),
    "tau a boolean": (lambda: scheme(tau=True), TypeError, "positive number"),
    "tau a boolean array": (lambda: scheme(tau=np.array(True)), TypeError, "positive number"),
    "tau complex": (lambda: scheme(tau=np.array(1j)), TypeError, "positive number"),
    "tau a key": (lambda: scheme(tau=KEY), TypeError, "positive number"),
    "tau an object": (lambda: scheme(tau=object()), TypeError, "positive number"),
    "tau below the float type": (lambda: scheme(tau=1e-60), ValueError, "positive"),
    "tau beyond the float type": (lambda: scheme(tau=1e60), ValueError, "finite"),
    "tau a list": (lambda: scheme(tau=[0.1, 0.2]), ValueError, "pytree prefix"),
    "tau of one group missing": (lambda: scheme(GROUPS, {"a": 0.1}), ValueError, "pytree prefix"),
    "tau of one group None": (
        lambda: scheme(GROUPS, {"a": 0.1, "b": None}),
        ValueError,
        "pytree prefix",
    ),
    "tau of one group a string": (
        lambda: scheme(GROUPS, {"a": 0.1, "b": "0.1"}),
        TypeError,
        "positive number",
    ),
    "tau of one group a boolean": (
        lambda: scheme(GROUPS, {"a": 0.1, "b": True}),
        TypeError,
        "positive number",
    ),
    "tau of one group NaN": (
        lambda: scheme(GROUPS, {"a": 0.1, "b": np.nan}),
        ValueError,
        "finite",
    ),
    "tau of one group of another shape": (
        lambda: scheme(GROUPS, {"a": 0.1, "b": np.ones(3)}),
        ValueError,
        "pytree prefix",
    ),
    "tau of sites that are not": (
        lambda: scheme(Loss.from_model(model, DATA[:, 0]), {"mean": 0.1}),
        ValueError,
        r"latent site \['m'\]",
    ),
    "tau of another tree": (lambda: scheme(tau={"a": 0.1}), ValueError, "pytree prefix"),
    "tau of the wrong length": (lambda: scheme(tau=np.ones(3)), ValueError, "pytree prefix"),
    "tau negative in one group": (
        lambda: scheme(tau=np.array([1.0, -1.0])),
        ValueError,
        "positive",
    ),
    "schedule that starts negative": (lambda: scheme(tau=lambda step: -1.0), ValueError, "step 0"),
    "schedule of two arguments": (lambda: scheme(tau=lambda a, b: a), TypeError, "schedule"),
    "schedule that returns nothing": (lambda: scheme(tau=lambda step: None), TypeError, "step 0"),
    "schedule of another shape": (
        lambda: scheme(tau=lambda step: jnp.ones(3)),
        ValueError,
        r"expected shape \(\) or \(2,\)",
    ),
    "schedule that branches in Python": (
        lambda: scheme(tau=lambda step: 0.1 if step < 5 else 0.01),
        TypeError,
        "schedule",
    ),
    "temperature zero": (lambda: scheme(temperature=0.0), ValueError, "temperature"),
    "temperature negative": (lambda: scheme(temperature=-1.0), ValueError, "temperature"),
    "temperature NaN": (lambda: scheme(temperature=np.nan), ValueError, "temperature"),
    "temperature infinite": (lambda: scheme(temperature=np.inf), ValueError, "temperature"),
    "temperature missing": (lambda: scheme(temperature=None), TypeError, "temperature"),
    "temperature a boolean": (lambda: scheme(temperature=True), TypeError, "temperature"),
    "temperature a schedule": (
        lambda: scheme(temperature=lambda step: 1.0),
        TypeError,
        "temperature",
    ),
    "temperature a string": (lambda: scheme(temperature="hot"), TypeError, "temperature"),
    "temperature a vector": (lambda: scheme(temperature=np.ones(2)), ValueError, "temperature"),
    "shift is a class": (lambda: scheme(engine=shift.NUTS), TypeError, "object with init and step"),
    "shift is a NumPyro kernel": (
        lambda: scheme(engine=numpyro.infer.NUTS(model)),
        TypeError,
        "object with init and step",
    ),
    "shift without verbs": (
        lambda: scheme(engine=type("Numb", (shift.Shift,), {"init": 3, "step": 4})()),
        TypeError,
        "object with init and step",
    ),
    "shift that inherits from nothing": (
        lambda: scheme(engine=Lonely()),
        TypeError,
        r"has defaults for the methods beside init and step, got Lonely; inherit from it",
    ),
    "info that is neither tuple nor dataclass": (
        lambda: fit.FitInfo.of({"mean_error": 0.0}),
        TypeError,
        "as a NamedTuple or a dataclass",
    ),
    "shift is an algorithm of another library": (
        lambda: scheme(engine=ALGORITHM),
        TypeError,
        r"shift with step\(rng_key, state, target\), got SamplingAlgorithm .*shift.Kernel",
    ),
    "anchor is an algorithm of another library": (
        lambda: scheme(anchor=ALGORITHM),
        TypeError,
        r"anchor with init\(target\), got|anchor with step\(rng_key, state, target, draws",
    ),
    "shift missing": (lambda: TwoStep(LOSS, 0.1), TypeError, "'shift'"),
    "shift is None": (lambda: TwoStep(LOSS, 0.1, None, fit.ForwardKL()), TypeError, "shift"),
    "fit is a shift": (lambda: scheme(projection=CHEAP), TypeError, "expected fit"),
    "anchor is a class": (lambda: scheme(anchor=anchor.Proximal), TypeError, "expected anchor"),
    "fit is a name": (lambda: scheme(projection="forward"), TypeError, "expected fit"),
    "fit is a guide": (
        lambda: scheme(projection=numpyro.infer.autoguide.AutoNormal(model)),
        TypeError,
        "expected fit",
    ),
    "anchor is a number": (lambda: scheme(anchor=1), TypeError, "expected anchor"),
    "anchor is an optimizer": (
        lambda: scheme(anchor=optax.adam(0.1)),
        TypeError,
        "expected anchor",
    ),
    "shift and fit exchanged": (
        lambda: TwoStep(LOSS, 0.1, fit.ForwardKL(), CHEAP),
        TypeError,
        "shift",
    ),
    "moment matching without draws": (
        lambda: scheme(engine=shift.Implicit()),
        ValueError,
        "makes none",
    ),
    "heat of a loss without a gradient": (
        lambda: schemes.heat(Loss.from_function(lambda x: jnp.sum(x > 0), np.zeros(2)), 0.1),
        TypeError,
        "shift.Importance",
    ),
    "chains on integers": (
        lambda: schemes.local_entropy(COUNTED.loss, 0.1),
        TypeError,
        "Auto follows gradients, and a loss that returns integers has none; use shift.Importance",
    ),
    "chains on integers, without a scheme": (
        lambda: shift.HMC().init(KEY, COUNTED),
        TypeError,
        "HMC follows gradients",
    ),
    "a kernel on integers": (
        lambda: schemes.local_entropy(COUNTED.loss, 0.1, shift.Kernel(numpyro.infer.BarkerMH)),
        TypeError,
        "Kernel follows gradients",
    ),
    "heat of a staircase": (
        lambda: schemes.heat(STAIRCASE, 0.5).init(KEY),
        ValueError,
        'RobbinsMonro follows gradients.* exactly zero at all of .*gradient="score"',
    ),
    "heat of a staircase by variational inference": (
        lambda: schemes.heat(STAIRCASE, 0.5, fit.ReverseKL()).init(KEY),
        ValueError,
        "ReverseKL follows gradients.* exactly zero",
    ),
    "chains on a staircase": (
        lambda: schemes.local_entropy(STAIRCASE, 0.5).run(KEY, 2),
        ValueError,
        "Auto follows gradients.* exactly zero .*shift.Importance",
    ),
    "a variational fit of a staircase": (
        lambda: regloss.reverse_kl(KEY, RegularizedLoss(STAIRCASE, TARGET.reference)),
        ValueError,
        "reverse_kl: ReverseKL follows gradients.* exactly zero",
    ),
    "heat gradients of a staircase": (
        lambda: values.value_and_grad(STAIRCASE, 0.5, kind="heat"),
        ValueError,
        'follows gradients.* exactly zero .*kind="local_entropy"',
    ),
    "a loss of batches that counts errors": (
        lambda: schemes.entropy_sgd(ERRORS, 0.5).init(KEY),
        ValueError,
        "SGLD follows gradients.* exactly zero",
    ),
    "gradients that are finite at the start alone": (
        lambda: schemes.heat(Loss.from_function(hidden_root, np.zeros(2)), 0.5).init(KEY),
        ValueError,
        "NaN or infinite at all of 4 points",
    ),
    "tau that is rounded to zero": (lambda: scheme(tau=1e-44), ValueError, "rounded to zero"),
    "tau whose inverse is": (lambda: scheme(tau=1e38), ValueError, "rounded to zero"),
    "temperature that is rounded to zero": (
        lambda: scheme(temperature=1e-40),
        ValueError,
        "rounded to zero",
    ),
    "a reference whose variance is rounded to zero": (
        lambda: RegularizedLoss(LOSS, Gaussian(np.zeros(2), np.float32(1e-20))),
        ValueError,
        "rounded to zero",
    ),
    "schedule that ends at a tau rounded to zero": (
        lambda: scheme(tau=lambda step: 0.1 * 1e-20**step).run(KEY, 3, progress_bar=False),
        ValueError,
        "rounded to zero|finite positive",
    ),
    "widths of other parameters": (
        lambda: schemes.anneal(LOSS, {"a": 1.0}, 10),
        ValueError,
        "schemes.anneal: width",
    ),
    # Settings of engines
    "antithetic pairs a number": (
        lambda: fit.RobbinsMonro(5, antithetic=1),
        TypeError,
        "got 1",
    ),
    "averaging a word": (lambda: fit.RobbinsMonro(5, averaging="no"), TypeError, "averaging"),
    "antithetic a number": (lambda: shift.Importance(10, antithetic=2), TypeError, "antithetic"),
    "acceptance above one": (
        lambda: shift.NUTS(target_accept_prob=1.5),
        ValueError,
        "between 0 and 1",
    ),
    "acceptance missing": (
        lambda: shift.NUTS(target_accept_prob=None),
        TypeError,
        "target_accept_prob",
    ),
    "step size a boolean": (lambda: shift.NUTS(step_size=True), TypeError, "step_size"),
    "path of length NaN": (
        lambda: shift.HMC(trajectory_length=np.nan),
        ValueError,
        "trajectory_length",
    ),
    "NUTS of a model": (lambda: shift.NUTS(model), TypeError, "num_warmup"),
    "negative step size": (lambda: shift.HMC(step_size=-0.1), ValueError, "step_size"),
    "path of length zero": (
        lambda: shift.HMC(trajectory_length=0.0),
        ValueError,
        "trajectory_length",
    ),
    "dense mass a string": (lambda: shift.NUTS(dense_mass="yes"), TypeError, "dense_mass"),
    "unknown metric": (lambda: shift.HMC(metric="diagonal"), ValueError, "metric as one of"),
    "unknown family": (lambda: fit.ForwardKL("full"), ValueError, "one of"),
    "unknown method": (lambda: fit.ReverseKL(method="newton"), ValueError, "one of"),
    "family a list": (lambda: fit.ForwardKL(["dense"]), ValueError, "one of"),
    "optimizer that was not built": (
        lambda: fit.ReverseKL(optimizer=optax.adam),
        TypeError,
        "optax.adam",
    ),
    "optimizer is a name": (lambda: fit.ReverseKL(optimizer="adam"), TypeError, "optax.adam"),
    "unknown gradient": (lambda: fit.RobbinsMonro(gradient="values"), ValueError, "one of"),
    "negative tolerance": (lambda: fit.RobbinsMonro(tolerance=-0.1), ValueError, "tolerance"),
    "tolerance a word": (lambda: fit.RobbinsMonro(tolerance="small"), TypeError, "tolerance"),
    "tolerance of the last iterate": (
        lambda: fit.RobbinsMonro(averaging=False, tolerance=0.1),
        ValueError,
        "averaging=True",
    ),
    "negative inner step": (lambda: fit.RobbinsMonro(5, step_size=-1.0), ValueError, "step_size"),
    "inner steps that branch in Python": (
        lambda: fit.RobbinsMonro(5, step_size=lambda j: 1.0 if j < 2 else 0.5),
        TypeError,
        "jnp.where",
    ),
    "inner steps that are vectors": (
        lambda: fit.RobbinsMonro(5, step_size=lambda j: jnp.ones(3)),
        ValueError,
        r"expected shape \(\)",
    ),
    "inner steps that end negative": (
        lambda: fit.RobbinsMonro(5, step_size=lambda j: 1.0 - j),
        ValueError,
        "step_size at step 4",
    ),
    # Running
    "key missing": (run(None, 2), TypeError, "random key"),
    "run inside jit": (
        lambda: jax.jit(lambda key: scheme().run(key, 2, progress_bar=False))(KEY),
        TypeError,
        "TwoStep.scan",
    ),
    "run inside vmap": (
        lambda: jax.vmap(lambda key: scheme().run(key, 2, progress_bar=False))(random.split(KEY)),
        TypeError,
        "TwoStep.scan",
    ),
    "run of a result": (
        lambda: run(KEY, 2, init_state=run()())(),
        TypeError,
        "got TwoStepResult",
    ),
    "state without a reference": (from_state(reference=None), TypeError, "Gaussian reference"),
    "state with a NaN reference": (
        from_state(reference=Gaussian(jnp.array([0.0, jnp.nan]), jnp.array(0.3))),
        ValueError,
        "finite reference",
    ),
    "state with half a step": (from_state(step=0.5), ValueError, "other engines"),
    "state of integers": (
        from_state(reference=Gaussian(jnp.arange(2), jnp.array(0.3))),
        ValueError,
        "other engines",
    ),
    "parameters of no state": (
        lambda: scheme().get_params(None),
        TypeError,
        "TwoStep.init",
    ),
    "chains on a loss without a gradient": (
        start(halve_until_small, np.ones(2), shift.NUTS()),
        ValueError,
        "shift.Importance",
    ),
    "heat of a loop without a gradient": (
        heat(halve_until_small, np.ones(2)),
        ValueError,
        "shift.Importance",
    ),
    "a variational fit of a loop": (
        lambda: regloss.reverse_kl(KEY, LOOP),
        TypeError,
        "ReverseKL follows gradients, and JAX cannot differentiate .*Reverse-mode.* Use shift.Importance",
    ),
    "scores of a loop": (
        lambda: regloss.score_matching(LOOP, rng_key=KEY),
        TypeError,
        "score_matching follows gradients, and JAX cannot differentiate .*Use shift.Importance",
    ),
    "scores of draws under a loop": (
        lambda: regloss.score_matching(np.eye(20, 2), loss=LOOP.loss),
        TypeError,
        "score_matching follows gradients, and JAX cannot differentiate .*Use forward_kl",
    ),
    "heat gradients of a loop": (
        lambda: values.value_and_grad(LOOP.loss, 0.1, kind="heat"),
        TypeError,
        'follows gradients, and JAX cannot differentiate .*kind="local_entropy"',
    ),
    "the flatness of a loop": (
        lambda: values.flatness_verdict(KEY, LOOP.loss),
        TypeError,
        "the slope follows gradients, and JAX cannot differentiate .*values.profile",
    ),
    "cloud on a loss that does not vmap": (start(on_host, np.ones(2)), TypeError, "jax.vmap"),
    "key is a number": (run(0, 2), TypeError, "random key"),
    "raw key of the wrong length": (run(np.zeros(3, np.uint32), 2), TypeError, "random key"),
    "schedule that falls to zero": (
        lambda: scheme(tau=lambda step: 0.1 - 0.05 * step).run(KEY, 3, progress_bar=False),
        ValueError,
        "tau at step 2",
    ),
    "step from no state": (lambda: scheme().step(None), TypeError, "TwoStep.init"),
    "scan from a tuple": (lambda: scheme().scan((1, 2), 3), TypeError, "TwoStep.init"),
    "several keys": (run(random.split(KEY), 2), TypeError, "one random key"),
    "callback is no function": (run(KEY, 2, callback=1), TypeError, "callback"),
    "state is no state": (run(KEY, 2, init_state={}), TypeError, "init_state"),
    "state of another loss": (
        lambda: scheme().run(
            KEY,
            2,
            init_state=scheme(Loss.from_function(bowl, np.zeros(5))).init(KEY),
            progress_bar=False,
        ),
        ValueError,
        "another loss",
    ),
    "state of another engine": (
        lambda: scheme().run(
            KEY, 2, init_state=scheme(engine=shift.HMC()).init(KEY), progress_bar=False
        ),
        ValueError,
        "other engines",
    ),
    "data that do not fit": (
        run(KEY, 2, np.zeros((6, 7)), loss=ROWS),
        (TypeError, ValueError),
        "the loss raised",
    ),
    "argument the loss does not know": (
        run(KEY, 2, weight=1.0, loss=ROWS),
        TypeError,
        "unexpected keyword",
    ),
    "draw with a number as key": (
        lambda: scheme().draw(0, scheme().init(KEY)),
        TypeError,
        "random key",
    ),
    "loss NaN at the start": (
        start(lambda x: jnp.log(x.sum()), -np.ones(2)),
        ValueError,
        "finite loss at the start",
    ),
    "loss minus infinity at the start": (
        start(lambda x: jnp.log(jnp.sum(x)), np.zeros(2)),
        ValueError,
        "got -inf",
    ),
    "NaN in bound data": (
        run(loss=Loss.from_function(rows_loss, np.zeros(2), WITH_NAN)),
        ValueError,
        "NaN among the data",
    ),
    "NaN in the data of a run": (run(KEY, 2, WITH_NAN, loss=ROWS), ValueError, "got nan"),
    "NaN in the data of a model": (
        run(loss=Loss.from_model(model, WITH_NAN[:, 0])),
        ValueError,
        "finite loss at the start",
    ),
    "NaN in a minibatch's data": (
        run(loss=Loss.from_function(rows_loss, np.zeros(2), WITH_NAN, minibatch=Minibatch(2))),
        ValueError,
        "NaN among the data",
    ),
    "no rows of data": (
        run(loss=Loss.from_function(rows_loss, np.zeros(2), DATA[:0])),
        ValueError,
        "finite loss at the start",
    ),
    "data are text": (run(KEY, 2, "rows", loss=ROWS), TypeError, "the loss raised"),
    "data are None": (run(KEY, 2, None, loss=ROWS), TypeError, "the loss raised"),
    "loss infinite at the start": (
        start(lambda x: 1 / jnp.sum(x), np.zeros(2)),
        ValueError,
        "finite loss at the start",
    ),
    "gradient NaN at the start": (
        start(lambda x: jnp.sqrt(jnp.sum(x**2)), np.zeros(2), shift.NUTS()),
        ValueError,
        "finite gradient at the start",
    ),
    "gradient NaN at the start of a heat step": (
        heat(lambda x: jnp.sqrt(jnp.sum(x**2)), np.zeros(2)),
        ValueError,
        "gradient-free engine",
    ),
    "one-call scheme of the wrong kind": (
        lambda: schemes.minimize(KEY, bowl, np.zeros(2), num_steps=2, tau=0.1, scheme="heat"),
        TypeError,
        "scheme",
    ),
    # Values
    "value of a loss": (lambda: values.local_entropy(KEY, LOSS), TypeError, "RegularizedLoss"),
    "value without a reference": (
        lambda: values.heat(KEY, RegularizedLoss(LOSS)),
        TypeError,
        "no reference",
    ),
    "value with a number as key": (lambda: values.heat(0, TARGET), TypeError, "random key"),
    "unknown way to a value": (
        lambda: values.local_entropy(KEY, TARGET, method="laplace"),
        ValueError,
        "one of",
    ),
    "bridge of integers": (
        lambda: values.local_entropy(KEY, COUNTED, method="bridge"),
        TypeError,
        'method="smc"',
    ),
    "bridge of a loop without a gradient": (
        lambda: values.local_entropy(KEY, LOOP, method="bridge"),
        TypeError,
        'method="smc"',
    ),
    # Tempering
    "particles that do not fit the moves": (
        lambda: shift.SMC(num_particles=25),
        ValueError,
        "multiple of num_moves=10, got 25",
    ),
    "odd number of islands": (lambda: shift.SMC(num_islands=3), ValueError, "even number, got 3"),
    "moves of an unknown kind": (lambda: shift.SMC(moves="gibbs"), ValueError, "SMC: moves"),
    "all particles effective": (
        lambda: shift.SMC(ess_fraction=1.0),
        ValueError,
        "between 0 and 1",
    ),
    "no particles effective": (
        lambda: shift.SMC(ess_fraction=0.0),
        ValueError,
        "SMC: ess_fraction",
    ),
    "Hamiltonian moves on integers": (
        lambda: TwoStep(COUNTED.loss, 0.1, shift.SMC(moves="hmc"), fit.ForwardKL()).init(KEY),
        TypeError,
        "returns integers",
    ),
}


# Every count of every engine: how to give it, its name, the least that is allowed.
COUNTS = {
    "Importance": (shift.Importance, "num_samples", 1),
    "Importance chunk": (lambda **k: shift.Importance(10, **k), "chunk_size", 1),
    "NUTS warm-up": (shift.NUTS, "num_warmup", 0),
    "NUTS draws": (shift.NUTS, "num_samples", 1),
    "NUTS chains": (shift.NUTS, "num_chains", 1),
    "NUTS depth": (shift.NUTS, "max_tree_depth", 1),
    "HMC warm-up": (shift.HMC, "num_warmup", 0),
    "HMC draws": (shift.HMC, "num_samples", 1),
    "HMC chains": (shift.HMC, "num_chains", 1),
    "SMC particles": (shift.SMC, "num_particles", 20),
    "SMC islands": (shift.SMC, "num_islands", 2),
    "SMC moves": (shift.SMC, "num_moves", 1),
    "SMC leapfrog": (shift.SMC, "num_leapfrog", 1),
    "SMC stages": (shift.SMC, "max_stages", 1),
    "RobbinsMonro": (fit.RobbinsMonro, "num_steps", 1),
    "RobbinsMonro pairs": (fit.RobbinsMonro, "num_pairs", 1),
    "ReverseKL steps": (fit.ReverseKL, "num_steps", 1),
    "ReverseKL particles": (fit.ReverseKL, "num_particles", 1),
    "Minibatch": (Minibatch, "batch_size", 1),
    "run": (lambda num_steps: run(KEY, num_steps)(), "num_steps", 1),
    "scan": (lambda num_steps: scheme().scan(scheme().init(KEY), num_steps), "num_steps", 1),
    "heat": (lambda **k: values.heat(KEY, TARGET, **k), "num_samples", 4),
    "local entropy": (lambda **k: values.local_entropy(KEY, TARGET, **k), "num_samples", 4),
    "values chunk": (lambda **k: values.heat(KEY, TARGET, **k), "chunk_size", 1),
}


@pytest.mark.parametrize("row", COUNTS)
def test_counts(row):
    call, name, least = COUNTS[row]
    for count in (least - 1, -3, 2.0, np.nan, True, np.True_, "3", [3], np.array([3]), KEY):
        error = ValueError if type(count) is int else TypeError
        with pytest.raises(error, match=f"{name}: expected an integer >= {least}, got "):
            call(**{name: count})


@pytest.mark.parametrize("row", CATALOGUE)
def test_bad_input(row):
    call, error, words = CATALOGUE[row]
    with pytest.raises(error, match=words) as caught:
        call()
    message = str(caught.value)
    assert "Traceback" not in message
    assert "Tracer" not in message or "the loss raised" in message
    assert len(message) < 1500


def test_the_catalogue_is_long_enough():
    assert len(CATALOGUE) >= 50


def test_constructors_check_inside_replace():
    with pytest.raises(ValueError, match="tau"):
        dataclasses.replace(scheme(), tau=-1.0)


def test_tracers_pass_unchecked():
    assert jax.vmap(lambda tau: scheme(tau=tau).init(KEY).reference.scale)(
        jnp.array([0.25, 1.0])
    ).tolist() == [
        0.5,
        1.0,
    ]
