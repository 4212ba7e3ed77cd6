"""The claims, and the rule that decides them from the numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dmdr_fast.eval.claims.records import Record
from dmdr_fast.eval.claims.statistics import COLD_START_FD, MATCHED_FD, MEASURES, difference, pair_of, spread_of

HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be told here"
ERRORS = 2.0  # a difference counts from this many standard errors
FD_BOUND = 2.5  # times the 50-step teacher's FD


@dataclass(frozen=True)
class Test:
    """``first`` is better than ``second`` in ``measure``; with ``guard``, it is enough that it is not worse."""

    first: str
    second: str
    measure: str
    guard: bool = False


@dataclass(frozen=True)
class Claim:
    """A claim of the paper. how: in words, what is compared. rows: of its table. figure: its picture."""

    key: str
    title: str
    how: str
    tests: tuple[Test, ...]
    rows: tuple[str, ...]
    figure: str


@dataclass(frozen=True)
class Outcome:
    """What came out of one test: first minus second, its standard error (None: unknown), and what that says."""

    test: Test
    difference: float | None
    error: float | None
    says: str


@dataclass(frozen=True)
class Verdict:
    """A claim with its outcomes."""

    claim: Claim
    outcomes: tuple[Outcome, ...]
    says: str

    def as_json(self) -> dict[str, Any]:
        """For docs/claims.json."""
        tests = [asdict(o.test) | {"difference": o.difference, "error": o.error, "says": o.says} for o in self.outcomes]
        return {"claim": self.claim.key, "verdict": self.says, "tests": tests}


_METHODS = ("dmdr_refl", "dmdr_grpo", "dmdr_dpo")
CLAIMS = (
    Claim(
        "regularizer",
        "DMD regularises RL better than a KL to a reference does",
        "DMDR (ReFL) against the same RL with a KL to the generator that RL started from, once after the same cold "
        "start and once from the teacher's weights (there the KL holds it to the teacher's single step, far from the "
        "data): DMDR's FD must be lower than theirs where they have its reward.",
        (Test("dmdr_refl", "dmd_then_rl_kl", MATCHED_FD), Test("dmdr_refl", "rl_kl", MATCHED_FD)),
        ("dmdr_refl", "dmd_then_rl_kl", "rl_kl", "rl_only"),
        "regularizer",
    ),
    Claim(
        "modes",
        "RL helps DMD to cover modes",
        "DMDR with each method against DMD alone for as many updates: recall must be higher.",
        tuple(Test(method, "dmd_only", "recall") for method in _METHODS),
        (*_METHODS, "dmd_only"),
        "modes",
    ),
    Claim(
        "dyna_dg",
        "DynaDG speeds the cold start",
        "Cold starts with and without it: the mean of log10 FD over all evaluations on the way must be lower. 0.01 of "
        "it is 2.3 % of FD.",
        (Test("cold_start", "cold_no_dyna_dg", COLD_START_FD),),
        ("cold_start", "cold_no_dyna_dg"),
        "cold_start",
    ),
    Claim(
        "dyna_rs",
        "DynaRS speeds the cold start",
        "As for DynaDG.",
        (Test("cold_start", "cold_no_dyna_rs", COLD_START_FD),),
        ("cold_start", "cold_no_dyna_rs"),
        "cold_start",
    ),
    Claim(
        "both",
        "DynaDG and DynaRS together speed the cold start",
        "As for each, against a cold start with neither.",
        (Test("cold_start", "cold_neither", COLD_START_FD),),
        ("cold_start", "cold_neither"),
        "cold_start",
    ),
    Claim(
        "joint",
        "DMD and RL at once are better than one after the other",
        "DMDR (ReFL) against DMD followed by RL without DMD, from the same cold start: DMDR's FD must be lower than "
        "the other's where that has its reward.",
        (Test("dmdr_refl", "dmd_then_rl", MATCHED_FD),),
        ("dmdr_refl", "dmd_then_rl"),
        "joint",
    ),
    Claim(
        "teacher_reward",
        "The one-step student beats the 50-step teacher: in reward",
        "DMDR (ReFL): the optimised reward and the held-out one must both be higher than the teacher's.",
        (Test("dmdr_refl", "teacher", "reward"), Test("dmdr_refl", "teacher", "held_out_reward")),
        ("dmdr_refl", "teacher", "teacher_n"),
        "teacher",
    ),
    Claim(
        "teacher_fd",
        "The one-step student beats the 50-step teacher: in distance to the data",
        "DMDR (ReFL): FD must be lower than the teacher's.",
        (Test("dmdr_refl", "teacher", "fd"),),
        ("dmdr_refl", "teacher", "teacher_n"),
        "teacher",
    ),
    Claim(
        "any_method",
        "Any RL method raises the reward",
        "DMDR with each method against DMD alone for as many updates: the optimised reward must be higher, and the "
        "held-out one not lower.",
        tuple(
            test
            for method in _METHODS
            for test in (Test(method, "dmd_only", "reward"), Test(method, "dmd_only", "held_out_reward", guard=True))
        ),
        (*_METHODS, "dmd_only"),
        "methods",
    ),
    Claim(
        "reuse",
        "Reused rollouts train a better student in the same time",
        "Not the paper's: `train.rollout_reuse` as this trainer offers it, at equal time. The cold start's FD must be "
        "lower than without, and DMDR's (ReFL) lower than DMDR's without where that has its reward. The rows at equal "
        "updates stand beside them.",
        (Test("cold_reuse_time", "cold_start", "fd"), Test("dmdr_reuse_time", "dmdr_refl", MATCHED_FD)),
        ("cold_start", "cold_reuse", "cold_reuse_time", "dmdr_refl", "dmdr_reuse", "dmdr_reuse_time"),
        "reuse",
    ),
    Claim(
        "tilt",
        "A reward from the first update on makes a better student",
        "The paper's fourth version: `rl.tilt` in the cold start. Its reward must be higher and its FD not higher than "
        "without, and DMDR's (ReFL) FD after it lower than DMDR's without where that has its reward.",
        (
            Test("cold_tilt", "cold_start", "reward"),
            Test("cold_tilt", "cold_start", "fd", guard=True),
            Test("dmdr_tilt", "dmdr_refl", MATCHED_FD),
        ),
        ("cold_start", "cold_tilt", "dmdr_refl", "dmdr_tilt"),
        "tilt",
    ),
    Claim(
        "nft",
        "Forward-process RL raises the reward of a student of one step",
        "DiffusionNFT's loss inside DMDR against DMD alone for as many updates: the optimised reward must be higher, "
        "and the held-out one not lower.",
        (Test("dmdr_nft", "dmd_only", "reward"), Test("dmdr_nft", "dmd_only", "held_out_reward", guard=True)),
        ("dmdr_nft", "dmdr_grpo", "dmd_only"),
        "nft",
    ),
    Claim(
        "hybrid",
        "GRPO and the reward's gradient in one update are better than each alone",
        "Students of two steps from the same cold start: the hybrid's FD must be lower than ReFL's and than GRPO's "
        "where they have its reward.",
        (
            Test("dmdr_hybrid_two", "dmdr_refl_two", MATCHED_FD),
            Test("dmdr_hybrid_two", "dmdr_grpo_two", MATCHED_FD),
        ),
        ("dmdr_hybrid_two", "dmdr_refl_two", "dmdr_grpo_two", "cold_two"),
        "hybrid",
    ),
)


def outcome(test: Test, records: Sequence[Record]) -> Outcome:
    """The test's difference against :data:`ERRORS` standard errors of it."""
    first, second = pair_of(records, test.first, test.second, test.measure)
    if first is None or second is None:
        return Outcome(test, None, None, OPEN)
    found = difference(first, second)
    if not math.isfinite(found.error):
        return Outcome(test, found.mean, None, OPEN)
    gain = found.mean if MEASURES[test.measure][2] else -found.mean
    if gain < -ERRORS * found.error:
        says = FAILS
    elif gain > ERRORS * found.error or test.guard:
        says = HOLDS
    else:
        says = OPEN
    return Outcome(test, found.mean, found.error, says)


