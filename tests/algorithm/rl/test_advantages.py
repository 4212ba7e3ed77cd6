"""Advantages in every variant against numbers written out by hand; the best and the worst of a group."""

import math

import pytest
import torch

from dmdr_fast.algorithm.rl.advantages import best_and_worst, group_advantages
from dmdr_fast.algorithm.rl.grpo import GRPO

REWARDS = [1.0, 2.0, 6.0, 0.1, 0.1, 0.1, -1.0, 0.0, 4.0]  # groups of mean 3, 0.1 and 1; the second all alike
CENTRED = [-2.0, -1.0, 3.0, 0.0, 0.0, 0.0, -2.0, -1.0, 3.0]
SQUARES = 14.0  # of the first group about its mean, and of the last
GLOBAL = sum((r - sum(REWARDS) / 9) ** 2 for r in REWARDS)


@pytest.mark.parametrize("eps", [0.0, 1e-4, 0.5])
@pytest.mark.parametrize(
    ("std", "unbiased", "divisor"),
    [
        ("group", False, math.sqrt(SQUARES / 3)),
        ("group", True, math.sqrt(SQUARES / 2)),
        ("global", False, math.sqrt(GLOBAL / 9)),
        ("global", True, math.sqrt(GLOBAL / 8)),
        ("none", False, None),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_variant(std, unbiased, divisor, eps, dtype):
    options = GRPO(group_size=3, std=std, unbiased=unbiased, eps=eps)
    advantages, kept = group_advantages(torch.tensor(REWARDS, dtype=dtype), options)
    scale = 1.0 if divisor is None else 1 / (divisor + eps)
    expected = torch.tensor([a * scale for a in CENTRED], dtype=dtype)
    torch.testing.assert_close(advantages, expected, rtol=1e-6, atol=1e-7)
    assert kept.tolist() == [True] * 3 + [False] * 3 + [True] * 3
    assert advantages[3:6].tolist() == [0.0] * 3  # exactly: 0.1 is not its own mean in float32


def test_groups_all_alike_can_be_kept():
    options = GRPO(group_size=3, eps=0.0, drop_zero_variance=False)
    advantages, kept = group_advantages(torch.tensor(REWARDS), options)
    assert kept.all() and advantages[3:6].tolist() == [0.0] * 3
    assert group_advantages(torch.full((6,), 0.1), options)[0].tolist() == [0.0] * 6


def test_a_small_spread_on_a_large_reward_survives():
    rewards = torch.tensor([1000.0, 1000.0 + 2**-13])
    advantages, kept = group_advantages(rewards, GRPO(group_size=2, eps=0.0))
    assert advantages.tolist() == [-1.0, 1.0] and kept.all()


def test_best_and_worst():
    winners, losers, gap = best_and_worst(torch.tensor(REWARDS), 3)
    assert (winners.tolist(), losers.tolist(), gap.tolist()) == ([2, 3, 8], [0, 3, 6], [5.0, 0.0, 5.0])
    winners, losers, _ = best_and_worst(torch.tensor([3.0, 3.0, 1.0, 1.0]), 4)
    assert (winners.tolist(), losers.tolist()) == ([0], [2])


@pytest.mark.parametrize(
    ("rewards", "size", "message"),
    [
        (torch.zeros(5), 2, r"multiple of group_size 2, got \[5\]"),
        (torch.zeros(4, 1), 2, r"multiple of group_size 2, got \[4, 1\]"),
        (torch.zeros(4), 1, "group_size must be at least 2"),
    ],
)
def test_what_is_not_groups_is_refused(rewards, size, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, GRPO(group_size=size))
    with pytest.raises(ValueError, match=message):
        best_and_worst(rewards, size)


def test_an_unknown_std_is_refused():
    with pytest.raises(ValueError, match="std must be 'group', 'global' or 'none', got 'batch'"):
        group_advantages(torch.zeros(4), GRPO(group_size=2, std="batch"))
