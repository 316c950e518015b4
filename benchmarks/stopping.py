# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Does `Arrived` stop runs too early, and how late does it stop them?

Runs of four families from starts that are off, looked at after every ten steps as by `run(until=Arrived())`.
The truth at a window is known from repetitions of it with other keys, from the same state: the mean of their
pulls is the pull that the window estimates, and the scatter of their first steps is the noise. A run stops too
early if that pull is longer than the noise of a step, and is not negligible. The delay counts steps from the end
of the first window whose true pull is short, of the first runs alone. All runs of a family are one program.
"""

import statistics
from functools import partial

import harness
import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from targets import breast_cancer

from numpyro_regloss import Arrived, Loss, Minibatch, TwoStep, fit, problems, schemes, shift
from numpyro_regloss.two_step.until import NEGLIGIBLE, pulls

RULE = Arrived()
# Runs whose true pull is known at every window.
FOLLOWED = 16
CURVATURE = np.geomspace(0.1, 10.0, 5)


def quadratic():
    loss = Loss.from_function(lambda x, h: jnp.sum(h * x**2) / 2, np.full(5, 3.0), CURVATURE)
    return TwoStep(loss, 0.5, shift.Importance(400), fit.ForwardKL())


def regression():
    fn, start, data = breast_cancer()
    loss = Loss.from_function(fn, start, *data)
    return TwoStep(loss, 0.1, shift.AdaptiveImportance(128), fit.ForwardKL())


def double_well():
    problem = problems.double_well(10)
    loss = Loss.from_function(problem.loss, np.linspace(-0.5, 0.7, 10))
    return TwoStep(loss, 0.1, shift.Importance(2_000), fit.ForwardKL())


def classifier(params, inputs, labels):
    logits = jnp.tanh(inputs @ params["w"] + params["b"]) @ params["v"] + params["c"]
    picked = jnp.take_along_axis(logits, labels[:, None], 1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, -1) - picked)


def network():
    from sklearn.datasets import load_digits  # noqa: PLC0415

    inputs, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    params = {
        "w": rng.normal(size=(64, 8)) / 8,
        "b": np.zeros(8),
        "v": rng.normal(size=(8, 10)) / 3,
        "c": np.zeros(10),
    }
    params = {name: a.astype(np.float32) for name, a in params.items()}
    data = inputs.astype(np.float32) / 16, labels.astype(np.int32)
    loss = Loss.from_function(classifier, params, *data, minibatch=Minibatch(128))
    return schemes.heat(loss, tau=0.01, temperature=0.01, fit=fit.RobbinsMonro(num_steps=20))


FAMILIES = {
    "quadratic, 5-d": (quadratic, 100),
    "regression, 30-d": (regression, 60),
    "double well, 10-d": (double_well, 60),
    "minibatch network, 610-d": (network, 120),
}


@jax.jit
def first(optimizer, keys):
    return jax.vmap(optimizer.init)(keys)


@partial(jax.jit, static_argnames="patience")
def advance(optimizer, states, patience):
    return jax.vmap(lambda state: optimizer.scan(state, patience))(states)


@partial(jax.jit, static_argnames="patience")
def truth(optimizer, states, keys, patience):
    """Squared length of the true pull over a window, less its error's, and the variance of one step."""

    def one(state):
        def repeated(key):
            _, history = optimizer.scan(state._replace(rng_key=key), patience)
            sd = jnp.sqrt(history.reference.variance)
            pull = (history.fitted.mean - history.reference.mean) / sd
            return jnp.mean(pull, 0), pull[0]

        means, firsts = jax.lax.map(repeated, keys)
        error = jnp.sum(jnp.var(means, 0, ddof=1)) / len(keys)
        return jnp.sum(jnp.mean(means, 0) ** 2) - error, jnp.sum(jnp.var(firsts, 0, ddof=1))

    return jax.vmap(one)(states)


def short(optimizer, states, seed, repeats):
    keys = random.split(random.key(seed), repeats)
    square, noise = map(np.asarray, truth(optimizer, states, keys, RULE.patience))
    return square <= np.maximum(noise, NEGLIGIBLE)


def take(tree, rows):
    return jax.tree.map(lambda a: a[rows], tree)


def family(make, num_windows, num_runs, num_followed, repeats):
    optimizer = make()
    states = first(optimizer, random.split(random.key(1), num_runs))
    stopped = np.zeros(num_runs, int)
    early = np.zeros(num_runs, bool)
    arrived = np.zeros(num_followed, int)
    for look in range(1, num_windows + 1):
        after, history = advance(optimizer, states, RULE.patience)
        history = jax.device_get(history)
        # Windows of runs that have stopped are passed over; their draws go on unseen.
        holds = np.array([
            not stopped[i] and RULE.holds(take(history, i), look) for i in range(num_runs)
        ])
        if holds.any() or (arrived == 0).any():
            # One size, so one program.
            rows = np.flatnonzero(holds)
            for block in range(0, len(rows), num_followed):
                chosen = np.resize(rows[block : block + num_followed], num_followed)
                ok = short(optimizer, take(states, chosen), look, repeats)
                early[chosen] = ~ok
            followed = short(optimizer, take(states, slice(num_followed)), look, repeats)
            arrived = np.where((arrived == 0) & followed, look, arrived)
        stopped[holds] = look
        states = after
        if stopped.all() and arrived.all():
            break
    done = stopped > 0
    delay = RULE.patience * (stopped[:num_followed] - arrived)[done[:num_followed] & (arrived > 0)]
    length = np.linalg.norm(pulls(take(history, 0))[0].mean(0))
    return {
        "runs": num_runs,
        "stopped": float(done.mean()),
        "too early": float(early[done].mean()) if done.any() else 0.0,
        "median step": float(np.median(RULE.patience * stopped[done])) if done.any() else -1.0,
        "median delay": float(statistics.median(delay)) if len(delay) else 0.0,
        "longest delay": float(max(delay)) if len(delay) else 0.0,
        "last pull, sd": float(length),
    }


def main():
    parser = harness.parser(__doc__)
    parser.add_argument("--runs", type=int, default=1_000)
    parser.add_argument("--families", nargs="*", default=list(FAMILIES), choices=list(FAMILIES))
    args = parser.parse_args()
    rows = []
    for name in args.families[:1] if args.smoke else args.families:
        make, num_windows = FAMILIES[name]
        if args.smoke:
            found = family(make, 2, 4, 2, 3)
        else:
            found = family(make, num_windows, args.runs, min(FOLLOWED, args.runs), 32)
        rows.append({"family": name, **found})
        harness.show("Runs that stop by themselves", rows[-1:])
    harness.show("Runs that stop by themselves", rows)
    harness.save(args.out, {"Runs that stop by themselves": rows})


if __name__ == "__main__":
    main()
