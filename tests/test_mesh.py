# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Draws that devices of a mesh divide: the same bits on any number of them, and what they send each other."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import on_devices
from jax import random

from numpyro_regloss import Gaussian, Loss, RegularizedLoss, TwoStep, fit, schemes, shift, values
from numpyro_regloss._core.mesh import copied, on_mesh
from numpyro_regloss._core.threefry import from_position, unrolled
from numpyro_regloss.draws.base import Shared, merge

SCRIPT = Path(__file__).parent / "mesh_cases.py"
# On one device XLA compiles other programs, which may round in other ways.
SAME_ON_ONE = {"importance", "importance_chunks", "importance_sobol", "robbins_monro"}
PARTS = shift.Importance(100), fit.ForwardKL()


def found_by(group, least=0):
    found = dict(on_devices(SCRIPT, group, 8))
    assert len(found) >= least
    return found


def loss():
    return Loss.from_function(lambda x: jnp.sum(x**2), jnp.ones(2))


@pytest.mark.both
def test_bits_do_not_depend_on_the_number_of_devices():
    found = found_by("few")
    away = found["importance"].pop("none")
    assert set(found["importance"].values()) == {0.0}, found
    # The draws are those without a mesh; sums are in another order.
    assert away < 1e-4
    check_rows(found["importance by rows"])
    assert found["resume"] is True
    assert found["bound"] == 0.0
    away, message = found["elsewhere"]
    assert away == 0.0
    assert "expected all arrays on the same devices" in message
    # Eight blocks on all devices together, and the centre on each.
    assert found["evaluations"] == [8 + 1, 8 + 8]
    check_program(found["program"], 4096)


def check_rows(found, allowed=1e-4):
    away, whole, parts, own = found
    # Sums over the rows are in another order.
    assert away < allowed
    # 46 rows on two devices: no device has all of them, nor computes with them.
    assert whole == 0
    assert parts > 0
    assert own == 23


def check_program(found, num_samples):
    assert found["kinds"] == ["all-gather"]
    # No device has more draws than its share of noise, in whole blocks.
    assert found["rows"] <= num_samples // 8
    assert found["losses"] <= 1.05 * 4 * num_samples  # in whole blocks
    # Less than asked, 64 * (dim + 3): four vectors of each device, and a few scalars.
    assert found["others"] <= 8 * (4 * found["dim"] + 8) * 4 < 64 * (found["dim"] + 3) * 4


@pytest.mark.both
@pytest.mark.long
def test_all_engines_have_the_same_bits_on_any_number_of_devices():
    for name, away in found_by("engines", least=15).items():
        assert away["three"] == away["explicit"] == 0.0, (name, away)
        if name in SAME_ON_ONE:
            assert away["one"] == 0.0, (name, away)
        # Rounding, of sums without a mesh and of quotients on one device, after three steps of chains.
        assert max(away.values()) < 1e-2, (name, away)


@pytest.mark.both
@pytest.mark.long
def test_rows_stay_divided_in_all_engines():
    for name, one in found_by("rows", least=15).items():
        # As above; and trees of NUTS branch at a rounding.
        check_rows(one, np.inf if name == "nuts" else 1e-2)


@pytest.mark.both
@pytest.mark.long
def test_values_have_the_same_bits_on_any_number_of_devices():
    for name, away in found_by("values", least=10).items():
        assert away["three"] == away["explicit"] == 0.0, (name, away)
        # As for engines: quotients of one device, in what chooses a Gaussian or temperatures.
        if name not in ("auto", "gaussian", "smc", "moments"):
            assert away["one"] == 0.0, (name, away)
        if name == "smc":
            # A rounding may turn a Metropolis decision, after which draws are others.
            del away["none"]
        assert max(away.values()) < 1e-2, (name, away)


@pytest.mark.long
def test_each_device_has_its_share_of_the_work():
    for name, ((one, alone), (_, busiest)) in found_by("work", least=9).items():
        assert one == alone, name
        # An eighth, where blocks divide evenly and but for centres and starts, which are evaluated on each.
        assert busiest <= alone / 4, (name, busiest, alone)


