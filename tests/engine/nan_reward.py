"""train.py with a digits reward whose gradient turns NaN on the last rank, in the updates that NAN_STEPS lists."""

import os
import sys

import torch

from dmdr_fast.cli import run_user_command
from dmdr_fast.engine import inputs
from dmdr_fast.train import main

POISONED = {int(s) for s in os.environ["NAN_STEPS"].split(",")}
RL_STARTS = int(os.environ["RL_STARTS"])
build = inputs.build_rewards


class Poisoned(torch.nn.Module):
    differentiable = True

    def __init__(self, reward):
        super().__init__()
        self.name, self.reward, self.step = reward.name, reward, RL_STARTS

    def forward(self, images, **given):
        values = self.reward(images, **given)
        last = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)
        if self.step in POISONED and last:
            values = values + (0.0 * images.square().flatten(1).sum(1)).sqrt()  # 0, of slope 0/0
        self.step += 1
        return values


def poisoned(*given):
    rewards = build(*given)
    rewards.terms = [(Poisoned(reward), weight, normalize) for reward, weight, normalize in rewards.terms]
    return rewards


inputs.build_rewards = poisoned
sys.exit(run_user_command(main))
