# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Scouts: a few points that walk downhill from draws of the reference, to find modes that the proposal lacks.

A proposal fits one mode of q, and where no draw reaches another one, nothing tells of it. Scouts are evaluated in
the batch of the draws, and each makes one step per round, so that over some rounds a mode is found whose valley
holds a fair part of the reference. The lowest one that is away from the proposal is the witness: some draws of the
mixture come from a Gaussian about it, and their weights tell how much of q is there.

Positions are in coordinates where the reference is N(0, I), and -log q is meant up to a constant.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from numpyro_regloss._core.types import Array
from numpyro_regloss.gaussians.gaussian import AnyGaussian
from numpyro_regloss.shift.adaptive_importance.proposal import Proposal

__all__ = ["UNKNOWN", "Scouts", "led", "moved", "send", "walked"]

# Nearer to the proposal's mean, in its standard deviations, a scout has come to the mode that is known.
NEAR = 3.0
# Of the rise of -log q from the proposal's mean, besides one: so nearly a draw is explained by it.
EXPLAINED = 0.1
# Of -log q above that at the proposal's mean: a Gaussian so high holds a four-hundredth of the other's mass.
HIGHEST = 6.0
# The same, for a place half as dense as the proposal's mean. A q that is nearly the proposal has none so far away.
RIVAL = math.log(2.0)
# Steps after which a scout that found nothing begins anew.
OLDEST = 15
# A round changes the width about the witness at most by the root of this.
MOST_RISE = 30.0
# A step is at most so many lengths of the reference's noise, sqrt(dim).
FARTHEST = 0.5
# Of the length of steps, where -log q fell and where it rose, and its bounds.
LONGER, SHORTER, LONGEST, SHORTEST = 1.5, 0.5, 4.0, 1e-2
# So many rounds scouts walk before a first step is believed, or fewer if so many walks found nothing.
FIRST_ROUNDS, ENOUGH_HOME = 8, 24
# In place of infinity, which has no place in a state.
UNKNOWN = 1e30


class Scouts(NamedTuple):
    """Where they are, and the lowest place away from the proposal.

    Attributes:
        place: the lowest place of each, `(scout, dim)`.
        direction: of descent there, `(scout, dim)`.
        length: of the next step in its units, `(scout,)`.
        potential: -log q at their places, `(scout,)`.
        age: steps since they began, `(scout,)`.
        witness: the lowest place that is not the proposal's, `(dim,)`; the reference's mean if there is none.
        depth: -log q there; `UNKNOWN` if there is none.
        width: of q about it, in units of the proposal's.
        num_rounds: of all scouts, since the first.
        num_home: walks that ended at the proposal's mode, since the first.
    """

    place: Array
    direction: Array
    length: Array
    potential: Array
    age: Array
    witness: Array
    depth: Array
    width: Array
    num_rounds: Array
    num_home: Array

    @property
    def young(self) -> Array:
        """Whether they have not seen enough for a first step to be believed."""
        return (self.num_rounds < FIRST_ROUNDS) & (self.known | (self.num_home < ENOUGH_HOME))

    @property
    def known(self) -> Array:
        """Whether there is a witness."""
        return self.depth < UNKNOWN

    def rivals(self, at_mean: Array) -> Array:
        """Whether q is as good as at the proposal's mean in a place that the proposal does not explain.

        Draws about it have the proposal's shape. Where q has another there, as in the other arm of a thin curve,
        their weights are even and tell of a small part of it.

        Args:
            at_mean: -log q at the proposal's mean.

        Returns:
            A scalar.
        """
        return self.known & (self.depth < at_mean + RIVAL)

    @property
    def next_place(self) -> Array:
        """Where to look next, `(scout, dim)`."""
        return self.place - self.length[:, None] * self.direction

    def expected_rise(self, proposal: Proposal, e: Array) -> Array:
        """Of -log q, from the witness to draws, if q has the width there: `(draw, dim)` -> `(draw,)`."""
        gap = proposal.whitened(e) - proposal.whitened(self.witness[None])
        return 0.5 * jnp.sum((gap / self.width) ** 2, -1)


def send(num_scouts: int, zero: Array) -> Scouts:
    """Scouts that begin where the first draws of the reference are.

    Args:
        num_scouts: how many.
        zero: the reference's mean in its own coordinates, `(dim,)`.

    Returns:
        The scouts.
    """
    each = jnp.zeros(num_scouts, zero.dtype)
    place = jnp.broadcast_to(zero, (num_scouts, zero.size))
    high, one = jnp.full_like(zero[0], UNKNOWN), jnp.ones_like(zero[0])
    none = jnp.asarray(0)
    return Scouts(place, place, each, each + high, each + OLDEST, zero, high, one, none, none)


def moved(scouts: Scouts, old: AnyGaussian, new: AnyGaussian) -> Scouts:
    """The same places in the coordinates of another reference.

    Args:
        scouts: in those of the old one.
        old: the reference of their coordinates.
        new: the next one.

    Returns:
        The scouts.
    """
    before = jnp.concatenate([scouts.place, scouts.witness[None]])
    places = new.whiten(old.unwhiten(before))
    # What they knew of -log q has another regularizer in it: that of where they are, not of where they were.
    change = 0.5 * (jnp.sum(places**2, -1) - jnp.sum(before**2, -1))
    return scouts._replace(
        place=places[:-1],
        potential=jnp.minimum(scouts.potential + change[:-1], UNKNOWN),
        witness=jnp.where(scouts.known, places[-1], 0.0),
        depth=jnp.where(scouts.known, scouts.depth + change[-1], UNKNOWN),
    )