@pytest.mark.both
@pytest.mark.long
def test_what_is_sent_does_not_grow_with_the_draws_but_for_their_losses():
    found = found_by("programs")
    assert found["small"]["others"] == found["large"]["others"]
    check_program(found["large"], 1_000_000)


@pytest.mark.parametrize(
    ("mesh", "kind", "message"),
    [
        (8, TypeError, "expected a jax.sharding.Mesh or None, got 8; write jax.make_mesh"),
        ("rows", ValueError, 'expected an axis "draws", or the axes "draws" and "rows"'),
        (("rows", "draws"), ValueError, "got .'rows', 'draws'.; write jax.make_mesh"),
    ],
)
def test_what_is_no_mesh_of_draws_is_refused(mesh, kind, message):
    if not isinstance(mesh, int):
        names = (mesh,) if isinstance(mesh, str) else mesh
        mesh = jax.make_mesh((1,) * len(names), names)
    with pytest.raises(kind, match=message):
        TwoStep(loss(), 0.1, *PARTS, mesh=mesh)


def test_calls_on_the_host_are_not_divided():
    external = Loss.from_external(lambda x: float(np.sum(x**2)), np.ones(2))
    mesh = jax.make_mesh((1,), ("draws",))
    target = RegularizedLoss(external, Gaussian.isotropic(external.x0, 0.1))
    with pytest.raises(ValueError, match="give Loss.from_external an executor"):
        TwoStep(external, 0.1, *PARTS, mesh=mesh)
    with pytest.raises(ValueError, match="values.heat: mesh: expected None with Loss.from_ext"):
        values.heat(random.key(0), target, mesh=mesh)


@pytest.mark.parametrize(
    "scheme",
    [
        schemes.entropy_sgd,
        schemes.parle,
        schemes.gradient_free,
        lambda *a, mesh: schemes.anneal(*a, 5, mesh=mesh),
    ],
)
def test_every_scheme_takes_a_mesh(scheme):
    mesh = jax.make_mesh((1,), ("draws",))
    assert scheme(loss(), 0.1, mesh=mesh).mesh.devices.tolist() == mesh.devices.tolist()


def test_a_mesh_around_the_run_is_refused():
    mesh = jax.make_mesh((1,), ("draws",))
    for enter in (lambda: on_mesh(mesh, jnp.sin), lambda: copied(mesh, jnp.ones(2))):
        with jax.set_mesh(mesh), pytest.raises(ValueError, match="leave it"):
            enter()


def test_a_mesh_is_kept_with_auto_axes_and_compiles():
    mesh = jax.make_mesh((1,), ("draws",))
    optimizer = TwoStep(loss(), 0.1, *PARTS, mesh=mesh)
    assert optimizer.mesh.axis_types == (jax.sharding.AxisType.Auto,)
    other = TwoStep(loss(), 0.1, *PARTS)
    assert jax.tree.structure(optimizer) != jax.tree.structure(other)


@pytest.mark.parametrize("make", [lambda key: key, unrolled])
def test_numbers_from_a_position_are_those_of_the_whole_array(make):
    key = random.key(3)
    whole = random.normal(key, (10, 7))
    at = from_position(make(key), jnp.asarray(21))
    np.testing.assert_array_equal(random.normal(at, (3, 7)), whole[3:6])


def test_keys_that_do_not_count_have_no_position():
    assert from_position(random.key(0, impl="rbg"), jnp.asarray(1)) is None


def test_carries_are_added_but_for_what_is_shared():
    none = Shared(jnp.zeros(2), jnp.asarray(False)), jnp.zeros(2)
    some = Shared(jnp.ones(2), jnp.asarray(True)), jnp.full(2, 3.0)
    for first, second in ((none, some), (some, none)):
        shared, total = merge(first, second)
        np.testing.assert_array_equal(shared.value, jnp.ones(2))
        np.testing.assert_array_equal(total, jnp.full(2, 3.0))
    np.testing.assert_array_equal(merge(some, some)[1], jnp.full(2, 6.0))


def test_arrays_that_are_given_twice_are_copied_once():
    mesh = jax.make_mesh((1,), ("draws",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jnp.ones(3)
    first, second = copied(mesh, ({"a": rows}, rows))
    assert first["a"] is second
