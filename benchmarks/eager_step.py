"""One DMDR update the way the paper's public reference is built, in plain PyTorch: the baseline of bench_step.py.

Against dmdr_fast.algorithm.step it
- rolls the generator out over all N steps for every fake update, and uses one of the samples;
- runs the fake score, then the real score with its condition and its null condition as a batch of 2B;
- adds the LoRA to q and v as x + s x (A B), with the product A B formed in every layer and pass;
- takes the DMD gradient of denoised samples and brings it in by a pseudo-target, F.mse_loss(x0, (x0 - g).detach());
- has one joint loss: generator, decoder and reward are one graph, held while the scores run.

It shares nothing with the package but the SiT it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmdr_fast.models.sit import SiT
from dmdr_fast.models.sit_layers import SiTBlock


@dataclass(frozen=True)
class FakeDraws:
    """What one fake update draws: labels [B], N noises [B, ...], the stop step, the renoise times [B] and noise."""

    labels: Tensor
    rollout: Sequence[Tensor]
    stop: int
    t: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Draws:
    """What a whole update draws: R fake updates, then the score pass's times and noise."""

    fake: Sequence[FakeDraws]
    t: Tensor
    noise: Tensor


class DenseLora:
    """q + s q (A_q B_q), v + s v (A_v B_v) on the output of every qkv layer of a frozen network, by hooks."""

    def __init__(self, network: SiT, weights: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]]):
        self.scale = 0.0
        self.pairs = [tuple(nn.Parameter(tensor.clone()) for tensor in layer) for layer in weights]
        network.requires_grad_(False)
        for block, pairs in zip(network.blocks, self.pairs, strict=True):
            cast(SiTBlock, block).attn.qkv.register_forward_hook(
                lambda module, args, out, pairs=pairs: self._add(out, *pairs)
            )

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for layer in self.pairs for parameter in layer]

    def _add(self, out: Tensor, a_q: Tensor, b_q: Tensor, a_v: Tensor, b_v: Tensor) -> Tensor:
        q, k, v = out.chunk(3, dim=-1)
        return torch.cat([q + self.scale * (q @ (a_q @ b_q)), k, v + self.scale * (v @ (a_v @ b_v))], dim=-1)


class EagerUpdate:
    """``update(draws)``: R fake updates and a generator update."""

    def __init__(
        self,
        generator: SiT,
        base: SiT,
        lora: DenseLora,
        optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer],
        grid: tuple[float, ...],
        *,
        fake_scale: float,
        real_scale: float,
        cfg_scale: float,
        clip: float,
        reward: Callable[[Tensor, Tensor], Tensor],
        reward_weight: float,
    ):
        self.generator, self.base, self.lora = generator, base, lora
        self.generator_optimizer, self.fake_optimizer = optimizers
        self.grid, self.clip = grid, clip
        self.reward, self.reward_weight = reward, reward_weight
        self.fake_scale, self.real_scale, self.cfg_scale = fake_scale, real_scale, cfg_scale

    def update(self, draws: Draws) -> Tensor:
        """R fake updates, then the generator's, on the last rollout's stop step; returns its loss."""
        for draw in draws.fake:
            x_in, x0 = self._rollout(draw)
            x_t = _mix(x0, draw.noise, draw.t)
            loss = F.mse_loss(self._score(x_t, draw.t, draw.labels, self.fake_scale).float(), (draw.noise - x0).float())
            loss.backward()
            self._step(self.fake_optimizer, self.lora.parameters())
        t_in = torch.full_like(draws.t, self.grid[draw.stop])
        x0 = self._sample(x_in, t_in, draw.labels)
        reward = self.reward(x0, draw.labels).mean()
        target = (x0 - self._dmd_gradient(x0.detach(), draws, draw.labels)).detach()
        loss = 0.5 * F.mse_loss(x0.float(), target.float()) - self.reward_weight * reward
        loss.backward()
        self._step(self.generator_optimizer, list(self.generator.parameters()))
        return loss.detach()

    @torch.no_grad()
    def _rollout(self, draw: FakeDraws) -> tuple[Tensor, Tensor]:
        """All N steps; (input, sample) of the stop step."""
        x, steps = draw.rollout[0], []
        for i, time in enumerate(self.grid[:-1]):
            x0 = self._sample(x, torch.full_like(draw.t, time), draw.labels)
            steps.append((x, x0))
            if i + 1 < len(self.grid) - 1:
                x = _mix(x0, draw.rollout[i + 1], torch.full_like(draw.t, self.grid[i + 1]))
        return steps[draw.stop]

    @torch.no_grad()
    def _dmd_gradient(self, x0: Tensor, draws: Draws, labels: Tensor) -> Tensor:
        x_t, t = _mix(x0, draws.noise, draws.t), draws.t
        fake = self._score(x_t, t, labels, self.fake_scale)
        if self.cfg_scale > 1:
            both = torch.cat([labels, self.base.null_condition(labels)])
            cond, uncond = self._score(torch.cat([x_t, x_t]), torch.cat([t, t]), both, self.real_scale).chunk(2)
            real = uncond + self.cfg_scale * (cond - uncond)
        else:
            real = self._score(x_t, t, labels, self.real_scale)
        p_fake, p_real = x0 - (x_t - _wide(t, x_t) * fake), x0 - (x_t - _wide(t, x_t) * real)
        weight = p_real.abs().mean(dim=(1, 2, 3), keepdim=True)
        return torch.nan_to_num((p_real - p_fake) / (weight + 1e-8))

    def _sample(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return x - _wide(t, x) * self.generator(x, t, labels)

    def _score(self, x_t: Tensor, t: Tensor, labels: Tensor, scale: float) -> Tensor:
        self.lora.scale = scale
        return self.base(x_t, t, labels)

    def _step(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
        nn.utils.clip_grad_norm_(parameters, self.clip)
        optimizer.step()
        optimizer.zero_grad()


def _mix(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    return (1 - _wide(t, x0)) * x0 + _wide(t, x0) * noise


def _wide(t: Tensor, like: Tensor) -> Tensor:
    return t.to(like.dtype).view(-1, 1, 1, 1)
