# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Which sites of a NumPyro model are data: what a likelihood counts, and what follows the rows of a batch.

NumPyro observes priors too: a factor may be a prior by hand, and reparametrizers such as `NeuTraReparam` and
`CircularReparam` move the density of a latent site into one. What a site is shows in the traced model: in the
arguments on which its terms depend, and in their number for all rows and for those of a batch.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.interpreters import partial_eval

from numpyro_regloss._core.pytree import Partition
from numpyro_regloss.losses.minibatch import take_rows

__all__ = ["check_rows", "likelihood_sites", "row_sites"]

# Log densities of the same rows in two programs differ by rounding; an average in place of a sum, or data that
# are standardized batch by batch, by far more.
TOLERANCE = 1e-3
HOW_TO_WRITE = (
    "write it with one term per row: numpyro.sample(..., obs=...) or numpyro.factor with one value per row, "
    "inside of numpyro.plate(name, len(rows)) and without to_event"
)


class _Term(NamedTuple):
    """One sample site: its kind, the shape of its log density, and the arguments behind that and its data."""

    kind: str
    shape: tuple[int, ...]
    inputs: frozenset[int]
    data: frozenset[int]


def likelihood_sites(source: Any, arguments: Partition) -> tuple[str, ...]:
    """The sites that `density="likelihood"` counts: observed ones, and factors of the data.

    A factor that depends on no argument is a prior. One that depends on arguments belongs to the data if
    observed sites have their data from the same arguments, or if there is nothing else that has data.

    Args:
        source: of the model; its `terms` runs it.
        arguments: its `(args, kwargs)`.

    Returns:
        Their names, sorted.

    Raises:
        ValueError: if there are none, or if a factor could be either.
    """
    terms = _terms(source, arguments)
    observed = {name for name, term in terms.items() if term.kind == "observed"}
    factors = {name: t.inputs for name, t in terms.items() if t.kind == "factor" and t.inputs}
    data = frozenset().union(*(terms[name].data for name in observed))
    if not data and factors:
        data = frozenset.intersection(*factors.values())
    unclear = sorted(name for name, inputs in factors.items() if not inputs & data)
    if unclear:
        raise ValueError(
            f"Loss.from_model: expected factors of the data for density='likelihood', got {unclear}, which depend "
            "on other arguments than the observed sites and could be priors. Write a likelihood as "
            "numpyro.sample(..., obs=...); bind the arguments of a prior with functools.partial(model, ...)."
        )
    counted = tuple(sorted(observed | set(factors)))
    if not counted:
        raise ValueError(
            "Loss.from_model: expected observed sites for density='likelihood', got none; pass the data as "
            "arguments (obs=...; a factor that depends on no argument is a prior), or use density='joint'."
        )
    return counted


