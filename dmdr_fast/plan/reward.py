"""Decoder and reward on meta tensors: decode a chunk, score the images and, for ReFL, go back to the latent."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from dmdr_fast import ops
from dmdr_fast.errors import UserError
from dmdr_fast.models.vae import save_decoder_memory
from dmdr_fast.plan.live import LiveBytes, flash_attention, no_collector
from dmdr_fast.plan.networks import DTYPES, META, latent_shape
from dmdr_fast.plan.shapes import Shape
from dmdr_fast.plan.workload import RewardPass, Workload

REWARD_DTYPES = DTYPES | {"fp16": torch.float16}
MODELS = json.loads((Path(__file__).parent / "rewards.json").read_text())


@dataclass(frozen=True)
class RewardCost:
    """Of the decoder and the reward models: bytes of weights, peak bytes of a chunk's graph, FLOPs per sample.

    ``flops`` are those of matrix products and of convolutions, these counted twice where the decoder is fp32: TF32
    runs at half the rate of bf16.
    """

    weights: int
    peak: int
    flops: tuple[float, float]


def reward_cost(work: Workload) -> RewardCost:
    """The cost of ``work.reward`` per GPU; it depends on shape, resolution and chunk alone."""
    assert work.reward is not None
    chunk = min(work.reward.chunk, work.batch)
    return _traced(work.shape, work.resolution, replace(work.reward, chunk=chunk))


@cache
def _traced(shape: Shape, resolution: int, options: RewardPass) -> RewardCost:
    """Trace R(decode(x0)) of one chunk, and its gradient as ``dmdr_fast.algorithm.rl.refl`` takes it."""
    vae = shape.build_vae()
    decoder = nn.Identity() if vae is None else nn.Module.to(vae, DTYPES[options.dtype]).requires_grad_(False).eval()
    towers = [_tower(name, REWARD_DTYPES[dtype]) for name, dtype in options.models]
    if vae is not None:
        try:
            save_decoder_memory(vae, tiling=options.tiling, recompute=options.recompute)
        except ValueError as error:
            raise UserError(str(error)) from None
    family = None if shape.family == "sit" else shape.opened()

    def decode(latent: Tensor) -> Tensor:
        if family is not None:
            return family.decode(vae, latent)
        return latent if vae is None else vae.decode(latent.to(vae.dtype)).sample

    live = LiveBytes()
    x0 = torch.empty(options.chunk, *latent_shape(shape, resolution), device=META)
    with no_collector(), flash_attention(), FlopCounterMode(display=False) as flops, live:
        leaf = x0.detach().requires_grad_(options.graded)
        images = checkpoint(decode, leaf, use_reentrant=False) if options.checkpoint else decode(leaf)
        score = sum(tower(images) for tower in towers) if towers else images.flatten(1).sum(1)
        if options.graded:
            score.sum().backward()  # autograd.grad would trip over the FLOP counter's hooks on the leaf
    products, convolutions = split_flops(flops)
    texts = [MODELS[name]["text_parameters"] * REWARD_DTYPES[dtype].itemsize for name, dtype in options.models]
    return RewardCost(
        weights=sum(_bytes(m) for m in (decoder, *towers)) + sum(texts),
        peak=max(sum(kinds.values()) for kinds in live.peaks.values()),
        flops=(products / options.chunk, convolutions * (2 if options.dtype == "fp32" else 1) / options.chunk),
    )


def split_flops(counter: FlopCounterMode) -> tuple[float, float]:
    """What ``counter`` counted: FLOPs of matrix products and attention, FLOPs of convolutions."""
    counts = counter.get_flop_counts().get("Global", {})
    convolutions = sum(n for op, n in counts.items() if "convolution" in str(op))
    return float(counter.get_total_flops() - convolutions), float(convolutions)


def _bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


class _Tower(nn.Module):
    """A vision transformer of a reward's sizes behind the preprocessing: images [B, 3, H, W] -> [B]."""

    def __init__(self, size: int, vision: nn.Module):
        super().__init__()
        self.size, self.vision = size, vision

    def forward(self, images):
        pixels = ops.preprocess_reward(images, self.size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        return self.vision(pixels.to(next(self.vision.parameters()).dtype)).pooler_output.float().sum(1)


def _tower(name: str, dtype: torch.dtype) -> _Tower:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    vision = MODELS[name]["vision"]
    with META:
        model = CLIPVisionModel._from_config(CLIPVisionConfig(**vision), attn_implementation="sdpa")
    return _Tower(vision["image_size"], model.to(dtype).requires_grad_(False).eval())
