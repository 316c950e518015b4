# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""The report on a run: bad runs are named with their remedies, good runs of every engine have no finding."""

import warnings
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import HEAT_FITS, SHIFTS, with_long
from jax import lax, random

from numpyro_regloss import (
    Gaussian,
    Loss,
    Record,
    TwoStep,
    TwoStepResult,
    anchor,
    diagnostics,
    fit,
    schemes,
    shift,
)
from numpyro_regloss.anchor import Proximal
from numpyro_regloss.diagnostics.arrival import Run
from numpyro_regloss.diagnostics.columns import Motion
from numpyro_regloss.diagnostics.doubts import DOUBTS
from numpyro_regloss.diagnostics.findings import LEAST_STEPS, RULES, arrival, window
from numpyro_regloss.diagnostics.look import look_around
from numpyro_regloss.diagnostics.rank_diagnostics import rank_diagnostics
from numpyro_regloss.two_step.outer_step import LossOfDraws

NUM_STEPS, NUM_SEEDS = 12, 4


def landscape(x, bowl, power, cliff, canyon):
    """Four losses, so that good and bad runs of an engine are one compiled program."""
    # Without the symmetry that would make pairs of draws exact.
    value = jnp.sum(3 * jnp.log(jnp.cosh(x - 1)) + 0.2 * jnp.exp(x)) + 0.5 * (x[0] - x[1]) ** 2
    value = bowl * value + power * jnp.sum(x**4) + cliff * jax.nn.relu(x[0])
    return value + canyon * (1e3 * jnp.log(jnp.cosh(x[0])) + x[1] + jnp.log(jnp.cosh(x[0] + x[1])))


def make(engine=None, method=None, tau=0.3, start=0.0, *, anchor=None, record=None, **weights):
    engine = shift.Importance(1000) if engine is None else engine
    method = fit.ForwardKL() if method is None else method
    kinds = ("bowl", "power", "cliff", "canyon")
    weights = [weights.get(kind, float(kind == "bowl" and not weights)) for kind in kinds]
    loss = Loss.from_function(landscape, np.full(2, start), *weights)
    anchor = Proximal() if anchor is None else anchor
    return TwoStep(loss, tau, engine, method, anchor, record=record)


@jax.jit
def go(optimizer, rng_keys):
    def one(rng_key):
        state, history = optimizer.scan(optimizer.init(rng_key), NUM_STEPS)
        return state.reference, history

    return lax.map(one, rng_keys)


def several(optimizer):
    """Results of several seeds; as many for good runs as for bad ones, which are the same program."""
    both = jax.device_get(go(optimizer, random.split(random.key(0), NUM_SEEDS)))
    for i in range(NUM_SEEDS):
        reference, history = jax.tree.map(lambda a, i=i: a[i], both)
        # The report looks at no more of the state.
        yield TwoStepResult(None, _State(reference), history)


class _State(NamedTuple):
    reference: Any


@pytest.fixture(scope="module")
def cloud():
    optimizer = make()
    return optimizer, optimizer.run(random.key(1), 20, progress_bar=False)


@pytest.fixture(scope="module")
def chains():
    optimizer = make(shift.HMC(num_warmup=50, num_samples=101, num_chains=3))
    return optimizer, optimizer.run(random.key(1), 8, progress_bar=False)


CHAINS = shift.NUTS(num_warmup=100, num_samples=100, num_chains=4)
INNER_STEPS = fit.RobbinsMonro(20)
# One of each kind of engine; their variants report the same.
GOOD = {
    **{
        name: lambda name=name: make(SHIFTS[name]())
        for name in SHIFTS
        # Those with bad runs below share their settings; HMC has its test with the draws at the end.
        if "_" not in name and name not in ("importance", "nuts", "hmc", "sgld")
    },
    "importance": make,
    "nuts": lambda: make(CHAINS),
    "sgld": lambda: make(shift.SGLD(0.02, 1000, num_chains=2)),
    "robbins_monro": lambda: make(shift.Implicit(), INNER_STEPS),
    "reverse_kl": lambda: make(shift.Implicit(), HEAT_FITS["reverse_kl"]()),
    "keep_covariance": lambda: make(
        None, fit.ForwardKL("dense"), anchor=anchor.KeepCovariance("dense")
    ),
    "adapt_tau": lambda: make(anchor=anchor.AdaptTau(Proximal()), record=Record()),
    "adaptive": lambda: make(
        shift.Adaptive(shift.Importance(200), max_rounds=8), anchor=anchor.Newton()
    ),
    "settled_temperature": lambda: make(shift.Importance(500, ess=0.4)),
}


