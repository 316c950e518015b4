# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Draws the figure of forward_or_reverse.md: `python docs/forward_or_reverse.py`."""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax import random

from numpyro_regloss import Gaussian, Loss, RegularizedLoss, forward_kl, reverse_kl, shift


def skewed(x):
    """Minus the log density of log(y), y ~ Gamma(0.6, 1)."""
    return jnp.sum(jnp.exp(x) - 0.6 * x)


def two_modes(x):
    """Minus the log density of 0.65 N(-2, 0.6²) + 0.35 N(2, 0.6²)."""
    parts = [jnp.log(w) - jnp.sum((x - m) ** 2) / 0.72 for w, m in ((0.65, -2.0), (0.35, 2.0))]
    return -jnp.logaddexp(*parts)


def both(fn, seed):
    """The density on a grid and the best Gaussian in either direction."""
    loss = Loss.from_function(fn, np.zeros(1))
    target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, tau=25.0))
    engine = shift.Importance(20_000)
    draws = engine.step(random.key(seed), (), target)[1]
    forward, _ = forward_kl(draws)
    near = forward._replace(
        mean=forward.mean - 1.0
    )  # a start to one side, which decides between modes
    reverse, _ = reverse_kl(random.key(seed), target, init=near)
    grid = np.linspace(-6.5, 5.0, 1_000)
    log_density = np.asarray(jax.vmap(target.log_density)(jnp.asarray(grid)[:, None]))
    density = np.exp(log_density - log_density.max())
    return grid, density / np.trapezoid(density, grid), forward, reverse


def main():
    """Writes the figure beside this file."""
    figure, axes = plt.subplots(1, 2, figsize=(9.0, 3.2), layout="constrained")
    for axis, fn, title in zip(axes, (skewed, two_modes), ("skewed", "two modes"), strict=True):
        grid, density, forward, reverse = both(fn, 0)
        axis.fill_between(grid, density, color="0.85", label="q")
        points = jnp.asarray(grid)[:, None]
        lines = (
            (forward, "#0072B2", "-", "KL(q ‖ N), forward"),
            (reverse, "#D55E00", "--", "KL(N ‖ q), reverse"),
        )
        for gaussian, color, style, label in lines:
            height = np.exp(np.asarray(gaussian.log_prob(points)))
            axis.plot(grid, height, color=color, linestyle=style, linewidth=2, label=label)
        axis.set(
            title=title, xlabel="x", ylabel="density", xlim=(grid[0], grid[-1]), ylim=(0, None)
        )
    axes[1].legend(frameon=False, loc="upper right")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
