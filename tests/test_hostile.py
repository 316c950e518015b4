# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Hostile losses of every kind, size and dimension: no NaN centre, right counts, right flags.

What goes wrong, where and how badly are data of one loss function, so that an engine compiles once per
dimension for all examples.
"""

import collections
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import long
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import lax, random

from numpyro_regloss import Loss, RejectedError, TwoStep, fit, shift
from numpyro_regloss.fit.robbins_monro import RobbinsMonroInfo

STEPS = 3
SAMPLES, WARMUP, CHAINS, DEPTH = 10, 20, 2, 4
CLOUD = 64
# float32 uniforms are at least 2^-24 away from 0 and 1, and normal quantiles of that are below 5.5.
FARTHEST_NORMAL = 5.5
ROUNDING = 1e-4  # float32 sums over a cloud of 64
# All others that a step reports must be finite when it was taken.
MAY_BE_INFINITE = {"khat", "rhat", "residual"}


def bowl(x):
    return jnp.mean((x - 1.0) ** 2)


# (point, place, bad value, start) -> loss
PATHOLOGIES = {
    "none": lambda x, place, bad, start: bowl(x),
    "flat": lambda x, place, bad, start: jnp.zeros(()),
    "bad half": lambda x, place, bad, start: jnp.where(x[0] > place, bad, bowl(x)),
    "bad far out": lambda x, place, bad, start: jnp.where(jnp.mean(x**2) > place**2, bad, bowl(x)),
    "bad but at the start": lambda x, place, bad, start: jnp.where(jnp.all(x == start), 0.0, bad),
    "bad here and there": lambda x, place, bad, start: jnp.where(
        jnp.floor(1e4 * x[0]) % 2 == 1, bad, bowl(x)
    ),
    "steps": lambda x, place, bad, start: jnp.mean(jnp.floor(x - place)),
    "kinks of infinite slope": lambda x, place, bad, start: jnp.mean(jnp.sqrt(jnp.abs(x - place))),
    "finite with a NaN gradient": lambda x, place, bad, start: jnp.where(
        x[0] > place, bowl(x), bowl(x) + jnp.where(x[0] > place, jnp.sqrt(x[0] - place), 0.0)
    ),
    "logarithm of negatives": lambda x, place, bad, start: -jnp.mean(jnp.log(x + 2.0 - place)),
    "overflow": lambda x, place, bad, start: jnp.mean(jnp.exp(x * (1.0 + jnp.abs(place)))),
    "slope": lambda x, place, bad, start: place * jnp.sum(x),
    "no minimum": lambda x, place, bad, start: -jnp.mean(x**4),
}


# Where derivatives may all be zero, or none finite, near a start where values differ.
WITHOUT_GRADIENT = {
    "bad half",
    "bad far out",
    "bad but at the start",
    "bad here and there",
    "steps",
    "finite with a NaN gradient",
    "overflow",
}


def hostile(x, pathology):
    code, place, bad, size, start = pathology
    return size * lax.switch(code.astype(int), list(PATHOLOGIES.values()), x, place, bad, start)


@jax.jit
def finite_at(x, pathology):
    value, gradient = jax.value_and_grad(hostile)(x, pathology)
    return jnp.isfinite(value), jnp.isfinite(gradient).all()


CHAIN = {"num_warmup": WARMUP, "num_samples": SAMPLES, "num_chains": CHAINS}
# Shift, fit, and examples by dimension. In three dimensions engines share what is compiled besides their steps.
ENGINES = {
    "importance": (shift.Importance(CLOUD), fit.ForwardKL(), {1: 110, 3: 110, 50: 220, 10_000: 12}),
    "importance_dense": (shift.Importance(CLOUD), fit.ForwardKL("dense"), {3: 220}),
    "nuts": (shift.NUTS(max_tree_depth=DEPTH, **CHAIN), fit.ForwardKL(), {3: 250}),
    # Where its step collapses it goes the most steps there are, at every transition.
    "hmc": (shift.HMC(trajectory_length=1.0, **CHAIN), fit.ForwardKL(), {3: 30, 50: 30}),
    "robbins_monro": (shift.Implicit(), fit.RobbinsMonro(5), {1: 285, 3: 285, 10_000: 20}),
    "reverse_kl": (
        shift.Implicit(),
        fit.ReverseKL(num_steps=10, num_particles=2),
        {3: 120, 50: 120},
    ),
    "reverse_kl_dense": (
        shift.Implicit(),
        fit.ReverseKL("dense", num_steps=10, num_particles=2),
        {3: 220},
    ),
}
# One in so many, and ten, without `--everything`; other dimensions and covariances wait for it, and of chains HMC.
SHARE = 8
CASES = [
    (name, dim) if dim == 3 and name in ("importance", "robbins_monro") else long(name, dim)
    for name, (_, _, dims) in ENGINES.items()
    for dim in dims
]
SIZE = st.integers(-6, 6).map(lambda exponent: 10.0**exponent)
EXAMPLES = {
    "seed": st.integers(0, 2**16),
    "start": st.sampled_from([0.0, 1.0, -1e3, 1e6]),
    "tau": SIZE,
    "temperature": SIZE,
    # Of two runs the second goes on from the first, with another pathology.
    "phases": st.lists(
        st.tuples(
            st.sampled_from(list(PATHOLOGIES)),
            st.sampled_from([0.0, 0.1, -0.1, 1.0, 1e3, -1e3]),
            st.sampled_from([np.nan, np.inf, -np.inf, 1e30, -1e30, 3e38]),
            SIZE,
        ),
        min_size=1,
        max_size=2,
    ),
}


def run(optimizer, seed, state, pathology):
    """Result of a run, and what the user sees of its rejected steps."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = optimizer.run(
                random.key(seed), STEPS, pathology, init_state=state, progress_bar=False
            )
            seen = "returned"
        except RejectedError as error:
            result, seen = error.result, "raised"
    if state is None:
        caught = [each for each in caught if "not what its values say" not in str(each.message)]
    if caught:
        (warning,) = caught
        assert "steps were rejected" in str(warning.message)
        remedies = ("smaller tau", "among the data and arguments", "unconstrained parameters")
        assert any(remedy in str(warning.message) for remedy in remedies)
        seen = "warned"
    ok = result.history.ok
    assert ok.dtype == bool
    assert ok.shape == (STEPS,)
    assert seen == ("returned" if ok.all() else "warned" if ok.any() else "raised")
    return result, seen


