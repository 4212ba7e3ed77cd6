"""The numbers of each reinforcement-learning method; the names are those of the configuration's ``rl`` section."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dmdr_fast.ops.sde_step import SDEKind


@dataclass(frozen=True)
class ReFLOptions:
    """Reward gradient on x0.

    chunk: samples decoded and scored at a time. checkpoint: recompute the decoder's activations in its backward.
    objective: ``linear`` maximises mean R; ``hinge`` minimises mean max(0, margin - R): a sample above it rests.
    """

    chunk: int = 8
    checkpoint: bool = False
    objective: Literal["linear", "hinge"] = "linear"
    margin: float = 0.0


@dataclass(frozen=True)
class GRPOOptions:
    """Group-relative policy gradient over a stochastic rollout.

    mode: ``policy`` the clipped ratio on the SDE's steps; ``advantage_weighted_dmd`` the advantage weights the
    teacher's guidance in the DMD gradient, and no policy loss is taken.
    kind, eta: the SDE of :func:`dmdr_fast.ops.sde_step_logprob`.
    std: of the advantages, ``group``, ``global`` (all groups of the update) or ``none``; unbiased: n - 1 in the place
    of n; eps: added to it; drop_zero_variance: groups whose rewards are all alike give nothing.
    trained_steps: how many of the stochastic steps are trained per update, drawn anew; None: all.
    noisy_last_step: the step that ends at t = 0 is stochastic too; the only one there is for a one-step student.
    """

    mode: Literal["policy", "advantage_weighted_dmd"] = "policy"
    group_size: int = 8
    kind: SDEKind = "flow_grpo"
    eta: float = 0.7
    std: Literal["group", "global", "none"] = "group"
    unbiased: bool = False
    eps: float = 1e-4
    drop_zero_variance: bool = True
    clip_low: float = 1e-4
    clip_high: float = 1e-4
    adv_clip: float = 5.0
    inner_epochs: int = 1
    trained_steps: int | None = None
    noisy_last_step: bool = False


@dataclass(frozen=True)
class DPOOptions:
    """Online preference pairs: best and worst of a group.

    times: ``grid`` draws the pair's t from the student's own times, ``renoise`` from the renoise law.
    """

    beta: float = 100.0
    group_size: int = 4
    times: Literal["grid", "renoise"] = "grid"


@dataclass(frozen=True)
class RLOptions:
    """How rewards reach the generator once the cold start has ended.

    regularizer: what holds the generator near the teacher: ``dmd``, ``kl`` (to the reference, with kl_weight) or
    ``none``. With ``dmd`` a kl_weight above 0 adds the KL to it.
    """

    method: Literal["refl", "grpo", "dpo", "none"] = "refl"
    regularizer: Literal["dmd", "kl", "none"] = "dmd"
    kl_weight: float = 0.0
    refl: ReFLOptions = field(default_factory=ReFLOptions)
    grpo: GRPOOptions = field(default_factory=GRPOOptions)
    dpo: DPOOptions = field(default_factory=DPOOptions)

    @property
    def group_size(self) -> int:
        """Samples per condition that belong together; 1 where samples stand alone."""
        return {"grpo": self.grpo.group_size, "dpo": self.dpo.group_size}.get(self.method, 1)
