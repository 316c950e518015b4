# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Runs engines on one simulated device and on several, for `test_mesh.py`.

    JAX_NUM_CPU_DEVICES=8 python tests/mesh_cases.py GROUP

A process of its own: JAX counts its devices once. One line of JSON per case: its name and what was found.
"""

import json
import re
import sys
import tempfile
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from numpyro.infer import BarkerMH
from numpyro.infer.autoguide import AutoDiagonalNormal

from numpyro_regloss import (
    Gaussian,
    Loss,
    RegularizedLoss,
    TwoStep,
    anchor,
    fit,
    forward_kl,
    shift,
    values,
)
from numpyro_regloss._core.mesh import AXIS, copied, is_divided
from numpyro_regloss.two_step import RejectedError, outer_step

KEY, STEPS = random.key(0), 3
INPUTS = random.normal(random.key(1), (32, 5))
OUTPUTS = jnp.sin(jnp.sum(INPUTS, 1))
START = {"w": 0.3 * random.normal(random.key(2), (5, 4)), "v": jnp.full(4, 0.5)}


def network(params, x, y):
    return jnp.mean((jnp.tanh(x @ params["w"]) @ params["v"] - y) ** 2)


LOSS = Loss.from_function(network, START, INPUTS, OUTPUTS)
CHAINS = dict(num_warmup=20, num_samples=20, num_chains=8)
ENGINES = {
    "importance": (shift.Importance(1000), fit.ForwardKL("diagonal")),
    # A draw per block: what one fused loop had of the generator, LLVM did not get through.
    "importance_few": (shift.Importance(16), fit.ForwardKL()),
    "importance_chunks": (
        shift.Importance(9001, chunk_size=64, antithetic=False),
        fit.ForwardKL("dense"),
    ),
    "importance_sobol": (shift.Importance(512, noise="sobol", ess=0.3), fit.ForwardKL()),
    "importance_newton": (
        shift.Importance(400, pareto_smoothing=True),
        fit.ForwardKL(),
        anchor.Newton(),
    ),
    "importance_low_rank": (shift.Importance(1000), fit.ForwardKL("low_rank", rank=2)),
    "adaptive": (shift.Adaptive(shift.Importance(100), max_rounds=4), fit.ForwardKL()),
    "adaptive_importance": (shift.AdaptiveImportance(), fit.ForwardKL("diagonal")),
    "adaptive_importance_values": (
        shift.AdaptiveImportance(gradient=False),
        fit.ForwardKL(),
    ),
    "smc": (shift.SMC(200, num_islands=2), fit.ForwardKL()),
    "robbins_monro": (shift.Implicit(), fit.RobbinsMonro(10, num_pairs=4)),
    "robbins_monro_score": (
        shift.Implicit(),
        fit.RobbinsMonro(10, num_pairs=8, gradient="score"),
    ),
    "reverse_kl": (shift.Implicit(), fit.ReverseKL("diagonal", "natural")),
    "svi": (shift.SVI(AutoDiagonalNormal, num_steps=20, num_samples=100), fit.ForwardKL()),
    "nuts": (shift.NUTS(**CHAINS), fit.ForwardKL()),
    "hmc": (shift.HMC(**CHAINS), fit.ForwardKL()),
    "sgld": (shift.SGLD(0.02, num_samples=30, num_chains=8), fit.ForwardKL()),
    "kernel": (shift.Kernel(BarkerMH, **CHAINS), fit.ForwardKL()),
}
# Of one draw more than a device has, and not as many as devices share evenly.
# Engines of every kind that devices divide, whose loops are as long on any number of them.
DIVIDED = (
    "importance",
    "importance_chunks",
    "importance_sobol",
    "adaptive_importance_values",
    "smc",
    "robbins_monro",
    "robbins_monro_score",
    "reverse_kl",
    "sgld",
)
VALUES = (
    "heat",
    "profile",
    "landscape",
    "gradient of heat",
    "gradient of local_entropy",
    "moments",
)
DIVISIONS = {"one": 1, "three": 3, "explicit": 4, "eight": 8}


def mesh_of(name):
    kind = AxisType.Explicit if name == "explicit" else AxisType.Auto
    count = DIVISIONS[name]
    return jax.make_mesh((count,), ("draws",), axis_types=(kind,), devices=jax.devices()[:count])


def optimizer_of(name, mesh, loss=LOSS):
    engine, method, *at = ENGINES[name]
    parts = engine, method, *(at or [anchor.Proximal()])
    return TwoStep(loss, 0.01, *parts, temperature=0.05, mesh=mesh)


def numbers_of(result):
    # Evaluations are more where draws fill blocks.
    info, count = result.history, ".num_loss"
    kept = (info.reference, info.fitted, info.loss, info.shift, result.params)
    leaves, _ = jax.tree_util.tree_flatten_with_path(kept)
    return [leaf for path, leaf in leaves if not jax.tree_util.keystr(path).endswith(count)]


def distance(first, second):
    pairs = [
        (np.asarray(a, float), np.asarray(b, float)) for a, b in zip(first, second, strict=True)
    ]
    found = [
        np.max(np.abs(a - b) / (1.0 + np.abs(a)), where=np.isfinite(a), initial=0.0)
        for a, b in pairs
    ]
    return float(max(found))


def compare(name, divisions):
    """Relative differences from the run on as many devices as there are; zero of equal bits."""

    def run(mesh):
        try:
            result = optimizer_of(name, mesh).run(KEY, STEPS, progress_bar=False)
        except RejectedError as error:
            result = error.result  # whose draws tell as much
        return numbers_of(result)

    return differences(run, divisions)


def differences(run, divisions):
    """The same of any function of a mesh that returns numbers."""
    meshes = {"none": None, **{k: mesh_of(k) for k in divisions}}
    runs = {kind: run(mesh) for kind, mesh in meshes.items()}
    expected = runs["eight"]
    return {kind: distance(expected, run) for kind, run in runs.items() if kind != "eight"}


def by_rows(name):
    """Of a run with rows divided: the difference from one device, and shapes of rows in the program."""
    mesh = jax.make_mesh((4, 2), ("draws", "rows"), axis_types=(AxisType.Auto,) * 2)
    put = partial(jax.device_put, device=jax.NamedSharding(mesh, jax.P("rows")))
    # 46 rows, which no block of draws has.
    data = jnp.tile(INPUTS, (2, 1))[:46], jnp.tile(OUTPUTS, 2)[:46]
    optimizer, alone = (
        optimizer_of(name, m, Loss.from_function(network, START, *rows))
        for rows, m in ((map(put, data), mesh), (data, None))
    )
    state, arguments = optimizer.init(KEY), copied(optimizer.mesh, optimizer.loss.bind())
    text = outer_step.step.lower(optimizer, state, arguments).compile().as_text()
    runs = []
    for one in (optimizer, alone):
        try:
            runs.append(one.run(KEY, STEPS, progress_bar=False))
        except RejectedError as error:
            runs.append(error.result)
    return [
        distance(*map(numbers_of, runs)),
        len(re.findall(r"[\[,]46,[45]\]", text)),
        len(re.findall(r"[\[,]23,[45]\]", text)),
        jax.tree.leaves(arguments)[0].addressable_shards[0].data.shape[0],
    ]


def value(what, mesh):
    """Numbers of one function of `values`, or of `forward_kl` on a cloud."""
    reference = Gaussian.isotropic(LOSS.x0, 0.01)
    target = RegularizedLoss(LOSS, reference, temperature=0.005)
    settings = {"num_samples": 500, "mesh": mesh}
    if what in values.METHODS:
        found = values.local_entropy(KEY, target, method=what, **settings)
    elif what == "heat":
        found = values.heat(KEY, target, **settings)
    elif what == "moments":
        _, cloud, _ = shift.Importance(5000, chunk_size=64).step(KEY, (), target)
        found = forward_kl(cloud, mesh=mesh)
    elif what == "profile":
        taus = {"taus": [0.001, 0.01], "temperature": 0.05}
        report = values.profile(KEY, LOSS, method="importance", **taus, **settings)
        found = report.local_entropy, report.heat
    elif what == "landscape":
        names = ["w[0,0]", "v[1]"]
        grid = {"directions": names, "num_points": 5, "tau": 0.01, "mesh": mesh}
        report = values.landscape(KEY, LOSS, num_samples=64, chunk_size=16, **grid)
        found = report.loss, report.local_entropy, report.heat
    else:
        kind = what.removeprefix("gradient of ")
        call = values.value_and_grad(LOSS, 0.01, kind=kind, temperature=0.05, **settings)
        found = call(START, KEY), jax.jit(call)(START, KEY)
    return jax.tree.leaves(found)


def program(num_samples, count):
    """Bytes that collectives gather in one step, and the largest array of draws on a device."""
    loss = Loss.from_function(lambda x: jnp.sum((x - 1.0) ** 2), jnp.zeros(dim := 50))
    parts = shift.Importance(num_samples, antithetic=False), fit.ForwardKL()
    mesh = jax.make_mesh((count,), ("draws",), devices=jax.devices()[:count])
    optimizer = TwoStep(loss, 0.01, *parts, mesh=mesh)
    state = optimizer.init(KEY)
    text = outer_step.step.lower(optimizer, state, loss.bind()).compile().as_text()
    found = re.findall(r"= (\w+)\[([\d,]*)\]\S* (all-\w+|reduce-scatter|collective-\w+)\(", text)
    sizes = [int(np.prod([int(n) for n in shape.split(",") if n])) for _, shape, _ in found]
    rows = [int(n) for n in re.findall(rf"f32\[(\d+),{dim}\]", text)]
    return {
        "kinds": sorted({kind for _, _, kind in found}),
        "losses": 4 * max(sizes),
        "others": 4 * (sum(sizes) - max(sizes)),
        "rows": max(rows),
        "dim": dim,
    }


def evaluations(count):
    """How often a loss was evaluated in a step, on all devices together."""
    calls = []

    def fn(x):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.sum(x**2)

    loss = Loss.from_function(fn, jnp.ones(2))
    mesh = jax.make_mesh((count,), ("draws",), devices=jax.devices()[:count])
    optimizer = TwoStep(loss, 0.01, shift.Importance(160), fit.ForwardKL(), mesh=mesh)
    state = optimizer.init(KEY)
    jax.effects_barrier()
    calls.clear()
    jax.block_until_ready(optimizer.step(state))
    jax.effects_barrier()
    return len(calls)


def work(name):
    """How often a step evaluated its loss, on one device and on eight: in all, and on the busiest."""
    found = []
    for count in (1, 8):
        calls = []

        def fn(x, calls=calls):
            # The device that calls is the one whose number is there.
            here = lax.axis_index(AXIS) if is_divided() else -1
            jax.debug.callback(calls.append, here)
            return jnp.sum((x - 1.0) ** 2)

        loss = Loss.from_function(fn, jnp.zeros(3))
        mesh = jax.make_mesh((count,), ("draws",), devices=jax.devices()[:count])
        optimizer = optimizer_of(name, mesh, loss)
        state = optimizer.init(KEY)
        jax.effects_barrier()
        calls.clear()
        jax.block_until_ready(optimizer.step(state))
        jax.effects_barrier()
        by_device = [sum(int(call) == device for call in calls) for device in range(count)]
        found.append([len(calls), max(by_device)])
    return found


def resume(name):
    """Whether a run that began on one device goes on under a mesh to the bits of one under it."""
    expected = numbers_of(optimizer_of(name, mesh_of("eight")).run(KEY, 4, progress_bar=False))
    with tempfile.TemporaryDirectory() as folder:
        settings = dict(checkpoint=folder, progress_bar=False)
        optimizer_of(name, mesh_of("one")).run(KEY, 2, **settings)
        found = numbers_of(optimizer_of(name, mesh_of("eight")).run(KEY, 4, **settings))
    return all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))


def elsewhere():
    """A run on eight devices with data that were put on two of them; and what data on two others raise."""
    places = jax.devices()
    two = NamedSharding(Mesh(np.array(places[:2]), ("some",)), PartitionSpec("some"))
    loss = Loss.from_function(network, START, *jax.device_put((INPUTS, OUTPUTS), two))
    found, expected = (
        numbers_of(
            optimizer_of("robbins_monro", mesh_of("eight"), a).run(KEY, STEPS, progress_bar=False)
        )
        for a in (loss, LOSS)
    )
    apart = jax.device_put(INPUTS, places[0]), jax.device_put(OUTPUTS, places[1])
    try:
        optimizer_of("robbins_monro", None, Loss.from_function(network, START, *apart)).init(KEY)
    except ValueError as error:
        return [distance(expected, found), str(error)]
    return [distance(expected, found), "nothing"]


def bound():
    """A step on eight devices with data that are bound to one, and what it leads to beside those data."""
    place = jax.devices()[3]
    loss = Loss.from_function(network, START, *jax.device_put((INPUTS, OUTPUTS), place))
    optimizer = optimizer_of("robbins_monro", mesh_of("eight"), loss)
    expected = optimizer.run(KEY, 1, progress_bar=False)
    state, _ = optimizer.step(optimizer.init(KEY))
    # Of a run, of a state on the mesh, and of a run that goes on from there without it.
    alone = optimizer_of("robbins_monro", None, loss).run(
        KEY, 1, init_state=state, progress_bar=False
    )
    for params in (expected.params, optimizer.get_params(state), alone.params):
        network(params, *loss.arguments.tree[0])
    return distance(*(jax.tree.leaves(a.reference) for a in (expected.state, state)))


GROUPS = {
    "few": {
        "elsewhere": elsewhere,
        "bound": bound,
        "importance": lambda: compare("importance", ["one", "explicit", "eight"]),
        "importance by rows": lambda: by_rows("importance"),
        "resume": lambda: resume("robbins_monro"),
        "evaluations": lambda: [evaluations(1), evaluations(8)],
        "program": lambda: program(4096, 8),
    },
    "values": {
        what: lambda what=what: differences(partial(value, what), [*DIVISIONS])
        # Chains of a bridge are those of `nuts`, and take minutes.
        for what in (*(method for method in values.METHODS if method != "bridge"), *VALUES)
    },
    "engines": {name: lambda name=name: compare(name, [*DIVISIONS]) for name in ENGINES},
    "rows": {name: lambda name=name: by_rows(name) for name in ENGINES},
    "work": {name: lambda name=name: work(name) for name in DIVIDED},
    "programs": {
        "small": lambda: program(4096, 8),
        "large": lambda: program(1_000_000, 8),
    },
}


def main(group, *names):
    warnings.simplefilter("ignore")
    for name, case in GROUPS[group].items():
        if not names or name in names:
            print(json.dumps([name, case()]), flush=True)
            jax.clear_caches()  # before the system's room for mapped programs is used up


if __name__ == "__main__":
    main(*sys.argv[1:])
