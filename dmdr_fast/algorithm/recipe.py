"""What one update of DMDR is made of: its numbers, its networks, its data, its reward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor

from dmdr_fast.algorithm.dmd import DMDOptions
from dmdr_fast.algorithm.paths import FLOW, Path
from dmdr_fast.algorithm.rl.method import Method, Regularizer
from dmdr_fast.algorithm.rl.refl import ReFL
from dmdr_fast.algorithm.rollout import Network, Variant
from dmdr_fast.algorithm.schedules import RenoiseLaw, real_score_lora_scale
from dmdr_fast.algorithm.score_pass import ScorePass
from dmdr_fast.algorithm.streams import Shard, Streams
from dmdr_fast.ops.dmd import Prediction

Decode = Callable[[Tensor], Tensor]  # latent [B, ...] -> image [B, C, H, W] in about [-1, 1]


class Trained(Protocol):
    """A trained role: a network with an optimizer behind it."""

    def __call__(self, x_t: Tensor, t: Tensor, condition: Any) -> Tensor: ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate one loss's gradients (averaged over micro-batches and ranks); ``last`` before a step."""

    def step(self) -> bool:
        """Clip and apply what was accumulated; False where a gradient was not finite and nothing was changed."""


@dataclass(frozen=True)
class Networks:
    """The roles. ``score`` runs F and T together; ``fake`` is F alone at its own LoRA scale, graded.

    ``reference`` is what a KL or DPO holds the generator to, without grad; None where neither is used.
    """

    generator: Trained
    fake: Trained
    score: ScorePass
    reference: Network | None = None


@dataclass(frozen=True)
class Batch:
    """What the data gives for one micro-batch.

    condition: of the networks, batch first. uncond: the null condition for CFG, likewise. classes: int64 [B], the
    class or prompt of each sample as a number. reward_inputs: what the rewards need to know (labels, prompts).
    """

    condition: Any
    uncond: Any
    classes: Tensor
    reward_inputs: dict[str, Any]


class Data(Protocol):
    """``data(index, shard, group)``: the shard's part of draw ``index``; each drawn condition serves ``group`` samples
    in a row of the global batch."""

    def __call__(self, index: tuple[int, ...], shard: Shard, group: int = 1) -> Batch: ...


# (images, reward inputs, what to call this batch in an error) -> (rewards fp32 [B], each reward by name)
Score = Callable[[Tensor, dict[str, Any], str], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class RewardModel:
    """Decoder and rewards, all frozen. chunk: samples decoded and scored at a time, where no gradient is taken."""

    decode: Decode
    score: Score
    chunk: int = 64


@dataclass(frozen=True)
class Recipe:
    """The numbers of one DMDR run that the step itself reads.

    prediction: what generator, fake and real score predict on ``path``. eta: how much of the noise of the student's
    steps is fresh, see ``rollout.next_input``. fake_renoise: the law of the fake updates' times; None: ``renoise``,
    that of the score pass. rollout_reuse: fake updates in a row that train on one rollout, renoised anew.
    stop_step_per: "micro_step" or "rank", see ``simulation.stop_places``. tilt: how rewards reach the generator in the
    cold start, by a method that acts on x0 alone, ``step.leaf_gradient``. method: how they do once it has ended.
    regularizer: what then holds it near the teacher, the DMD gradient (``dm``: without guidance), a KL to the reference
    or nothing; kl_weight: that of the KL, which comes on top of ``dmd`` and ``dm``. saturation: |x0| beyond which a
    value counts as saturated. more_shapes: latents of other sizes than ``latent_shape``, see ``sizes``.
    """

    grid: tuple[float, ...]
    latent_shape: tuple[int, ...]
    cold_start_steps: int
    generator_steps: int
    fake_updates: int = 5
    rollout_variant: Variant = "backward_simulation"
    eta: float = 1.0
    rollout_reuse: int = 1
    stop_step_per: Literal["micro_step", "rank"] = "micro_step"
    prediction: Prediction = "flow"
    path: Path = FLOW
    real_lora_scale: float = 0.0
    dynamic_guidance_step: int = 0
    renoise: RenoiseLaw = field(default_factory=RenoiseLaw)
    fake_renoise: RenoiseLaw | None = None
    dmd: DMDOptions = field(default_factory=DMDOptions)
    tilt: Method = field(default_factory=Method)
    tilt_weight: float = 0.0
    method: Method = field(default_factory=ReFL)
    regularizer: Regularizer = "dmd"
    kl_weight: float = 0.0
    reward_weight: float = 0.0
    reward_final_weight: float | None = None
    reward_warmup_steps: int = 0
    saturation: float = 1.0
    more_shapes: tuple[tuple[int, ...], ...] = ()

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The latent's shape in every size, by its number."""
        return (self.latent_shape, *self.more_shapes)

    def sizes(self, streams: Streams, index: tuple[int, ...], count: int, group: int = 1) -> list[int]:
        """The numbers of the sizes of draw ``index``'s ``count`` micro-steps: uniform, the same on all ranks.

        Samples that are compared, in groups, have one size in the whole update.
        """
        places = [0 if group > 1 else micro_step for micro_step in range(count)]
        return [int(streams.rng("size", *index, place).integers(len(self.shapes))) for place in places]

    def rl_active(self, step: int) -> bool:
        """Reinforcement learning starts when the cold start has ended."""
        weighs = self.reward_weight != 0.0 or (self.reward_final_weight or 0.0) != 0.0
        return step >= self.cold_start_steps and self.method.uses_reward and weighs

    def method_at(self, step: int) -> Method:
        """What brings rewards to the generator at this step; the method none where nothing does."""
        if step < self.cold_start_steps:
            return self.tilt
        return self.method if self.rl_active(step) else Method()

    def rl_weight(self, step: int) -> float:
        """Weight of the reward: the tilt's, then up from 0 over the warm-up, then linearly to the final weight."""
        if step < self.cold_start_steps:
            return self.tilt_weight
        since = step - self.cold_start_steps
        last = max(1, self.generator_steps - 1 - self.cold_start_steps)
        final = self.reward_weight if self.reward_final_weight is None else self.reward_final_weight
        weight = self.reward_weight + (final - self.reward_weight) * min(1.0, since / last)
        return weight * min(1.0, (since + 1) / self.reward_warmup_steps) if self.reward_warmup_steps else weight

    def real_scale(self, step: int) -> float:
        """DynaDG's s_r at this step."""
        return real_score_lora_scale(step, initial=self.real_lora_scale, dynamic_step=self.dynamic_guidance_step)
