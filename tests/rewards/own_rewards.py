"""Rewards as a user writes them, in a file of their own: good ones and ones that fail."""

import os
import time
from dataclasses import dataclass

import torch


class Brightness:
    name = "brightness"
    differentiable = True

    def __init__(self, scale: float = 1.0):
        self.scale = scale

    def __call__(self, images, *, labels=None, prompts=None):
        return self.scale * images.flatten(1).mean(1)


@dataclass
class PromptLength:
    """Score-only: brightness above a threshold plus the prompt's length, or the label."""

    differentiable = False
    threshold: float = 0.0

    def __call__(self, images, *, labels=None, prompts=None):
        bright = (images.flatten(1).mean(1) > self.threshold).float()
        return bright + (labels if prompts is None else torch.tensor([len(p) for p in prompts]))


class Fails:
    """Does what the first label asks for: 0 raises, 1 hangs, 2 dies, 3 returns a wrong shape, else the process id."""

    differentiable = False

    def __call__(self, images, *, labels=None, prompts=None):
        match int(labels[0]):
            case 0:
                raise KeyError("no such tower")
            case 1:
                time.sleep(600)
            case 2:
                os._exit(7)
            case 3:
                return torch.zeros(len(images), 1)
        return torch.full((len(images),), float(os.getpid()))


class Unbuildable:
    differentiable = False

    def __init__(self):
        raise OSError("weights are gone")


class NoReward:
    pass
