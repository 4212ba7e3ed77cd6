"""The claims, and the rule that decides them from the numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from dmdr_fast.eval.claims.records import Record
from dmdr_fast.eval.claims.runs import Task
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
    """A claim of the paper. Its title and ``how`` it is put to the test hold a task's words in braces.

    rows: of its table. figure: its picture, which claims can share; measures: what that shows against updates, the
    rewards against FD where there are none; drawn: its runs, where they are not those of the rows that had RL.
    """

    key: str
    title: str
    how: str
    tests: tuple[Test, ...]
    rows: tuple[str, ...]
    figure: str
    measures: tuple[str, ...] = ()
    drawn: tuple[str, ...] = ()


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
        """For the page's JSON."""
        tests = [asdict(o.test) | {"difference": o.difference, "error": o.error, "says": o.says} for o in self.outcomes]
        return {"claim": self.claim.key, "verdict": self.says, "tests": tests}


_METHODS = ("dmdr_refl", "dmdr_grpo", "dmdr_dpo")
_COLD_STARTS = ("cold_start", "cold_no_dyna_dg", "cold_no_dyna_rs", "cold_neither")
_FOUR_STEPS = ("cold_four", "cold_four_ode", "cold_four_cps", "cold_four_stops")


def _cold_start(key: str, subject: str, other: str, how: str) -> Claim:
    test = Test("cold_start", other, COLD_START_FD)
    return Claim(
        key, f"{subject} the cold start", how, (test,), ("cold_start", other), "cold_start", ("fd",), _COLD_STARTS
    )


def _hybrid(students: str, end: str) -> Claim:
    hybrid, refl, grpo = (f"dmdr_{method}{end}" for method in ("hybrid", "refl", "grpo"))
    return Claim(
        "hybrid",
        "GRPO and the reward's gradient in one update are better than each alone",
        f"{students} from the same cold start: the hybrid's FD must be lower than ReFL's and than GRPO's where they "
        "have its reward.",
        (Test(hybrid, refl, MATCHED_FD), Test(hybrid, grpo, MATCHED_FD)),
        (hybrid, refl, grpo, f"cold{end or '_start'}"),
        "hybrid",
    )


def _four_steps(key: str, title: str, how: str) -> Claim:
    other, plain = f"cold_four_{key}", "cold_four"
    return Claim(key, title, how, (Test(other, plain, "fd"),), (other, plain), "four_steps", ("fd",), _FOUR_STEPS)


