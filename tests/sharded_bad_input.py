# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""The catalogue of bad input with data that lie on four simulated devices, for `test_sharded.py`.

    JAX_NUM_CPU_DEVICES=4 python tests/sharded_bad_input.py KIND

Whatever takes data gets them divided in two along their rows where the rows allow it, and copied in other cases;
the kinds of mesh are those of `sharded_cases.py`. One line of JSON per row: its name, and what came in place of
the exception and the words of the catalogue.
"""

import contextlib
import functools
import json
import re
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sharded_cases import AXES

import numpyro_regloss as regloss

# Built from data that have their places already.
OURS = regloss.Loss | regloss.RegularizedLoss
# Everything of the public interface that takes data.
TAKES_DATA = [
    (regloss.Loss, ["from_function", "from_model", "from_external", "from_module"]),
    (regloss, ["forward_kl", "reverse_kl", "score_matching", "model"]),
    (regloss.diagnostics, ["gaussian_fit"]),
]


def on(mesh):
    """Places numbers and Gaussians, and leaves everything else as it is."""

    def place(leaf):
        if isinstance(leaf, jax.core.Tracer | np.ma.MaskedArray):
            return leaf
        if not (
            isinstance(leaf, np.ndarray | jax.Array) and jnp.issubdtype(leaf.dtype, jnp.number)
        ):
            return leaf
        spec = P("rows") if leaf.ndim and leaf.size and len(leaf) % 2 == 0 else P()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return place


def placing(function, place):
    def put(tree):
        return jax.tree.map(place, tree, is_leaf=lambda part: isinstance(part, OURS))

    @functools.wraps(function)
    def placed(*args, **settings):
        return function(*put(args), **put(settings))

    return placed


def what_came(call, error, words):
    try:
        call()
    except error as caught:
        if re.search(words, str(caught)):
            return None
        return f"{type(caught).__name__}: {caught}"
    except Exception as other:  # noqa: BLE001
        return f"{type(other).__name__}: {other}"
    return "nothing was raised"


def main(kind):
    mesh = jax.make_mesh((2, 2), ("rows", "copies"), axis_types=(AXES[kind],) * 2)
    warnings.simplefilter("ignore")
    place = on(mesh)
    for owner, names in TAKES_DATA:
        for name in names:
            function = placing(getattr(owner, name), place)
            setattr(owner, name, staticmethod(function) if isinstance(owner, type) else function)
    context = jax.set_mesh(mesh) if kind == "context" else contextlib.nullcontext()
    with context:
        # Once data are placed: what the catalogue builds for several rows lies on the mesh too.
        import test_bad_input  # noqa: PLC0415

        for number, (name, row) in enumerate(test_bad_input.CATALOGUE.items()):
            print(json.dumps([name, what_came(*row)]), flush=True)
            if number % 50 == 49:
                jax.clear_caches()


if __name__ == "__main__":
    main(sys.argv[1])
