# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Data and networks of `training.py`, and what is measured of a network on test images."""

from pathlib import Path

import jax
import jax.numpy as jnp
from network_price import images, start
from overhead import logits, network

from numpyro_regloss import Loss

NUM_BINS = 15


class Task:
    """Images and labels, and networks of one hidden layer from a start for every seed."""

    def __init__(self, path, *, smoke=False):
        data = images(path)
        if smoke:
            data = [a[:300] for a in data]
        self.name = "digits" if path is None else Path(path).stem
        self.x, self.y, self.x_test, self.y_test = map(jnp.asarray, data)
        self.num_inputs = self.x.shape[1]

    def loss(self, seed, hidden, minibatch=None, function=network, params=None):
        if params is None:
            params = start(seed, self.num_inputs, hidden)
        return Loss.from_function(function, params, self.x, self.y, minibatch=minibatch)

    def tested(self, params):
        """Accuracy and calibration error in per cent, and mean negative log-likelihood, on the test images."""
        found = measured(logits(params, self.x_test), self.y_test)
        return {name: float(value) for name, value in found.items()}


@jax.jit
def measured(outputs, labels):
    """Of predicted logits: accuracy, likelihood, and the expected calibration error over 15 equal bins."""
    logs = jax.nn.log_softmax(outputs)
    confidence, guess = jnp.exp(logs.max(-1)), logs.argmax(-1)
    right = (guess == labels).astype(outputs.dtype)
    bins = jnp.clip((NUM_BINS * confidence).astype(int), 0, NUM_BINS - 1)
    # |accuracy - mean confidence| of each bin, weighed by its share of the images.
    gaps = jnp.abs(jax.ops.segment_sum(right - confidence, bins, NUM_BINS))
    picked = jnp.take_along_axis(logs, labels[:, None], 1)
    return {
        "accuracy": 100.0 * right.mean(),
        "NLL": -picked.mean(),
        "ECE": 100.0 * gaps.sum() / len(labels),
    }
