# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""How much time do the engines take beyond the loss evaluations and random numbers that they must have?

Each engine is timed in turn with bare programs of the same evaluations and numbers ("floors"). Ratios are medians
over rounds of the ratio within a round; only they are to be compared from one run to another, on a quiet machine:
beside other programs the samplers took up to half as long again and the floors did not. With NPROC=1 in the
environment, which leaves XLA one thread, they did not either.

Importance: one shift and fit, against a program that stores everything; against the sum of its parts timed apart;
and against the least that a stream does: noise in chunks, once or (where the fit draws it again) twice, and the
loss on chunks of a given cloud. Antithetic pairs need half the noise.

HMC and NUTS: five warm shifts, against a loop of as many batched gradients, normals and uniforms. The gradients
are those that were computed, counted by a callback: chains side by side wait for the longest tree of each
doubling, and chains whose tree is complete compute on without use; `waiting` is what was computed over what
was used. `batch / single` is the cost of a gradient of all chains over that of one chain's.

Rest: fit, anchor and history of an outer step, as what a whole run takes beyond its shifts alone, which are run
again at the same references with the same keys.
"""

import statistics
from functools import partial

import harness
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from targets import TARGETS

from numpyro_regloss import Gaussian, Loss, RegularizedLoss, TwoStep, fit, schemes, shift
from numpyro_regloss._core.threefry import unrolled

CHUNK_ELEMENTS = 500_000
NUM_SHIFTS = 5


def milliseconds(times):
    return 1e3 * statistics.median(times)


# Importance


def logits(params, inputs):
    hidden = jax.nn.relu(inputs @ params["w"] + params["b"])
    return hidden @ params["v"] + params["c"]


def network(params, inputs, labels):
    outputs = logits(params, inputs)
    picked = jnp.take_along_axis(outputs, labels[:, None], 1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(outputs, -1) - picked)


def digits():
    """784-32-10, 25,450 parameters, 256 rows of noise for data."""
    rng = np.random.default_rng(0)
    params = {
        "w": rng.normal(size=(784, 32)).astype(np.float32) / 28,
        "b": np.zeros(32, np.float32),
        "v": rng.normal(size=(32, 10)).astype(np.float32) / 6,
        "c": np.zeros(10, np.float32),
    }
    inputs = rng.uniform(size=(256, 784)).astype(np.float32)
    loss = Loss.from_function(network, params, inputs, rng.integers(0, 10, 256))
    return RegularizedLoss(loss, Gaussian.isotropic(loss.x0, 1e-4), temperature=0.05)


def square(x):
    return 0.5 * jnp.sum(x**2)


def cheap():
    loss = Loss.from_function(square, jnp.ones(30))
    return RegularizedLoss(loss, Gaussian.isotropic(loss.x0, 0.01))


@jax.jit
def shift_and_fit(engine, rng_key, target):
    _, draws, info = engine.step(rng_key, (), target)
    _, fitted, fit_info = fit.ForwardKL().step(rng_key, (), target, draws)
    return fitted.mean, fit_info.mean_error, info


@partial(jax.jit, static_argnames="num_samples")
def store_everything(rng_key, target, num_samples):
    noise = random.normal(rng_key, (num_samples, target.dim))
    x = target.reference.unwhiten(noise)
    loss = jax.vmap(target.value)(x)
    return jax.nn.softmax(-loss / target.temperature) @ x, x


@partial(jax.jit, static_argnames="num_samples")
def cloud_only(rng_key, target, num_samples):
    return target.reference.unwhiten(random.normal(rng_key, (num_samples, target.dim)))


@jax.jit
def losses_only(target, x):
    return jax.vmap(target.value)(x)


@jax.jit
def weighted_sum_only(weight, x):
    return weight @ x


@partial(jax.jit, static_argnames=("num_samples", "num_chunks"))
def noise_in_chunks(rng_key, target, num_samples, num_chunks):
    # Carried but not used: each chunk is written once.
    def body(i, noise):
        return random.normal(random.fold_in(rng_key, i), noise.shape)

    rows = num_samples // num_chunks
    return lax.fori_loop(0, num_chunks, body, jnp.zeros((rows, target.dim)))


@partial(jax.jit, static_argnames="num_chunks")
def losses_in_chunks(target, x, num_chunks):
    return lax.map(jax.vmap(target.value), x.reshape(num_chunks, -1, target.dim))


def importance(label, target, num_samples, repeats):
    key = random.key(0)
    # Chunks of one length, that no draw is left over.
    num_chunks = max(2, -(-num_samples * target.dim // CHUNK_ELEMENTS))
    while num_samples % num_chunks:
        num_chunks += 1
    x = cloud_only(key, target, num_samples)
    weight = jax.nn.softmax(-losses_only(target, x) / target.temperature)
    engines = {
        "pairs": shift.Importance(num_samples),
        "independent": shift.Importance(num_samples, antithetic=False),
    }
    normals = {"pairs": num_samples // 2, "independent": num_samples}
    calls = {
        "store everything": lambda: store_everything(key, target, num_samples),
        "cloud": lambda: cloud_only(key, target, num_samples),
        "losses": lambda: losses_only(target, x),
        "sum": lambda: weighted_sum_only(weight, x),
        "losses in chunks": lambda: losses_in_chunks(target, x, num_chunks),
    }
    for name, engine in engines.items():
        calls[name] = lambda engine=engine: shift_and_fit(engine, key, target)
        calls[f"noise, {name}"] = lambda rows=normals[name]: noise_in_chunks(
            key, target, rows, num_chunks
        )
    times = harness.rounds(calls, repeats)
    parts = add(times["cloud"], times["losses"], times["sum"])
    return [
        {
            "loss": label,
            "draws": f"{num_samples} {name}",
            "ms": milliseconds(times[name]),
            "/ store everything": harness.ratio(times[name], times["store everything"]),
            "/ sum of parts": harness.ratio(times[name], parts),
            "/ noise + losses": harness.ratio(times[name], add(noise, times["losses in chunks"])),
            "/ 2 noise + losses": harness.ratio(
                times[name], add(noise, noise, times["losses in chunks"])
            ),
            "25-75 %": harness.spread(times[name], parts),
            "noise ms": milliseconds(noise),
            "losses ms": milliseconds(times["losses in chunks"]),
            "store everything ms": milliseconds(times["store everything"]),
            "parts ms": milliseconds(parts),
        }
        for name in engines
        for noise in [times[f"noise, {name}"]]
    ]


def add(*parts):
    return [sum(values) for values in zip(*parts, strict=True)]


# HMC and NUTS


@jax.jit
def take_shifts(engine, rng_key, state, target):
    """Some shifts in one program, as an outer loop has them; the draws are summed."""

    def body(state, key):
        state, draws, info = engine.step(key, state, target)
        return state, (jnp.sum(draws.x) + jnp.sum(draws.score), info)

    return lax.scan(body, state, random.split(rng_key, NUM_SHIFTS))


@partial(jax.jit, static_argnames=("num_transitions", "uniform_each", "summed"))
def bare(rng_key, noise, num_gradients, target, num_transitions, *, uniform_each, summed):
    """Batched gradients in a loop per transition, each with its normals, its uniforms and a small step.

    The gradient of the sum over chains is the same as one of each, but XLA compiles it to other matrix products,
    and either may be the faster by a factor: the faster one is the floor. A single chain has no batch axis, as
    in the engine.
    """
    single = noise.shape[0] == 1

    def total(noise):
        values = jax.vmap(target.whitened_potential)(noise)
        return jnp.sum(values), values

    def gradients(noise):
        if single:
            value, gradient = jax.value_and_grad(target.whitened_potential)(noise[0])
            return value[None], gradient[None]
        if summed:
            (_, values), gradient = jax.value_and_grad(total, has_aux=True)(noise)
            return values, gradient
        return jax.vmap(jax.value_and_grad(target.whitened_potential))(noise)

    def transition(i, carry):
        key = random.fold_in(rng_key, i)
        noise, energy = carry
        noise = noise + 1e-3 * random.normal(key, noise.shape)
        uniform = random.uniform(random.fold_in(key, 1), energy.shape)

        def leapfrog(j, carry):
            noise, energy = carry
            value, gradient = gradients(noise)
            if uniform_each:
                value = value * random.uniform(random.fold_in(key, j), value.shape)
            return noise - 1e-4 * gradient, energy + value

        # Whole numbers that differ by one at most and add to num_gradients.
        first, last = (num_gradients * k // num_transitions for k in (i, i + 1))
        return lax.fori_loop(0, last - first, leapfrog, (noise, energy * uniform))

    start = noise, jnp.zeros(noise.shape[0])
    return lax.fori_loop(0, num_transitions, transition, start)


@partial(jax.jit, static_argnames="summed")
def gradients_only(noise, num_gradients, target, *, summed):
    return bare(random.key(0), noise, num_gradients, target, 1, uniform_each=False, summed=summed)


def sampler(label, engine, loss, x0, data, repeats):
    bound = Loss.from_function(loss, x0, *data)
    target = RegularizedLoss(bound, Gaussian.isotropic(bound.x0, 0.1))
    key = random.key(2)
    state = take_shifts(engine, random.key(1), engine.init(key, target), target)[0]
    used = int(jnp.sum(take_shifts(engine, key, state, target)[1][1].num_grad))
    computed = np.int32(count_batches(engine, key, state, loss, x0, data))
    noise = target.reference.whiten(state.x)
    common = {
        "num_transitions": NUM_SHIFTS * engine.num_samples,
        "uniform_each": isinstance(engine, shift.NUTS),
    }

    def floor(rng_key, *, summed):
        return lambda: bare(rng_key, noise, computed, target, **common, summed=summed)

    calls = {"engine": lambda: take_shifts(engine, key, state, target)}
    for form in (False, True)[: engine.num_chains]:
        # JAX's generator is rolled into a loop on CPUs; a floor has to have the faster one.
        calls |= {
            f"floor {form}": floor(unrolled(key), summed=form),
            f"JAX's floor {form}": floor(key, summed=form),
            f"batched {form}": lambda form=form: gradients_only(
                noise, computed, target, summed=form
            ),
        }
    if engine.num_chains > 1:
        calls["single "] = lambda: gradients_only(noise[:1], computed, target, summed=False)
    times = harness.rounds(calls, repeats)
    times.setdefault("single ", times["batched False"])

    def fastest(name):
        forms = [values for key, values in times.items() if key.startswith(f"{name} ")]
        return min(forms, key=statistics.median)

    return {
        "target": label,
        "engine": f"{type(engine).__name__} {engine.num_chains} x {engine.num_samples}",
        "ms / shift": milliseconds(times["engine"]) / NUM_SHIFTS,
        "floor": milliseconds(fastest("floor")) / NUM_SHIFTS,
        "/ floor": harness.ratio(times["engine"], fastest("floor")),
        "25-75 %": harness.spread(times["engine"], fastest("floor")),
        "/ floor, JAX's numbers": harness.ratio(times["engine"], fastest("JAX's floor")),
        "gradients used": used,
        "batches computed": int(computed),
        "waiting": engine.num_chains * int(computed) / used,
        "us / batch": 1e3 * milliseconds(fastest("batched")) / int(computed),
        "batch / single": harness.ratio(fastest("batched"), times["single "]),
    }


def count_batches(engine, rng_key, state, loss, x0, data):
    """Gradients of all chains at once that the shifts compute, those that no chain uses included."""
    calls = []

    def counted(x, *data):
        # Without arguments, so that vmap leaves it one call for all chains.
        jax.debug.callback(lambda: calls.append(1))
        return loss(x, *data)

    bound = Loss.from_function(counted, x0, *data)
    target = RegularizedLoss(bound, Gaussian.isotropic(bound.x0, 0.1))
    jax.block_until_ready(take_shifts(engine, rng_key, state, target))
    jax.effects_barrier()
    return len(calls)


def samplers(repeats, *, smoke):
    rows = []
    for name, build in TARGETS.items():
        for chains in (1, 4):
            settings = {"num_samples": 200 // chains, "num_chains": chains, "num_warmup": 100}
            for engine in (shift.HMC(**settings), shift.NUTS(**settings)):
                rows.append(sampler(name, engine, *build(), repeats))
                if smoke:
                    return rows
    return rows


# Fit, anchor and history


def quadratic(x, matrix):
    return 0.5 * x @ (matrix @ x)


@jax.jit
def shifts_alone(optimizer, state, references):
    """The shifts of a run: the same references and keys, and nothing is made of the draws."""

    def body(carry, reference):
        step, shift_state = carry
        key = random.split(random.fold_in(state.rng_key, step), 4)[0]
        target = RegularizedLoss.unchecked(
            optimizer.loss, reference, optimizer.loss.arguments, optimizer.temperature
        )
        shift_state, draws, info = optimizer.shift.step(key, shift_state, target)
        stored = draws.x if draws.block_size is None else 0.0
        return (step + 1, shift_state), (jnp.sum(draws.log_weight) + jnp.sum(stored), info)

    return lax.scan(body, (state.step, state.shift), references)


def rest(engine, loss, args, dim, num_steps, repeats):
    bound = Loss.from_function(loss, jnp.full(dim, 0.1), *args)
    optimizer = schemes.local_entropy(bound, 0.1, shift=engine)
    run = jax.jit(TwoStep.scan, static_argnums=2)
    state, _ = run(optimizer, optimizer.init(random.key(0)), num_steps)
    history = run(optimizer, state, num_steps)[1]
    times = harness.rounds(
        {
            "whole": lambda: run(optimizer, state, num_steps),
            "shifts": lambda: shifts_alone(optimizer, state, history.reference),
        },
        repeats,
    )
    return {
        "engine": type(engine).__name__,
        "dim": dim,
        "ms / step": milliseconds(times["whole"]) / num_steps,
        "shift alone": milliseconds(times["shifts"]) / num_steps,
        "rest, % of the step": 100 * (1 - harness.ratio(times["shifts"], times["whole"])),
        "25-75 % of shift / step": harness.spread(times["shifts"], times["whole"]),
    }


def rests(repeats, *, smoke):
    rows = []
    for dim in (2,) if smoke else (2, 30, 1000):
        steps = 5 if smoke else min(100, 3000 // dim)
        rows.append(rest(shift.Importance(4000), square, (), dim, steps, repeats))
        matrix = np.eye(dim, dtype=np.float32) + np.float32(1 / dim)
        engine = shift.NUTS(num_samples=50, num_chains=4, num_warmup=100)
        rows.append(rest(engine, quadratic, (matrix,), dim, steps, repeats))
    return rows


def main():
    options = harness.arguments(__doc__)
    repeats = 2 if options.smoke else 11
    print(harness.environment())
    tables = {}

    def report(title, rows):
        tables[title] = rows
        harness.show(title, rows)

    report(
        "Importance: shift and fit",
        importance("network, 25,450-d", digits(), 100 if options.smoke else 1000, repeats)
        + importance("square, 30-d", cheap(), 1000 if options.smoke else 10_000, 3 * repeats),
    )
    report("HMC and NUTS: warm shifts", samplers(repeats, smoke=options.smoke))
    report("Rest of an outer step", rests(repeats, smoke=options.smoke))
    harness.save(options.out, tables)


if __name__ == "__main__":
    main()
