"""Small differentiable networks and plain-PyTorch trained roles for tests of the algorithm."""

from __future__ import annotations

import torch
from torch import nn

from dmdr_fast.algorithm.recipe import Batch, Networks, Recipe, RewardModel
from dmdr_fast.algorithm.schedules import timestep_grid
from dmdr_fast.algorithm.score_pass import separate_scores
from dmdr_fast.algorithm.update import Update

SHAPE = (2, 4, 4)
CLASSES = 3


class Denoiser(nn.Module):
    """A smooth conditional network of (x, t, label), float dtype of its weights."""

    def __init__(self, seed: int, width: int = 16, dtype=torch.float64):
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        size = SHAPE[0] * SHAPE[1] * SHAPE[2]
        self.inner = nn.Parameter(torch.randn(size + 1, width, generator=rng, dtype=torch.float64).to(dtype) * 0.2)
        self.outer = nn.Parameter(torch.randn(width, size, generator=rng, dtype=torch.float64).to(dtype) * 0.2)
        self.label = nn.Parameter(torch.randn(CLASSES + 1, width, generator=rng, dtype=torch.float64).to(dtype))

    def forward(self, x, t, y):
        flat = torch.cat([x.to(self.inner.dtype).flatten(1), t.to(self.inner.dtype)[:, None]], dim=1)
        return (torch.tanh(flat @ self.inner + self.label[y]) @ self.outer).view_as(x).to(x.dtype)


class PlainRole:
    """A module with a torch optimizer (SGD), as ``dmdr_fast.algorithm.recipe.Trained`` asks."""

    def __init__(self, module, lr=1e-2, before=None, optimizer=None):
        self.module, self.before = module, before
        self.optimizer = optimizer or torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=lr)
        self.forwards = 0

    def __call__(self, x, t, condition):
        self.forwards += 1
        if self.before is not None:
            self.before()
        return self.module(x, t, condition)

    def backward(self, loss, *, last):
        loss.backward()

    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()
        return True


def labels(index, shard, group=1):
    y = (torch.arange(shard.start, shard.stop) // group) % CLASSES
    return Batch(y, torch.full_like(y, CLASSES), y, {"labels": y})


def reward_model(decode, reward):
    """A reward model of ``reward(images, labels) -> [B]``."""
    return RewardModel(decode, lambda images, given, batch: (reward(images, **given), {}))


def networks(dtype=torch.float64):
    generator, fake, real = (Denoiser(seed, dtype=dtype) for seed in (1, 2, 3))
    generator_role, fake_role = PlainRole(generator), PlainRole(fake)
    nets = Networks(
        generator_role,
        fake_role,
        separate_scores(fake_role, real.requires_grad_(False)),
    )
    return nets, generator, fake, real


def recipe(steps=1, **changes):
    values = {"grid": timestep_grid(steps), "latent_shape": SHAPE, "cold_start_steps": 0, "generator_steps": 100}
    values |= {"fake_updates": 2}
    return Recipe(**(values | changes))


def update(nets, numbers, streams, shards, step=0, data=labels, reward=None, device=torch.device("cpu")):  # noqa: B008
    return Update(numbers, streams, nets, data, reward, shards, device, step)
