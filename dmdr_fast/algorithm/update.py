"""One update: what all of its parts read, in one object."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dmdr_fast.algorithm.recipe import Data, Networks, Recipe, RewardModel
from dmdr_fast.algorithm.rl.method import Method
from dmdr_fast.algorithm.streams import Shard, Streams

# One equal-shaped part per micro-batch of this rank -> the whole global batch in its own order.
Gather = Callable[[Sequence[Tensor]], Tensor]


def whole_batch(parts: Sequence[Tensor]) -> Tensor:
    """:data:`Gather` of a single rank."""
    return torch.cat(list(parts))


@dataclass(frozen=True)
class Update:
    """Update ``step`` of a run on this rank, whose micro-batches of the global batch are ``shards``.

    epoch: which of the generator's steps on one batch of samples is being taken (GRPO's inner epochs).
    """

    recipe: Recipe
    streams: Streams
    networks: Networks
    data: Data
    reward: RewardModel | None
    shards: Sequence[Shard]
    device: torch.device
    step: int
    gather: Gather = whole_batch
    epoch: int = 0

    @property
    def method(self) -> Method:
        """What brings rewards to the generator in this update: the tilt in the cold start, then RL's, or none."""
        return Method() if self.reward is None else self.recipe.method_at(self.step)

    @property
    def rl(self) -> bool:
        """Whether this update is one of reinforcement learning, after the cold start."""
        return self.reward is not None and self.recipe.rl_active(self.step)

    @property
    def uses_dmd(self) -> bool:
        """Whether the DMD gradient is part of this update; the fake score is trained only then."""
        return not self.rl or self.recipe.regularizer in ("dmd", "dm")

    @property
    def guided(self) -> bool:
        """Whether the teacher is guided in it; the regulariser ``dm`` is DMD without."""
        return self.recipe.dmd.uses_cfg and not (self.rl and self.recipe.regularizer == "dm")

    @property
    def counters(self) -> tuple[int, ...]:
        """What the generator's step draws by: (step,), and (step, epoch) after the first epoch."""
        return (self.step, self.epoch) if self.epoch else (self.step,)

    def name_of(self, shard: Shard) -> str:
        """How an error names a micro-batch."""
        return f"update {self.step}, samples {shard.start} to {shard.stop - 1}"