def check_centres(result, tau):
    ok, fitted = result.history.ok, result.history.fitted
    means, scales = (
        np.concatenate([rows, np.asarray(last)[None]])
        for rows, last in zip(result.history.reference, result.state.reference, strict=True)
    )
    assert np.isfinite(means).all()
    np.testing.assert_array_equal(scales, np.full(STEPS + 1, np.sqrt(np.float32(tau))))
    np.testing.assert_array_equal(means[1:][~ok], means[:-1][~ok])
    # XLA may compute one mean twice, with another rounding, where it does not optimize.
    rounding = 4 * np.finfo(means.dtype).eps * np.max(np.abs(means), initial=1.0)
    np.testing.assert_allclose(means[1:][ok], fitted.mean[ok], rtol=0, atol=rounding)
    assert np.isfinite(fitted.scale[ok]).all()


def check_infos(result):
    history = result.history
    for info in (history.shift, history.fit):
        for name, rows in info._asdict().items():
            if rows is None:  # names, which only samples with sites have
                continue
            taken = rows[history.ok]
            if name == "residual" and isinstance(info, RobbinsMonroInfo):
                looked = info.looked[history.ok]
                assert np.isnan(taken[~looked]).all()
                taken = taken[looked]
            assert not np.isnan(taken).any(), name
            # Of a stochastic root that met numbers near overflow the error is unknown, which is infinite.
            unknown = name == "mean_error" and isinstance(info, RobbinsMonroInfo)
            assert unknown or name in MAY_BE_INFINITE or np.isfinite(taken).all(), name
    np.testing.assert_array_equal(history.ok, history.shift.ok & history.fit.ok)


