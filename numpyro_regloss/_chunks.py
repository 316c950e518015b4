# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""The one mechanism for progress, callbacks, early stopping and Ctrl-C: chunks of compiled steps."""

import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

__all__ = ["history_capacity", "run_in_chunks"]

# A chunk runs about this long, so that the bar moves and Ctrl-C answers, at a negligible cost.
SECONDS_PER_CHUNK = 0.25
# Room for the history of one chunk on the device: at most so many bytes and so many steps.
CHUNK_BYTES = 2**23
CHUNK_STEPS = 512


def history_capacity(row: Any) -> int:
    """How many steps a chunk may have.

    Args:
        row: shapes and types of one step's info.

    Returns:
        The largest number of steps per chunk; it does not depend on how many steps are run.
    """
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(row))
    return max(1, min(CHUNK_STEPS, CHUNK_BYTES // max(size, 1)))


def run_in_chunks(
    advance: Callable[[Any, int], tuple[Any, Any]],
    state: Any,
    num_steps: int,
    capacity: int,
    callback: Callable[[Any, Any], bool | None] | None,
    headline: Callable[[Any], dict[str, str]],
    *,
    progress_bar: bool,
) -> tuple[Any, Any]:
    """Advances a state chunk by chunk and collects the history on the host.

    Args:
        advance: `(state, count)` -> state after `count` steps and buffers whose first `count` rows are
            the infos of those steps.
        state: where to start.
        num_steps: steps to do.
        capacity: steps per chunk at most.
        callback: called after every chunk with the state and the info of its last step; true stops.
        headline: what the bar shows of an info.
        progress_bar: whether there is a bar.

    Returns:
        The last state, and the infos stacked as NumPy arrays. After Ctrl-C: what there is, with a warning.

    Raises:
        KeyboardInterrupt: if it came before the first chunk was done.
    """
    chunk, done, past = 1, 0, (state, None)
    with tqdm(total=num_steps, disable=not progress_bar, desc="two-step") as bar:
        try:
            while done < num_steps:
                count = min(chunk, num_steps - done)
                start = time.perf_counter()
                after, buffers = advance(past[0], count)
                infos = jax.tree.map(lambda a, n=count: a[:n], jax.device_get(buffers))
                seconds = (time.perf_counter() - start) / count
                chunk = int(np.clip(SECONDS_PER_CHUNK / seconds, 1, min(2 * count, capacity)))
                # One assignment, so that an interrupt cannot part the state from its history.
                past = (after, (infos, past[1]))
                done += count
                last = jax.tree.map(lambda a: a[-1], infos)
                bar.set_postfix(headline(last), refresh=False)
                bar.update(count)
                if callback is not None and callback(after, last):
                    break
        except KeyboardInterrupt:
            if past[1] is None:
                raise
            message = f"TwoStep.run: interrupted after {done} of {num_steps} steps."
            warnings.warn(message, stacklevel=3)
    (state, link), rows = past, []
    while link is not None:
        infos, link = link
        rows.append(infos)
    return state, jax.tree.map(lambda *parts: np.concatenate(parts), *reversed(rows))
