"""Which runs the claims are judged by: the variants, their settings and their budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dmdr_fast.errors import UserError

BASE = "cold_start"  # the run that others start from, where they begin with the same updates


@dataclass(frozen=True)
class Budget:
    """Generator updates of the cold start and in all, between evaluations, and what else every run is told.

    only: the runs that are made; all of :data:`VARIANTS` where it is empty.
    """

    cold_start: int
    total: int
    evaluate_every: int
    settings: dict[str, Any] = field(default_factory=dict)
    only: tuple[str, ...] = ()


FULL = Budget(500, 700, 25)
# A smoke test: each phase, method and regulariser in one run, on a model and lengths whose numbers mean nothing.
QUICK = Budget(
    4,
    6,
    2,
    {
        "model.hidden_size": 32,
        "model.depth": 2,
        "model.num_heads": 2,
        "teacher.train.steps": 100,
        "train.micro_batch_size": 16,
        "train.fake_updates": 1,
        "lora.rank": 4,
        "eval.samples": 200,
    },
    only=("cold_start", "cold_neither", "rl_kl", "dmdr_refl", "dmdr_grpo", "dmdr_dpo"),
)


@dataclass(frozen=True)
class Variant:
    """One kind of run. ``phases``: cold_start ends with it; both goes on with RL; rl has no cold start.

    settings: keys of the configuration, on top of the recipe file. after: the run whose last checkpoint it starts
    from; its first updates are those of that run, to the byte. longer: times the budget's updates.
    """

    name: str
    title: str
    phases: str = "both"
    settings: dict[str, Any] = field(default_factory=dict)
    after: str | None = None
    longer: float = 1.0

    def updates(self, of: int) -> int:
        """The variant's updates in the place of the budget's."""
        return round(of * self.longer)


# One rollout for all three fake updates of the digits: 12 F-units of 14, seven updates in the time of six.
REUSE_TIME = 7 / 6
# The weights of GRPO, DPO and the KL were chosen on seed 0; page.py says from what. The others are the recipe's.
_GRPO = {
    "rl.method": "grpo",
    "rl.grpo.noisy_last_step": True,
    "rl.grpo.sde": "dance",
    "rl.grpo.eta": 0.2,
    "rl.grpo.group_size": 8,
    "reward.weight": 0.15,
}
_DPO = {"rl.method": "dpo", "rl.dpo.beta": 100.0, "rl.dpo.group_size": 4, "reward.weight": 0.02}
_KL = {"rl.method": "refl", "rl.regularizer": "kl", "rl.kl_weight": 1.0}
_ALONE = {"rl.method": "refl", "rl.regularizer": "none"}

_REUSE = {"train.rollout_reuse": 3}
_TILT = {"rl.tilt.method": "refl", "rl.tilt.weight": 0.02}
_NFT = {"rl.method": "nft", "rl.nft.group_size": 8}
# A student of two steps, whose first is stochastic: GRPO alone, ReFL alone, and both.
_TWO = {"student.steps": 2}
_GRPO_OF_TWO = {**_TWO, "rl.grpo.sde": "dance", "rl.grpo.eta": 0.2, "rl.grpo.group_size": 8}

VARIANTS = (
    Variant(BASE, "Cold start", "cold_start", {"rl.method": "none"}),
    Variant(
        "cold_no_dyna_dg", "Cold start without DynaDG", "cold_start", {"rl.method": "none", "dyna_dg.real_scale": 0.0}
    ),
    Variant(
        "cold_no_dyna_rs", "Cold start without DynaRS", "cold_start", {"rl.method": "none", "dyna_rs.dynamic_step": 0}
    ),
    Variant(
        "cold_neither",
        "Cold start without either",
        "cold_start",
        {"rl.method": "none", "dyna_dg.real_scale": 0.0, "dyna_rs.dynamic_step": 0},
    ),
    Variant("dmd_only", "DMD only", settings={"rl.method": "none"}, after=BASE),
    Variant("rl_only", "RL only (ReFL)", "rl", _ALONE),
    Variant("rl_kl", "RL + KL (ReFL)", "rl", _KL),
    Variant("dmd_then_rl", "DMD, then RL (ReFL)", settings=_ALONE, after=BASE),
    Variant("dmd_then_rl_kl", "DMD, then RL + KL (ReFL)", settings=_KL, after=BASE),
    Variant("dmdr_refl", "DMDR, ReFL", settings={"rl.method": "refl"}, after=BASE),
    Variant("dmdr_grpo", "DMDR, GRPO", settings=_GRPO, after=BASE),
    Variant("dmdr_dpo", "DMDR, DPO", settings=_DPO, after=BASE),
    Variant("cold_reuse", "Cold start, rollouts reused", "cold_start", {"rl.method": "none", **_REUSE}),
    Variant("dmdr_reuse", "DMDR (ReFL), rollouts reused", settings={"rl.method": "refl", **_REUSE}, after="cold_reuse"),
    Variant(
        "cold_reuse_time",
        "Cold start, rollouts reused, equal time",
        "cold_start",
        {"rl.method": "none", **_REUSE},
        longer=REUSE_TIME,
    ),
    Variant(
        "dmdr_reuse_time",
        "DMDR (ReFL), rollouts reused, equal time",
        settings={"rl.method": "refl", **_REUSE},
        after="cold_reuse_time",
        longer=REUSE_TIME,
    ),
    Variant("dmdr_nft", "DMDR, NFT", settings=_NFT, after=BASE),
    Variant("cold_tilt", "Cold start, tilted", "cold_start", {"rl.method": "none", **_TILT}),
    Variant("dmdr_tilt", "DMDR (ReFL), tilted cold start", settings={"rl.method": "refl", **_TILT}, after="cold_tilt"),
    Variant("cold_two", "Cold start, 2 steps", "cold_start", {"rl.method": "none", **_TWO}),
    Variant("dmdr_refl_two", "DMDR, ReFL, 2 steps", settings={"rl.method": "refl", **_TWO}, after="cold_two"),
    Variant(
        "dmdr_grpo_two",
        "DMDR, GRPO, 2 steps",
        settings={"rl.method": "grpo", **_GRPO_OF_TWO, "reward.weight": 0.15},
        after="cold_two",
    ),
    Variant(
        "dmdr_hybrid_two",
        "DMDR, hybrid, 2 steps",
        settings={"rl.method": "hybrid", **_GRPO_OF_TWO},
        after="cold_two",
    ),
)
TITLES = {v.name: v.title for v in VARIANTS} | {"teacher": "Teacher, 50 steps", "teacher_n": "Teacher, 1 step"}


def settings_of(variant: Variant, seed: int, budget: Budget) -> dict[str, Any]:
    """Everything that a run of this variant sets on top of the recipe file, by dotted key."""
    cold, total = {
        "cold_start": (budget.cold_start, budget.cold_start),
        "both": (budget.cold_start, budget.total),
        "rl": (0, budget.total),
    }[variant.phases]
    return {
        "seed": seed,
        "train.cold_start_steps": variant.updates(cold),
        "train.generator_steps": variant.updates(total),
        "reward.terms": [{"kind": "digits"}],
        "reward.held_out": [{"kind": "digits_held_out"}],
        "eval.every": budget.evaluate_every,
        # The teacher is the same in all runs: its many steps are taken once a seed.
        **({} if variant.name == BASE else {"eval.teacher_steps": 1}),
        **budget.settings,
        **variant.settings,
    }


def chosen(names: Sequence[str]) -> tuple[Variant, ...]:
    """The named variants and the runs that they start from, in the table's order; all where none is named.

    Raises:
        UserError: a name that is not in the table.
    """
    known = {v.name: v for v in VARIANTS}
    for name in names:
        if name not in known:
            raise UserError(f"--only {name}: no such run; expected one of {', '.join(known)}")
    wanted = set(names or known) | {known[n].after for n in names if known[n].after}
    return tuple(v for v in VARIANTS if v.name in wanted)