CLAIMS = (
    Claim(
        "regularizer",
        "DMD regularises RL better than a KL to a reference does",
        "DMDR (ReFL) against the same RL with a KL to the generator that RL started from, once after the same cold "
        "start and once from the teacher's weights (there the KL holds it to the teacher in as few steps): "
        "DMDR's FD must be lower than theirs where they have its reward.",
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
        ("recall", "diversity"),
    ),
    _cold_start(
        "dyna_dg",
        "DynaDG speeds",
        "cold_no_dyna_dg",
        "Cold starts with and without it: the mean of log10 FD over all evaluations on the way must be lower. 0.01 of "
        "it is 2.3 % of FD.",
    ),
    _cold_start("dyna_rs", "DynaRS speeds", "cold_no_dyna_rs", "As for DynaDG."),
    _cold_start(
        "both", "DynaDG and DynaRS together speed", "cold_neither", "As for each, against a cold start with neither."
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
        "The {student} student beats the 50-step teacher: in reward",
        "DMDR (ReFL): {reward} and the held-out reward must both be higher than the teacher's.",
        (Test("dmdr_refl", "teacher", "reward"), Test("dmdr_refl", "teacher", "held_out_reward")),
        ("dmdr_refl", "teacher", "teacher_n"),
        "teacher",
        drawn=_METHODS,
    ),
    Claim(
        "teacher_unseen",
        "The {student} student beats the 50-step teacher: on what no training set shows",
        "DMDR (ReFL): the accuracy on unseen combinations must be higher than the teacher's.",
        (Test("dmdr_refl", "teacher", "accuracy_unseen"),),
        ("dmdr_refl", "teacher", "teacher_n"),
        "teacher",
    ),
    Claim(
        "teacher_fd",
        "The {student} student beats the 50-step teacher: in distance to the data",
        "DMDR (ReFL): FD must be lower than the teacher's.",
        (Test("dmdr_refl", "teacher", "fd"),),
        ("dmdr_refl", "teacher", "teacher_n"),
        "teacher",
    ),
    Claim(
        "any_method",
        "Any RL method raises the reward",
        "DMDR with each method against DMD alone for as many updates: {reward} must be higher, and the held-out reward "
        "not lower.",
        tuple(
            test
            for method in _METHODS
            for test in (Test(method, "dmd_only", "reward"), Test(method, "dmd_only", "held_out_reward", guard=True))
        ),
        (*_METHODS, "dmd_only"),
        "methods",
        ("reward", "held_out_reward"),
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
        "Forward-process RL raises the reward of a {student} student",
        "DiffusionNFT's loss inside DMDR against DMD alone for as many updates: {reward} must be higher, and the "
        "held-out reward not lower.",
        (Test("dmdr_nft", "dmd_only", "reward"), Test("dmdr_nft", "dmd_only", "held_out_reward", guard=True)),
        ("dmdr_nft", "dmdr_grpo", "dmd_only"),
        "nft",
        ("reward", "held_out_reward"),
    ),
    Claim(
        "decoupled",
        "Decoupled DMD makes a better student of a guided teacher than DMD does",
        "Cold starts at one CFG scale, `dmd.decoupled` in one: its FD must be lower. It costs a score row more.",
        (Test("cold_decoupled", "cold_guided", "fd"),),
        ("cold_decoupled", "cold_guided", "cold_start"),
        "decoupled",
        ("fd",),
        ("cold_decoupled", "cold_guided"),
    ),
    Claim(
        "advantage",
        "The advantage on the guidance alone raises the reward",
        "The second form of the paper's GRPO, `rl.grpo.mode: advantage_weighted_dmd`, on decoupled DMD's guidance, "
        "against decoupled DMD alone for as many updates: {reward} must be higher, and the held-out reward not lower.",
        (
            Test("dmdr_advantage", "decoupled_only", "reward"),
            Test("dmdr_advantage", "decoupled_only", "held_out_reward", guard=True),
        ),
        ("dmdr_advantage", "decoupled_only", "cold_decoupled"),
        "advantage",
        ("reward", "held_out_reward"),
    ),
    _four_steps(
        "ode",
        "Four deterministic steps make a better student than four renoised ones",
        "Cold starts with `student.sampler: ode` and with renoise: FD must be lower.",
    ),
    _four_steps(
        "cps",
        "Four steps that keep a part of their noise make a better student than four renoised ones",
        "As for ode, with `student.sampler: cps` and its default `student.eta`.",
    ),
    _four_steps(
        "stops",
        "A stop step per micro-step makes a better student than one per update",
        "A batch as four micro-steps, each with a stop step of its own, and as one: FD must be lower.",
    ),
    _hybrid("Students of two steps", "_two"),
    _hybrid("Students", ""),
)


def claims_of(task: Task) -> list[Claim]:
    """The claims of whose tests the task has all runs and measures, in its words, its reward for ``reward``."""
    found = []
    for claim in CLAIMS:
        measures = tuple(task.reward if m == "reward" else m for m in claim.measures)
        tests = tuple(replace(t, measure=task.reward) if t.measure == "reward" else t for t in claim.tests)
        known = {*task.columns, COLD_START_FD, MATCHED_FD}
        if all({t.first, t.second} <= task.titles.keys() and t.measure in known for t in tests):
            title, how = claim.title.format(**task.words), claim.how.format(**task.words)
            found.append(replace(claim, title=title, how=how, tests=tests, measures=measures))
    return found


def outcome(test: Test, records: Sequence[Record], reward: str) -> Outcome:
    """The test's difference against :data:`ERRORS` standard errors of it; ``reward`` is where FD is matched."""
    first, second = pair_of(records, test.first, test.second, test.measure, reward)
    if first is None or second is None:
        return Outcome(test, None, None, OPEN)
    mean, error = difference(first, second)
    if not math.isfinite(error):
        return Outcome(test, mean, None, OPEN)
    gain = mean if MEASURES[test.measure][2] else -mean
    if gain < -ERRORS * error:
        says = FAILS
    elif gain > ERRORS * error or test.guard:
        says = HOLDS
    else:
        says = OPEN
    return Outcome(test, mean, error, says)


def judge(claim: Claim, records: Sequence[Record], reward: str) -> Verdict:
    """Holds where every test does, fails where one does, and cannot be told otherwise."""
    outcomes = tuple(outcome(test, records, reward) for test in claim.tests)
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


def goals(records: Sequence[Record], reward: str) -> list[Goal]:
    """Of every method that was run, beside the teacher."""
    found = []
    for name in (*_METHODS, "dmdr_nft", "dmdr_hybrid", "dmdr_refl_one"):
        mine, its, fd, teachers = (spread_of(records, one, m) for m in (reward, "fd") for one in (name, "teacher"))
        if mine and its and fd and teachers:
            found.append(Goal(name, mine.mean - its.mean, fd.mean / teachers.mean))
    return found
