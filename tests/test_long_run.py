# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Many outer steps of a small problem: nothing compiles, memory is that of the history, time is constant."""

import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import with_long
from harness import count_compiles
from jax import random

from numpyro_regloss import Loss, TwoStep, fit, shift
from numpyro_regloss.two_step import chunks
from numpyro_regloss.two_step import optimizer as two_step

MEMORY = Path("/proc/self/statm")
PAGE = 4096
# Room grows twofold, so that old and new hold three times the rows while one is copied to the other; the rest
# is for the allocators of Python and JAX. A buffer of the device kept per step takes 700 MB.
TIMES_HISTORY, SLACK = 3, 16 * 2**20
# Cost in proportion to the steps done would be seven times as high in the last quarter as in the first.
# Other work on the machine only adds time, so lower quartiles are compared, of ten chunks or more.
MOST_GROWTH = 2.0

# Steps, seconds per chunk and callback: chunks of full length, of single steps as for a slow loss, callbacks.
MODES = {
    "chunks": (20_000, chunks.SECONDS_PER_CHUNK, None),
    "slow": (1_500, 0.0, None),
    "callback": (2_500, chunks.SECONDS_PER_CHUNK, lambda *_: None),
}


@pytest.mark.skipif(not MEMORY.exists(), reason="reads the memory of a process as Linux tells it")
@pytest.mark.parametrize("mode", with_long(MODES, {"slow", "callback"}))
def test_many_steps_cost_no_more_than_few_each(mode, monkeypatch):
    num_steps, seconds, callback = MODES[mode]
    monkeypatch.setattr(chunks, "SECONDS_PER_CHUNK", seconds)
    # Chunks that grow with the run would take longer each.
    monkeypatch.setattr(chunks, "SHARE", 0.0)
    stamps, memory = [], []

    def look(*_):
        stamps.append(time.perf_counter())
        memory.append(int(MEMORY.read_text().split()[1]) * PAGE)
        return {}

    loss = Loss.from_function(lambda x: jnp.sum((x - 1.0) ** 2), np.zeros(2))
    optimizer = TwoStep(loss, 0.1, shift.Importance(16), fit.ForwardKL())
    optimizer.run(random.key(0), 600, progress_bar=False, callback=callback)
    monkeypatch.setattr(two_step, "headline", look)
    with count_compiles() as compiled:
        result = optimizer.run(random.key(0), num_steps, progress_bar=False, callback=callback)
    assert compiled == []
    assert result.history.ok.shape == (num_steps,)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(result.history))
    assert max(memory) - memory[0] < TIMES_HISTORY * size + SLACK
    # The first chunks, of 1, 2, 4, … steps, and the last are shorter than the others.
    elapsed = np.diff(stamps)[10:-1]
    first, last = (np.quantile(quarter, 0.25) for quarter in np.array_split(elapsed, 4)[::3])
    assert last < MOST_GROWTH * first
