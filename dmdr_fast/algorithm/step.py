"""One update of DMDR, to be read beside Algorithm 1 of the paper (arXiv 2511.13649).

    repeat R times                                       (fake updates)
        x0 <- G's truncated rollout                      no grad; rollout_reuse updates share one
        F  <- F - lr grad  |F(renoise(x0), t) - target|^2
    g   <- DMD gradient at renoise(x0)                   one score pass, no grad
    g   <- g + w_rl * reward gradient at x0              after the cold start: ReFL
    G   <- G - lr g^T dx0/dG                             one graded forward, the leaf gradient goes in
           - lr w_rl grad of the GRPO or DPO loss        after the cold start: GRPO, DPO

The rollout of the last fake update serves the generator update too: G has not moved since. Gradients are assembled on
the leaf x0, so the peak is the largest of three graphs (score pass, reward, generator), not their sum, and they are
the gradients of the joint loss. Policy and preference losses follow one graded forward at a time. All metrics stay on
the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dmdr_fast.algorithm.dmd import dmd_leaf_gradient, fake_loss
from dmdr_fast.algorithm.monitors import OutputGradient, diversity, saturation
from dmdr_fast.algorithm.paths import clean_sample
from dmdr_fast.algorithm.recipe import Batch, Data, Networks, Recipe, RewardModel, Trained
from dmdr_fast.algorithm.rl import policy
from dmdr_fast.algorithm.rl.experience import Gather, rows_of, share, whole_batch
from dmdr_fast.algorithm.rl.kl import kl_leaf_gradient
from dmdr_fast.algorithm.rl.refl import refl_leaf_gradient
from dmdr_fast.algorithm.rollout import Network, Rollout, draw_stop_step, truncated_rollout
from dmdr_fast.algorithm.streams import Shard, Streams

Metrics = dict[str, Tensor]
# A loss of the generator, built when it is called, so that one graph lives at a time.
Loss = Callable[[Network], tuple[Tensor, Metrics]]


@dataclass(frozen=True)
class Simulated:
    """A micro-batch with the generator's sample for it."""

    batch: Batch
    rollout: Rollout
    shard: Shard
    size: int = 0  # its number, see Recipe.sizes


def simulate(
    generator: Trained,
    data: Data,
    recipe: Recipe,
    streams: Streams,
    index: tuple[int, int],
    shard: Shard,
    device: torch.device,
    group: int = 1,
    place: int = 0,
    size: int = 0,
) -> Simulated:
    """Draw the conditions and the stop step of update ``index`` (step, fake update) and roll the generator out.

    Micro-batches of one ``place`` have one stop step. ``size``: the number of the samples' shape.
    """
    shape, noise = recipe.shapes[size], streams.of_size(size)
    batch = data(index, shard, group)
    stop = draw_stop_step(streams.rng("stop", *index, *([place] if place else [])), len(recipe.grid) - 1)
    rollout = truncated_rollout(
        generator,
        lambda i: noise.noise("rollout", *index, i, shape=shape, shard=shard, device=device),
        batch.condition,
        recipe.grid,
        stop,
        variant=recipe.rollout_variant,
        kind=recipe.prediction,
        path=recipe.path,
    )
    return Simulated(batch, rollout, shard, size)


