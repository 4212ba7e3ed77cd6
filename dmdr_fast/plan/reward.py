"""Decoder and reward on meta tensors: decode a chunk, score the images and, for ReFL, go back to the latent."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, partial, reduce
from operator import add

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from dmdr_fast.errors import UserError
from dmdr_fast.models.vae import save_decoder_memory
from dmdr_fast.plan.live import LiveBytes, flash_attention, linear_layers, no_collector
from dmdr_fast.plan.networks import DTYPES, META, latent_shape
from dmdr_fast.plan.reward_nets import meta_reward, size_of
from dmdr_fast.plan.shapes import Shape
from dmdr_fast.plan.workload import RewardPass, Workload


@dataclass(frozen=True)
class RewardCost:
    """Of the decoder and the reward models: bytes of weights, peak bytes of a chunk's graph, FLOPs per sample.

    ``flops`` are those of matrix products and of convolutions, these counted twice where the decoder is fp32: TF32
    runs at half the rate of bf16. ``notes``: a line about each reward that is not counted as it is.
    """

    weights: int
    peak: int
    flops: tuple[float, float]
    notes: tuple[str, ...]


def reward_cost(work: Workload) -> RewardCost:
    """The cost of ``work.reward`` per GPU; it depends on shape, resolution and chunk alone."""
    assert work.reward is not None
    chunk = min(work.reward.chunk, work.batch)
    cost = _traced(work.shape, work.resolution, replace(work.reward, chunk=chunk), work.zero.own_linear)
    return replace(cost, weights=cost.weights + round(work.reward.stated))


@cache
def _traced(shape: Shape, resolution: int | tuple[int, int], options: RewardPass, own_linear: bool) -> RewardCost:
    """Trace R(decode(x0)) of one chunk, and its gradient as ``dmdr_fast.algorithm.rl.reward_gradient`` takes it."""
    vae = shape.build_vae()
    decoder = nn.Identity() if vae is None else nn.Module.to(vae, DTYPES[options.dtype]).requires_grad_(False).eval()
    image = (3, 64, 64) if vae is not None else latent_shape(shape, resolution)
    rewards = [meta_reward(net, image) for net in options.models]
    scores = [reward.score for reward in rewards if reward.score is not None]
    if vae is not None:
        try:
            save_decoder_memory(vae, tiling=options.tiling, recompute=options.recompute)
        except ValueError as error:
            raise UserError(str(error)) from None
    decode = partial(shape.opened().decode, vae)
    live = LiveBytes()
    x0 = torch.empty(options.chunk, *latent_shape(shape, resolution), device=META)
    with no_collector(), flash_attention(), linear_layers(own_linear), FlopCounterMode(display=False) as flops, live:
        leaf = x0.detach().requires_grad_(options.graded)
        images = checkpoint(decode, leaf, use_reentrant=False) if options.checkpoint else decode(leaf)
        total = reduce(add, (score(images) for score in scores)) if scores else images.flatten(1).sum(1)
        if options.graded:
            total.sum().backward()  # autograd.grad would trip over the FLOP counter's hooks on the leaf
    products, convolutions = split_flops(flops)
    return RewardCost(
        weights=size_of(decoder) + sum(reward.weights for reward in rewards),
        peak=max(sum(kinds.values()) for kinds in live.peaks.values()),
        flops=(products / options.chunk, convolutions * (2 if options.dtype == "fp32" else 1) / options.chunk),
        notes=tuple(reward.note for reward in rewards if reward.note),
    )


def split_flops(counter: FlopCounterMode) -> tuple[float, float]:
    """What ``counter`` counted: FLOPs of matrix products and attention, FLOPs of convolutions."""
    counts = counter.get_flop_counts().get("Global", {})
    convolutions = sum(n for op, n in counts.items() if "convolution" in str(op))
    return float(counter.get_total_flops() - convolutions), float(convolutions)