@pytest.mark.parametrize(
    "name",
    with_long(GOOD, GOOD.keys() - {"importance", "robbins_monro"}),
)
def test_good_runs_have_no_findings(name):
    optimizer = GOOD[name]()
    for result in several(optimizer):
        report = diagnostics.summary(result, optimizer)
        # A guide that is still on its way at the first step may have a poor k-hat there, which is told.
        findings = [f.name for f in report.findings if (name, f.name) != ("svi", "single steps")]
        assert not findings, str(report)
        assert report.arrived is not None


# What was done wrong, what the report must call it, and words of the remedy.
BAD = {
    "tau_too_large": (lambda: make(tau=1.0, bowl=1e4), "ess", "degenerate .* smaller tau"),
    "degenerate_cloud": (lambda: make(tau=0.1, bowl=1e3), "k-hat", "shift.SMC"),
    "too_few_draws": (lambda: make(shift.Importance(10)), "ess", "too small; use more draws"),
    "unstable": (
        lambda: make(shift.SGLD(0.5, 1000, num_chains=2)),
        "shift",
        "unstable .* step_size below",
    ),
    "biased": (
        lambda: make(shift.SGLD(0.2, 1000, num_chains=2)),
        "step size",
        "half of the step_size",
    ),
    "drifting_temperature": (
        lambda: make(shift.Importance(500, ess=0.4), tau=1.0, start=10.0, power=1.0),
        "temperature",
        "fix it: temperature=",
    ),
    "divergent": (
        lambda: make(CHAINS, tau=1.0, start=-0.5, bowl=0.3, cliff=1e5),
        "divergences",
        "smaller tau, a target_accept_prob",
    ),
    "too_few_inner_steps": (
        lambda: make(shift.Implicit(), INNER_STEPS, tau=1.0, canyon=1.0),
        "residual",
        "more num_steps",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_runs_are_named_with_their_remedies(case):
    build, name, words = BAD[case]
    optimizer = build()
    for result in several(optimizer):
        # The infos alone say as much.
        for report in (diagnostics.summary(result), diagnostics.summary(result, optimizer)):
            texts = [finding.text for finding in report.findings if finding.name == name]
            assert len(texts) == 1, str(report)
            with pytest.raises(AssertionError, match=words):
                raise AssertionError(texts[0])


class Info(NamedTuple):
    """What the contract asks for, and no more."""

    ok: Any
    num_loss: Any
    num_grad: Any


def with_infos(result, shift=None, fit=None, anchor=None, record=None):
    """A run whose infos have the fields given, and otherwise only those of the contract."""
    history = result.history
    count = len(history.ok)

    def info(fields):
        fields = {name: np.broadcast_to(value, count) for name, value in (fields or {}).items()}
        least = Info(history.ok, np.full(count, 100), np.full(count, 0))
        fields = least._asdict() | fields
        return NamedTuple("Other", [(name, Any) for name in fields])(**fields)

    return result._replace(
        history=history._replace(
            shift=info(shift), fit=info(fit), anchor=info(anchor), record=record and info(record)
        )
    )


# Rules by what they look at; the engines that come with such numbers are slow to provoke.
SYMPTOMS = {
    "not finite": ({"shift": {"num_rejected": 2.0}}, "smaller tau"),
    "k-hat": ({"shift": {"khat": 0.8, "negative_elbo": 1.0}}, "richer guide"),
    "ess": ({"shift": {"ess": 15.0}}, "too few to estimate"),
    "R-hat": ({"shift": {"rhat": 1.2}}, "chains disagree"),
    "divergences": ({"shift": {"num_divergent": 1}}, "target_accept_prob"),
    "acceptance": ({"shift": {"accept_prob": 0.05}}, "hardly moves"),
    "step size": ({"shift": {"stability": 1.5}}, "half of the step_size"),
    "increases": ({"record": {"verdict": -1}}, "plain anchor.Proximal"),
    "residual": ({"fit": {"bound": 1.0, "residual": 2.0}}, "num_steps"),
    "covariance": ({"fit": {"floored": True}}, "more draws than parameters"),
    "fallback": ({"anchor": {"fell_back": True}}, "smaller learning rate"),
}


@pytest.mark.parametrize("name", SYMPTOMS)
def test_rules(cloud, name):
    infos, words = SYMPTOMS[name]
    findings = diagnostics.summary(with_infos(cloud[1], **infos)).findings
    assert [finding.name for finding in findings] == [name]
    assert words in findings[0].text


def test_a_centre_that_rests_has_not_arrived_where_steps_are_not_solved(cloud):
    infos = {"fit": {"bound": 1.0, "residual": 2.0}}
    report = diagnostics.summary(with_infos(cloud[1], **infos))
    assert report.arrived is None
    assert "see below" in report.arrival


def changed(history, **fields):
    """A history whose losses over the draws are others, or all of whose losses are."""
    draws = {name: fields.pop(name) for name in set(LossOfDraws._fields) & set(fields)}
    return history._replace(draws=history.draws._replace(**draws), **fields)


# What a centre that rests hides, by what is changed in a good run: the name of the finding and words of it.
DOUBTFUL = {
    "all losses equal": (
        lambda h: changed(h, sd=0 * h.draws.sd),
        "rounding",
        "the same at all draws",
    ),
    "a large constant": (
        lambda h: changed(h, loss=h.loss + np.float32(1e8)),
        "rounding",
        "1e\\+08",
    ),
    "a constant beside a small spread": (
        lambda h: changed(h, loss=h.loss + np.float32(2e3), sd=1e-4 * h.draws.sd),
        "rounding",
        "subtract a constant",
    ),
    "another temperature": (
        lambda h: changed(h, temperature=h.draws.temperature / 300),
        "adapted temperature",
        "a fixed temperature",
    ),
    "a saddle": (
        lambda h: changed(h, loss=h.draws.mean + 0.5 * h.draws.sd, share_lower=0.6 + 0 * h.loss),
        "centre",
        "60% of q has a lower loss than the centre: the centre rests on a saddle",
    ),
    "outside of the support": (lambda h: changed(h, loss=h.loss + np.inf), "centre", "not finite"),
    "no width": (
        lambda h: h._replace(reference=h.reference._replace(scale=0 * h.reference.scale)),
        "lengths",
        "are not finite",
    ),
}


@pytest.mark.parametrize("name", DOUBTFUL)
@pytest.mark.filterwarnings("ignore:(divide|invalid):RuntimeWarning")
def test_a_centre_that_rests_may_not_have_arrived(cloud, name):
    change, rule, words = DOUBTFUL[name]
    report = diagnostics.summary(cloud[1]._replace(history=change(cloud[1].history)))
    assert report.arrived is None
    assert "see below" in report.arrival
    assert [finding.name for finding in report.findings] == [rule]
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(report.findings[0].text)
    assert "nan" not in str(report)
    assert "Nothing wrong" not in str(report)


@pytest.mark.parametrize(
    ("dim", "num_draws", "doubted"), [(5000, 1000, True), (30, 20, True), (30, 90, False)]
)
def test_fewer_draws_than_parameters_are_noise(cloud, dim, num_draws, doubted):
    history = cloud[1].history
    noise = np.random.default_rng(0).normal(size=(len(history.ok), dim)) / np.sqrt(num_draws)
    motion = Motion(noise, np.full_like(noise, num_draws**-0.5), noise)
    run = Run({"ess": np.full(len(noise), num_draws)}, history, motion)
    text = DOUBTS["dimension"](run)
    assert bool(text) == doubted
    assert (
        not doubted or f"{num_draws:.3g} effective draws are too few for {dim} parameters" in text
    )


def test_an_adapted_temperature_is_named(cloud):
    history = changed(cloud[1].history, temperature=3 * cloud[1].history.draws.temperature)
    report = diagnostics.summary(cloud[1]._replace(history=history))
    assert report.findings == ()
    assert report.arrived
    assert report.arrival.endswith(", at an adapted temperature of 1, not yours (3).")
    # A cloud that narrows to the rounding of a loss whose lowest value is not zero.
    narrow = np.where(np.arange(20) > 9, 1e-8, 1.0) * history.draws.sd
    report = diagnostics.summary(cloud[1]._replace(history=changed(history, sd=narrow)))
    assert report.findings == ()
    assert report.arrival.endswith("and as far as the rounding of the loss tells.")


def test_single_steps_are_counted_and_named(cloud):
    def poor(*steps, others=1.0):
        rhat, ess, count = np.full(20, others), np.full(20, 100.0), np.zeros(20, int)
        rhat[list(steps)], ess[list(steps)], count[list(steps)] = 1.64, 6.9, 22
        return with_infos(cloud[1], {"rhat": rhat, "ess": ess, "num_divergent": count})

    report = diagnostics.summary(poor(4))
    assert report.arrived  # later steps made up for it
    assert [finding.name for finding in report.findings] == ["single steps"]
    expected = "1 of 20 steps is poor: R-hat 1.64, 22 divergent transitions, ESS 6.9 (step 4)."
    assert report.findings[0].text.startswith(expected)
    report = diagnostics.summary(poor(4, 18))
    assert report.arrived is None
    assert "2 of 20 steps are poor: R-hat up to 1.64, 44 div" in report.findings[0].text
    # What most steps have is a finding of its own, said once.
    names = [finding.name for finding in diagnostics.summary(poor(4, others=1.2)).findings]
    assert names == ["R-hat", "single steps"]
    assert diagnostics.summary(poor()).findings == ()


def test_what_was_checked(cloud, chains):
    text = diagnostics.summary(cloud[1]).checked
    assert text == "Checked: steps, the loss at the draws, weights, noise of the centre."
    optimizer, result = chains
    assert "Not checked: gradients against differences" in diagnostics.summary(result).checked
    report = diagnostics.summary(result, optimizer)
    assert "gradients against differences" in report.checked
    assert "Not checked" not in report.checked
    assert str(report).splitlines()[-1] == report.checked
    # The run of another loss: the program is the same.
    other = make(optimizer.shift, bowl=2.0)
    text = diagnostics.summary(result, other).checked
    assert "the run had other arguments than those bound to the loss" in text


@pytest.mark.parametrize("engine", ["heat", "cloud"])
def test_a_constant_loss(engine):
    parts = (shift.Implicit(), INNER_STEPS) if engine == "heat" else ()
    optimizer = make(*parts, bowl=0.0)
    result = next(several(optimizer))
    name = "gradient" if engine == "heat" else "rounding"
    for report in (diagnostics.summary(result), diagnostics.summary(result, optimizer)):
        assert report.arrived is None
        assert [finding.name for finding in report.findings] == [name]


def network(params):
    inputs = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    hidden = jnp.tanh(inputs @ params["in"]) @ params["out"]
    return 0.5 * jnp.sum((hidden + params["bias"] - np.sin(2 * inputs[:, 0])) ** 2)


def stairs(x):
    return jnp.sum(jnp.floor(4 * x) ** 2) + jnp.sum(1e-2 * x)


ROUND = np.linalg.qr(np.random.default_rng(1).normal(size=(30, 30)))[0]
# Losses around a point: finding or none, loss, point and tau.
PLACES = {
    "saddle": ("curvature", lambda x: x[0] ** 2 - x[1] ** 2 + x[1] ** 4, np.zeros(2), 0.01),
    "a saddle far flatter than tau / T": (
        "curvature",
        network,
        {"in": np.zeros((3, 8)), "out": np.zeros(8), "bias": np.zeros(())},
        1e-6,
    ),
    "one direction of thirty": (
        "curvature",
        lambda x: jnp.sum((ROUND @ x) ** 2 * jnp.ones(30).at[7].set(-1.0)),
        np.zeros(30),
        0.1,
    ),
    "maximum": ("curvature", lambda x: -jnp.sum(jnp.cosh(x) ** -1), np.full(4, 3.0), 1.0),
    "stairs with a slope": ("gradient", stairs, np.full(3, 2.3), 0.5),
    "stairs between the points": ("gradient", stairs, np.full(3, 2.3), 0.01),
    "stairs": ("gradient", lambda x: jnp.sum(jnp.round(5 * x) ** 2), np.zeros(3), 0.5),
    "minimum": (None, lambda x: jnp.sum((x - 1) ** 2), np.ones(30), 10.0),
    "a large constant": (None, lambda x: jnp.sum((x - 1) ** 2) + 1e7, np.ones(3), 0.1),
    "valley": (
        None,
        lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2,
        np.ones(2),
        0.02,
    ),
    # Where the loss itself bends down at half of all points, the regularized one does not.
    "ripples": (None, lambda x: jnp.sum(x**2 + 0.3 * jnp.cos(20 * x)), np.zeros(5), 1.0),
    "a flat direction": (None, lambda x: x[0] ** 2, np.zeros(3), 1.0),
}


@pytest.mark.parametrize(
    "name",
    with_long(
        PLACES, {"maximum", "minimum", "stairs", "one direction of thirty", "valley", "ripples"}
    ),
)
def test_a_look_around_the_centre(name):
    expected, function, point, tau = PLACES[name]
    optimizer = schemes.heat(Loss.from_function(function, point), tau)
    loss = optimizer.loss
    reference = Gaussian.isotropic(loss.x0, tau)
    history = SimpleNamespace(
        loss=np.array([loss.value(loss.x0)]),
        reference=SimpleNamespace(mean=np.asarray(loss.x0)[None]),
        motion=None,
    )
    look = look_around(optimizer, reference, history)
    assert [finding.name for finding in look.findings] == ([expected] if expected else [])
    assert not any("nan" in finding.text for finding in look.findings)


@pytest.mark.parametrize("guide", [True, False])
def test_k_hat_of_too_few_draws(cloud, guide):
    shift = {"khat": np.inf, "ess": 9.0} | ({"negative_elbo": 1.0} if guide else {})
    texts = {f.name: f.text for f in diagnostics.summary(with_infos(cloud[1], shift)).findings}
    assert ("guide" in texts["k-hat"], "guide" in texts["ess"]) == (guide, guide)
    assert "hangs on" not in texts["k-hat"]


def test_every_rule_is_tried():
    tried = {name for _, name, _ in BAD.values()} | set(SYMPTOMS) | {"draws"}
    assert tried >= set(RULES)
    assert {name for _, name, _ in DOUBTFUL.values()} | {"dimension", "gradient"} == set(DOUBTS)


def test_noisy_centres_are_too_few_draws(cloud):
    result = cloud[1]
    # Nothing but noise, of 0.5 sd of the reference.
    noise = np.random.default_rng(0).normal(size=result.history.fitted.mean.shape)
    sd = result.history.reference.scale[:, None]
    history = result.history._replace(
        fitted=result.history.fitted._replace(
            mean=result.history.reference.mean + 0.5 * sd * noise
        ),
        fit=result.history.fit._replace(mean_error=0.5 * sd * np.ones_like(noise)),
    )
    report = diagnostics.summary(result._replace(history=history))
    assert report.arrived
    assert [finding.name for finding in report.findings] == ["draws"]
    assert "use more draws" in report.findings[0].text


def test_user_written_engines(cloud):
    report = diagnostics.summary(with_infos(cloud[1]))
    assert report.findings == ()
    assert report.arrived  # the steps are too small for the loss to notice
    assert set(report.columns) == {
        "ok",
        "loss",
        "tau",
        "step",
        "num_loss",
        "num_grad",
        "seconds",
    }


def test_columns(cloud):
    _, result = cloud
    columns = diagnostics.summary(result).columns
    history = result.history
    sd = history.reference.scale
    np.testing.assert_array_equal(columns["ess"], history.shift.ess)
    np.testing.assert_allclose(
        columns["step"][:-1],
        np.linalg.norm(np.diff(history.reference.mean, axis=0), axis=1) / sd[:-1],
        rtol=1e-5,
    )
    way = np.linalg.norm(history.fitted.mean - history.reference.mean, axis=1)
    error = np.linalg.norm(history.fit.mean_error, axis=1)
    np.testing.assert_allclose(columns["noise"], error / way, rtol=1e-4)
    # Signal at the start, noise at the end.
    assert columns["noise"][0] < 0.1 < 0.5 < columns["noise"][-1]
    assert result.seconds.shape == (20,)
    assert np.all(result.seconds > 0)


@pytest.mark.both
def test_the_report(cloud, chains):
    optimizer, result = cloud
    report = diagnostics.summary(result)
    text = str(report)
    assert "20 of 20 steps taken, 20,020 losses and 0 gradients" in text
    assert "Arrived" in text
    assert "Nothing wrong was found." in text
    assert "nan" not in text
    rows = report.table().splitlines()
    assert len(rows) == 21
    assert len(report.table(5).splitlines()) == 6
    assert len({len(row) for row in rows}) == 1
    assert "num_grad" not in rows[0]  # there were none
    for name in ("noise", "khat", "ess", "loss"):
        assert name in rows[0]
        assert f"{name}: " in report.describe()
    assert diagnostics.summary(result._replace(seconds=None)).columns.keys() < report.columns.keys()
    rejected = np.arange(20) >= 3
    history = result.history._replace(ok=~rejected)
    report = diagnostics.summary(result._replace(history=history))
    assert report.arrived is None
    assert report.findings[0].name == "rejections"
    assert report.table().splitlines()[-1].startswith("  19 x")
    short = jax.tree.map(lambda a: a[:1], result.history)
    assert diagnostics.summary(result._replace(history=short)).arrived is None


def test_draws_at_the_end(cloud, chains):
    optimizer, result = chains
    draws = optimizer.draw(random.key(2), result.state)
    report = diagnostics.summary(result, optimizer, draws)
    assert report.findings == ()
    assert report.draws.names == optimizer.loss.flat_names
    assert np.all((report.draws.ess_bulk > 50) & (report.draws.rhat < 1.1))
    assert "bulk ESS" in str(report)
    # A chain elsewhere.
    moved = jnp.concatenate([draws.x[:1] + 5.0, draws.x[1:]])
    off = type(draws)(moved, draws.log_weight, draws.loss, draws.temperature)
    texts = [f.text for f in diagnostics.summary(result, None, off).findings]
    assert any("R-hat is bad at 0 (" in text for text in texts)
    optimizer, result = cloud
    report = diagnostics.summary(result, optimizer, optimizer.draw(random.key(2), result.state))
    assert report.findings == ()
    assert np.isnan(report.draws.rhat).all()
    assert report.draws.ess_weights > 500
    assert "effective number" in str(report)


def test_what_is_refused(cloud):
    _, result = cloud
    with pytest.raises(TypeError, match="expected the result of TwoStep.run"):
        diagnostics.summary(result.history)
    with pytest.raises(TypeError, match="optimizer.draw"):
        diagnostics.summary(result, draws=np.zeros((2, 3, 4)))
    many = jax.tree.map(lambda a: np.stack([a, a]), result.history)
    with pytest.raises(ValueError, match="of several runs take one"):
        diagnostics.summary(result._replace(history=many))


@pytest.mark.parametrize("dim", [1, 30])
@pytest.mark.parametrize("contraction", [0.0, 0.5, 0.9, 0.99])
def test_noise_about_a_fixed_point_is_not_called_moving(contraction, dim):
    rng = np.random.default_rng(0)
    wrong, repeats, num_steps = 0, 200, 40
    for _ in range(repeats):
        error = 0.3 * np.exp(rng.normal(scale=0.2, size=dim))  # stated with a scatter of 20 %
        x, pulls = 0.3 * rng.normal(size=dim), []
        for _ in range(num_steps):
            pulls.append((contraction - 1) * x + 0.3 * rng.normal(size=dim))
            x = x + pulls[-1]
        pull = np.array(pulls)
        moves, _ = arrival(Motion(pull, np.broadcast_to(error, pull.shape), pull))
        wrong += moves is False
    assert wrong <= 0.03 * repeats


def test_arrival():
    steady = np.ones((40, 3))
    error = np.full_like(steady, 0.5)
    noise = np.random.default_rng(1).normal(size=steady.shape)
    assert arrival(Motion(steady, error, steady))[0] is False
    assert arrival(Motion(0.5 * noise, error, 0.5 * noise))[0] is True
    # A drift below the noise of one step, but not of all.
    slow = 0.4 * steady + 0.5 * noise
    assert arrival(Motion(slow, error, slow))[0] is False
    # The same, where the fit states twice the error that pulls show.
    noise = 0.5 * np.random.default_rng(2).normal(size=(40, 30))
    drift, stated = 0.5 + noise, np.full_like(noise, 1.0)
    assert arrival(Motion(drift, stated, drift))[0] is False
    assert arrival(Motion(noise, stated, noise))[0] is True
    noise = np.random.default_rng(1).normal(size=steady.shape)
    # Without errors: straight or not, or too short to matter.
    assert arrival(Motion(steady, None, steady))[0] is False
    assert arrival(Motion(noise, None, noise))[0] is None
    assert arrival(Motion(steady, np.full_like(steady, np.inf), steady))[0] is False
    # No number is said of what is none.
    for moves, sentence in (
        arrival(Motion(np.nan * steady, error, steady)),
        arrival(Motion(np.inf * steady, error, np.inf * steady)),
    ):
        assert moves is None
        assert "nan" not in sentence
    # So few steps that their end does not tell: the whole run does.
    slow = 1e-3 * steady[:12]
    assert arrival(Motion(slow, 0.1 * slow, slow))[0] is None
    halved = slow * 0.5 ** np.arange(12.0)[:, None]
    assert arrival(Motion(halved, 0.1 * halved, halved))[0] is True
    # Short, but on and on: tau / T is too small a rate.
    slow = 1e-3 * steady
    for error_of_slow in (None, np.full_like(slow, 1e-4)):
        moves, sentence = arrival(Motion(slow, error_of_slow, slow))
        assert moves is None
        assert "larger tau" in sentence
    halved = slow * 0.5 ** np.arange(40.0)[:, None]
    assert arrival(Motion(halved, None, halved))[0] is True
    # Replicas that are tied pull apart and stay.
    assert arrival(Motion(steady, error, 0 * steady))[0] is True
    few = steady[: LEAST_STEPS - 1]
    assert arrival(Motion(few, few, few))[0] is None
    assert [window(n) for n in (1, 4, 10, 40)] == [1, 4, 4, 10]


@pytest.mark.both
@pytest.mark.parametrize("shape", [(4, 100, 3), (2, 51, 3), (3, 21, 3)])
def test_rank_diagnostics_agree_with_arviz(shape):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "\\s*ArviZ is undergoing", FutureWarning)
        import arviz as az
    rng = np.random.default_rng(0)
    noise = rng.normal(size=shape).astype(np.float32)
    x = noise.copy()
    for t in range(1, shape[1]):
        x[:, t] = 0.6 * x[:, t - 1] + noise[:, t]
    x[0] += 0.5
    x[..., 1] = np.round(2 * x[..., 1])  # ties
    x[..., 2] = np.exp(3 * x[..., 2])  # a heavy tail
    found = rank_diagnostics(x)
    for j in range(shape[2]):
        column = x[..., j].astype(float)
        expected = (
            az.ess(column, method="bulk"),
            az.ess(column, method="tail", prob=(0.05, 0.95)),
            az.rhat(column, method="rank"),
        )
        # Single precision.
        np.testing.assert_allclose([values[j] for values in found], expected, rtol=1e-4)


def test_rank_diagnostics_of_draws_that_are_not_finite():
    x = np.random.default_rng(0).normal(size=(2, 20, 2))
    x[0, 3, 1] = np.nan
    found = rank_diagnostics(x)
    assert np.isfinite(found.rhat).tolist() == [True, False]
    assert (found.ess_bulk > 0).tolist() == [True, False]
    assert (found.ess_tail > 0).tolist() == [True, False]
