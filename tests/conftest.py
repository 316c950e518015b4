# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Shared by all tests: engines by name, trace and compile counters, tolerances."""

import gc
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

# Nearly all of the suite's time is compilation: programs are not optimized unless XLA_FLAGS says how. XLA reads
# the variable once, with its first device; processes that tests start get it where they are not timed.
QUICK_FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
# XLA ends the process at a flag that it does not know; later releases do not know this one.
if jax.__version_info__[:2] == (0, 10):
    QUICK_FLAGS += " --xla_cpu_use_fusion_emitters=false"
if "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = QUICK_FLAGS
    jax.devices()
    del os.environ["XLA_FLAGS"]

# What a shell starts in the background ignores Ctrl-C, and so does what that starts; tests send it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tracing makes millions of objects and hardly a cycle: as often as is usual, the search for cycles takes a tenth.
gc.set_threshold(50_000, 20, 50)

import shape_checker

shape_checker.pass_by_what_has_no_shapes()

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import random
from numpyro.infer import AIES, BarkerMH
from numpyro.infer.autoguide import AutoMultivariateNormal
from page_engines import Damped, RandomWalk

from numpyro_regloss import Loss, Minibatch, TwoStep, anchor, fit, shift

# For `jax.jit` where a program computes for longer than it compiles.
OPTIMIZED = {"xla_backend_optimization_level": "2"}

# Monte Carlo tests allow this many standard errors. With the fixed seeds of this suite they pass or fail for
# good; a new seed would fail a single comparison once in 16,000.
SIGMAS = 4.0

# Built once, as users should: another one would be another program.
ADAM = optax.adam(0.03)


class Row(NamedTuple):
    """An engine of the table.

    Attributes:
        make: builds it.
        fit: of an anchor, the fit that goes with it.
        exempt: rules of `test_conformance.py` that it does not follow, with the reason.
        long: whether it is tried with `--everything` alone: a variant that shares its code with another row.
    """

    make: Callable[[], Any]
    fit: Callable[[], Any] = fit.ForwardKL
    exempt: dict[str, str] = {}  # noqa: RUF012
    long: bool = False


