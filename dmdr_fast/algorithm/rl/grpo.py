"""GRPO: a policy gradient over the generator's own stochastic steps, from the rewards of groups of samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dmdr_fast.algorithm.rl.grouped import Grouped
from dmdr_fast.algorithm.rl.method import Setting, option

if TYPE_CHECKING:
    from dmdr_fast.algorithm.rl.experience import Experience
    from dmdr_fast.algorithm.update import Update


@dataclass(frozen=True)
class GRPOOptions(Grouped):
    """GRPO: policy gradient over groups of samples of one condition."""

    name = "grpo"

    mode: Literal["policy", "advantage_weighted_dmd"] = option(
        "policy", "policy: clipped ratios; advantage_weighted_dmd: advantages weight the guidance in the DMD gradient."
    )
    sde: Literal["flow_grpo", "dance", "cps"] = option("flow_grpo", "Form of the stochastic step.")
    eta: float = option(0.7, "Its noise: 0.7 for flow_grpo, 0.3 for dance.", gt=0)
    clip_low: float = option(1e-4, "Ratio bound below, 1 - clip_low.", ge=0)
    clip_high: float = option(1e-4, "Ratio bound above, 1 + clip_high.", ge=0)
    adv_clip: float = option(5.0, "Largest |advantage|.", gt=0)
    inner_epochs: int = option(1, "Generator steps per batch of rollouts.", gt=0)
    trained_steps: int | None = option(None, "Stochastic steps trained per update, drawn anew; null: all.", gt=0)
    noisy_last_step: bool = option(False, "The step that ends at t = 0 is stochastic too; needed for student.steps 1.")


@dataclass(frozen=True)
class GRPO(GRPOOptions):
    """GRPO: policy gradient over groups of samples of one condition.

    The clipped ratio on the steps of an SDE; inside DMDR the DMD gradient takes the KL's place.
    """

    kl_on_x0 = False

    @property
    def generator_steps(self) -> int:
        return self.inner_epochs

    def stochastic_steps(self, student_steps: int) -> range:
        """All but the last; with ``noisy_last_step`` that too, where the SDE gives it noise: cps has none at t = 0."""
        return range(student_steps if self.noisy_last_step and self.sde != "cps" else student_steps - 1)

    def graded_forwards(self, student_steps: int) -> int:
        """One for each stochastic step that is trained."""
        return self.inner_epochs * (self.trained_steps or len(self.stochastic_steps(student_steps)))

    def reference_forwards(self, student_steps: int) -> int:
        """The KL is of each step that is trained."""
        return self.graded_forwards(student_steps)

    def problems(self, setting: Setting) -> Iterator[str]:
        yield from super().problems(setting)
        steps = setting.student_steps
        stochastic = len(self.stochastic_steps(steps))
        if setting.prediction not in ("flow", "x0"):
            yield (
                f"rl.method: the stochastic steps of grpo are of flow matching and {setting.family.upper()} predicts "
                f"{setting.prediction}; take refl or dpo"
            )
        if self.sde == "cps" and self.eta >= 2.0:
            yield f"rl.grpo.eta: {self.eta:g} turns cps's noise angle, eta pi / 2, past a half turn; set it below 2"
        if not stochastic:
            yield (
                f"rl.grpo: no step of a {steps}-step student is stochastic with sde {self.sde} and noisy_last_step "
                f"{str(self.noisy_last_step).lower()}; set rl.grpo.noisy_last_step to true with sde flow_grpo or "
                "dance, or student.steps to 2 or more"
            )
        if self.trained_steps is not None and self.trained_steps > stochastic:
            yield f"rl.grpo.trained_steps: {self.trained_steps} of {stochastic} stochastic step(s); lower it"

    def collect(self, update: Update) -> Experience:
        from dmdr_fast.algorithm.rl.policy_gradient import collect

        return collect(self, update)
