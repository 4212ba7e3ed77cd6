"""The generator's samples of an update: this rank's micro-batches, their conditions and truncated rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dmdr_fast.algorithm.paths import clean_sample
from dmdr_fast.algorithm.recipe import Batch, Recipe
from dmdr_fast.algorithm.rollout import Network, Rollout, truncated_rollout
from dmdr_fast.algorithm.streams import Shard
from dmdr_fast.algorithm.update import Update


@dataclass(frozen=True)
class Simulated:
    """A micro-batch with the generator's sample for it."""

    batch: Batch
    rollout: Rollout
    shard: Shard
    size: int = 0  # its number, see Recipe.sizes


def simulate(
    update: Update, index: tuple[int, int], shard: Shard, group: int = 1, place: int = 0, size: int = 0
) -> Simulated:
    """Draw the conditions and the stop step of draw ``index`` (step, fake update) and roll the generator out.

    Micro-batches of one ``place`` have one stop step. ``size``: the number of the samples' shape.
    """
    recipe, streams = update.recipe, update.streams
    shape, noise = recipe.shapes[size], streams.of_size(size)
    batch = update.data(index, shard, group)
    rollout = truncated_rollout(
        update.networks.generator,
        lambda i: noise.noise("rollout", *index, i, shape=shape, shard=shard, device=update.device),
        batch.condition,
        recipe.grid,
        streams.stop_step(len(recipe.grid) - 1, *index, *([place] if place else [])),
        variant=recipe.rollout_variant,
        eta=recipe.eta,
        kind=recipe.prediction,
        path=recipe.path,
    )
    return Simulated(batch, rollout, shard, size)


def simulate_all(update: Update, index: tuple[int, int], group: int = 1) -> list[Simulated]:
    """:func:`simulate` for each of this rank's micro-batches, with its stop step and its size."""
    places = stop_places(update.recipe, update.shards, group)
    sizes = update.recipe.sizes(update.streams, index, len(update.shards), group)
    return [
        simulate(update, index, shard, group, place, size)
        for shard, place, size in zip(update.shards, places, sizes, strict=True)
    ]


def stop_places(recipe: Recipe, shards: Sequence[Shard], group: int = 1) -> Sequence[int]:
    """Which of an update's stop steps each of this rank's micro-batches takes.

    Every micro-step has its own, the same on every rank; with ``stop_step_per`` "rank" every micro-batch of every rank
    has. The first is the one of an update that does not accumulate. Samples whose advantages are compared, in groups,
    stop at one step.
    """
    if group > 1:
        return [0] * len(shards)
    if recipe.stop_step_per == "rank":
        return [shard.start // shard.size for shard in shards]
    return range(len(shards))


def one_step(network: Network, sample: Simulated, recipe: Recipe) -> Tensor:
    """x0 by ``network`` from (x_in, t_in) of a rollout, with grad where grad is enabled."""
    r = sample.rollout
    prediction = network(r.x_in, r.t_in, sample.batch.condition)
    return clean_sample(r.x_in, r.t_in, prediction, recipe.prediction, recipe.path)
