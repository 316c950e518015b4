# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Adaptive importance sampling, and the sampler where it is refused."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from numpyro_regloss import Loss, TwoStep, diagnostics, fit, shift, to_arviz

DIM = 3
ENGINE = shift.Auto(sampler=shift.HMC(50, 50, num_chains=4), patience=2)


def bowl(x):
    return 0.5 * jnp.sum(x**2)


def funnel(x):
    return x[0] ** 2 / 18 + jnp.sum(0.5 * x[1:] ** 2 * jnp.exp(-x[0]) + 0.5 * x[0])


def scheme(loss, engine=ENGINE):
    start = jnp.full(DIM, 2.0)
    return TwoStep(Loss.from_function(loss, start), 4.0, engine, fit.ForwardKL())


@pytest.fixture(scope="module")
def refused():
    """A run in which the sampler takes over."""
    optimizer = scheme(funnel)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = optimizer.run(random.key(0), 12, progress_bar=False)
    return optimizer, result, " ".join(str(one.message) for one in caught)


def test_sampler_takes_over_where_importance_sampling_is_refused(refused):
    _, result, message = refused
    history = result.history
    first = int(np.argmax(history.shift.sampled))
    assert first >= 2  # patience
    assert history.shift.sampled[first:].all()
    assert not history.shift.sampled[:first].any()
    assert (~history.ok[:first]).sum() >= 2
    assert history.ok[first:].all()
    # What did not draw reports nothing.
    assert np.isnan(history.shift.khat[first:]).all()
    assert np.isnan(history.shift.rhat[:first]).all()
    assert np.isfinite(history.shift.rhat[first:]).all()
    assert f"Auto: HMC made the draws from step {first} of this run on" in message
    assert "Use shift.NUTS or shift.SMC" in message


def test_where_it_takes_over_depends_on_the_state_alone(refused):
    optimizer, result, _ = refused
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        # Chunks of one step.
        stepwise = optimizer.run(random.key(0), 12, progress_bar=False, callback=lambda *_: None)
        half = optimizer.run(random.key(0), 6, progress_bar=False)
        rest = optimizer.run(random.key(9), 6, init_state=half.state, progress_bar=False)
    for other in (stepwise.state, rest.state):
        same = jax.tree.map(
            lambda a, b: np.array_equal(a, b), _numbers(result.state), _numbers(other)
        )
        assert all(jax.tree.leaves(same))
    state = optimizer.init(random.key(0))
    for _ in range(12):
        state, info = optimizer.step(state)
    np.testing.assert_allclose(state.reference.mean, result.state.reference.mean, rtol=1e-4)
    assert info.shift.sampled


def test_draws_are_those_of_the_engine_that_goes_on(refused):
    optimizer, result, _ = refused
    assert optimizer.draw(None, result.state).x.shape == (4, 50, DIM)
    data = to_arviz(result, optimizer, step_draws=False)
    assert data["posterior"].sizes["chain"] == 4


def test_sampler_is_neither_traced_nor_used_where_weights_fit(monkeypatch):
    def never(*args):
        raise AssertionError(args)

    monkeypatch.setattr(shift.NUTS, "step", never)
    optimizer = scheme(bowl, shift.Auto())
    result = optimizer.run(random.key(0), 12, progress_bar=False)
    assert result.history.ok.all()
    assert not result.history.shift.sampled.any()
    # One standard error of a step is 0.05 sd of q, whose sd is 0.9.
    assert np.abs(result.params).max() < 4 * 0.05
    # F_tau of a quadratic loss about its minimum.
    exact = 0.5 * DIM * np.log1p(4.0)
    error = result.history.shift.local_entropy_error[-1]
    gap = 0.5 * np.sum(np.asarray(result.history.reference.mean[-1]) ** 2) / 5.0
    assert abs(result.history.shift.local_entropy[-1] - exact - gap) < 4 * error
    # The report has it, and what each step did; and no columns of the sampler.
    columns = diagnostics.summary(result, optimizer).columns
    assert "accept_prob" not in columns
    assert "rhat" not in columns
    np.testing.assert_array_equal(columns["local_entropy"], result.history.shift.local_entropy)
    assert columns["verdict"][0] == 1
    center = np.asarray(result.history.reference.mean)
    fall = 0.5 * (np.sum(center[:-1] ** 2, 1) - np.sum(center[1:] ** 2, 1)) / 5.0
    errors = columns["decrease_error"][:-1]
    assert (np.abs(columns["decrease"][:-1] - fall) < 4 * errors).all()


def test_inside_of_a_program_importance_sampling_goes_on(refused):
    optimizer, *_ = refused
    state = optimizer.init(random.key(0))
    last, history = jax.jit(lambda state: optimizer.scan(state, 8))(state)
    assert not history.shift.sampled.any()
    assert last.shift.refused >= 2


def test_draws_follow_the_dimension():
    loss = Loss.from_function(bowl, jnp.zeros(100))
    optimizer = TwoStep(loss, 1.0, shift.Auto(), fit.ForwardKL())
    state = optimizer.init(random.key(0))
    draws = jax.eval_shape(lambda s: optimizer.draw(random.key(1), s), state)
    assert draws.x.shape == (1, 400, 100)
    assert state.shift.importance.proposal.scale.shape == (100, 100)


def test_what_it_refuses():
    with pytest.raises(TypeError, match="expected importance as a shift.AdaptiveImportance"):
        shift.Auto(importance=shift.Importance(100))
    with pytest.raises(TypeError, match="expected sampler as a shift.NUTS or shift.HMC"):
        shift.Auto(sampler=shift.SMC(100))
    with pytest.raises(ValueError, match="patience"):
        shift.Auto(patience=0)
    with pytest.raises(ValueError, match="begin"):
        shift.Auto(begin="nuts")


def _numbers(state):
    return state._replace(rng_key=random.key_data(state.rng_key))


def test_advice_counts_effective_draws_of_what_was_evaluated():
    # Of 409 evaluations in a round, as in 100 dimensions.
    fields = dict.fromkeys(shift.AutoInfo._fields, np.zeros(1))
    seen = {"ess": np.array([40.9]), "num_rounds": np.array([8]), "num_grad": np.array([8 * 409])}
    info = shift.AutoInfo(**fields | seen | {"ok": np.array([False]), "sampled": np.array([False])})
    assert "effective draws down to 10% of all" in shift.Auto().remedy(info, np.array([False]))
