"""One update of DMDR, to be read beside Algorithm 1 of the paper (arXiv 2511.13649).

    repeat R times                                       (fake updates)
        x0 <- G's truncated rollout                      no grad; rollout_reuse updates share one
        F  <- F - lr grad  |F(renoise(x0), t) - target|^2
    g   <- DMD gradient at renoise(x0)                   one score pass, no grad; decoupled: its parts at two
    g   <- g + w_rl * reward gradient at x0              ReFL; in the cold start too where it is tilted
    G   <- G - lr g^T dx0/dG                             one graded forward, the leaf gradient goes in
           - lr w_rl grad of the method's own losses     after the cold start: GRPO, DPO, hybrid, NFT

The rollout of the last fake update serves the generator update too: G has not moved since. Gradients are assembled on
the leaf x0, so the peak is the largest of three graphs (score pass, reward, generator), not their sum, and they are
the gradients of the joint loss. Policy and preference losses follow one graded forward at a time. All metrics stay on
the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dmdr_fast.algorithm.dmd import Renoising, dmd_leaf_gradient, fake_loss
from dmdr_fast.algorithm.monitors import OutputGradient, diversity, saturation
from dmdr_fast.algorithm.recipe import Recipe, Trained
from dmdr_fast.algorithm.rl.experience import Experience
from dmdr_fast.algorithm.rl.kl import kl_leaf_gradient
from dmdr_fast.algorithm.rl.method import Loss, Metrics
from dmdr_fast.algorithm.rollout import Network
from dmdr_fast.algorithm.schedules import UNIFORM
from dmdr_fast.algorithm.simulation import Simulated, one_step, simulate_all
from dmdr_fast.algorithm.update import Update


@dataclass(frozen=True)
class Outcome:
    """What one DMDR update did: metrics (0-d, on the device) and which optimizer steps were skipped."""

    metrics: Metrics
    skipped: tuple[str, ...]


def dmdr_update(update: Update) -> Outcome:
    """R fake updates, then one generator update."""
    recipe, step, method = update.recipe, update.step, update.method
    metrics, skipped, samples = Metrics(), list[str](), list[Simulated]()
    for r in range(recipe.fake_updates if update.uses_dmd else 0):
        if r % recipe.rollout_reuse == 0:
            last = r + recipe.rollout_reuse >= recipe.fake_updates
            samples = simulate_all(update, (step, r), method.rollout_group if last else 1)
        fake_metrics, applied = fake_update(update, samples, (step, r))
        metrics |= fake_metrics
        if not applied:
            skipped.append("fake")
    if not update.uses_dmd and (method.needs_rollout or (recipe.kl_weight and method.kl_on_x0)):
        samples = simulate_all(update, (step, 0))
    experience = method.collect(update)
    if experience is not None:
        metrics |= experience.metrics()
    generator_metrics, applied = generator_update(update, samples, experience)
    if not applied:
        skipped.append("generator")
    metrics |= generator_metrics | _signs_of_collapse(samples, experience, recipe)
    return Outcome(metrics, tuple(skipped))


def fake_update(update: Update, samples: Sequence[Simulated], index: tuple[int, int]) -> tuple[Metrics, bool]:
    """F <- F - lr grad of its denoising loss on the generator's samples, renoised by DynaRS or its own law."""
    recipe, streams, fake, losses = update.recipe, update.streams, update.networks.fake, []
    law = recipe.fake_renoise or recipe.renoise
    for sample in samples:
        x0, shard, own = sample.rollout.x0, sample.shard, streams.of_size(sample.size)
        t = streams.times(law, "fake_t", *index, step=update.step, shard=shard, device=x0.device)
        noise = own.noise("fake_noise", *index, shape=x0.shape[1:], shard=shard, device=x0.device)
        loss = fake_loss(fake, x0, t, noise, sample.batch.condition, recipe.prediction, recipe.path)
        fake.backward(loss, last=sample is samples[-1])
        losses.append(loss.detach())
    return {"fake_loss": torch.stack(losses).mean()}, fake.step()


def generator_update(
    update: Update, samples: Sequence[Simulated], experience: Experience | None = None
) -> tuple[Metrics, bool]:
    """The generator's part of one update; a method may take several steps on one batch of its own samples."""
    method, applied = update.method, True
    guidance, metrics = method.guidance(update, samples)
    for epoch in range(1 if experience is None else method.generator_steps):
        now = replace(update, epoch=epoch)
        leaf_losses = [leaf_loss(now, sample, own) for sample, own in zip(samples, guidance, strict=True)]
        rl_losses = [] if experience is None else experience.losses(now)
        part, stepped = generator_step(update.networks.generator, leaf_losses, rl_losses, update.uses_dmd)
        metrics, applied = metrics | part, applied and stepped
    return metrics, applied


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