# All engines: a new one is one new line here, and every rule runs over it.
ENGINES = {
    "importance": Row(lambda: shift.Importance(num_samples=4000)),
    "importance_iid": Row(lambda: shift.Importance(num_samples=4000, antithetic=False)),
    "importance_chunked": Row(lambda: shift.Importance(num_samples=3999, chunk_size=512)),
    "importance_sobol": Row(lambda: shift.Importance(num_samples=8000, noise="sobol")),
    "nuts": Row(lambda: shift.NUTS(num_warmup=200, num_samples=250, num_chains=4)),
    "nuts_dense": Row(
        lambda: shift.NUTS(200, 250, num_chains=4, metric="variance", dense_mass=True)
    ),
    "nuts_scores": Row(lambda: shift.NUTS(200, 250, num_chains=4, metric="scores"), long=True),
    "hmc_variance": Row(lambda: shift.HMC(200, 250, num_chains=4, metric="variance"), long=True),
    "kernel": Row(lambda: shift.Kernel(BarkerMH, num_warmup=300, num_samples=500)),
    "kernel_ensemble": Row(
        lambda: shift.Kernel(AIES, num_warmup=400, num_samples=400, num_chains=40)
    ),
    "svi": Row(
        lambda: shift.SVI(
            AutoMultivariateNormal, ADAM, num_steps=50, num_samples=2000, num_warmup=1000
        ),
        exempt={"pickles": "Optax's transformations hold closures, which do not pickle"},
    ),
    "hmc": Row(lambda: shift.HMC(num_warmup=200, num_samples=250, num_chains=4)),
    "smc": Row(lambda: shift.SMC(num_particles=300)),
    # Steps so small that the bias is a fraction of the error.
    "sgld": Row(lambda: shift.SGLD(0.02, num_samples=4000, num_warmup=400, num_chains=4)),
    "adaptive_importance": Row(shift.AdaptiveImportance),
    "adaptive_importance_diagonal": Row(
        lambda: shift.AdaptiveImportance(covariance="diagonal"), long=True
    ),
    "adaptive_importance_low_rank": Row(
        lambda: shift.AdaptiveImportance(covariance="low_rank"), long=True
    ),
    "adaptive_importance_values": Row(
        lambda: shift.AdaptiveImportance(1024, gradient=False), long=True
    ),
    "auto": Row(shift.Auto, long=True),
    "adaptive": Row(lambda: shift.Adaptive(shift.Importance(500), max_rounds=8)),
    "robbins_monro": Row(lambda: fit.RobbinsMonro(num_steps=2000)),
    "robbins_monro_single": Row(lambda: fit.RobbinsMonro(num_steps=8000, antithetic=False)),
    "robbins_monro_score": Row(lambda: fit.RobbinsMonro(2000, gradient="score", num_pairs=8)),
    "reverse_kl": Row(fit.ReverseKL),
    "reverse_kl_natural": Row(lambda: fit.ReverseKL(method="natural"), long=True),
    "reverse_kl_dense": Row(lambda: fit.ReverseKL("dense"), long=True),
    "forward_kl_diagonal": Row(lambda: fit.ForwardKL("diagonal"), long=True),
    "forward_kl_low_rank": Row(lambda: fit.ForwardKL("low_rank", rank=1), long=True),
    "sgld_batch_means": Row(
        lambda: shift.SGLD(0.02, 4000, num_warmup=400, num_chains=4, keep="batch_means"), long=True
    ),
    "adaptive_hmc": Row(
        lambda: shift.Adaptive(shift.HMC(100, 50, num_chains=4), max_rounds=4), long=True
    ),
    "forward_kl_dense": Row(lambda: fit.ForwardKL("dense")),
    "score_matching": Row(fit.ScoreMatching),
    "score_matching_diagonal": Row(lambda: fit.ScoreMatching("diagonal"), long=True),
    "score_matching_dense": Row(lambda: fit.ScoreMatching("dense"), long=True),
    "score_matching_low_rank": Row(lambda: fit.ScoreMatching("low_rank", rank=1), long=True),
    "proximal": Row(anchor.Proximal),
    "newton": Row(anchor.Newton),
    "newton_diagonal": Row(lambda: anchor.Newton(curvature="diagonal")),
    "anderson": Row(lambda: anchor.Anderson(memory=3)),
    "keep_covariance": Row(
        lambda: anchor.KeepCovariance("dense"), fit=lambda: fit.ForwardKL("dense")
    ),
    "adapt_tau": Row(lambda: anchor.AdaptTau(anchor.Proximal())),
    "optax": Row(lambda: anchor.Optax(ADAM), exempt={"pickles": "as for svi"}),
    # New engines as readers write them, and their lines.
    "page_shift": Row(lambda: RandomWalk(num_samples=2000)),
    "page_anchor": Row(Damped),
}
# Tables of the other tests have the engines of the package.
MADE = {name: row.make() for name, row in ENGINES.items() if not name.startswith("page_")}
SHIFTS = {
    name: ENGINES[name].make
    for name, engine in MADE.items()
    # Tables of the other tests are the plain engines.
    if isinstance(engine, shift.Shift)
    and not isinstance(engine, shift.Adaptive)
    and not ENGINES[name].long
}
HEAT_FITS = {
    name: ENGINES[name].make
    for name, engine in MADE.items()
    if isinstance(engine, fit.Fit) and not engine.uses_draws and not ENGINES[name].long
}
ANCHORS = {
    name: ENGINES[name]
    for name, engine in MADE.items()
    if isinstance(engine, anchor.Anchor) and name != "optax"
}
# Where an engine's variants run the same code, the rules are checked on one of them.
FAMILIES = ("importance_chunked", "nuts", "hmc", "sgld")


def scheme(name, loss, tau, temperature=1.0):
    """The optimizer in which an engine of the table is tried, with cheap parts beside it."""
    row = ENGINES[name]
    engine = row.make()
    parts = {"shift": shift.Importance(2000), "fit": fit.ForwardKL(), "anchor": anchor.Proximal()}
    if isinstance(engine, anchor.Anchor):
        parts |= {"fit": row.fit(), "anchor": engine}
    elif isinstance(engine, fit.Fit):
        parts["fit"] = engine
        if engine.needs_scores:
            parts["shift"] = shift.AdaptiveImportance()
        elif not engine.uses_draws:
            parts["shift"] = shift.Implicit()
    else:
        parts["shift"] = engine
    return TwoStep(loss, tau, **parts, temperature=temperature)


# Docstrings that show what ArviZ made, or draw; the others are tested on the first stack.
BOTH_DOCTESTS = ("io_arviz", "plots.", "diagnostics")


