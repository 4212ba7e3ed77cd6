"""ReFL: the reward's own gradient on x0 (ImageReward, arXiv 2304.05977)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dmdr_fast.algorithm.rl.method import Method, Metrics, option

if TYPE_CHECKING:
    from torch import Tensor

    from dmdr_fast.algorithm.simulation import Simulated
    from dmdr_fast.algorithm.update import Update


@dataclass(frozen=True)
class ReFL(Method):
    """ReFL: the reward's own gradient on x0."""

    name = "refl"
    uses_reward = needs_gradient = needs_rollout = auto_weight = True

    chunk: int = option(64, "Samples decoded and scored at a time; less is less memory.", gt=0)
    checkpoint: bool = option(False, "Recompute the decoder's activations in its backward pass.")
    objective: Literal["linear", "hinge"] = option("linear", "linear: mean R; hinge: -mean max(0, margin - R).")
    margin: float = option(0.0, "The reward above which the hinge leaves a sample alone.")

    def leaf(self, update: Update, sample: Simulated, x0: Tensor) -> tuple[Tensor, Metrics]:
        from dmdr_fast.algorithm.rl.reward_gradient import leaf

        return leaf(self, update, sample, x0)

    def loss_on_x0(self, update: Update, sample: Simulated) -> Tensor:
        from dmdr_fast.algorithm.rl.reward_gradient import loss_on_x0

        return loss_on_x0(self, update, sample)
