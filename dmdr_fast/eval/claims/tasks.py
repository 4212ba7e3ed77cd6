"""The tasks, each with its table of runs."""

from __future__ import annotations

from typing import Any

from dmdr_fast.eval.claims.runs import BASE, Budget, Task, Variant

_NONE, _REFL = {"rl.method": "none"}, {"rl.method": "refl"}
_ALONE = {**_REFL, "rl.regularizer": "none"}
_KL = {**_REFL, "rl.regularizer": "kl", "rl.kl_weight": 1.0}
_NO_DG, _NO_RS = {"dyna_dg.real_scale": 0.0}, {"dyna_rs.dynamic_step": 0}
_SDE = {"rl.grpo.sde": "dance", "rl.grpo.eta": 0.2, "rl.grpo.group_size": 8}
_DPO = {"rl.method": "dpo", "rl.dpo.beta": 100.0, "rl.dpo.group_size": 4, "reward.weight": 0.02}
_NFT = {"rl.method": "nft", "rl.nft.group_size": 8}
_TILT = {"rl.tilt.method": "refl", "rl.tilt.weight": 0.02}
_REUSE, _REUSE_TIME = {"train.rollout_reuse": 3}, 7 / 6  # 12 F-units of 14: seven updates in the time of six
_ONE, _TWO, _FOUR = ({"student.steps": steps} for steps in (1, 2, 4))
_GUIDED = {"teacher.cfg_scale": 1.25}
_DECOUPLED = {**_GUIDED, "dmd.decoupled": True}
_ADVANTAGE = {"rl.method": "grpo", "rl.grpo.mode": "advantage_weighted_dmd", "rl.grpo.group_size": 8}


def _cold(name: str, title: str, settings: dict[str, Any], longer: float = 1.0) -> Variant:
    return Variant(name, title, "cold_start", {**_NONE, **settings}, longer=longer)


def _cold_end(name: str, title: str, settings: dict[str, Any]) -> Variant:
    """On the digits, of which only the end is compared."""
    return _cold(name, title, {**settings, "eval.every": 100})


def _paper(grpo: dict[str, Any], dpo: dict[str, Any]) -> tuple[Variant, ...]:
    """The runs that the paper compares."""
    return (
        _cold(BASE, "Cold start", {}),
        _cold("cold_no_dyna_dg", "Cold start without DynaDG", _NO_DG),
        _cold("cold_no_dyna_rs", "Cold start without DynaRS", _NO_RS),
        _cold("cold_neither", "Cold start without either", {**_NO_DG, **_NO_RS}),
        Variant("dmd_only", "DMD only", settings=_NONE, after=BASE),
        Variant("rl_only", "RL only (ReFL)", "rl", _ALONE),
        Variant("rl_kl", "RL + KL (ReFL)", "rl", _KL),
        Variant("dmd_then_rl", "DMD, then RL (ReFL)", settings=_ALONE, after=BASE),
        Variant("dmd_then_rl_kl", "DMD, then RL + KL (ReFL)", settings=_KL, after=BASE),
        Variant("dmdr_refl", "DMDR, ReFL", settings=_REFL, after=BASE),
        Variant("dmdr_grpo", "DMDR, GRPO", settings=grpo, after=BASE),
        Variant("dmdr_dpo", "DMDR, DPO", settings=dpo, after=BASE),
    )


# A smoke test: each phase, method and regulariser in one run, on lengths whose numbers mean nothing.
_SMOKE = {"train.micro_batch_size": 16, "train.fake_updates": 1, "lora.rank": 4, "eval.samples": 200}
_SMALL = {"model.hidden_size": 32, "model.depth": 2, "model.num_heads": 2, "teacher.train.steps": 100}
_SMOKED = (BASE, "cold_neither", "rl_kl", "dmdr_refl", "dmdr_grpo", "dmdr_dpo")

