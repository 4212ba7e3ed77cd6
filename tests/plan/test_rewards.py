"""Rewards as the planner counts them: the published ones, those at a path, a user's own."""

import json

import pytest
import torch

from dmdr_fast.cli import parse
from dmdr_fast.plan.from_config import workload
from dmdr_fast.plan.reward import reward_cost
from dmdr_fast.plan.reward_nets import meta_reward
from dmdr_fast.plan.workload import RewardNet
from dmdr_fast.rewards.registry import KINDS, build_reward
from tests.rewards.conftest import small_clip  # noqa: F401, a fixture

OWN = """
import torch
from torch import nn

class Small(nn.Module):
    differentiable = True

    def __init__(self, width=64):
        super().__init__()
        self.layer = nn.Conv2d(3, width, 3)

    def forward(self, images, *, labels=None, prompts=None):
        return self.layer(images).square().mean((1, 2, 3))

class Loads(Small):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3, device="cpu"))

class Asks:
    differentiable = False

    def __call__(self, images, *, labels=None, prompts=None):
        return images.mean((1, 2, 3))
"""


@pytest.fixture
def own(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(OWN)
    return lambda name, **options: RewardNet(f"{file}:{name}", options=json.dumps(options))


def test_a_path_is_counted_as_what_lies_there(small_clip):  # noqa: F811
    real = sum(t.numel() * t.element_size() for t in (*small_clip.model.parameters(), *small_clip.model.buffers()))
    found = meta_reward(RewardNet("clip_score", str(small_clip.path)))
    assert (found.weights, found.note) == (real, "")
    half = meta_reward(RewardNet("pickscore", str(small_clip.path), json.dumps({"dtype": "bf16"})))
    assert half.weights == pytest.approx(real / 2, rel=0.02)  # but for int64 positions
    assert found.weights < meta_reward(RewardNet("clip_score")).weights / 1000
    images = torch.empty(2, 3, 40, 40, device="meta", requires_grad=True)
    found.score(images).sum().backward()
    assert images.grad.shape == images.shape


def test_what_is_not_there_is_said(tmp_path):
    found = meta_reward(RewardNet("clip_score", str(tmp_path)))
    assert found.weights == meta_reward(RewardNet("clip_score")).weights
    assert f"no configuration at {tmp_path}" in found.note and "counted as openai/clip-vit-large-patch14" in found.note


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith(("digits", "scenes"))])
def test_rewards_that_come_with_the_package(kind):
    real = build_reward(kind, num_classes=10)
    found = meta_reward(RewardNet(kind, num_classes=10), (3, 16, 16))
    size = sum(t.numel() * t.element_size() for t in (*real.parameters(), *real.buffers()))
    assert (found.weights, found.note) == (size, "")
    shape = (2, 1, 8, 8) if kind.startswith("digits") else (2, 3, 16, 16)
    assert found.score(torch.empty(shape, device="meta")).shape == (2,)


def test_a_user_s_own_reward(own):
    found = meta_reward(own("Small", width=128))
    assert (found.weights, found.note) == (4 * (128 * 27 + 128), "")
    assert "its constructor loads weights" in meta_reward(own("Loads")).note
    assert "a process of its own" in meta_reward(own("Asks")).note


def test_own_rewards_in_the_plan(own):
    """Counted as nothing before; what is stated by --reward-gb comes on top."""

    def plan(*nets):
        terms = json.dumps([{"kind": net.kind} for net in nets])
        argv = ["--config", "digits", "--model.resolution", "16", "--model.channels", "3", "--reward.terms", terms]
        argv += [
            "--reward.held_out",
            "[]",
            "--teacher.weights",
            "w.pt",
            "--eval.data",
            "null",
            "--eval.features",
            "null",
        ]
        return reward_cost(workload(parse(argv)[0]))

    without, counted, unknown = (
        plan(RewardNet("clip_score")),
        plan(RewardNet("clip_score"), own("Small")),
        plan(own("Loads")),
    )
    assert counted.weights - without.weights == 4 * (64 * 27 + 64)
    assert counted.flops[1] > without.flops[1]
    assert len(unknown.notes) == 1 and "--reward-gb" in unknown.notes[0]
