"""DPO: of two samples of one condition, the generator comes to denoise the preferred one better than its reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dmdr_fast.algorithm.rl.method import Loss, Method, option

if TYPE_CHECKING:
    from dmdr_fast.algorithm.rl.experience import Experience
    from dmdr_fast.algorithm.update import Update


@dataclass(frozen=True)
class DPOOptions:
    """DPO: best against worst of a group, online."""

    beta: float = option(100.0, "Strength of the preference.", above=0)
    group_size: int = option(4, "Samples per prompt or class; divides the global micro-batch.", above=0)
    times: Literal["grid", "renoise"] = option(
        "grid", "Times of the pairs: the student's own grid, or the renoise law."
    )


@dataclass(frozen=True)
class DPO(Method):
    """Online pairs: the best and the worst of each group of the generator's own samples."""

    name = "dpo"
    title = "DPO"
    Options = DPOOptions
    uses_reward = needs_reference = True

    options: DPOOptions = DPOOptions()

    def graded_forwards(self, student_steps: int) -> int:
        return 1

    def collect(self, update: Update) -> Experience:
        from dmdr_fast.algorithm.rl.preference import collect

        return collect(update, self.options)

    def losses(self, update: Update, experience: Experience) -> list[Loss]:
        from dmdr_fast.algorithm.rl.preference import losses

        return losses(update, experience, self.options)