# The weights of GRPO, DPO and the KL were chosen on seed 0; ``trials`` says from what. The others are the recipe's.
_DIGITS = Task(
    name="digits",
    page="claims",
    steps=1,
    rewards=("digits", "digits_held_out"),
    full=Budget(500, 700, 25),
    quick=Budget(4, 6, 2, {**_SMALL, **_SMOKE}, _SMOKED),
    variants=(
        *_paper({"rl.method": "grpo", "rl.grpo.noisy_last_step": True, **_SDE, "reward.weight": 0.15}, _DPO),
        _cold("cold_reuse", "Cold start, rollouts reused", _REUSE),
        Variant("dmdr_reuse", "DMDR (ReFL), rollouts reused", settings={**_REFL, **_REUSE}, after="cold_reuse"),
        _cold("cold_reuse_time", "Cold start, rollouts reused, equal time", _REUSE, _REUSE_TIME),
        Variant(
            "dmdr_reuse_time",
            "DMDR (ReFL), rollouts reused, equal time",
            settings={**_REFL, **_REUSE},
            after="cold_reuse_time",
            longer=_REUSE_TIME,
        ),
        Variant("dmdr_nft", "DMDR, NFT", settings=_NFT, after=BASE),
        _cold_end("cold_tilt", "Cold start, tilted", _TILT),
        Variant("dmdr_tilt", "DMDR (ReFL), tilted cold start", settings={**_REFL, **_TILT}, after="cold_tilt"),
        _cold_end("cold_guided", "Cold start, guided", _GUIDED),
        _cold_end("cold_decoupled", "Cold start, decoupled", _DECOUPLED),
        Variant("decoupled_only", "Decoupled DMD only", settings={**_NONE, **_DECOUPLED}, after="cold_decoupled"),
        Variant(
            "dmdr_advantage",
            "Decoupled DMD, CA times the advantage",
            settings={**_ADVANTAGE, **_DECOUPLED, "reward.weight": 1.0},
            after="cold_decoupled",
        ),
        _cold_end("cold_four", "Cold start, 4 steps", _FOUR),
        _cold_end("cold_four_ode", "Cold start, 4 steps, ode", {**_FOUR, "student.sampler": "ode"}),
        _cold_end("cold_four_cps", "Cold start, 4 steps, cps", {**_FOUR, "student.sampler": "cps"}),
        _cold_end(
            "cold_four_stops",
            "Cold start, 4 steps, 4 stop steps an update",
            {**_FOUR, "train.micro_batch_size": 16, "train.gradient_accumulation": 4},
        ),
        # A student of two steps, whose first is stochastic: GRPO alone, ReFL alone, and both.
        _cold_end("cold_two", "Cold start, 2 steps", _TWO),
        Variant("dmdr_refl_two", "DMDR, ReFL, 2 steps", settings={**_REFL, **_TWO}, after="cold_two"),
        Variant(
            "dmdr_grpo_two",
            "DMDR, GRPO, 2 steps",
            settings={"rl.method": "grpo", **_TWO, **_SDE, "reward.weight": 0.15},
            after="cold_two",
        ),
        Variant(
            "dmdr_hybrid_two",
            "DMDR, hybrid, 2 steps",
            settings={"rl.method": "hybrid", **_TWO, **_SDE},
            after="cold_two",
        ),
    ),
    columns=("fd", "precision", "recall", "reward", "held_out_reward", "diversity"),
    reward="reward",
    words={
        "make": "make claims",
        "command": "python -m dmdr_fast.eval.claims",
        "student": "one-step",
        "reward": "the optimised reward",
        "world": "scikit-learn's digits (1,797 real 8x8 scans)",
        "caution": "Digits are not ImageNet",
        "measured": """\
FD, precision and recall are measured against the digits in the features of a classifier that neither trained nor judged
the generator otherwise; the held-out reward is a second classifier that no run optimises; diversity is the mean
distance between samples of one class.""",
        "runs": """\
*Rollouts reused* trains all three fake updates of an update on one rollout, 12 F-units in place of 14; *equal time* has
seven updates for six of the others. *Guided* and *decoupled* runs distil the teacher at a CFG scale of 1.25, which no
row of the teacher has; *4 stop steps an update* is four micro-steps of a quarter of the batch. Runs of four steps have
the one-step student's learning rates, at which their FD rises again after update 100 to 300.""",
        "trials": """\
Three numbers were chosen for this page, on seed 0: the weight of GRPO (of 0.05, 0.15 and 0.5) and of DPO (of 0.02 and
0.05), for the goal below, and that of the KL (of 0.1 and 1), for a reward like DMDR's. The CFG scale is below 1.5, at
which a cold start of 200 updates ended at an FD of 2.2. The rules were fixed before these runs, with those trials
known.""",
    },
)

_RIGHT = {"reward.terms": [{"kind": "scenes_right"}]}  # scores alone
_SCENES = Task(
    name="scenes",
    page="claims-scenes",
    steps=4,
    rewards=("scenes", "scenes_held_out"),
    full=Budget(60, 120, 20),
    quick=Budget(4, 6, 2, {**_SMOKE, "eval.teacher_steps": 4}, (*_SMOKED, "dmdr_hybrid")),
    variants=(
        *_paper({"rl.method": "grpo", **_SDE, **_RIGHT, "reward.weight": 0.15}, {**_DPO, **_RIGHT}),
        Variant("dmdr_nft", "DMDR, NFT", settings={**_NFT, **_RIGHT}, after=BASE),
        Variant("dmdr_hybrid", "DMDR, hybrid", settings={"rl.method": "hybrid", **_SDE}, after=BASE),
        _cold("cold_tilt", "Cold start, tilted", _TILT),
        Variant("dmdr_tilt", "DMDR (ReFL), tilted cold start", settings={**_REFL, **_TILT}, after="cold_tilt"),
        _cold("cold_one", "Cold start, 1 step", _ONE),
        Variant("dmdr_refl_one", "DMDR, ReFL, 1 step", settings={**_REFL, **_ONE}, after="cold_one"),
    ),
    columns=("fd", "precision", "recall", "accuracy", "accuracy_unseen", "held_out_reward", "diversity"),
    reward="accuracy",
    words={
        "make": "make claims TASK=scenes",
        "command": "python -m dmdr_fast.eval.claims --task scenes",
        "student": "four-step",
        "reward": "the prompt accuracy",
        "world": "scenes, 16x16 pixels with two coloured digits that a prompt asks for,",
        "caution": "Scenes are not photographs",
        "measured": """\
FD, precision and recall are measured in the features of the held-out verifier, which no run optimises. It also tells
the prompt accuracy, the share of samples with all five attributes right, that of prompts whose combination no training
set holds (*of unseen*), and the held-out reward, its log-probability; diversity is the mean distance between samples of
one prompt. The other verifier rewards: ReFL, the hybrid and
the tilt by its log-probability, GRPO, DPO and NFT by the share of attributes that it finds right, a score alone. These
cannot be compared; what tests take for the reward is the prompt accuracy.""",
        "runs": "",
        "trials": """\
No number was chosen for this page: weights that are not the recipe's are those of the digits' page. The recipe's own
reward weight and guidance were chosen on these seeds ([scenes](scenes.md)). The rules were fixed before these runs.""",
    },
)
TASKS = {task.name: task for task in (_DIGITS, _SCENES)}
