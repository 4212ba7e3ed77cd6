"""GRPO: a policy gradient over the generator's own stochastic steps, from the rewards of groups of samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dmdr_fast.algorithm.rl.method import Loss, Method, Setting, option

if TYPE_CHECKING:
    from dmdr_fast.algorithm.rl.experience import Experience
    from dmdr_fast.algorithm.update import Update


@dataclass(frozen=True)
class GRPOOptions:
    """GRPO: policy gradient over groups of samples of one condition."""

    mode: Literal["policy", "advantage_weighted_dmd"] = option(
        "policy", "policy: clipped ratios; advantage_weighted_dmd: advantages weight the guidance in the DMD gradient."
    )
    group_size: int = option(8, "K, samples per prompt or class; divides the global micro-batch.", above=0)
    sde: Literal["flow_grpo", "dance", "cps"] = option("flow_grpo", "Form of the stochastic step.")
    eta: float = option(0.7, "Its noise: 0.7 for flow_grpo, 0.3 for dance.", above=0)
    std: Literal["group", "global", "none"] = option("group", "What advantages are divided by.")
    unbiased: bool = option(False, "Standard deviation over n - 1 (DanceGRPO) instead of n (Flow-GRPO).")
    eps: float = option(1e-4, "Added to the standard deviation.", least=0)
    drop_zero_variance: bool = option(True, "Leave out groups whose rewards are all alike.")
    clip_low: float = option(1e-4, "Ratio bound below, 1 - clip_low.", least=0)
    clip_high: float = option(1e-4, "Ratio bound above, 1 + clip_high.", least=0)
    adv_clip: float = option(5.0, "Largest |advantage|.", above=0)
    inner_epochs: int = option(1, "Generator steps per batch of rollouts.", above=0)
    trained_steps: int | None = option(None, "Stochastic steps trained per update, drawn anew; null: all.", above=0)
    noisy_last_step: bool = option(False, "The step that ends at t = 0 is stochastic too; needed for student.steps 1.")

    def stochastic_steps(self, student_steps: int) -> int:
        """How many of the student's steps are stochastic: cps has no noise at t = 0."""
        return student_steps if self.noisy_last_step and self.sde != "cps" else student_steps - 1


@dataclass(frozen=True)
class GRPO(Method):
    """The clipped ratio on the steps of an SDE; inside DMDR the DMD gradient takes the KL's place."""

    name = "grpo"
    title = "GRPO"
    Options = GRPOOptions
    uses_reward = True
    kl_on_x0 = False

    options: GRPOOptions = GRPOOptions()

    @property
    def inner_epochs(self) -> int:
        return self.options.inner_epochs

    def graded_forwards(self, student_steps: int) -> int:
        """One for each stochastic step that is trained."""
        trained = self.options.trained_steps or self.options.stochastic_steps(student_steps)
        return self.options.inner_epochs * trained

    def lacks(self, prediction: str) -> str | None:
        return None if prediction in ("flow", "x0") else "the stochastic steps of grpo are of flow matching"

    def problems(self, setting: Setting) -> Iterator[str]:
        yield from super().problems(setting)
        options, steps = self.options, setting.student_steps
        stochastic = options.stochastic_steps(steps)
        if options.sde == "cps" and options.eta >= 2.0:
            yield f"rl.grpo.eta: {options.eta:g} turns cps's noise angle, eta pi / 2, past a half turn; set it below 2"
        if not stochastic:
            yield (
                f"rl.grpo: no step of a {steps}-step student is stochastic with sde {options.sde} and noisy_last_step "
                f"{str(options.noisy_last_step).lower()}; set rl.grpo.noisy_last_step to true with sde flow_grpo or "
                "dance, or student.steps to 2 or more"
            )
        if options.trained_steps is not None and options.trained_steps > stochastic:
            yield f"rl.grpo.trained_steps: {options.trained_steps} of {stochastic} stochastic step(s); lower it"

    def collect(self, update: Update) -> Experience:
        from dmdr_fast.algorithm.rl.policy_gradient import collect

        return collect(update, self.options)

    def losses(self, update: Update, experience: Experience) -> list[Loss]:
        from dmdr_fast.algorithm.rl.policy_gradient import losses

        return losses(update, experience, self.options)
