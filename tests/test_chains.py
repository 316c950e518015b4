# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Chains of NumPyro's `MCMC` over devices: the draws of vectorized ones, each on its device, compiled once."""

import functools
import pickle
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import finish, start_on
from jax import random
from jax.sharding import AxisType
from numpyro.infer import AIES, MCMC, NUTS

from numpyro_regloss import sharded
from numpyro_regloss.draws.chains import _fingerprint

SCRIPT = Path(__file__).parent / "chains_cases.py"
# Draws of size one, from 250 leapfrog steps and 64 rows in float32, in another order: 8e-7 in fact.
ROUNDING = 2e-5
SIGMAS = 5.0


@pytest.mark.both
def test_four_devices(tmp_path):
    found = finish(*start_on(SCRIPT, tmp_path / "draws.npz"))
    # Otherwise equal draws would say nothing.
    assert found["moved"] > 1e-3
    assert found["new data"] > 1e-3
    for name in ("rounding", "rows", "context"):
        assert found[name] < ROUNDING, name
    assert found["same"] == found["constants"] == 0.0

    assert found["devices"] == 4
    assert found["chains per device"]
    assert found["rows per device"]
    assert not found["collectives of chains"]
    assert found["flat in context"] == [400, 2]

    assert found["programs of another MCMC"] == found["programs of new data"] == 0
    assert found["programs of constants"] == found["programs of other constants"] == 1
    assert found["programs of equal constants"] == 0
    assert found["untouched kernel"]

    # Warm-up and draws, for both targets.
    assert found["programs of the model"] == 2
    assert found["errors of the model"] < SIGMAS
    assert found["refused"].startswith("sharded: expected num_chains as a multiple of 4")
    assert "got 6; take 8 chains" in found["refused"]


@pytest.mark.long
def test_two_processes_draw_what_one_does(tmp_path):
    files = [tmp_path / "one.npz", tmp_path / "two.npz"]
    finish(*start_on(SCRIPT, files[0]))
    reports = [finish(process) for process in start_on(SCRIPT, files[1], processes=2)]
    one, two = (np.load(file) for file in files)
    for found in reports:
        # What all processes compute together, each of them has.
        np.testing.assert_allclose(found["mean"], one["w"].mean((0, 1)), atol=ROUNDING)
        assert found["programs"] == 0
        assert found["rows"] < ROUNDING
        assert not found["here"]
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])


def test_equal_meshes_are_the_same_method():
    auto = jax.make_mesh((1,), ("draws",), axis_types=(AxisType.Auto,))
    explicit = jax.make_mesh((1,), ("draws",), axis_types=(AxisType.Explicit,))
    assert sharded(auto) == sharded(explicit) == sharded(auto, "draws") == sharded(auto, ("draws",))
    assert hash(sharded(auto)) == hash(sharded(explicit))
    assert pickle.loads(pickle.dumps(sharded(auto))) == sharded(auto)
    make, (numbers, *rest) = sharded(auto).__reduce__()
    with pytest.raises(
        ValueError, match=r"expected the devices \[\d+\] of the mesh that was pickled"
    ):
        make(numbers + 1000, *rest)
    both = jax.make_mesh((1, 1), ("rows", "draws"))
    assert sharded(both).axis == ("draws",)
    assert sharded(both, ("draws", "rows")).axis == ("draws", "rows")
    assert sharded(both) != sharded(both, "rows") != sharded(auto)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (lambda mesh: (mesh.devices,), "expected a mesh of devices such as .*got ndarray"),
        (lambda mesh: (mesh,), "one axis or with one named 'draws', got \\('a', 'b'\\)"),
        (lambda mesh: (mesh, "c"), "expected axis as one of, or some of, .*, got \\('c',\\)"),
        (lambda mesh: (mesh, ("a", "a")), "got \\('a', 'a'\\)"),
        (lambda mesh: (mesh, ()), "got \\(\\)"),
    ],
)
def test_meshes_that_are_refused(args, message):
    mesh = jax.make_mesh((1, 1), ("a", "b"))
    with pytest.raises((TypeError, ValueError), match=f"^sharded: .*{message}"):
        sharded(*args(mesh))


def potential(x):
    return 0.5 * jnp.sum(x**2)


def test_chains_that_are_refused():
    method = sharded(jax.make_mesh((1,), ("draws",)))
    for function in (jnp.sin, functools.partial(jnp.sin)):
        with pytest.raises(TypeError, match="expected to be called by numpyro.infer.MCMC"):
            method(function)
    mcmc = MCMC(
        AIES(potential_fn=potential),
        num_warmup=1,
        num_samples=1,
        num_chains=4,
        chain_method=method,
        progress_bar=False,
    )
    with pytest.raises(TypeError, match="got AIES, whose chains move together"):
        mcmc.run(random.key(0), init_params=jnp.zeros((4, 2)))


READ = {"scale": 1.0, "data": np.zeros(3)}


def helper(x):
    return READ["scale"] * x


class Holder:
    def __init__(self):
        self.data = np.zeros(2)

    def model(self, x):
        return x - self.data


def test_what_a_model_reads_is_part_of_the_program(monkeypatch):
    closed = np.zeros(2)
    on_device = [jnp.zeros(2)]
    holder, other = Holder(), Holder()

    def of_object(x):
        return x - other.data

    def of_closure(x):
        return x - closed - on_device[0]

    def of_globals(x):
        return [helper(part) for part in x]

    models = [of_closure, functools.partial(of_closure), of_globals, holder.model, of_object]
    before = [_fingerprint(NUTS(model)) for model in models]
    assert before == [_fingerprint(NUTS(model)) for model in models]
    assert len({*map(hash, before)}) == len(before)
    closed[0] = 1.0
    monkeypatch.setitem(READ, "scale", 2.0)
    holder.data[0] = 1.0
    other.data = np.ones(2)
    after = [_fingerprint(NUTS(model)) for model in models]
    assert all(a != b for a, b in zip(before, after, strict=True))
    on_device[0] = jnp.ones(2)
    assert _fingerprint(NUTS(of_closure)) != after[0]


def test_what_compiles_is_told_apart():
    first, second = np.zeros(2), np.zeros(2)
    same = [
        (NUTS(potential_fn=potential), NUTS(potential_fn=potential)),
        ({"a": [1, first]}, {"a": [1, second]}),
    ]
    for a, b in same:
        assert _fingerprint(a) == _fingerprint(b)
        assert hash(_fingerprint(a)) == hash(_fingerprint(b))
    on_device = jnp.zeros(2)
    assert _fingerprint([on_device]) == _fingerprint([on_device])
    different = [
        (NUTS(potential_fn=potential), NUTS(potential_fn=potential, max_tree_depth=3)),
        (NUTS(potential_fn=potential), NUTS(potential_fn=lambda x: 0.5 * jnp.sum(x**2))),
        (1, 1.0),
        (1, True),
        (first, first.astype(np.float32)),
        (first, first + 1),
        (first, first[None]),
        ([1], (1,)),
        (on_device, jnp.zeros(2)),
    ]
    for a, b in different:
        assert _fingerprint(a) != _fingerprint(b)
