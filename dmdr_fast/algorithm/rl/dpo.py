"""DPO: of two samples of one condition, the generator comes to denoise the preferred one better than its reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dmdr_fast.algorithm.rl.method import Method, option

if TYPE_CHECKING:
    from dmdr_fast.algorithm.rl.experience import Experience
    from dmdr_fast.algorithm.update import Update


@dataclass(frozen=True)
class DPO(Method):
    """DPO: best against worst of a group, online."""

    name = "dpo"
    uses_reward = needs_reference = True

    beta: float = option(100.0, "Strength of the preference.", gt=0)
    group_size: int = option(4, "Samples per prompt or class; divides the global batch.", gt=0)
    times: Literal["grid", "renoise"] = option(
        "grid", "Times of the pairs: the student's own grid, or the renoise law."
    )

    def graded_forwards(self, student_steps: int) -> int:
        return 1

    @property
    def graded_share(self) -> float:
        """Two samples of a group."""
        return 2 / self.group_size

    def reference_forwards(self, student_steps: int) -> int:
        return 1

    def collect(self, update: Update) -> Experience:
        from dmdr_fast.algorithm.rl.preference import collect

        return collect(self, update)
