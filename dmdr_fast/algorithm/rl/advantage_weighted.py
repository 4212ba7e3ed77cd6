"""GRPO's second form: advantages weight the teacher's guidance in the DMD gradient, and no policy loss is taken."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dmdr_fast.algorithm.rl.grpo import GRPOOptions
from dmdr_fast.algorithm.rl.method import Metrics, Setting

if TYPE_CHECKING:
    from torch import Tensor

    from dmdr_fast.algorithm.simulation import Simulated
    from dmdr_fast.algorithm.update import Update


@dataclass(frozen=True)
class AdvantageWeightedDMD(GRPOOptions):
    """The rollout's samples come in groups; a sample that beats its group is guided more, one that lost less."""

    @property
    def rollout_group(self) -> int:
        return self.group_size

    def problems(self, setting: Setting) -> Iterator[str]:
        yield from super().problems(setting)
        if self.inner_epochs > 1:
            yield (
                f"rl.grpo.inner_epochs: {self.inner_epochs}; rl.grpo.mode advantage_weighted_dmd takes one step on its "
                "samples, set it to 1, or the mode to policy"
            )
        if setting.regularizer != "dmd":
            yield (
                "rl.grpo.mode: advantage_weighted_dmd weights the DMD gradient; set rl.regularizer to dmd, or the mode "
                "to policy"
            )
        if not setting.uses_cfg:
            scale = "null" if setting.cfg_scale is None else f"{setting.cfg_scale:g}"
            yield (
                f"teacher.cfg_scale: {scale} is no guidance, so rl.grpo.mode advantage_weighted_dmd has nothing to "
                "weight; raise it, or set the mode to policy"
            )

    def guidance(self, update: Update, samples: Sequence[Simulated]) -> tuple[Sequence[Tensor | None], Metrics]:
        from dmdr_fast.algorithm.rl.advantages import guidance

        return guidance(self, update, samples)