def judge(claim: Claim, records: Sequence[Record]) -> Verdict:
    """Holds where every test does, fails where one does, and cannot be told otherwise."""
    outcomes = tuple(outcome(test, records) for test in claim.tests)
    said = {o.says for o in outcomes}
    return Verdict(claim, outcomes, FAILS if FAILS in said else OPEN if OPEN in said else HOLDS)


@dataclass(frozen=True)
class Goal:
    """A method's mean reward less the 50-step teacher's, and its FD over the teacher's."""

    name: str
    reward_gain: float
    fd_ratio: float

    @property
    def met(self) -> bool:
        """Reward above the teacher's at an FD under :data:`FD_BOUND` times its."""
        return self.reward_gain > 0 and self.fd_ratio < FD_BOUND


def goals(records: Sequence[Record]) -> list[Goal]:
    """Of every method that was run, beside the teacher."""
    found = []
    for name in _METHODS:
        mine, teacher = (
            {m: s for m in ("reward", "fd") if (s := spread_of(records, one, m)) is not None}
            for one in (name, "teacher")
        )
        if len(mine) + len(teacher) < 4:
            continue
        gain = mine["reward"].mean - teacher["reward"].mean
        found.append(Goal(name, gain, mine["fd"].mean / teacher["fd"].mean))
    return found