def leaf_loss(update: Update, sample: Simulated, guidance: Tensor | None) -> Loss:
    """The scalar x0 . g whose gradient is the leaf gradient's: leaf first, then one graded forward that takes it in."""

    def build(generator: Network) -> tuple[Tensor, Metrics]:
        fresh = sample.rollout.reuse and not update.epoch  # after a generator step, x0 is not G's output any more
        with torch.no_grad():
            x0 = sample.rollout.x0 if fresh else one_step(update.networks.generator, sample, update.recipe)
        g, metrics = leaf_gradient(update, sample, x0, guidance)
        return (one_step(generator, sample, update.recipe) * g).sum(), metrics

    return build


def leaf_gradient(update: Update, sample: Simulated, x0: Tensor, guidance: Tensor | None) -> tuple[Tensor, Metrics]:
    """g = d(DMD loss)/d(x0) + w d(-mean R)/d(x0) + d(KL)/d(x0) on the leaf x0, with the metrics of each part.

    In the cold start w is the tilt's weight. The KL of the generator to the teacher tilted by a reward, p*(x) ~ p(x)
    exp(R(x) / beta), has the gradient of the KL to p, which is DMD's, minus dR/dx0 / beta: w is 1 / beta, in units of
    the DMD gradient, which its normaliser and the mean over x0's elements scale. Source: DMDR (arXiv 2511.13649, v4).
    """
    recipe, method = update.recipe, update.method
    g, metrics = torch.zeros_like(x0), Metrics()
    if update.uses_dmd:
        g, metrics["dmd_loss"] = dmd_part(update, sample, x0, guidance)
    found = method.leaf(update, sample, x0)
    if found is not None:
        g_reward, named = found
        weight = recipe.rl_weight(update.step)
        metrics |= named
        if update.uses_dmd:
            metrics["rl_grad_ratio"] = weight * g_reward.norm() / g.norm()
        g = g + weight * g_reward
    if update.rl and recipe.kl_weight and method.kl_on_x0:
        assert update.networks.reference is not None  # a run with a KL has one
        x0_ref = one_step(update.networks.reference, sample, recipe)
        g_kl, metrics["kl"] = kl_leaf_gradient(x0, x0_ref, recipe.kl_weight)
        g = g + g_kl
    return g, metrics


def dmd_part(update: Update, sample: Simulated, x0: Tensor, guidance: Tensor | None) -> tuple[Tensor, Tensor]:
    """d(DMD loss)/d(x0) and the loss. ``guidance`` fp32 [B] weights the teacher's guidance sample by sample."""
    recipe, streams, shard, batch = update.recipe, update.streams, sample.shard, sample.batch
    draw: dict[str, Any] = {"step": update.step, "shard": shard, "device": x0.device}

    def renoising(part: str, t: Tensor) -> Renoising:
        seed = streams.of_size(sample.size).noise_seed(f"{part}_noise", *update.counters, device=x0.device)
        return Renoising(t, seed, shard.start * x0[0].numel())

    ca = None
    if recipe.dmd.ca is not None and update.guided:
        u = streams.times(UNIFORM, "ca_t", *update.counters, **draw)
        ca = renoising("ca", recipe.dmd.ca.times(u, sample.rollout.t_in))
    return dmd_leaf_gradient(
        x0,
        renoising("dmd", streams.times(recipe.renoise, "dmd_t", *update.counters, **draw)),
        batch.condition,
        batch.uncond if update.guided else None,
        update.networks.score,
        recipe.dmd,
        real_scale=recipe.real_scale(update.step),
        path=recipe.path,
        guidance=guidance,
        ca=ca,
    )


def _signs_of_collapse(samples: Sequence[Simulated], experience: Experience | None, recipe: Recipe) -> Metrics:
    seen = [(s.rollout.x0, s.batch.classes) for s in samples]
    if experience is not None and not seen:
        seen = [(s.x0, s.batch.classes) for s in experience.scored]
    return {
        "diversity": torch.stack([diversity(x0, classes) for x0, classes in seen]).nanmean(),
        "saturation": torch.stack([saturation(x0, recipe.saturation) for x0, _ in seen]).mean(),
    }
