"""``reward.weight: auto``: the RL loss starts as large as the DMD loss then is."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dmdr_fast.algorithm.simulation import simulate
from dmdr_fast.algorithm.update import Update
from dmdr_fast.engine.runtime import Runtime

WINDOW = 100  # updates at the end of the cold start: one update's loss depends on its few renoise times


class RewardWeight:
    """w = (mean DMD loss of the last ``WINDOW`` cold-start updates) / |mean RL loss of a batch as RL starts|.

    A function of the updates before it, the same on every number of ranks; a checkpoint keeps what it needs.
    """

    def __init__(self, ranks: Runtime) -> None:
        self.ranks = ranks
        self.value: float | None = None
        self.losses: deque[Tensor] = deque(maxlen=WINDOW)

    def note(self, dmd_loss: Tensor) -> None:
        """The DMD loss of a cold-start update, 0-d, of this rank's micro-batches."""
        self.losses.append(dmd_loss.detach())

    def match(self, rl_loss: Tensor) -> float:
        """Fix the weight by the RL loss, 0-d, of this rank's micro-batches. All ranks must call.

        Raises:
            ValueError: the RL loss is 0 or not finite, or no cold-start update had a finite DMD loss.
        """
        size, losses = abs(float(self._means([rl_loss])[0])), self._means(self.losses)
        dmd = float(losses[losses.isfinite()].double().mean())
        if not (0.0 < size < math.inf and 0.0 < dmd < math.inf):
            raise ValueError(
                f"reward.weight: auto is the DMD loss over the RL loss, {dmd:g} / {size:g} as RL starts; set a number"
            )
        self.value = dmd / size
        self.losses.clear()
        return self.value

    def state_dict(self) -> dict[str, Any]:
        """Numbers that JSON keeps exactly. All ranks must call."""
        return {"value": self.value, "losses": self._means(self.losses).tolist() if self.losses else []}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]
        self.losses.extend(torch.tensor(loss, device=self.ranks.device) for loss in state["losses"])

    def _means(self, values: Iterable[Tensor]) -> Tensor:
        """The means over the ranks, fp32: in fp64 between, so that the mean of equal fp32 numbers is that number."""
        return self.ranks.mean(torch.stack(list(values)).double()).float()


def first_rl_loss(update: Update) -> Tensor:
    """The method's loss on a batch of the generator's samples, 0-d, the mean of this rank's micro-batches.

    Conditions and noise are drawn as for a rollout of that update. All ranks must call.
    """
    recipe, index = update.recipe, (update.step, update.recipe.fake_updates - 1)
    sizes = recipe.sizes(update.streams, index, len(update.shards))
    samples = (simulate(update, index, s, size=size) for s, size in zip(update.shards, sizes, strict=True))
    return torch.stack([recipe.method.loss_on_x0(update, sample) for sample in samples]).mean()
