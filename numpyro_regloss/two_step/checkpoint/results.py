# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Results of runs as files of NumPy arrays, without pickle."""

import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_regloss.two_step.checkpoint.fingerprint import host, types_of
from numpyro_regloss.two_step.checkpoint.keeper import write_whole
from numpyro_regloss.two_step.motion import scalars_of
from numpyro_regloss.two_step.optimizer import TwoStep
from numpyro_regloss.two_step.outer_step import first_state, row_of_history
from numpyro_regloss.two_step.result import TwoStepResult

__all__ = ["load", "save"]

FORMAT = "numpyro_regloss result, 1"


def save(result: TwoStepResult, path: str | os.PathLike) -> None:
    """Writes a result to one file, whole or not at all.

    The file is a zip archive of NumPy's (`numpy.load` opens it), whatever its name; one that is there is replaced.
    Parameters follow from the state and are not written.

    Args:
        result: of `TwoStep.run`.
        path: of the file.

    Raises:
        TypeError: if it is no result.
        ValueError: if it is of several runs.
        OSError: if the file cannot be written.

    Example:
        >>> import tempfile
        >>> from numpyro_regloss import Loss, schemes
        >>> loss = Loss.from_function(lambda x: jnp.sum((x - 1.0) ** 2), jnp.zeros(2))
        >>> optimizer = schemes.heat(loss, tau=0.1)
        >>> result = optimizer.run(jax.random.key(0), 5, progress_bar=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(result, f"{folder}/result.npz")
        ...     again = load(f"{folder}/result.npz", optimizer)
        >>> bool((again.params == result.params).all()), len(again.history.ok)
        (True, 5)
    """
    if not isinstance(result, TwoStepResult):
        raise TypeError(f"save: expected the result of TwoStep.run, got {type(result).__name__}.")
    if np.ndim(result.history.ok) != 1:
        raise ValueError(
            f"save: expected the result of one run, got a history of shape {np.shape(result.history.ok)}; save "
            "one at a time, jax.tree.map(lambda a: a[0], result)."
        )
    row = jax.eval_shape(lambda history: jax.tree.map(lambda a: a[0], history), result.history)
    header = {
        "format": FORMAT,
        "types": types_of("state", result.state) | types_of("history", row),
        "vectors": result.history.motion is None,
        "steps": len(result.history.ok),
        "key": str(jax.random.key_impl(result.state.rng_key)),
        "stopped": result.stopped,
    }
    arrays = {"header": np.frombuffer(json.dumps(header).encode(), np.uint8)}
    for name, tree in (("state", result.state), ("history", result.history)):
        # As bytes: NumPy's format has no name for bfloat16.
        leaves = (np.ascontiguousarray(host(leaf)) for leaf in jax.tree.leaves(tree))
        arrays |= {f"{name}_{i}": a.reshape(-1).view(np.uint8) for i, a in enumerate(leaves)}
    if result.seconds is not None:
        arrays["seconds"] = result.seconds
    if result.path is not None:
        arrays["path_steps"], arrays["path_centers"] = result.path
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    write_whole(Path(path), buffer.getvalue())


def load(path: str | os.PathLike, optimizer: TwoStep, *args: Any, **kwargs: Any) -> TwoStepResult:
    """Reads a result that `save` wrote.

    Args:
        path: of the file.
        optimizer: that ran, or one of the same engines and shapes: the file has numbers, the optimizer names.
        *args: arguments of the loss in place of the bound ones.
        **kwargs: keyword arguments over the bound ones.

    Returns:
        The result, with the same bits.

    Raises:
        TypeError: if the optimizer is none.
        ValueError: if the file is damaged or something else, or belongs to another optimizer.
        OSError: if it cannot be read.
    """
    if not isinstance(optimizer, TwoStep):
        raise TypeError(
            f"load: expected the TwoStep of the run as second argument, got {type(optimizer).__name__}."
        )
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = dict(file)
        header = json.loads(arrays["header"].tobytes())
        known = header["format"]
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"load: expected a file of numpyro_regloss.save, got {path}, which is damaged or something else "
            f"({type(error).__name__}: {error})."
        ) from error
    if known != FORMAT:
        raise ValueError(f"load: expected {FORMAT!r} in {path}, got {known!r}.")
    arguments = optimizer.loss.bind(args, kwargs)
    key = jax.random.key(0, impl=header["key"])
    state = first_state.eval_shape(optimizer, key, arguments)
    row = row_of_history(optimizer, state, arguments)
    if not header["vectors"]:
        row = jax.eval_shape(scalars_of, row, state.reference)
    here, there = types_of("state", state) | types_of("history", row), header["types"]
    for name in (*here, *(name for name in there if name not in here)):
        old, new = there.get(name, "nothing"), here.get(name, "nothing")
        if old != new:
            raise ValueError(
                f"load: expected the optimizer of the run in {path}, which differs in {name}: there {old}, here "
                f"{new}; build the optimizer as it was, with the same engines and precision."
            )
    history = _tree("history", row, arrays, (header["steps"],))
    state = _tree("state", state, arrays, ())
    kept = (arrays["path_steps"], arrays["path_centers"]) if "path_steps" in arrays else None
    return TwoStepResult(
        params=optimizer.get_params(state, *args, **kwargs),
        state=state,
        history=history,
        seconds=arrays.get("seconds"),
        stopped=header["stopped"],
        path=kept,
    )


def _tree(name: str, like: Any, arrays: dict[str, np.ndarray], axes: tuple[int, ...]) -> Any:
    shapes, structure = jax.tree.flatten(like)
    leaves = []
    for i, shape in enumerate(shapes):
        data = arrays[f"{name}_{i}"]
        if jnp.issubdtype(shape.dtype, jax.dtypes.prng_key):
            inner = jax.eval_shape(jax.random.key_data, shape)
            array = jnp.asarray(data.view(inner.dtype).reshape(axes + inner.shape))
            leaves.append(jax.random.wrap_key_data(array, dtype=shape.dtype))
        else:
            array = data.view(shape.dtype).reshape(axes + shape.shape)
            leaves.append(array if axes else jnp.asarray(array))
    return jax.tree.unflatten(structure, leaves)
