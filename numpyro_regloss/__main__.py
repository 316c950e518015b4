# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""The command line: both regularized losses on real data, or local entropy of a user's own NumPyro model.

Results are a table, the report of the run, a figure and files with all numbers.
"""

import argparse
import datetime
import importlib
import importlib.util
import inspect
import json
import operator
import platform
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax import random
from numpyro.infer.reparam import TransformReparam

from numpyro_regloss import (
    Arrived,
    Loss,
    Minibatch,
    RegularizedLoss,
    TwoStep,
    TwoStepResult,
    __version__,
    diagnostics,
    fit,
    plots,
    schemes,
    shift,
    to_arviz,
    values,
)
from numpyro_regloss.io_arviz.labels import RESERVED, label_sites

DESCRIPTION = """\
Minimizes local-entropy and heat regularized losses on real data, or the local entropy of your own NumPyro
model, and reports what they reached:

  digits         a 64-32-10 tanh network on scikit-learn's 1,797 handwritten digits, trained without
                 gradients by local entropy (importance sampling) and with heat regularization
                 (Robbins-Monro)
  eight-schools  Rubin's eight schools as an ordinary constrained NumPyro model, minimized by local
                 entropy with NUTS

Prints a table and writes results.json and figure.png to the output folder. Takes about a minute and a
half on two cores.

  --model module:function --data file.npz
                 a NumPyro model of yours, from a module in this folder or an installed one; arrays of the
                 file are its arguments, by name. Minimizes minus its log joint density, and stops once it has
                 arrived. Also writes report.txt and draws.nc, the last draws for ArviZ
                 (az.from_netcdf)."""

SCHOOLS = ("A", "B", "C", "D", "E", "F", "G", "H")
EFFECTS = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


class Row(NamedTuple):
    """One line of the table; the rest goes to the figure and the files."""

    problem: str
    scheme: str
    loss: float
    local_entropy: values.Estimate
    heat: values.Estimate
    outcome: str
    num_loss: int
    num_grad: int
    seconds: float
    result: TwoStepResult
    report: str


def network(params: dict[str, jax.Array], inputs: jax.Array) -> jax.Array:
    """Logits of a network with one hidden layer of tanh units."""
    hidden = jnp.tanh(inputs @ params["w1"] + params["b1"])
    return hidden @ params["w2"] + params["b2"]


def cross_entropy(params: dict[str, jax.Array], inputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy in nats."""
    logits = network(params, inputs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def start_params(rng_key: jax.Array) -> dict[str, jax.Array]:
    """A random 64-32-10 network, 2,410 parameters."""
    key_1, key_2 = random.split(rng_key)
    return {
        "w1": random.normal(key_1, (64, 32)) / 64**0.5,
        "b1": jnp.zeros(32),
        "w2": random.normal(key_2, (32, 10)) / 32**0.5,
        "b2": jnp.zeros(10),
    }


@numpyro.handlers.reparam(config={"theta": TransformReparam()})
def eight_schools(num_schools: int, errors: jax.Array, effects: jax.Array | None = None) -> None:
    """Effects of coaching in eight schools, in non-centered form (Rubin 1981; Gelman et al. 2013)."""
    mu = jnp.asarray(numpyro.sample("mu", dist.Normal(0.0, 5.0)))
    tau = jnp.asarray(numpyro.sample("tau", dist.HalfCauchy(5.0)))
    with numpyro.plate("school", num_schools):
        affine = dist.transforms.AffineTransform(mu, tau)
        theta = numpyro.sample("theta", dist.TransformedDistribution(dist.Normal(0.0, 1.0), affine))
        numpyro.sample("obs", dist.Normal(theta, errors), obs=effects)


def digits(rng_key: jax.Array, arguments: argparse.Namespace) -> list[Row]:
    """Trains the network twice from one start: without gradients, and with heat regularization."""
    from sklearn.datasets import load_digits  # noqa: PLC0415

    inputs, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    inputs, labels = (inputs / 16).astype(np.float32)[order], labels.astype(np.int32)[order]
    train, test = ((inputs[part], labels[part]) for part in (slice(1437), slice(1437, None)))
    key_params, key_run = random.split(rng_key)
    params = start_params(key_params)

    # The loss is averaged, so the temperature is in nats per image. The gradient-free run needs one at
    # which a cloud of a thousand networks still has some of comparable weight.
    gradient_free = schemes.local_entropy(
        Loss.from_function(cross_entropy, params, *train, minibatch=Minibatch(256)),
        tau=0.01,
        temperature=0.02,
        shift=shift.Importance(num_samples=500 if arguments.quick else 1000),
    )
    with_gradients = schemes.heat(
        Loss.from_function(cross_entropy, params, *train, minibatch=Minibatch(128)),
        tau=0.001,
        temperature=0.001,
        fit=fit.RobbinsMonro(num_steps=10),
    )

    def outcome(params: Any) -> str:
        right = np.mean(np.argmax(network(params, test[0]), -1) == test[1])
        return f"test accuracy {100 * right:.1f} %"

    jobs = (
        ("local entropy, Importance", gradient_free, 60 if arguments.quick else 400),
        ("heat, RobbinsMonro", with_gradients, 150 if arguments.quick else 800),
    )
    return [
        _run(key_run, ("digits", name), optimizer, steps, outcome, arguments)
        for name, optimizer, steps in jobs
    ]


def schools(rng_key: jax.Array, arguments: argparse.Namespace) -> list[Row]:
    """Minimizes minus the log joint density of the model, regularized."""
    loss = Loss.from_model(eight_schools, 8, ERRORS, effects=EFFECTS)
    optimizer = schemes.local_entropy(
        loss, tau=1.0, shift=shift.NUTS(num_warmup=200, num_samples=100, num_chains=4)
    )

    def outcome(params: Any) -> str:
        return f"mu {params['mu']:.2f}, tau {params['tau']:.2f}"

    name = "eight schools", "local entropy, NUTS"
    steps = 10 if arguments.quick else 40
    return [_run(rng_key, name, optimizer, steps, outcome, arguments)]


def _run(
    rng_key: jax.Array,
    name: tuple[str, str],
    optimizer: TwoStep,
    num_steps: int,
    outcome: Callable[[Any], str],
    arguments: argparse.Namespace,
    until: Arrived | None = None,
) -> Row:
    most = "" if until is None else "at most "
    print(f"{': '.join(name)}, {most}{num_steps} outer steps")
    start = time.perf_counter()
    result = optimizer.run(rng_key, num_steps, until=until, progress_bar=not arguments.no_progress)
    seconds = time.perf_counter() - start
    report = str(diagnostics.summary(result, optimizer))
    print(f"{report}\n")
    target = RegularizedLoss(
        optimizer.loss, result.state.reference, temperature=optimizer.temperature
    )
    key_entropy, key_heat = random.split(random.fold_in(rng_key, num_steps))
    num_samples = 1000 if arguments.quick else 4000
    return Row(
        *name,
        loss=float(target.value(target.reference.mean)),
        local_entropy=values.local_entropy(key_entropy, target, num_samples=num_samples),
        heat=values.heat(key_heat, target, num_samples=num_samples),
        outcome=outcome(result.params),
        num_loss=int(result.history.num_loss.sum()),
        num_grad=int(result.history.num_grad.sum()),
        seconds=seconds,
        result=result,
        report=report,
    )


def table(rows: list[Row]) -> str:
    """The rows as aligned text; errors are standard errors."""
    header = (
        "problem", "scheme", "loss", "local entropy", "heat", "outcome",
        "loss evals", "gradients", "seconds",
    )  # fmt: skip
    lines = [
        (
            row.problem,
            row.scheme,
            f"{row.loss:.4f}",
            _with_error(row.local_entropy),
            _with_error(row.heat),
            row.outcome,
            f"{row.num_loss:,}",
            f"{row.num_grad:,}",
            f"{row.seconds:.1f}",
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    numeric = {2, 3, 4, 6, 7, 8}
    pad = [str.rjust if i in numeric else str.ljust for i in range(len(header))]

    def render(cells: tuple[str, ...]) -> str:
        return "  ".join(p(c, w) for p, c, w in zip(pad, cells, widths, strict=True)).rstrip()

    return "\n".join([render(header), "  ".join("-" * w for w in widths), *map(render, lines)])


def _with_error(estimate: values.Estimate) -> str:
    if not 0 < estimate.error < np.inf:
        return f"{estimate.value:.4g} ± {estimate.error:.4g}"
    decimals = int(np.clip(1 - np.floor(np.log10(estimate.error)), 0, 8))
    return f"{estimate.value:.{decimals}f} ± {estimate.error:.{decimals}f}"


def figure(rows: list[Row], path: Path) -> None:
    """Loss at the centre over evaluations for each run, and the schools' effects."""
    from matplotlib import pyplot as plt  # noqa: PLC0415

    panels = list(dict.fromkeys(row.problem for row in rows))
    columns = len(panels) + ("eight schools" in panels)
    canvas, axes = plt.subplots(
        1, columns, figsize=(4.6 * columns, 3.6), layout="constrained", squeeze=False
    )
    for axis, problem in zip(axes[0], panels, strict=False):
        for row, style in zip((r for r in rows if r.problem == problem), ("-", "--"), strict=False):
            history = row.result.history
            spent = np.cumsum(history.num_loss + history.num_grad)
            axis.plot(spent, history.loss, style, label=row.scheme)
        if problem == "digits":
            axis.set(xscale="log", yscale="log", ylabel="cross-entropy of a minibatch (nats)")
        else:
            axis.set(ylabel="minus log joint density (nats)")
        axis.set(title=problem, xlabel="loss and gradient evaluations")
        axis.legend(frameon=False)
    if "eight schools" in panels:
        (row,) = (r for r in rows if r.problem == "eight schools")
        axis, place = axes[0][-1], np.arange(8)
        axis.errorbar(
            place - 0.12, EFFECTS, ERRORS, fmt="o", capsize=3, label="observed ± standard error"
        )
        axis.plot(place + 0.12, row.result.params["theta"], "D", label="theta at the centre")
        axis.set(title="eight schools", xlabel="school", ylabel="effect (points)", ylim=(-25, 62))
        axis.set_xticks(place, SCHOOLS)
        axis.legend(frameon=False, loc="upper right")
    canvas.savefig(path, dpi=150)
    plt.close(canvas)


def own_figure(rows: list[Row], path: Path) -> None:
    """The course of the run."""
    from matplotlib import pyplot as plt  # noqa: PLC0415

    (row,) = rows
    canvas = plots.optimization(row.result)[0].figure
    canvas.suptitle(f"{row.problem}: {row.scheme}")
    canvas.savefig(path, dpi=150)
    plt.close(canvas)


def results(rows: list[Row], arguments: argparse.Namespace) -> dict[str, Any]:
    """What the results file holds: versions, settings, and every row with its history of losses."""
    return {
        "versions": {
            "numpyro_regloss": __version__,
            "numpyro": numpyro.__version__,
            "jax": jax.__version__,
            "python": platform.python_version(),
        },
        "device": jax.devices()[0].device_kind,
        "settings": {"seed": arguments.seed, "quick": arguments.quick},
        "rows": [
            {
                "problem": row.problem,
                "scheme": row.scheme,
                "loss": row.loss,
                "local_entropy": _numbers(row.local_entropy),
                "heat": _numbers(row.heat),
                "outcome": row.outcome,
                "num_loss": row.num_loss,
                "num_grad": row.num_grad,
                "seconds": row.seconds,
                "rejected_steps": int(np.sum(~row.result.history.ok)),
                "loss_history": row.result.history.loss.tolist(),
            }
            for row in rows
        ],
    }


def _numbers(estimate: values.Estimate) -> dict[str, float | None]:
    numbers = {name: float(value) for name, value in estimate._asdict().items()}
    # JSON has no infinities.
    return {name: value if np.isfinite(value) else None for name, value in numbers.items()}


def load_model(name: str) -> Callable:
    """The function that `module:function` names, from a module that can be imported here."""
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ValueError(f"--model: expected module:function, such as schools:model, got {name}.")
    try:
        found = operator.attrgetter(function)(importlib.import_module(module))
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(
            f"--model: {error}; expected a module here or an installed one."
        ) from error
    if not callable(found):
        raise TypeError(
            f"--model: expected a NumPyro model, a function, got {type(found).__name__} as {name}."
        )
    return found


def load_data(path: Path | None, model: Callable) -> dict[str, Any]:
    """Arguments of a model from a file of NumPy; arrays without dimensions are numbers."""
    data: dict[str, Any] = {}
    if path is not None:
        try:
            with np.load(path) as file:
                data = {name: array if array.ndim else array.item() for name, array in file.items()}
        except (ValueError, AttributeError, TypeError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"--data: expected a file of np.savez(file, y=y, ...) with arrays of numbers, got {path}: {error}"
            ) from error
    try:
        inspect.signature(model).bind(**data)
    except TypeError as error:
        raise ValueError(
            f"--data: {error}; the model has the arguments {inspect.signature(model)}, the file has "
            f"{', '.join(data) or 'no arrays'}."
        ) from error
    return data


def own_model(rng_key: jax.Array, arguments: argparse.Namespace) -> tuple[Row, str, Any]:
    """Minimizes the local entropy of a model; its row, its sites as text, and the last draws for ArviZ."""
    import arviz as az  # noqa: PLC0415

    model = load_model(arguments.model)
    loss = Loss.from_model(model, **load_data(arguments.data, model))
    # Before the run: names that ArviZ takes for its own axes have others there, and the rest must fit.
    rename = {name: f"{name}_" for name in loss.names if name in RESERVED}
    label_sites(loss, loss.bind(), "--model", rename=rename)
    optimizer = schemes.local_entropy(loss, tau=arguments.tau)

    def outcome(params: Any) -> str:
        return f"{loss.dim} parameters, {len(params)} sites"

    name = arguments.model, "local entropy, Auto"
    steps = 10 if arguments.quick else arguments.steps
    row = _run(rng_key, name, optimizer, steps, outcome, arguments, until=Arrived())
    draws = to_arviz(row.result, optimizer, rename=rename)
    return row, f"Draws of q, around the last centre:\n{az.summary(draws, kind='stats')}", draws


def _write(path: Path, save: Callable[[Path], object]) -> Path:
    # Under another name first: a file that has the name is whole.
    unfinished = path.with_name(f".unfinished-{path.name}")
    try:
        save(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def main(argv: list[str] | None = None) -> int:
    """Runs the jobs.

    Args:
        argv: command-line arguments; default: those of the process.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(
        prog="python -m numpyro_regloss",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument(
        "--problem",
        choices=("all", "digits", "eight-schools"),
        help="which of the problems to run (default: all)",
    )
    parser.add_argument("--model", metavar="MODULE:FUNCTION", help="your own NumPyro model instead")
    parser.add_argument("--data", type=Path, metavar="FILE", help="its arguments, by np.savez")
    parser.add_argument(
        "--tau",
        type=float,
        default=1.0,
        help="variance of its regularizer, of unconstrained parameters (default: 1)",
    )
    parser.add_argument(
        "--steps", type=int, default=200, help="outer steps of it at most (default: 200)"
    )
    parser.add_argument(
        "--out", type=Path, help="folder for the files (default: a new folder here)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer steps and samples, for a first look"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument("--no-progress", action="store_true", help="no progress bars")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    arguments = parser.parse_args(argv)
    if arguments.model and arguments.problem:
        parser.error("expected --model or --problem, got both.")
    if arguments.data and not arguments.model:
        parser.error("expected --model with --data: the file has the arguments of a model.")
    try:
        with warnings.catch_warnings(record=True) as noted:
            try:
                _carry_out(arguments)
            finally:
                # Behind the report, and without the line of this file that they came from.
                sys.stderr.writelines(f"Warning: {one.message}\n" for one in noted)
    except Exception as error:
        if arguments.traceback:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"{parser.prog}: {text} (--traceback shows where)", file=sys.stderr)
        return 1
    return 0


def _carry_out(arguments: argparse.Namespace) -> None:
    out = arguments.out or Path(f"regloss-{datetime.datetime.now():%Y%m%d-%H%M%S}")
    # Before the work, which may take long.
    own = arguments.model is not None
    jobs = {"digits": digits, "eight-schools": schools}
    chosen = {n: job for n, job in jobs.items() if not own and arguments.problem in (None, n)}
    needed = {"matplotlib": "plots"} | ({"h5netcdf": "netcdf"} if own else {})
    for name, extra in (needed | ({"sklearn": "demo"} if "digits" in chosen else {})).items():
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"expected the package {name}: install numpyro_regloss[{extra}].")
    out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()
    importlib.import_module("matplotlib").use("Agg")
    rng_key, saved = random.key(arguments.seed), {}
    if own:
        row, sites, draws = own_model(rng_key, arguments)
        rows, text, drawer = [row], f"{table([row])}\n\n{sites}", own_figure
        report = f"{row.report}\n\n{text}\n"
        saved["report.txt"] = lambda path: path.write_text(report)
        saved["draws.nc"] = lambda path: draws.to_netcdf(str(path))
    else:
        rows = [row for job in chosen.values() for row in job(rng_key, arguments)]
        text, drawer = table(rows), figure
    print(f"\n{text}\n")
    numbers = json.dumps(results(rows, arguments), indent=1) + "\n"
    saved["results.json"] = lambda path: path.write_text(numbers)
    saved["figure.png"] = lambda path: drawer(rows, path)
    written = [_write(out / name, save) for name, save in saved.items()]
    print(f"Wrote {', '.join(map(str, written))}.")


if __name__ == "__main__":
    raise SystemExit(main())
