"""What the methods share that compare a sample with its group by an advantage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dmdr_fast.algorithm.rl.method import Method, option


@dataclass(frozen=True)
class Grouped(Method):
    """How :func:`~dmdr_fast.algorithm.rl.advantages.group_advantages` compares."""

    uses_reward = True

    group_size: int = option(8, "K, samples per prompt or class; divides the global batch.", gt=0)
    std: Literal["group", "global", "none"] = option("group", "What advantages are divided by.")
    unbiased: bool = option(False, "Standard deviation over n - 1 (DanceGRPO) instead of n (Flow-GRPO).")
    eps: float = option(1e-4, "Added to the standard deviation.", ge=0)
    drop_zero_variance: bool = option(True, "Leave out groups whose rewards are all alike.")
