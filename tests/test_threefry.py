# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""The unrolled generator gives JAX's own numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from numpyro_regloss._core.threefry import unrolled

pytestmark = pytest.mark.both

USES = {
    "bits8": lambda key: random.bits(key, (7,), "uint8"),
    "bits16": lambda key: random.bits(key, (7,), "uint16"),
    "bits32": lambda key: random.bits(key, (3, 5)),
    "split": lambda key: random.key_data(random.split(key, (2, 3))),
    "split of a split": lambda key: random.uniform(random.split(random.split(key)[1], 3)[2]),
    "fold_in": lambda key: random.normal(random.fold_in(key, 2**31 + 5), (4,)),
    "fold_in traced": lambda key: jax.jit(lambda i: random.normal(random.fold_in(key, i)))(3),
    "normal": lambda key: random.normal(key, (1001,)),
    "bernoulli": lambda key: random.bernoulli(key, 0.3, (50,)),
    "randint": lambda key: random.randint(key, (50,), 0, 1000),
    "permutation": lambda key: random.permutation(key, 100),
    "gamma": lambda key: random.gamma(key, 0.5, (20,)),
    "empty": lambda key: random.normal(key, (0, 3)),
    "batch": lambda key: jax.vmap(random.normal)(random.split(key, 5)),
}


@pytest.mark.parametrize("use", USES)
def test_same_bits(use):
    key = random.key(12345)
    np.testing.assert_array_equal(USES[use](unrolled(key)), USES[use](key))


def test_same_bits_in_double_precision(x64):
    key = random.key(1)
    assert random.normal(key).dtype == jnp.float64
    np.testing.assert_array_equal(random.normal(unrolled(key), (9,)), random.normal(key, (9,)))
    np.testing.assert_array_equal(
        random.bits(unrolled(key), (9,), "uint64"), random.bits(key, (9,), "uint64")
    )


def test_seeds_are_the_same():
    key = unrolled(random.key(0))
    same = random.key(7, impl=random.key_impl(key))
    np.testing.assert_array_equal(random.key_data(same), random.key_data(random.key(7)))


def test_other_generators_are_left_alone():
    key = random.key(0, impl="rbg")
    assert unrolled(key) is key


def test_too_many_numbers_are_refused():
    with pytest.raises(ValueError, match="fewer than"):
        jax.jit(lambda k: random.bits(unrolled(k), (2**16, 2**16))).lower(random.key(0))
