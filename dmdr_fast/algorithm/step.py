"""One update of DMDR, to be read beside Algorithm 1 of the paper (arXiv 2511.13649).

    repeat R times                                       (fake updates)
        x0 <- G's truncated rollout                      no grad
        F  <- F - lr grad  |F(renoise(x0), t) - target|^2
    g   <- DMD gradient at renoise(x0)                   one score pass, no grad
    g   <- g + w_rl * reward gradient at x0              after the cold start
    G   <- G - lr g^T dx0/dG                             one graded forward, the leaf gradient goes in

The rollout of the last fake update serves the generator update too: G has not moved since. Gradients are assembled on
the leaf x0, so the peak is the largest of three graphs (score pass, reward, generator), not their sum, and they are
the gradients of the joint loss. All metrics stay on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from dmdr_fast.algorithm.dmd import DMDOptions, dmd_leaf_gradient, fake_loss
from dmdr_fast.algorithm.rl.options import ReFLOptions
from dmdr_fast.algorithm.rl.refl import Decode, refl_leaf_gradient
from dmdr_fast.algorithm.rollout import Rollout, clean_sample, draw_stop_step, truncated_rollout
from dmdr_fast.algorithm.schedules import RenoiseLaw, real_score_lora_scale
from dmdr_fast.algorithm.score_pass import ScorePass
from dmdr_fast.algorithm.streams import Shard, Streams


class Trained(Protocol):
    """A trained role: a network with an optimizer behind it."""

    def __call__(self, x_t: Tensor, t: Tensor, condition: Any) -> Tensor: ...

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one micro-batch's loss (averaged over micro-batches and ranks)."""

    def step(self) -> bool:
        """Clip and apply what was accumulated; False where a gradient was not finite and nothing was changed."""


@dataclass(frozen=True)
class Networks:
    """The three roles. ``score`` runs F and T together; ``fake`` is F alone at its own LoRA scale, graded."""

    generator: Trained
    fake: Trained
    score: ScorePass
    null_condition: Callable[[Any], Any]


@dataclass(frozen=True)
class Recipe:
    """The numbers of one DMDR run that the step itself reads."""

    grid: tuple[float, ...]
    latent_shape: tuple[int, ...]
    cold_start_steps: int
    fake_updates: int = 5
    rollout_variant: str = "backward_simulation"
    generator_prediction: str = "flow"
    fake_prediction: str = "flow"
    real_lora_scale: float = 0.0
    dynamic_guidance_step: int = 0
    renoise: RenoiseLaw = field(default_factory=RenoiseLaw)
    dmd: DMDOptions = field(default_factory=DMDOptions)
    reward_weight: float = 0.0
    reward_chunk: int = 8

    def rl_active(self, step: int) -> bool:
        """Reinforcement learning starts when the cold start has ended."""
        return step >= self.cold_start_steps and self.reward_weight != 0.0

    def real_scale(self, step: int) -> float:
        """DynaDG's s_r at this step."""
        return real_score_lora_scale(step, initial=self.real_lora_scale, dynamic_step=self.dynamic_guidance_step)


@dataclass(frozen=True)
class Batch:
    """What the data gives for one micro-batch: the condition, and what the reward needs to know about it."""

    condition: Any
    reward_inputs: dict[str, Any]


@dataclass(frozen=True)
class Simulated:
    """A micro-batch with the generator's sample for it."""

    batch: Batch
    rollout: Rollout
    shard: Shard


@dataclass(frozen=True)
class RewardModel:
    """Decoder and reward, both frozen: ``score(images, labels=..., prompts=...)`` -> fp32 [B]."""

    decode: Decode
    score: Callable[..., Tensor]

    def of(self, batch: Batch) -> Callable[[Tensor, slice], Tensor]:
        """The reward of rows of this batch."""
        return lambda images, rows: self.score(images, **{k: v[rows] for k, v in batch.reward_inputs.items()})


def simulate(
    generator: Trained,
    data: Callable[[tuple[int, ...], Shard], Batch],
    recipe: Recipe,
    streams: Streams,
    index: tuple[int, int],
    shard: Shard,
    device: torch.device,
) -> Simulated:
    """Draw the conditions and the stop step of update ``index`` (step, fake update) and roll the generator out."""
    batch = data(index, shard)
    stop = draw_stop_step(streams.rng("stop", *index), len(recipe.grid) - 1)
    rollout = truncated_rollout(
        generator,
        lambda i: streams.noise("rollout", *index, i, shape=recipe.latent_shape, shard=shard, device=device),
        batch.condition,
        recipe.grid,
        stop,
        variant=recipe.rollout_variant,
        kind=recipe.generator_prediction,
    )
    return Simulated(batch, rollout, shard)


