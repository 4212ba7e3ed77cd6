"""GRPO and DPO inside an update: collect samples and rewards, then the losses that the generator descends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dmdr_fast.algorithm.rl.advantages import best_and_worst, group_advantages
from dmdr_fast.algorithm.rl.dpo import dpo_loss
from dmdr_fast.algorithm.rl.experience import Gather, PairShare, Scored, pair_share, scored, share
from dmdr_fast.algorithm.rl.grpo import guidance_weights, policy_loss, sde_rollout, stochastic_steps, trained_steps
from dmdr_fast.algorithm.rl.options import RLOptions
from dmdr_fast.algorithm.rollout import Network, sample
from dmdr_fast.algorithm.streams import Shard, Streams

if TYPE_CHECKING:
    from dmdr_fast.algorithm.recipe import Batch, Data, Networks, Recipe, RewardModel

Loss = Callable[[Network], tuple[Tensor, dict[str, Tensor]]]


def weighs_guidance(rl: RLOptions) -> bool:
    """GRPO's second form: advantages weigh the teacher's guidance in the DMD gradient."""
    return rl.method == "grpo" and rl.grpo.mode == "advantage_weighted_dmd"


def has_losses(rl: RLOptions) -> bool:
    """Whether the method has losses of its own, on samples of its own."""
    return rl.method == "dpo" or (rl.method == "grpo" and not weighs_guidance(rl))


@dataclass(frozen=True)
class Pair:
    """One micro-batch's preference pairs: samples [P, ...], their condition, which pairs, and their weights [P]."""

    winner: Tensor
    loser: Tensor
    batch: Batch
    part: PairShare


@dataclass(frozen=True)
class Experience:
    """This rank's samples of one update, one entry per micro-batch, with what was learnt from all ranks' rewards."""

    scored: list[Scored]
    advantages: Tensor  # fp32 [global batch]
    kept: Tensor  # bool [global batch]
    pairs: list[Pair]

    def metrics(self) -> dict[str, Tensor]:
        """Mean rewards over the micro-batches, and the share of samples whose group says something."""
        parts = [s.metrics() for s in self.scored]
        metrics = {n: torch.stack([p[n] for p in parts]).mean() for n in parts[0]}
        return metrics | {"kept": self.kept.float().mean()}


def collect(
    generator: Network,
    data: Data,
    reward: RewardModel,
    recipe: Recipe,
    streams: Streams,
    step: int,
    shards: Sequence[Shard],
    device: torch.device,
    gather: Gather,
) -> Experience:
    """Sample groups with the generator as it is (GRPO: the SDE; DPO: its own sampling), and score them."""
    rl, index = recipe.rl, (step, recipe.fake_updates)
    shape = recipe.shapes[recipe.sizes(streams, index, 1)[0]]  # one for all: their x0 are compared and gathered
    parts = []
    for shard in shards:
        batch = data(index, shard, rl.group_size)

        def noise(i: int, shard: Shard = shard) -> Tensor:
            return streams.noise("rl_rollout", step, i, shape=shape, shard=shard, device=device)

        if rl.method == "grpo":
            trajectory = sde_rollout(
                generator,
                noise(0),
                lambda i: streams.noise_seed("rl_sde", step, i, device=device),
                batch.condition,
                recipe.grid,
                rl.grpo,
                offset=shard.start * noise(0)[0].numel(),
                kind=recipe.prediction,
            )
            x0 = trajectory.x[-1]
        else:
            trajectory = None
            x0 = sample(generator, noise, batch.condition, recipe.grid, kind=recipe.prediction, path=recipe.path)
        parts.append(
            scored(batch, shard, x0, reward, chunk=rl.refl.chunk, name=batch_name(step, shard), trajectory=trajectory)
        )
    rewards = gather([p.rewards for p in parts])
    if rl.method == "grpo":
        return Experience(parts, *group_advantages(rewards, rl.grpo), pairs=[])
    winners, losers, gap = best_and_worst(rewards, rl.dpo.group_size)
    x0 = gather([p.x0 for p in parts])
    pairs = []
    for shard in shards:
        part = pair_share(len(gap), shard, device)
        mine = slice(part.shard.start, part.shard.stop)
        # A NaN reward must not pass for a tie: it makes the weight, and so the loss, NaN, and the update is skipped.
        weight = part.weight * torch.where(gap[mine].isnan(), gap[mine], (gap[mine] > 0).float())
        batch = data(index, part.shard, 1)  # the groups' conditions, one for each pair
        pairs.append(Pair(x0[winners[mine]], x0[losers[mine]], batch, PairShare(part.shard, weight)))
    kept = (gap > 0).repeat_interleave(rl.dpo.group_size)
    return Experience(parts, torch.zeros_like(rewards), kept, pairs)


