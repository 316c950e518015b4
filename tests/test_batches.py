# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Runs on batches from the host: one item for each step, none lost, none too many."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from numpyro_regloss import Loss, Minibatch, fit, schemes

RNG = np.random.default_rng(0)
ITEMS = [(RNG.normal(size=(8, 2)).astype(np.float32), np.float32(i)) for i in range(6)]
QUIET = {"progress_bar": False}


def loss_fn(x, rows, level):
    return jnp.mean((x - rows) ** 2) + 0.1 * (x[0] - level) ** 2


@pytest.fixture(scope="module")
def optimizer():
    loss = Loss.from_function(loss_fn, jnp.zeros(2), *ITEMS[0])
    return schemes.heat(loss, 0.1, temperature=0.1, fit=fit.RobbinsMonro(3))


def test_every_step_has_an_item_of_its_own(optimizer):
    taken = []

    def loader():
        for item in ITEMS:
            taken.append(item)
            yield item

    items = loader()
    result = optimizer.run(random.key(0), 4, batches=items, **QUIET)
    # No more than the steps need: the rest is for whoever goes on.
    assert len(taken) == 4
    assert result.stopped is None
    state = optimizer.init(random.key(0), *ITEMS[0])
    for item in ITEMS[:4]:
        state, _ = optimizer.step(state, *item)
    np.testing.assert_allclose(result.params, state.reference.mean, rtol=1e-5, atol=1e-6)
    rest = optimizer.run(random.key(0), 9, batches=items, init_state=result.state, **QUIET)
    assert (rest.stopped, len(rest.history.ok)) == ("exhausted", 2)
    for item in ITEMS[4:]:
        state, _ = optimizer.step(state, *item)
    np.testing.assert_allclose(rest.params, state.reference.mean, rtol=1e-5, atol=1e-6)


def test_the_next_item_is_fetched_before_a_step_is_looked_at(optimizer):
    order = []

    def loader():
        for i, item in enumerate(ITEMS):
            order.append(f"item {i}")
            yield item

    optimizer.run(
        random.key(0),
        3,
        batches=loader(),
        callback=lambda state, info: order.append(f"step {int(state.step)}"),
        **QUIET,
    )
    assert order == ["item 0", "item 1", "step 1", "item 2", "step 2", "step 3"]


def test_items_by_name_and_alone(optimizer):
    by_name = [{"rows": rows, "level": level} for rows, level in ITEMS[:2]]
    loss = Loss.from_function(loss_fn, jnp.zeros(2), rows=ITEMS[0][0], level=0.0)
    one = schemes.heat(loss, 0.1, temperature=0.1, fit=fit.RobbinsMonro(3))
    found = one.run(random.key(0), 2, batches=by_name, **QUIET).params
    wanted = optimizer.run(random.key(0), 2, batches=ITEMS, **QUIET).params
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    loss = Loss.from_function(
        lambda x, rows: jnp.mean((x - rows) ** 2), jnp.zeros(2), ITEMS[0][0], minibatch=Minibatch(4)
    )
    alone = schemes.heat(loss, 0.1, temperature=0.1, fit=fit.RobbinsMonro(3))
    result = alone.run(random.key(0), 2, batches=[jax.device_put(i[0]) for i in ITEMS], **QUIET)
    assert len(result.history.ok) == 2


@pytest.mark.parametrize(
    ("make", "parts"),
    [(dict, lambda b: (b["rows"], b["level"])), (lambda **b: tuple(b.values()), tuple)],
)
def test_items_that_are_one_argument(optimizer, make, parts):
    items = [make(rows=rows, level=level) for rows, level in ITEMS[:2]]
    loss = Loss.from_function(lambda x, batch: loss_fn(x, *parts(batch)), jnp.zeros(2), items[0])
    one = schemes.heat(loss, 0.1, temperature=0.1, fit=fit.RobbinsMonro(3))
    found = one.run(random.key(0), 2, batches=items, **QUIET).params
    wanted = optimizer.run(random.key(0), 2, batches=ITEMS, **QUIET).params
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_what_is_wrong_is_said(optimizer, tmp_path):
    def run(batches, *args, **more):
        optimizer.run(random.key(0), 3, *args, batches=batches, **QUIET, **more)

    with pytest.raises(TypeError, match="expected an iterable"):
        run(3)
    with pytest.raises(ValueError, match="got none"):
        run([])
    with pytest.raises(TypeError, match="either batches or positional"):
        run(ITEMS, ITEMS[0][0])
    with pytest.raises(ValueError, match="no checkpoint"):
        run(ITEMS, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="rows and level as positional arguments, got dicts"):
        run([{"rows": ITEMS[0][0], "level": 0.0}])
    with pytest.raises(ValueError, match="the same shapes"):
        run([ITEMS[0], (ITEMS[0][0][:5], ITEMS[0][1])])