def simulate_all(
    generator: Trained,
    data: Data,
    recipe: Recipe,
    streams: Streams,
    index: tuple[int, int],
    shards: Sequence[Shard],
    device: torch.device,
    group: int = 1,
) -> list[Simulated]:
    """:func:`simulate` for each of this rank's micro-batches, with its stop step and its size."""
    places, sizes = stop_places(recipe, shards, group), recipe.sizes(streams, index, len(shards), group)
    return [
        simulate(generator, data, recipe, streams, index, shard, device, group, place, size)
        for shard, place, size in zip(shards, places, sizes, strict=True)
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


def fake_update(
    fake: Trained, samples: Sequence[Simulated], recipe: Recipe, streams: Streams, index: tuple[int, int]
) -> tuple[Metrics, bool]:
    """F <- F - lr grad of its denoising loss on the generator's samples, renoised by DynaRS."""
    losses = []
    for sample in samples:
        x0, shard, own = sample.rollout.x0, sample.shard, streams.of_size(sample.size)
        t = streams.times(recipe.renoise, "fake_t", *index, step=index[0], shard=shard, device=x0.device)
        noise = own.noise("fake_noise", *index, shape=x0.shape[1:], shard=shard, device=x0.device)
        loss = fake_loss(fake, x0, t, noise, sample.batch.condition, recipe.prediction, recipe.path)
        fake.backward(loss, last=sample is samples[-1])
        losses.append(loss.detach())
    return {"fake_loss": torch.stack(losses).mean()}, fake.step()


def graded_sample(generator: Network, sample: Simulated, recipe: Recipe) -> Tensor:
    """x0 = G(x_in, t_in), with grad where grad is enabled."""
    r = sample.rollout
    prediction = generator(r.x_in, r.t_in, sample.batch.condition)
    return clean_sample(r.x_in, r.t_in, prediction, recipe.prediction, recipe.path)


def dmd_part(
    sample: Simulated,
    x0: Tensor,
    nets: Networks,
    recipe: Recipe,
    streams: Streams,
    index: tuple[int, ...],
    guidance: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """d(DMD loss)/d(x0) and the loss. ``guidance`` fp32 [B] weighs the teacher's guidance sample by sample."""
    shard, batch, step = sample.shard, sample.batch, index[0]
    return dmd_leaf_gradient(
        x0,
        streams.times(recipe.renoise, "dmd_t", *index, step=step, shard=shard, device=x0.device),
        streams.of_size(sample.size).noise_seed("dmd_noise", *index, device=x0.device),
        batch.condition,
        batch.uncond if recipe.dmd.uses_cfg else None,
        nets.score,
        recipe.dmd,
        real_scale=recipe.real_scale(step),
        noise_offset=shard.start * x0[0].numel(),
        path=recipe.path,
        guidance=guidance,
    )


def leaf_gradient(
    sample: Simulated,
    x0: Tensor,
    nets: Networks,
    reward: RewardModel | None,
    recipe: Recipe,
    streams: Streams,
    index: tuple[int, ...],
    guidance: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """g = d(DMD loss)/d(x0) + w_rl d(-mean R)/d(x0) + d(KL)/d(x0) on the leaf x0, with the metrics of each part.

    ``index`` is (step,), or (step, epoch) where GRPO takes several generator steps on one batch of rollouts.
    """
    step, r, batch = index[0], sample.rollout, sample.batch
    g, metrics = torch.zeros_like(x0), Metrics()
    if recipe.uses_dmd(step):
        g, metrics["dmd_loss"] = dmd_part(sample, x0, nets, recipe, streams, index, guidance)
    if reward is None or not recipe.rl_active(step):
        return g, metrics
    if recipe.rl.method == "refl":
        name = policy.batch_name(step, sample.shard)
        named: dict[str, list[Tensor]] = {}

        def score(images: Tensor, rows: slice) -> Tensor:
            total, each = reward.score(images, rows_of(batch.reward_inputs, rows), name)
            for n, values in each.items():
                named.setdefault(n, []).append(values.detach())
            return total

        g_reward, rewards = refl_leaf_gradient(x0, reward.decode, score, recipe.rl.refl)
        weight = recipe.rl_weight(step)
        metrics |= {"reward": rewards.mean()} | {n: torch.cat(v).mean() for n, v in named.items()}
        if recipe.uses_dmd(step):
            metrics["rl_grad_ratio"] = weight * g_reward.norm() / g.norm()
        g = g + weight * g_reward
    if recipe.kl_weight and recipe.rl.method != "grpo":
        assert nets.reference is not None  # a run with a KL has one
        prediction = nets.reference(r.x_in, r.t_in, batch.condition)
        x0_ref = clean_sample(r.x_in, r.t_in, prediction, recipe.prediction, recipe.path)
        g_kl, metrics["kl"] = kl_leaf_gradient(x0, x0_ref, recipe.kl_weight)
        g = g + g_kl
    return g, metrics


def leaf_loss(
    sample: Simulated,
    nets: Networks,
    reward: RewardModel | None,
    recipe: Recipe,
    streams: Streams,
    index: tuple[int, ...],
    guidance: Tensor | None = None,
) -> Loss:
    """The scalar x0 . g whose gradient is the leaf gradient's: leaf first, then one graded forward that takes it in."""

    def build(generator: Network) -> tuple[Tensor, Metrics]:
        fresh = sample.rollout.reuse and len(index) == 1  # after a generator step, x0 is not G's output any more
        with torch.no_grad():
            x0 = sample.rollout.x0 if fresh else graded_sample(nets.generator, sample, recipe)
        g, metrics = leaf_gradient(sample, x0, nets, reward, recipe, streams, index, guidance)
        return (graded_sample(generator, sample, recipe) * g).sum(), metrics

    return build


def generator_step(
    generator: Trained, leaf_losses: Sequence[Loss], rl_losses: Sequence[Loss], uses_dmd: bool
) -> tuple[Metrics, bool]:
    """G <- G - lr grad of the sum of losses, one graph at a time."""
    watched = {"dmd": OutputGradient(generator), "rl": OutputGradient(generator)}
    losses = [(watched["dmd"], loss) for loss in leaf_losses] + [(watched["rl"], loss) for loss in rl_losses]
    collected: dict[str, list[Tensor]] = {}
    for i, (network, build) in enumerate(losses):
        loss, metrics = build(network)
        generator.backward(loss, last=i == len(losses) - 1)
        for name, value in metrics.items():
            collected.setdefault(name, []).append(value)
    metrics = {name: torch.stack(values).mean() for name, values in collected.items()}
    if rl_losses and leaf_losses and uses_dmd:
        metrics["rl_grad_ratio"] = watched["rl"].norm / watched["dmd"].norm
    return metrics, generator.step()


def generator_update(
    nets: Networks,
    samples: Sequence[Simulated],
    reward: RewardModel | None,
    recipe: Recipe,
    streams: Streams,
    step: int,
    *,
    experience: policy.Experience | None = None,
    gather: Gather = whole_batch,
) -> tuple[Metrics, bool]:
    """The generator's part of one update; GRPO may take several steps (``inner_epochs``) on one batch of rollouts."""
    metrics, applied = Metrics(), True
    guidance: list[Tensor | None] = [None] * len(samples)
    if reward is not None and recipe.rl_active(step) and policy.weighs_guidance(recipe.rl):
        weights, metrics = policy.guidance_of(
            [(s.batch, s.shard, s.rollout.x0) for s in samples], reward, recipe, step, gather
        )
        guidance = [share(weights, s.shard) for s in samples]
    epochs = recipe.rl.grpo.inner_epochs if experience is not None and recipe.rl.method == "grpo" else 1
    for epoch in range(epochs):
        index = (step, epoch) if epoch else (step,)
        leaf_losses = [
            leaf_loss(sample, nets, reward, recipe, streams, index, weights)
            for sample, weights in zip(samples, guidance, strict=True)
        ]
        rl_losses = [] if experience is None else policy.losses(experience, nets, recipe, streams, index)
        part, stepped = generator_step(nets.generator, leaf_losses, rl_losses, recipe.uses_dmd(step))
        metrics, applied = metrics | part, applied and stepped
    return metrics, applied


@dataclass(frozen=True)
class Update:
    """What one DMDR update did: metrics (0-d, on the device) and which optimizer steps were skipped."""

    metrics: Metrics
    skipped: tuple[str, ...]


def dmdr_update(
    nets: Networks,
    data: Data,
    reward: RewardModel | None,
    recipe: Recipe,
    streams: Streams,
    step: int,
    shards: Sequence[Shard],
    device: torch.device,
    gather: Gather = whole_batch,
) -> Update:
    """R fake updates, then one generator update. ``shards`` are this rank's micro-batches of the global batch."""
    rl = reward is not None and recipe.rl_active(step)
    uses_dmd = recipe.uses_dmd(step) or not rl
    metrics, skipped, samples = Metrics(), list[str](), list[Simulated]()
    for r in range(recipe.fake_updates if uses_dmd else 0):
        if r % recipe.rollout_reuse == 0:
            last = r + recipe.rollout_reuse >= recipe.fake_updates
            group = recipe.rl.group_size if rl and last and policy.weighs_guidance(recipe.rl) else 1
            samples = simulate_all(nets.generator, data, recipe, streams, (step, r), shards, device, group)
        fake_metrics, applied = fake_update(nets.fake, samples, recipe, streams, (step, r))
        metrics |= fake_metrics
        if not applied:
            skipped.append("fake")
    if not uses_dmd and (recipe.rl.method == "refl" or (recipe.kl_weight and recipe.rl.method == "dpo")):
        samples = simulate_all(nets.generator, data, recipe, streams, (step, 0), shards, device)
    experience = None
    if rl and reward is not None and policy.has_losses(recipe.rl):
        experience = policy.collect(nets.generator, data, reward, recipe, streams, step, shards, device, gather)
        metrics |= experience.metrics()
    generator_metrics, applied = generator_update(
        nets, samples, reward, recipe, streams, step, experience=experience, gather=gather
    )
    if not applied:
        skipped.append("generator")
    metrics |= generator_metrics | _signs_of_collapse(samples, experience, recipe)
    return Update(metrics, tuple(skipped))


def _signs_of_collapse(samples: Sequence[Simulated], experience: policy.Experience | None, recipe: Recipe) -> Metrics:
    seen = [(s.rollout.x0, s.batch.classes) for s in samples]
    if experience is not None and not seen:
        seen = [(s.x0, s.batch.classes) for s in experience.scored]
    return {
        "diversity": torch.stack([diversity(x0, classes) for x0, classes in seen]).nanmean(),
        "saturation": torch.stack([saturation(x0, recipe.saturation) for x0, _ in seen]).mean(),
    }