def on_devices(script: Path, group: str, num_devices: int) -> list[Any]:
    """What a script of cases prints, one line of JSON per case, with so many simulated devices.

    A process of its own: JAX counts its devices once, and what goes wrong there may end Python.
    """
    done = subprocess.run(
        [sys.executable, script, group],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": str(num_devices), "XLA_FLAGS": QUICK_FLAGS},
        capture_output=True,
        text=True,
        check=False,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def start_on(script: Path, *args: Any, processes: int = 1) -> list[subprocess.Popen]:
    """Starts a script with four simulated devices, on so many processes over loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"JAX_NUM_CPU_DEVICES": str(max(1, 4 // processes)), "XLA_FLAGS": QUICK_FLAGS}
    return [
        subprocess.Popen(
            [sys.executable, script, *map(str, args), *map(str, where)],
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for where in ([(i, processes, port) for i in range(processes)] if processes > 1 else [()])
    ]


def finish(process: subprocess.Popen) -> Any:
    """What a process of `start_on` printed as its last line."""
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def pytest_addoption(parser):
    parser.addoption(
        "--everything", action="store_true", help="also what is long, or for the other stack"
    )


# Pages of the site whose examples compile for half a minute and more.
LONG_PAGES = {
    f"{page}.md"
    for page in (
        "diagnostics",
        "flat_minima",
        "forward_or_reverse",
        "gaussian_approximations",
        "modules",
        "networks",
    )
}


def pytest_collection_modifyitems(config, items):
    """The second stack has what meets releases that differ; what is long waits for `--everything`."""
    if config.getoption("everything"):
        return
    for item in items:
        if isinstance(item, pytest.DoctestItem) and item.name in LONG_PAGES:
            item.add_marker(pytest.mark.long)
        doctest = isinstance(item, pytest.DoctestItem) and any(
            f"numpyro_regloss.{name}" in item.name for name in BOTH_DOCTESTS
        )
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.skip(reason="long: runs with --everything"))
        elif sys.version_info >= (3, 13) and not (doctest or item.get_closest_marker("both")):
            item.add_marker(pytest.mark.skip(reason="for the first stack; runs with --everything"))


def on_both(names, chosen):
    """Names as parameters, of which the chosen ones run on both stacks."""
    return [pytest.param(n, marks=[pytest.mark.both] if n in chosen else []) for n in names]


def long(*values):
    """A parameter whose cases take many seconds."""
    return pytest.param(*values, marks=pytest.mark.long)


def with_long(names, chosen):
    """Names as parameters, of which the chosen ones are long."""
    return [long(n) if n in chosen else n for n in names]


class Counter:
    """A loss that counts how often Python runs it: once per trace under jit."""

    def __init__(self, fn):
        self.fn, self.count = fn, 0

    def __call__(self, *args, **kwargs):
        self.count += 1
        return self.fn(*args, **kwargs)


# XLA maps each program into memory, and a process of Linux has room for 65,530 maps, beyond which it dies. A test
# takes up to 4,000.
MAPS, MANY_MAPS, CHECK_EVERY = Path("/proc/self/maps"), 40_000, 5
TESTS = itertools.count(1)


def pytest_runtest_teardown(item, nextitem):
    """Drops compiled programs before there are too many; until then modules share the small ones."""
    is_last = nextitem is None or nextitem.path != item.path
    if MAPS.exists():
        is_due = next(TESTS) % CHECK_EVERY == 0
        is_full = is_due and MAPS.read_bytes().count(b"\n") > MANY_MAPS
    else:
        is_full = is_last
    if is_full:
        jax.clear_caches()
        gc.unfreeze()
        gc.collect()
    if is_last:
        # What a module leaves are mostly programs: no search for cycles passes over them again.
        gc.freeze()


@pytest.fixture
def x64():
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield


def as_flat(params):
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(params)])


def gradients_of_batches(make):
    """The history of 100 updates of five inner steps, each of which is a gradient and nothing else.

    What the engine says that it evaluated is compared with what the loss was asked for.
    """
    calls = []

    def counted(x, rows):
        jax.debug.callback(lambda x: calls.append(1), x[0])
        return jnp.mean((rows @ x - 1.0) ** 2)

    rows = np.random.default_rng(0).normal(size=(300, 3)).astype(np.float32)
    optimizer = make(
        Loss.from_function(counted, np.zeros(3), rows, minibatch=Minibatch(64, split=True))
    )
    state = optimizer.init(random.key(0))
    jax.effects_barrier()
    calls.clear()
    _, history = optimizer.scan(state, 100)
    jax.effects_barrier()
    assert len(calls) == np.sum(history.num_grad) <= 5.25 * 100
    assert np.all(history.num_loss == 0)
    return history
