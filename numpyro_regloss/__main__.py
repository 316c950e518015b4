# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""The main job: both regularized losses on real data, with a table, a figure and a results file."""

import argparse
import datetime
import json
import platform
import time
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
    Loss,
    Minibatch,
    RegularizedLoss,
    TwoStep,
    TwoStepResult,
    __version__,
    diagnostics,
    fit,
    schemes,
    shift,
    values,
)

DESCRIPTION = """\
Minimizes local-entropy and heat regularized losses on real data and reports what they reached:

  digits         a 64-32-10 tanh network on scikit-learn's 1,797 handwritten digits, trained without
                 gradients by local entropy (importance sampling) and with heat regularization
                 (Robbins-Monro)
  eight-schools  Rubin's eight schools as an ordinary constrained NumPyro model, minimized by local
                 entropy with NUTS

Prints a table and writes results.json and figure.png to the output folder. Takes about a minute and a
half on two cores."""

SCHOOLS = ("A", "B", "C", "D", "E", "F", "G", "H")
EFFECTS = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


class Row(NamedTuple):
    """One line of the table; `history` and `params` go to the figure and the results file."""

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


def digits(rng_key: jax.Array, *, quick: bool, progress_bar: bool) -> list[Row]:
    """Trains the network twice from one start: without gradients, and with heat regularization."""
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(
            "The digits come with scikit-learn: install numpyro_regloss[demo]."
        ) from error
    inputs, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    inputs, labels = (inputs / 16).astype(np.float32)[order], labels.astype(np.int32)[order]
    num_train = 1437
    train = inputs[:num_train], labels[:num_train]
    test = inputs[num_train:], labels[num_train:]
    key_params, key_run = random.split(rng_key)
    params = start_params(key_params)

    # The loss is averaged, so the temperature is in nats per image. The gradient-free run needs one at
    # which a cloud of a thousand networks still has some of comparable weight.
    gradient_free = schemes.local_entropy(
        Loss.from_function(cross_entropy, params, *train, minibatch=Minibatch(256)),
        tau=0.01,
        temperature=0.02,
        shift=shift.Importance(num_samples=500 if quick else 1000),
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
        ("local entropy, Importance", gradient_free, 60 if quick else 400),
        ("heat, RobbinsMonro", with_gradients, 150 if quick else 800),
    )
    return [
        _run(
            key_run,
            "digits",
            name,
            optimizer,
            steps,
            outcome,
            quick=quick,
            progress_bar=progress_bar,
        )
        for name, optimizer, steps in jobs
    ]


def schools(rng_key: jax.Array, *, quick: bool, progress_bar: bool) -> list[Row]:
    """Minimizes minus the log joint density of the model, regularized."""
    loss = Loss.from_model(eight_schools, 8, ERRORS, effects=EFFECTS)
    optimizer = schemes.local_entropy(
        loss, tau=1.0, shift=shift.NUTS(num_warmup=200, num_samples=100, num_chains=4)
    )

    def outcome(params: Any) -> str:
        return f"mu {params['mu']:.2f}, tau {params['tau']:.2f}"

    steps = 10 if quick else 40
    name = "local entropy, NUTS"
    return [
        _run(
            rng_key,
            "eight schools",
            name,
            optimizer,
            steps,
            outcome,
            quick=quick,
            progress_bar=progress_bar,
        )
    ]


def _run(
    rng_key: jax.Array,
    problem: str,
    scheme: str,
    optimizer: TwoStep,
    num_steps: int,
    outcome: Callable[[Any], str],
    *,
    quick: bool,
    progress_bar: bool,
) -> Row:
    print(f"{problem}: {scheme}, {num_steps} outer steps")
    start = time.perf_counter()
    result = optimizer.run(rng_key, num_steps, progress_bar=progress_bar)
    seconds = time.perf_counter() - start
    print(f"{diagnostics.summary(result, optimizer)}\n")
    target = RegularizedLoss(
        optimizer.loss, result.state.reference, temperature=optimizer.temperature
    )
    key_entropy, key_heat = random.split(random.fold_in(rng_key, num_steps))
    num_samples = 1000 if quick else 4000
    return Row(
        problem=problem,
        scheme=scheme,
        loss=float(target.value(target.reference.mean)),
        local_entropy=values.local_entropy(key_entropy, target, num_samples=num_samples),
        heat=values.heat(key_heat, target, num_samples=num_samples),
        outcome=outcome(result.params),
        num_loss=int(result.history.num_loss.sum()),
        num_grad=int(result.history.num_grad.sum()),
        seconds=seconds,
        result=result,
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
    known = 0 < estimate.error < np.inf
    decimals = int(np.clip(1 - np.floor(np.log10(estimate.error)), 0, 8)) if known else 4
    return f"{estimate.value:.{decimals}f} ± {estimate.error:.{decimals}f}"


def figure(rows: list[Row], path: Path) -> None:
    """Loss at the centre over evaluations for each run, and the schools' effects."""
    try:
        import matplotlib  # noqa: PLC0415
    except ImportError as error:
        raise ImportError("The figure needs matplotlib: install numpyro_regloss[plots].") from error
    matplotlib.use("Agg")
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
        default="all",
        help="what to run (default: all)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for results.json and figure.png (default: a new folder here)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer steps and samples, for a first look"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument("--no-progress", action="store_true", help="no progress bars")
    arguments = parser.parse_args(argv)

    out = arguments.out or Path(f"regloss-{datetime.datetime.now():%Y%m%d-%H%M%S}")
    out.mkdir(parents=True, exist_ok=True)
    jobs = {"digits": digits, "eight-schools": schools}
    chosen = jobs if arguments.problem == "all" else {arguments.problem: jobs[arguments.problem]}
    rows = [
        row
        for job in chosen.values()
        for row in job(
            random.key(arguments.seed),
            quick=arguments.quick,
            progress_bar=not arguments.no_progress,
        )
    ]
    print(f"\n{table(rows)}\n")
    (out / "results.json").write_text(json.dumps(results(rows, arguments), indent=1) + "\n")
    figure(rows, out / "figure.png")
    print(f"Wrote {out / 'results.json'} and {out / 'figure.png'}.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
