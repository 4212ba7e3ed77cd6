"""train.py with a digits reward that turns NaN on the last rank, in the generator updates that NAN_STEPS lists."""

import os
import sys

import torch

from dmdr_fast.cli import run_user_command
from dmdr_fast.engine import inputs
from dmdr_fast.train import main

POISONED = {int(s) for s in os.environ["NAN_STEPS"].split(",")}
RL_STARTS = int(os.environ["RL_STARTS"])
build = inputs.build_reward


class Poisoned(torch.nn.Module):
    def __init__(self, reward):
        super().__init__()
        self.reward, self.step = reward, RL_STARTS

    def forward(self, images, **given):
        values = self.reward(images, **given)
        last = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)
        if self.step in POISONED and last:
            values = values * torch.nan
        self.step += 1
        return values


inputs.build_reward = lambda config, device: Poisoned(build(config, device))
sys.exit(run_user_command(main))