def guidance_of(
    samples: Sequence[tuple[Batch, Shard, Tensor]], reward: RewardModel, recipe: Recipe, step: int, gather: Gather
) -> tuple[Tensor, dict[str, Tensor]]:
    """The factor on the teacher's guidance, fp32 [global batch], from the rewards of grouped samples (x0 of each)."""
    parts = [
        scored(batch, shard, x0, reward, chunk=recipe.rl.refl.chunk, name=batch_name(step, shard))
        for batch, shard, x0 in samples
    ]
    advantages, kept = group_advantages(gather([p.rewards for p in parts]), recipe.rl.grpo)
    weights = guidance_weights(advantages, kept, recipe.rl.grpo, recipe.rl_weight(step))
    return weights, Experience(parts, advantages, kept, []).metrics()


def batch_name(step: int, shard: Shard) -> str:
    """How an error names a micro-batch."""
    return f"update {step}, samples {shard.start} to {shard.stop - 1}"


def losses(
    experience: Experience, nets: Networks, recipe: Recipe, streams: Streams, index: tuple[int, ...]
) -> list[Loss]:
    """The weighted losses of one generator step, each one graded forward."""
    if recipe.rl.method == "grpo":
        return _grpo_losses(experience, nets, recipe, streams, index)
    return [_dpo_loss(pair, nets, recipe, streams, index) for pair in experience.pairs]


def _grpo_losses(
    experience: Experience, nets: Networks, recipe: Recipe, streams: Streams, index: tuple[int, ...]
) -> list[Loss]:
    options, weight = recipe.rl.grpo, recipe.rl_weight(index[0])
    steps = trained_steps(
        streams.rng("rl_steps", *index), stochastic_steps(recipe.grid, options), options.trained_steps
    )

    def at(part: Scored, i: int) -> Loss:
        def build(generator: Network) -> tuple[Tensor, dict[str, Tensor]]:
            assert part.trajectory is not None  # collect() keeps it for GRPO
            loss, stats = policy_loss(
                generator,
                part.trajectory,
                i,
                part.batch.condition,
                share(experience.advantages, part.shard),
                share(experience.kept, part.shard),
                options,
                kind=recipe.prediction,
                weight=weight,
                reference=nets.reference if recipe.kl_weight else None,
                kl_weight=recipe.kl_weight,
            )
            return loss / len(steps), stats

        return build

    return [at(part, i) for part in experience.scored for i in steps]


def _dpo_loss(pair: Pair, nets: Networks, recipe: Recipe, streams: Streams, index: tuple[int, ...]) -> Loss:
    step, shard, device = index[0], pair.part.shard, pair.winner.device

    def build(generator: Network) -> tuple[Tensor, dict[str, Tensor]]:
        assert nets.reference is not None  # a run with DPO has one
        if recipe.rl.dpo.times == "grid":
            points = streams.rng("dpo_t", *index).integers(len(recipe.grid) - 1, size=shard.total)
            t = torch.tensor([recipe.grid[i] for i in points[shard.start : shard.stop]], device=device)
        else:
            t = streams.times(recipe.renoise, "dpo_t", *index, step=step, shard=shard, device=device)
        loss, stats = dpo_loss(
            generator,
            nets.reference,
            pair.winner,
            pair.loser,
            t,
            streams.noise("dpo_noise", *index, shape=pair.winner.shape[1:], shard=shard, device=device),
            pair.batch.condition,
            recipe.rl.dpo,
            prediction=recipe.prediction,
            path=recipe.path,
            weight=pair.part.weight,
        )
        return recipe.rl_weight(step) * loss, {f"dpo_{name}": value for name, value in stats.items()}

    return build