def led(
    scouts: Scouts, before: Proposal, after: Proposal, share: Array, at_mean: Array
) -> tuple[Proposal, Array, Array]:
    """The proposal about the witness where most of q is there, and else as it was adapted.

    Args:
        scouts: of the round.
        before: the proposal that drew.
        after: as it was adapted.
        share: of the weights that the draws about the witness have.
        at_mean: -log q at the mean of the proposal that drew.

    Returns:
        The proposal of the next round, -log q at its mean, by its own curvature if it was adapted, and which scout
        stays behind at the mean of the one that drew, `(scout,)`.
    """
    there = replace(before, mean=scouts.witness).stretched(jnp.minimum(scouts.width, 1.0))
    leads = scouts.known & (share > 0.5)
    after = jax.tree.map(lambda a, b: jnp.where(leads, a, b), there, after)
    level = jnp.where(leads, scouts.depth, at_mean - 0.5 * after.square(before.mean[None])[0])
    # The scout at the witness changes places with the proposal. Else the mode that the proposal leaves would be
    # forgotten, and of two equal ones each would be left for the other, and believed to be the only one.
    gap = jnp.sum((scouts.place - scouts.witness) ** 2, -1)
    return after, level, leads & (jnp.arange(len(gap)) == jnp.argmin(gap))


def walked(
    scouts: Scouts,
    proposal: Proposal,
    at_mean: Array,
    level: Array,
    looked: tuple[Array, Array, Array],
    fresh: tuple[Array, Array, Array],
    rise: Array,
) -> Scouts:
    """One step of each.

    Args:
        scouts: before.
        proposal: of the round to come.
        at_mean: -log q at the mean of the proposal that drew.
        level: -log q at the mean of that to come, by its own curvature.
        looked: the scouts' next places, -log q and gradients there: `(scout, dim)`, `(scout,)`, `(scout, dim)`.
        fresh: the same for as many draws of the reference, from which scouts begin anew.
        rise: -log q at the draws about the witness, over what it is there where q has the width of these draws.

    Returns:
        The scouts after the step.
    """
    # A scout that hardly moves believes what it sees now: the loss may have changed since.
    fell = (looked[1] < scouts.potential) | (scouts.length < SHORTEST)
    place, potential, direction = _chosen(
        fell, _descending(proposal, looked), (scouts.place, scouts.potential, scouts.direction)
    )
    length = jnp.where(fell, LONGER, SHORTER) * scouts.length
    away, fresh_away = _away(proposal, level, place, potential), _away(proposal, level, *fresh[:2])
    home = ~away & (scouts.age < OLDEST)
    idle = (potential > at_mean + HIGHEST) & (scouts.age >= OLDEST)
    anew = ~away | (potential >= UNKNOWN) | idle | (fresh_away & (fresh[1] < potential))
    place, potential, direction = _chosen(
        anew, _descending(proposal, fresh), (place, potential, direction)
    )
    away = jnp.where(anew, fresh_away, away)
    length = jnp.where(anew, 1.0, jnp.minimum(length, LONGEST))
    most = FARTHEST * math.sqrt(place.shape[-1])
    size = jnp.sqrt(jnp.sum(direction**2, -1))
    length = jnp.minimum(length, most / jnp.maximum(size, jnp.finfo(size.dtype).tiny))
    lowest = jnp.argmin(jnp.where(away, potential, jnp.inf))
    known = away[lowest] & (potential[lowest] < jnp.minimum(at_mean + HIGHEST, UNKNOWN))
    # Of a Gaussian of another width the rise goes with the square of its inverse.
    rise = jnp.clip(jnp.median(jnp.where(jnp.isnan(rise), jnp.inf, rise)), 1 / MOST_RISE, MOST_RISE)
    return Scouts(
        place=place,
        direction=direction,
        length=length,
        potential=potential,
        age=jnp.where(anew, 0.0, scouts.age + 1.0),
        witness=jnp.where(known, place[lowest], 0.0),
        depth=jnp.where(known, potential[lowest], UNKNOWN),
        width=jnp.where(known & scouts.known, scouts.width / jnp.sqrt(rise), 1.0),
        num_rounds=scouts.num_rounds + 1,
        num_home=scouts.num_home + jnp.sum(home),
    )


def _away(proposal: Proposal, level: Array, place: Array, potential: Array) -> Array:
    # Neither near the proposal's mean, nor where its curvature says how high -log q is.
    square = proposal.square(place)
    rise = 0.5 * square
    return (square > NEAR**2) & (jnp.abs(potential - level - rise) > 1.0 + EXPLAINED * rise)


def _descending(proposal: Proposal, seen: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    # Where the potential is infinite there is no gradient, and the scout begins anew.
    place, potential, gradient = seen
    direction = proposal.times(gradient)
    direction = jnp.where(jnp.all(jnp.isfinite(direction), -1, keepdims=True), direction, 0.0)
    return place, jnp.where(potential < UNKNOWN, potential, UNKNOWN), direction


def _chosen(choice: Array, a: tuple[Array, ...], b: tuple[Array, ...]) -> list[Array]:
    return [
        jnp.where(choice.reshape(-1, *[1] * (x.ndim - 1)), x, y) for x, y in zip(a, b, strict=True)
    ]
