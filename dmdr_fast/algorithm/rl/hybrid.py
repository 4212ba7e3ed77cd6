"""Hybrid: GRPO's policy loss on the stochastic steps and the reward's own gradient, ReFL's, on the last."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dmdr_fast.algorithm.rl.grpo import GRPO
from dmdr_fast.algorithm.rl.method import Method, Setting, option
from dmdr_fast.algorithm.rl.refl import ReFL

if TYPE_CHECKING:
    from dmdr_fast.algorithm.rl.experience import Experience
    from dmdr_fast.algorithm.update import Update


@dataclass(frozen=True)
class Hybrid(Method):
    """Hybrid: GRPO on the steps before the last, as ``rl.grpo`` has it, and ReFL on the last, as ``rl.refl`` has it."""

    name = "hybrid"
    parts = ("grpo", "refl")
    uses_reward = needs_gradient = True
    kl_on_x0 = False

    refl_weight: float = option(1.0, "Weight of ReFL's loss on the last step beside GRPO's on the others.", gt=0)
    grpo: GRPO = field(default_factory=GRPO)
    refl: ReFL = field(default_factory=ReFL)

    @property
    def generator_steps(self) -> int:
        return self.grpo.generator_steps

    def graded_forwards(self, student_steps: int) -> int:
        """GRPO's, and the last step's in each of its epochs."""
        return self.grpo.graded_forwards(student_steps) + self.generator_steps

    def reference_forwards(self, student_steps: int) -> int:
        """GRPO's: no KL holds the last step."""
        return self.grpo.reference_forwards(student_steps)

    def plain_forwards(self) -> int:
        """x0 of each epoch but the first."""
        return self.generator_steps - 1

    def reward_passes(self) -> int:
        """At the x0 of each epoch."""
        return self.generator_steps

    def problems(self, setting: Setting) -> Iterator[str]:
        if self.grpo.mode != "policy":
            yield f"rl.grpo.mode: {self.grpo.mode} has no policy loss, which rl.method hybrid takes; set it to policy"
        if self.grpo.noisy_last_step:
            yield "rl.grpo.noisy_last_step: true; under rl.method hybrid the last step is ReFL's, set it to false"
        if setting.student_steps < 2:
            yield (
                f"student.steps: {setting.student_steps}; rl.method hybrid takes GRPO's loss on the steps before the "
                "last, set it to 2 or more"
            )
        yield from self.grpo.problems(setting)

    def collect(self, update: Update) -> Experience:
        from dmdr_fast.algorithm.rl.last_step import collect

        return collect(self, update)