def check_cloud(result, tau):
    history = result.history
    usable = np.isfinite(history.fitted.mean).all(-1) & np.isfinite(history.fit.mean_error).all(-1)
    np.testing.assert_array_equal(history.ok, (history.shift.ess > 0) & usable)
    ess = history.shift.ess[history.ok]
    assert ((ess > 1 - ROUNDING) & (ess < CLOUD * (1 + ROUNDING))).all()
    moved = np.abs(history.fitted.mean - history.reference.mean)[history.ok]
    rounding = ROUNDING * (np.sqrt(tau) + np.abs(history.reference.mean[history.ok]))
    assert (moved <= FARTHEST_NORMAL * np.sqrt(tau) + rounding).all()


def check_counts(engine, result, known):
    """Evaluations: the loss at the centre, and what shift and fit must have spent."""
    history = result.history
    least_loss = most_loss = 1 + (CLOUD if "importance" in engine else 0)
    least = most = np.zeros(STEPS)
    if engine in ("nuts", "hmc"):
        # Gradients at the start of every chain and at the centre, then at least one per transition.
        path = 2**DEPTH - 1 if engine == "nuts" else 1024
        least = least + CHAINS + 1 + CHAINS * SAMPLES
        most = most + CHAINS + 1 + CHAINS * (WARMUP + SAMPLES) * path
    elif engine == "robbins_monro":
        # Pairs: five steps, and where one looks, as after every rejection, the residual, and for the curvature one
        # secant, ten before the first success.
        known = np.append(known, known | np.logical_or.accumulate(history.ok))[:-1]
        looked = history.fit.looked
        assert looked[1:][~history.ok[:-1]].all()
        least = most = 2 * (5 + looked * (1 + 1 + np.where(known, 1, 10)))
    elif "reverse" in engine:
        least, most = least + 4, most + 10 * 4
    assert ((history.num_loss >= least_loss) & (history.num_loss <= most_loss)).all()
    assert ((history.num_grad >= least) & (history.num_grad <= most)).all()


@pytest.mark.parametrize(("engine", "dim"), CASES)
def test_hostile_losses(engine, dim, request):
    shifting, fitting, examples = ENGINES[engine]
    count = examples[dim]
    if not request.config.getoption("everything"):
        count = min(count, 10 + count // SHARE)
    seen = collections.Counter()

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(**EXAMPLES)
    def example(seed, start, tau, temperature, phases):
        rows = [
            np.array([list(PATHOLOGIES).index(name), *numbers, start], np.float32)
            for name, *numbers in phases
        ]
        loss = Loss.from_function(hostile, np.full(dim, start), rows[0])
        optimizer = TwoStep(loss, tau, shifting, fitting, temperature=temperature)
        value_ok, gradient_ok = finite_at(loss.x0, rows[0])
        uses_gradient = shifting.uses_gradient or fitting.uses_gradient
        if not (value_ok and (gradient_ok or not uses_gradient)):
            with pytest.raises(ValueError, match="at the start"):
                optimizer.run(random.key(seed), STEPS, progress_bar=False)
            seen["refused"] += 1
            return
        state = None
        for number, (row, (name, *_)) in enumerate(zip(rows, phases, strict=True)):
            known = state is not None and bool(getattr(state.fit, "curvature", -1.0) >= 0)
            try:
                result, outcome = run(optimizer, seed, state, row)
            except ValueError as error:
                if "follows gradients" not in str(error):
                    raise
                result = None
            if result is None:
                assert uses_gradient
                assert state is None
                assert name in WITHOUT_GRADIENT
                seen["refused"] += 1
                return
            state = result.state
            assert int(state.step) == STEPS * (number + 1)
            check_centres(result, tau)
            check_infos(result)
            check_counts(engine, result, known)
            if shifting.makes_draws and not shifting.uses_gradient:
                check_cloud(result, tau)
            assert outcome == "returned" or name != "flat"
            seen[outcome] += 1

    example()
    assert seen.total() >= count


def test_there_are_enough_examples():
    assert sum(sum(dims.values()) for *_, dims in ENGINES.values()) >= 2000
