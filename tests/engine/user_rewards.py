"""Rewards of a user's own: sound ones, and one for every way of failing."""

import time

import torch


class Darkness:
    name = "darkness"
    differentiable = True

    def __call__(self, images, *, labels=None, prompts=None):
        return -images.flatten(1).mean(1)


class Ink:
    """Score-only."""

    name = "ink"
    differentiable = False

    def __call__(self, images, *, labels=None, prompts=None):
        return (images > 0).float().flatten(1).mean(1)


class NaN(Darkness):
    def __call__(self, images, *, labels=None, prompts=None):
        return super().__call__(images) * torch.nan


class WrongShape(Darkness):
    def __call__(self, images, *, labels=None, prompts=None):
        return super().__call__(images)[:, None]


class WrongDevice(Darkness):
    def __call__(self, images, *, labels=None, prompts=None):
        return super().__call__(images).to("meta")


class Raises(Darkness):
    def __call__(self, images, *, labels=None, prompts=None):
        raise RuntimeError("the tower fell")


class Hangs:
    differentiable = False

    def __call__(self, images, *, labels=None, prompts=None):
        time.sleep(600)