def row_sites(
    source: Any, arguments: Partition, batch: Partition, is_row: tuple[bool, ...]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The sites that follow the rows of a minibatch, and so count `rows / batch_size` times.

    Args:
        source: of the model; its `terms` runs it.
        arguments: the full `(args, kwargs)`.
        batch: shapes of those of a batch.
        is_row: which of the traced arguments are rows.

    Returns:
        Their names, sorted, and those of all observed sites but factors.

    Raises:
        ValueError: if no site follows the rows, or if one depends on them in another way.
    """
    full, part = _terms(source, arguments), _terms(source, batch)
    rows = frozenset(i for i, flag in enumerate(is_row) if flag)
    sizes = [
        (a.shape[0], b.shape[0])
        for a, b, flag in zip(arguments.leaves, batch.leaves, is_row, strict=True)
        if flag
    ]
    num_rows, batch_size = sizes[0]
    found = []
    for name, term in full.items():
        depends = bool(term.inputs & rows)
        if term.kind in ("latent", "reparametrized"):
            if depends:
                raise ValueError(
                    "Loss.from_model: expected priors that do not depend on the rows of the minibatch, got the "
                    f"site {name!r}, whose prior does; compute what it needs from all rows beforehand, and pass "
                    "it as an argument of its own that is no data (argnums, argnames)."
                )
            continue
        size = math.prod(term.shape)
        batch_terms = math.prod(part[name].shape) if name in part else 0
        # A batch of all rows has no other number of terms by which to tell.
        follows = depends if num_rows == batch_size else batch_terms != size
        if size == 0:
            continue
        if follows and batch_terms * num_rows == size * batch_size:
            found.append(name)
        elif follows or depends:
            raise ValueError(
                f"Loss.from_model: expected {term.kind} sites whose size follows the rows of the minibatch, got "
                f"{name!r} with {size} terms for {num_rows} rows and {batch_terms} for {batch_size}, so that its "
                f"share of a batch is not known; {HOW_TO_WRITE}; take plate sizes from the data (len(y)), and "
                "name the data with argnums."
            )
    if not found:
        raise ValueError(
            "Loss.from_model: expected observed sites whose size follows the rows of the minibatch, got none; "
            f"{HOW_TO_WRITE}, and name the data with argnums."
        )
    observed = tuple(sorted(name for name, term in full.items() if term.kind == "observed"))
    return tuple(sorted(found)), observed


def check_rows(
    source: Any, arguments: Partition, is_row: tuple[bool, ...], batch_size: int
) -> None:
    """Refuses models in which the same row has another log density in a batch than among all rows.

    Args:
        source: of the model; its `terms` runs it.
        arguments: the full `(args, kwargs)`, as values.
        is_row: which of the traced arguments are rows.
        batch_size: rows per batch.

    Raises:
        ValueError: if terms of a site change with the batch.
    """
    x = jnp.sin(1.0 + jnp.arange(source.dim, dtype=float))
    flags, first = iter(is_row), jnp.arange(batch_size)
    batch = arguments.map(lambda leaf: take_rows(leaf, first) if next(flags) else leaf)
    full, part = _log_probs(source, x, arguments), _log_probs(source, x, batch)
    for kind, sites in full.items():
        for name, site in sites.items():
            terms, others = np.asarray(site["terms"]), np.asarray(part[kind][name]["terms"])
            axes = [a for a, (m, n) in enumerate(zip(terms.shape, others.shape)) if m != n]  # noqa: B905
            if len(terms.shape) != len(others.shape) or len(axes) > 1:
                continue
            for axis in axes:
                terms = terms.take(range(others.shape[axis]), axis)
            with np.errstate(invalid="ignore"):
                apart = np.abs(terms - others) > TOLERANCE * (1.0 + np.abs(terms))
            if apart.any():
                raise ValueError(
                    "Loss.from_model: expected log densities that do not change with the minibatch, got "
                    f"{kind} site {name!r}, where the same row has {terms[apart][0]:.6g} among all rows and "
                    f"{others[apart][0]:.6g} in a batch. Standardize data before they are bound, do not divide by "
                    "the number of rows in the model (put 1 / rows into temperature), and draw no noise per row."
                )


def _terms(source: Any, arguments: Partition) -> dict[str, _Term]:
    x = jnp.zeros(source.dim, float)
    jaxpr, shapes = jax.make_jaxpr(_log_probs, return_shape=True)(source, x, arguments)
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(shapes)[0]]
    count = len(arguments.leaves)

    def inputs(*wanted: Any) -> frozenset[int]:
        used = [any(path[: len(w)] == w for w in wanted) for path in paths]
        flags = partial_eval.dce_jaxpr(jaxpr.jaxpr, used)[1][-count:] if count else []
        return frozenset(i for i, flag in enumerate(flags) if flag)

    terms = {}
    for kind, sites in shapes.items():
        for name, site in sites.items():
            key = (jax.tree_util.DictKey(kind), jax.tree_util.DictKey(name))
            terms_key = (*key, jax.tree_util.DictKey("terms"))
            data_key = (*key, jax.tree_util.DictKey("data"))
            depends = inputs(key) if kind == "latent" else inputs(terms_key)
            data = inputs(data_key) if kind == "observed" else frozenset()
            terms[name] = _Term(kind, site["terms"].shape, depends, data)
    return terms


# Traces are remembered per shape: new data of equal shapes run the model no more.
@jax.jit
def _log_probs(source: Any, x: Any, arguments: Partition) -> dict[str, Any]:
    return source.user.call(partial(_by_kind, source), x, arguments)


def _by_kind(source: Any, model: Any, x: Any, arguments: Partition) -> dict[str, Any]:
    log_probs, trace = source.terms(model, x, arguments)
    found: dict[str, Any] = {"latent": {}, "observed": {}, "factor": {}, "reparametrized": {}}
    for name, terms in log_probs.items():
        site = trace[name]
        data = jax.tree.map(jnp.asarray, site["value"])
        found[_kind(site, trace)][name] = {"terms": jnp.asarray(terms), "data": data}
    return found


def _kind(site: dict[str, Any], trace: Any) -> str:
    if not site["is_observed"]:
        return "latent"
    if not isinstance(site["fn"], dist.Unit):
        return "observed"
    return "reparametrized" if _is_prior(site["name"], trace) else "factor"


def _is_prior(name: str, trace: Any) -> bool:
    # NumPyro's reparametrizers make the site itself deterministic and name their factor after it.
    neural = name.removeprefix("_").removesuffix("_log_prob")
    circular = name.removesuffix("_factor")
    return (
        name == f"_{neural}_log_prob"
        and trace.get(neural, {}).get("type") == "deterministic"
        or name == f"{circular}_factor"
        and f"{circular}_unwrapped" in trace
    )
