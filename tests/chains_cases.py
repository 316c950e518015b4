# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Runs chains of NumPyro's `MCMC` over four simulated devices, for `test_chains.py`.

    python tests/chains_cases.py FILE [PROCESS PROCESSES PORT]

A process of its own, since JAX counts its devices once; or one of several, which have four devices together. Draws
are written to FILE by the first process; one line of JSON says what else was found.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import random
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numpyro.infer import HMC, MCMC, NUTS

from numpyro_regloss import Gaussian, Loss, RegularizedLoss, forward_kl, model, sharded
from numpyro_regloss.draws import chains

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from harness import count_compiles

INPUTS = np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32)
OUTPUTS = INPUTS @ np.array([1.0, -1.0], np.float32)
CHAINS = 8


def regression(num_sites, x, y):
    with numpyro.plate("sites", num_sites):
        w = numpyro.sample("w", dist.Normal(0.0, 1.0))
    sd = numpyro.sample("sd", dist.HalfNormal(1.0))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(x @ w, sd), obs=y)


def fixed_steps():
    # What adapts makes a rounding grow. A fixed number of steps wants no length: NumPyro's starts at 2 π.
    fixed = dict(adapt_step_size=False, adapt_mass_matrix=False, trajectory_length=None)
    return HMC(regression, step_size=0.02, num_steps=5, **fixed)


def run(method, *data, num_chains=CHAINS, jit=True):
    mcmc = MCMC(
        fixed_steps(),
        num_warmup=0,
        num_samples=50,
        num_chains=num_chains,
        chain_method=method,
        jit_model_args=jit,
        progress_bar=False,
    )
    mcmc.run(random.key(0), 2, *(data or (INPUTS, OUTPUTS)))
    return mcmc


def sites(mcmc):
    return mcmc.get_samples(group_by_chain=True)


def difference(a, b):
    return max(float(np.abs(np.asarray(a[name]) - np.asarray(b[name])).max()) for name in a)


def programs(call):
    """What a call returns, and how many programs of chains it compiled."""
    with count_compiles() as compiled:
        found = call()
    return found, sum("run_chains" in name for name in compiled)


def texts_of_programs():
    """A list that grows by the text of every program of chains that is called."""
    texts, compiled = [], chains._compiled

    def spy(program):
        call = compiled(program)

        def spied(*args):
            texts.append(call.lower(*args).compile().as_text())
            return call(*args)

        return spied

    chains._compiled = spy
    return texts, lambda: setattr(chains, "_compiled", compiled)


def of_regularized_loss(mesh):
    loss = Loss.from_function(lambda w: jnp.sum(w**2), jnp.ones(2))
    mcmc = MCMC(
        NUTS(model),
        num_warmup=100,
        num_samples=100,
        num_chains=CHAINS,
        chain_method=sharded(mesh),
        jit_model_args=True,
        progress_bar=False,
    )
    means = []
    for center in (0.0, 3.0):
        # exp(-|w|²) N(w; center, 1/2) has the mean center / 2 and the variance 1/4.
        target = RegularizedLoss(loss, Gaussian.isotropic(jnp.full(2, center), 0.5))
        mcmc.warmup(random.key(0), target)
        mcmc.run(random.key(0), target, extra_fields=("z_grad",))
        fitted = forward_kl(mcmc)
        means.append((fitted.gaussian.mean - center / 2) / fitted.info.mean_error)
    return np.asarray(means)


def on_one_process():
    devices = ("draws",)
    explicit = jax.make_mesh((4,), devices)
    auto = jax.make_mesh((4,), devices, axis_types=(AxisType.Auto,))
    both = jax.make_mesh((2, 2), ("draws", "rows"))
    found = {}
    # NumPyro traces integers, too, if it compiles arguments: then they size no plate.
    plain = sites(run("vectorized", jit=False))
    found["moved"] = float(np.abs(np.diff(plain["w"], axis=1)).mean())

    texts, stop = texts_of_programs()
    first = sites(run(sharded(explicit)))
    stop()
    found["rounding"] = difference(plain, first)
    found["devices"] = len(first["w"].sharding.device_set)
    found["chains per device"] = "f32[2,64]" in texts[0] and "f32[8,64]" not in texts[0]
    found["collectives of chains"] = "all-" in texts[0] or "collective-" in texts[0]

    again, found["programs of another MCMC"] = programs(lambda: run(sharded(auto)))
    found["same"] = difference(first, sites(again))
    found["untouched kernel"] = vars(again.sampler) == vars(fixed_steps())

    _, found["programs of new data"] = programs(
        lambda: again.run(random.key(1), 2, INPUTS + 0.1, OUTPUTS)
    )
    found["new data"] = difference(first, sites(again))

    constants, found["programs of constants"] = programs(lambda: run(sharded(auto), jit=False))
    found["constants"] = difference(first, sites(constants))
    _, found["programs of equal constants"] = programs(
        lambda: run(sharded(auto), INPUTS.copy(), OUTPUTS.copy(), jit=False)
    )
    _, found["programs of other constants"] = programs(
        lambda: run(sharded(auto), INPUTS + 0.1, OUTPUTS, jit=False)
    )

    data = jax.device_put((INPUTS, OUTPUTS), NamedSharding(both, P("rows")))
    texts, stop = texts_of_programs()
    rows = sites(run(sharded(both), *data))
    stop()
    found["rows"] = difference(plain, rows)
    found["rows per device"] = "f32[4,32]" in texts[0] and "64]" not in texts[0]
    with jax.set_mesh(both):
        inside = run(sharded(both), *data)
        found["context"] = difference(plain, jax.device_get(sites(inside)))
        found["flat in context"] = inside.get_samples()["w"].shape

    try:
        run(sharded(explicit), num_chains=6)
    except ValueError as error:
        found["refused"] = str(error)

    (found["errors of the model"], found["programs of the model"]) = programs(
        lambda: np.abs(of_regularized_loss(explicit)).max().item()
    )
    return first, found


def on_several():
    mesh = jax.make_mesh((2, 2), ("draws", "rows"))
    sharding = NamedSharding(mesh, P("rows"))
    # The devices of a row of the mesh belong to one process, which thus holds all of the data.
    data = [
        jax.make_array_from_callback(whole.shape, sharding, lambda index, whole=whole: whole[index])
        for whole in (INPUTS, OUTPUTS)
    ]
    mcmc = run(sharded(mesh), *data)
    _, count = programs(lambda: mcmc.run(random.key(0), 2, *data))
    host = run(sharded(jax.make_mesh((4,), ("draws",))))
    gathered = multihost_utils.process_allgather(sites(host), tiled=True)
    rows = multihost_utils.process_allgather(sites(mcmc), tiled=True)
    draws = sites(mcmc)["w"]
    mean = np.asarray(draws.mean((0, 1)))
    return gathered, {
        "programs": count,
        "rows": difference(gathered, rows),
        "here": draws.is_fully_addressable,
        "mean": mean.tolist(),
    }


if __name__ == "__main__":
    file, *where = sys.argv[1:]
    process, processes, port = map(int, where or (0, 1, 0))
    jax.config.update("jax_num_cpu_devices", 4 // processes)
    if processes > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, process)
    draws, found = on_several() if where else on_one_process()
    if process == 0:
        np.savez(file, **draws)
    print(json.dumps(found))
