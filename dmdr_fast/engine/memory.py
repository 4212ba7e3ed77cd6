"""Memory options that cannot work here are refused, and a frozen base gets 8-bit weights, with the effect measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from dmdr_fast import ops
from dmdr_fast.algorithm.dmd import DMDOptions, dmd_gradient
from dmdr_fast.algorithm.paths import FLOW, Path
from dmdr_fast.algorithm.rollout import Network
from dmdr_fast.algorithm.score_pass import Scores, join
from dmdr_fast.config import Config
from dmdr_fast.engine.conditions import Conditions
from dmdr_fast.engine.engines import DTYPES
from dmdr_fast.engine.model import Model
from dmdr_fast.engine.optimizers import check_device
from dmdr_fast.engine.recipe import dmd_options
from dmdr_fast.engine.roles import Role
from dmdr_fast.errors import UserError
from dmdr_fast.models.eight_bit import float8_refusal, quantise_blocks
from dmdr_fast.ops.dmd import Prediction


def check_levers(config: Config, device: torch.device) -> None:
    """Raise a UserError where an option cannot work on ``device``: before any weights are read."""
    check_device(config.optimizer.kind, device)
    if config.deepspeed.dtype == "fp16" and not get_accelerator().is_fp16_supported():
        raise UserError(f"deepspeed.dtype: fp16 does not train on this {device.type}; use bf16 or fp32")
    if config.memory.frozen == "float8":
        refusal = float8_refusal(device)
        if refusal is not None:
            raise UserError(f"memory.frozen: float8 {refusal}; use int8")


@dataclass(frozen=True)
class Probe:
    """A few samples on which the effect of 8-bit weights is measured."""

    x0: Tensor  # fp32 [B, ...]
    noise: Tensor  # like x0
    t: Tensor  # fp32 [B] in (0, 1)
    condition: Any
    null: Any
    prediction: Prediction = "flow"
    path: Path = FLOW
    token: int = 1

    @property
    def x_t(self) -> Tensor:
        return ops.renoise(self.x0, *self.path.alpha_sigma(self.t), noise=self.noise)


def build_probe(model: Model, conditions: Conditions, config: Config, device: torch.device, batch: int = 8) -> Probe:
    """Gaussian latents, times over the whole range, and the first conditions: the same on every rank."""
    rng = torch.Generator().manual_seed(config.seed)
    x0, noise = (torch.randn(batch, *model.latent_shape, generator=rng).to(device) for _ in range(2))
    t = ((torch.arange(batch) + 0.5) / batch).to(device)
    given = conditions.batch(np.arange(batch) % conditions.count)
    return Probe(x0, noise, t, given.condition, given.uncond, model.prediction, model.path, model.token)


@torch.no_grad()
def predictions(network: Network, probe: Probe) -> tuple[Tensor, Tensor]:
    """The conditional and the unconditional prediction at the probe's x_t, in one batch."""
    twice = torch.cat([probe.x_t] * 2)
    conditional, unconditional = network(twice, probe.t.repeat(2), join(probe.condition, probe.null)).chunk(2)
    return conditional, unconditional


def dmd_gradient_change(
    native: tuple[Tensor, Tensor], eight_bit: tuple[Tensor, Tensor], probe: Probe, options: DMDOptions, *, shared: bool
) -> float:
    """|g_8 - g| / |g|: how far the DMD gradient moves when the frozen base goes from its own to 8-bit weights.

    At the start the fake score is the teacher and there is no gradient to compare: the base's unconditional prediction
    stands in for the fake score. With ``shared`` the fake score rests on the 8-bit base too, and what both scores get
    wrong alike cancels. NaN where the two predictions are the same.
    """
    alpha, sigma = probe.path.alpha_sigma(probe.t)

    def gradient(fake: Tensor, real: Tensor, uncond: Tensor) -> Tensor:
        scores = Scores(fake, real, uncond if options.uses_cfg else None)
        return dmd_gradient(probe.x0, probe.x_t, scores, alpha, sigma, options).grad.double()

    g = gradient(native[1], *native)
    g8 = gradient(eight_bit[1] if shared else native[1], *eight_bit)
    return ((g8 - g).norm() / g.norm()).item()


def quantise_frozen(module: nn.Module, probe: Probe, config: Config) -> str:
    """Give the blocks of a frozen base 8-bit weights; returns the line that says so, with the measured effect.

    The module is whole (not yet partitioned), in the compute dtype, on its device. Its adapters are off.
    """
    kind, role = config.memory.frozen, Role(module, DTYPES[config.deepspeed.dtype])
    assert kind != "native"
    before = predictions(role, probe)
    try:
        layers = quantise_blocks(module, kind)
    except ValueError as error:
        raise UserError(f"memory.frozen: {error}") from None
    options = dmd_options(config, probe.prediction, probe.token)
    shared = config.sharing != "separate"
    change = dmd_gradient_change(before, predictions(role, probe), probe, options, shared=shared)
    return f"frozen base in {kind} ({layers} layers): DMD gradient differs by {100 * change:.2g} %"
