"""The whole configuration as typed models. Unknown keys and wrong types are errors that name the key's full path.

Every leaf is a YAML key and a command-line flag of the same dotted name; the descriptions below are its ``--help``.
Reading a configuration imports neither torch nor deepspeed, so a mistake is answered at once.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from dmdr_fast.config.base import Count, File, Place, Section, key
from dmdr_fast.config.compute import Compute
from dmdr_fast.config.data import Data
from dmdr_fast.config.distillation import DMD, DynaDG, DynaRS, Renoise
from dmdr_fast.config.memory import Memory, Rollout
from dmdr_fast.config.networks import (
    PIPELINE_CFG,
    Decoder,
    Fake,
    LoRA,
    Model,
    Student,
    StudentLoRA,
    StudentModel,
    Teacher,
    TeacherTraining,
)
from dmdr_fast.config.phases import Phase, at, changes, phase_problems
from dmdr_fast.config.problems import problems
from dmdr_fast.config.rl import RL, Monitors, Reward, RewardTerm
from dmdr_fast.config.run import AdamW, Checkpoint, DeepSpeed, Evaluation, Export, Log, Optimizer, Train

__all__ = [
    "DMD",
    "RL",
    "AdamW",
    "Checkpoint",
    "Compute",
    "Config",
    "Data",
    "Decoder",
    "DeepSpeed",
    "DynaDG",
    "DynaRS",
    "Evaluation",
    "Export",
    "Fake",
    "LoRA",
    "Log",
    "Memory",
    "Model",
    "Monitors",
    "Optimizer",
    "Phase",
    "Renoise",
    "Reward",
    "RewardTerm",
    "Rollout",
    "Student",
    "StudentLoRA",
    "StudentModel",
    "Teacher",
    "TeacherTraining",
    "Train",
]


class Config(Section):
    """dmdr_fast: distil a multi-step diffusion transformer into a 1-4 step generator by DMD and RL at once."""

    run_dir: File = key(Path("runs/dmdr"), "Where checkpoints, logs, the final weights and the report go.")
    seed: Count = key(0, "Seed of everything that is drawn.")
    resume: Place = key(
        "auto", "auto: the newest good checkpoint in run_dir; never: start anew; or a path. Newer ones are dropped."
    )
    sharing: Literal["separate", "shared_score", "shared_all"] = key(
        "shared_score",
        "separate: three networks; shared_score: teacher and fake score are one frozen base and a LoRA; shared_all: "
        "that base carries the generator too, as student.lora.",
    )
    model: Model = key(Model(), "The network.")
    teacher: Teacher = key(Teacher(), "The teacher.")
    decoder: Decoder = key(Decoder(), "The decoder.")
    data: Data = key(Data(), "Prompts.")
    student: Student = key(Student(), "The student.")
    fake: Fake = key(Fake(), "The fake score.")
    train: Train = key(Train(), "The run.")
    phases: tuple[Phase, ...] = key(
        (),
        "Other values from a generator step on, [{from: 2000, teacher.cfg_scale: 3, optimizer.generator.lr: 1e-6}]; "
        "each holds until a later one sets the key again.",
    )
    dyna_dg: DynaDG = key(DynaDG(), "DynaDG.")
    dyna_rs: DynaRS = key(DynaRS(), "DynaRS.")
    renoise: Renoise = key(Renoise(), "Renoise time.")
    lora: LoRA = key(LoRA(), "LoRA of the fake score.")
    dmd: DMD = key(DMD(), "DMD gradient.")
    reward: Reward = key(Reward(), "Reward.")
    rl: RL = key(RL(), "Reinforcement learning.")
    monitors: Monitors = key(Monitors(), "Collapse monitors.")
    rollout: Rollout = key(Rollout(), "Rollouts.")
    memory: Memory = key(Memory(), "Memory options.")
    compute: Compute = key(Compute(), "Compute path.")
    optimizer: Optimizer = key(Optimizer(), "Optimizers.")
    deepspeed: DeepSpeed = key(DeepSpeed(), "DeepSpeed.")
    checkpoint: Checkpoint = key(Checkpoint(), "Checkpoints.")
    export: Export = key(Export(), "Final weights.")
    log: Log = key(Log(), "Logs.")
    eval: Evaluation = key(Evaluation(), "Evaluation.")

    @property
    def latent_size(self) -> int:
        """Side of SiT's latent, in latent pixels."""
        return self.model.sizes[0][0] // self.decoder_factor

    @property
    def num_classes(self) -> int | None:
        """Classes of the labels; None with prompts."""
        return self.model.num_classes if self.model.family == "sit" else None

    @property
    def cfg_mode(self) -> Literal["standard", "offset", "per_token"]:
        """The form of guidance, with ``pipeline`` resolved: standard, offset or per_token."""
        mode = self.teacher.cfg_mode
        return PIPELINE_CFG.get(self.model.family, "standard") if mode == "pipeline" else mode

    def guides(self, scale: float | None) -> bool:
        """Whether CFG at ``scale`` reads the unconditional prediction: not at 1, in the offset form 0.

        Nor below, where a pipeline's form is asked for: pipelines guide above it only.
        """
        if scale is None:
            return False
        neutral = 0.0 if self.cfg_mode == "offset" else 1.0
        as_a_pipeline = self.teacher.cfg_mode == "pipeline" and self.model.family != "sit"
        return scale > neutral if as_a_pipeline else scale != neutral

    @property
    def uses_cfg(self) -> bool:
        """Whether the real score is guided."""
        return self.guides(self.teacher.cfg_scale)

    @property
    def has_rl(self) -> bool:
        """Whether reinforcement learning follows the cold start."""
        return self.rl.chosen.uses_reward and self.train.cold_start_steps < self.train.generator_steps

    @property
    def reference_kind(self) -> Literal[None, "lora_off", "frozen"]:
        """What a KL or DPO holds the generator to; None where neither is used."""
        rl = self.rl
        if not self.uses_kl and not (self.has_rl and rl.chosen.needs_reference):
            return None
        if rl.reference == "auto":
            return "lora_off" if self.student.lora.rank else "frozen"
        return rl.reference

    @property
    def uses_kl(self) -> bool:
        """Whether a KL holds the generator to a reference."""
        rl = self.rl
        return rl.kl_weight > 0 and rl.regularizer != "none" and self.has_rl

    @property
    def reference_passes(self) -> dict[str, Any]:
        """Forwards of the reference in an update and micro-batch, by the names of ``algorithm.passes.Schedule``."""
        method, uses_one = self.rl.chosen, self.reference_kind is not None
        return {
            "reference_steps": method.reference_forwards(self.student.steps) if uses_one else 0,
            "kl_on_x0": int(self.uses_kl and method.kl_on_x0),
        }

    @property
    def epochs(self) -> int:
        """Steps of the generator in an update of RL that have a DMD gradient each."""
        return self.rl.chosen.generator_steps if self.has_rl and self.rl.regularizer in ("dmd", "dm") else 1

    @property
    def decoder_factor(self) -> int:
        """Image pixels per latent pixel: 8 for the AutoencoderKL of Stable Diffusion, 1 without a decoder."""
        return 8 if self.decoder.kind == "vae" else 1

    def at(self, step: int) -> Config:
        """The configuration of generator step ``step``, which has taken in the ``phases`` that have begun."""
        return at(self, step)

    @property
    def each_phase(self) -> tuple[Config, ...]:
        """The configuration before any of the ``phases``, and as each of them has it."""
        return (self.at(0), *(self.at(phase.start) for phase in self.phases))

    def fake_updates_before(self, step: int) -> int:
        """Updates of the fake score in all generator steps before ``step``."""
        starts = [0, *(phase.start for phase in self.phases)]
        lengths = (max(0, min(end, step) - start) for start, end in pairwise([*starts, max(step, starts[-1])]))
        return sum(n * phase.train.fake_updates for n, phase in zip(lengths, self.each_phase, strict=True))

    @property
    def switches(self) -> dict[int, list[str]]:
        """What changes with the ``phases``, by the step: "teacher.cfg_scale 4.5 -> 3" each."""
        return {phase.start: changes(self, phase) for phase in self.phases}

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        for problem in (*problems(self), *phase_problems(self)):
            raise ValueError(problem)
        for number, phase in enumerate(self.phases):
            for problem in problems(self.at(phase.start)):
                raise ValueError(f"phases.{number} (from step {phase.start}): {problem}")
        return self