def fake_update(
    fake: Trained, samples: Sequence[Simulated], recipe: Recipe, streams: Streams, index: tuple[int, int]
) -> tuple[dict[str, Tensor], bool]:
    """F <- F - lr grad of its denoising loss on the generator's samples, renoised by DynaRS."""
    losses = []
    for sample in samples:
        x0, shard = sample.rollout.x0, sample.shard
        t = streams.times(recipe.renoise, "fake_t", *index, step=index[0], shard=shard, device=x0.device)
        noise = streams.noise("fake_noise", *index, shape=recipe.latent_shape, shard=shard, device=x0.device)
        loss = fake_loss(fake, x0, t, noise, sample.batch.condition, recipe.fake_prediction)
        fake.backward(loss)
        losses.append(loss.detach())
    return {"fake_loss": torch.stack(losses).mean()}, fake.step()


def leaf_gradient(
    sample: Simulated,
    x0: Tensor,
    nets: Networks,
    reward: RewardModel | None,
    recipe: Recipe,
    streams: Streams,
    step: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """g = d(DMD loss)/d(x0) + w_rl d(-mean R)/d(x0) on the leaf x0, with the metrics of both parts."""
    shard, cond = sample.shard, sample.batch.condition
    g, loss = dmd_leaf_gradient(
        x0,
        streams.times(recipe.renoise, "dmd_t", step, step=step, shard=shard, device=x0.device),
        streams.noise_seed("dmd_noise", step, device=x0.device),
        cond,
        nets.null_condition(cond) if recipe.dmd.uses_cfg else None,
        nets.score,
        recipe.dmd,
        real_scale=recipe.real_scale(step),
        noise_offset=shard.start * x0[0].numel(),
    )
    metrics = {"dmd_loss": loss}
    if reward is not None and recipe.rl_active(step):
        refl = ReFLOptions(chunk=recipe.reward_chunk)
        g_reward, rewards = refl_leaf_gradient(x0, reward.decode, reward.of(sample.batch), refl)
        metrics |= {"reward": rewards.mean(), "reward_grad_ratio": recipe.reward_weight * g_reward.norm() / g.norm()}
        g = g + recipe.reward_weight * g_reward
    return g, metrics


def generator_update(
    nets: Networks,
    samples: Sequence[Simulated],
    reward: RewardModel | None,
    recipe: Recipe,
    streams: Streams,
    step: int,
) -> tuple[dict[str, Tensor], bool]:
    """G <- G - lr g^T dx0/dG: leaf gradient first, then one graded forward that takes it in."""
    parts = []
    for sample in samples:
        r = sample.rollout
        with torch.no_grad():
            x0 = r.x0 if r.reuse else graded_sample(nets.generator, sample, recipe)
        g, metrics = leaf_gradient(sample, x0, nets, reward, recipe, streams, step)
        nets.generator.backward((graded_sample(nets.generator, sample, recipe) * g).sum())
        parts.append(metrics)
    return {k: torch.stack([m[k] for m in parts]).mean() for k in parts[0]}, nets.generator.step()


def graded_sample(generator: Trained, sample: Simulated, recipe: Recipe) -> Tensor:
    """x0 = G(x_in, t_in), with grad where grad is enabled."""
    r = sample.rollout
    return clean_sample(r.x_in, r.t_in, generator(r.x_in, r.t_in, sample.batch.condition), recipe.generator_prediction)


@dataclass(frozen=True)
class Update:
    """What one DMDR update did: metrics (0-d, on the device) and which optimizer steps were skipped."""

    metrics: dict[str, Tensor]
    skipped: tuple[str, ...]


def dmdr_update(
    nets: Networks,
    data: Callable[[tuple[int, ...], Shard], Batch],
    reward: RewardModel | None,
    recipe: Recipe,
    streams: Streams,
    step: int,
    shards: Sequence[Shard],
    device: torch.device,
) -> Update:
    """R fake updates, then one generator update. ``shards`` are this rank's micro-batches of the global batch."""
    skipped = []
    for r in range(recipe.fake_updates):
        samples = [simulate(nets.generator, data, recipe, streams, (step, r), shard, device) for shard in shards]
        metrics, applied = fake_update(nets.fake, samples, recipe, streams, (step, r))
        if not applied:
            skipped.append("fake")
    generator_metrics, applied = generator_update(nets, samples, reward, recipe, streams, step)
    if not applied:
        skipped.append("generator")
    return Update(metrics | generator_metrics, tuple(skipped))
