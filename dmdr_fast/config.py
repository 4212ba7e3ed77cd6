"""The whole configuration as typed models. Unknown keys and wrong types are errors that name the key's full path.

Every leaf is a YAML key and a command-line flag of the same dotted name; the descriptions below are its ``--help``.
Reading a configuration imports neither torch nor deepspeed, so a mistake is answered at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A group of keys: unknown ones are errors, values do not change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


def key(default, description: str):
    """A documented key with its default."""
    return Field(default, description=description)


class Model(Section):
    """The network that teacher, fake score and generator share: SiT, class-conditional, in latent or pixel space."""

    family: Literal["sit"] = key("sit", "Model family.")
    resolution: Positive = key(8, "Image side in pixels; a multiple of the decoder's factor times patch_size.")
    channels: Positive = key(1, "Latent channels (4 for sd-vae, the image's own without a decoder).")
    patch_size: Positive = key(2, "Side of a patch in latent pixels.")
    hidden_size: Positive = key(96, "Width.")
    depth: Positive = key(4, "Transformer blocks.")
    num_heads: Positive = key(4, "Attention heads; divides hidden_size.")
    num_classes: Positive = key(10, "Classes; class number num_classes is the null class.")
    learn_sigma: bool = key(False, "The checkpoint predicts 2x channels (public SiT); only the velocity half is used.")
    time_reversed: bool = key(False, "The checkpoint's time runs from noise at 0 to data at 1 (public SiT, not REPA).")


class TeacherTraining(Section):
    """Flow-matching training of the teacher, where the recipe says that it is trained first (digits)."""

    data: Literal["digits"] | None = key(None, "Data set to train a missing teacher on; null: the teacher must exist.")
    steps: Positive = key(3000, "Training steps.")
    batch_size: Positive = key(128, "Samples per step.")
    lr: PositiveFloat = key(2e-3, "Peak learning rate, cosine to zero.")
    ema: Fraction = key(0.995, "EMA decay of the weights that are kept.")
    seed: Count = key(0, "Seed of the teacher; not the run's, so that runs share the cached teacher.")
    label_dropout: Fraction = key(0.1, "Share of labels replaced by the null class, for CFG.")


class Teacher(Section):
    """The multi-step teacher: real score, and the start of the generator and the fake score."""

    weights: str | None = key(None, "Weights: a .safetensors or .pt path, or hf://ORG/REPO/FILE. null: see train.data.")
    cfg_scale: NonNegative = key(1.0, "CFG scale w of the real score; standard: u + w (c - u), so 1 is no CFG.")
    cfg_mode: Literal["standard", "offset"] = key("standard", "standard u + w (c - u), offset c + w (c - u).")
    sample_cfg_scale: NonNegative = key(1.0, "Standard CFG scale of the teacher's own samples in the evaluation.")
    train: TeacherTraining = key(TeacherTraining(), "How a missing teacher is trained.")


class Decoder(Section):
    """From latents to images."""

    kind: Literal["identity", "vae"] = key("identity", "identity: latents are images; vae: diffusers' AutoencoderKL.")
    path: str | None = key(None, "Folder or hub id of the VAE.")


class Student(Section):
    """The few-step generator."""

    steps: Positive = key(1, "Student steps N.")
    shift: PositiveFloat = key(1.0, "Timestep shift of the grid, t' = s t / (1 + (s - 1) t).")
    grid_points: Positive = key(1000, "Distinct times that the teacher was trained on; N cannot exceed them.")
    rollout: Literal["backward_simulation", "same_step"] = key(
        "backward_simulation",
        "Input of the graded step: x at t_i of the full rollout; same_step (the reference's): x0_i renoised to t_i.",
    )
    ema: Fraction | None = key(0.99, "EMA decay of the generator that is evaluated and saved; null: none.")


class Train(Section):
    """Lengths and batch."""

    cold_start_steps: Count = key(300, "Generator updates before reinforcement learning starts.")
    generator_steps: Positive = key(600, "Generator updates in all.")
    fake_updates: Positive = key(5, "R, fake-score updates per generator update.")
    micro_batch_size: Positive = key(64, "Samples per rank and micro-step.")
    gradient_accumulation: Positive = key(1, "Micro-steps per update.")
    max_skipped: Positive = key(10, "Skipped updates (non-finite gradients) in a row that end the run.")
    activation_checkpointing: bool = key(False, "Recompute each block's activations in the backward pass.")


class DynaDG(Section):
    """Dynamic distribution guidance: the real score wears the fake score's LoRA, less and less. shared_score only."""

    fake_scale: NonNegative = key(2.0, "s_f, LoRA scale of the fake score.")
    real_scale: NonNegative = key(0.75, "s_r0, LoRA scale of the real score at step 0; 0 turns DynaDG off.")
    dynamic_step: Count = key(200, "Generator updates over which s_r falls to 0 by a cosine.")


class DynaRS(Section):
    """Dynamic renoise sampling: t ~ Beta(alpha, beta), from high noise to uniform."""

    alpha0: PositiveFloat = key(4.0, "alpha at step 0; falls to 1.")
    beta0: PositiveFloat = key(1.5, "beta at step 0; falls to 1.")
    dynamic_step: Count = key(200, "Generator updates over which both reach 1 by a cosine; 0 turns DynaRS off.")


class Renoise(Section):
    """The law of the renoise time."""

    kind: Literal["dyna_rs", "uniform", "logit_normal"] = key("dyna_rs", "Law of t before range and shift.")
    mean: float = key(0.0, "Mean of the logit-normal law.")
    std: PositiveFloat = key(1.0, "Standard deviation of the logit-normal law.")
    t_min: Fraction = key(0.001, "Smallest t.")
    t_max: Fraction = key(0.999, "Largest t.")
    shift: PositiveFloat = key(1.0, "Timestep shift applied to t.")
    per: Literal["sample", "batch"] = key("sample", "One t per sample, or one per micro-batch.")


class LoRA(Section):
    """The fake score's LoRA (sharing: shared_score)."""

    rank: Positive = key(32, "Rank.")
    targets: tuple[str, ...] = key(("attn.qkv",), "Module-name suffixes of the Linear layers that get an adapter.")
    form: Literal["standard", "post_projection"] = key(
        "standard", "standard: W x + s (x A) B, PEFT-exportable; post_projection: the reference's, on qkv's output."
    )
    init_std: PositiveFloat | None = key(None, "Standard deviation of A at the start; null: the form's own.")


class DMD(Section):
    """The DMD gradient; the table in docs names the value each public code base uses."""

    normalizer: Literal["per_sample", "global", "none"] = key("per_sample", "Over what mean|x0 - x0_real| is taken.")
    eps: NonNegative = key(1e-8, "Added to the normaliser, or its lower bound.")
    eps_mode: Literal["add", "clamp", "none"] = key("add", "What eps does.")
    nan_policy: Literal["keep", "zero", "torch", "zero_sample"] = key(
        "keep", "Non-finite elements of g: keep lets the update be skipped; zero hides them; torch is nan_to_num."
    )
    reduction: Literal["mean", "sum"] = key("mean", "mean: gradient g / numel; sum: rCM's 2 g / batch.")


class Reward(Section):
    """The reward that the generator maximises after the cold start, by its gradient (ReFL)."""

    kind: Literal["none", "digits", "classifier"] = key("none", "digits: embedded; classifier: an image classifier.")
    path: str | None = key(None, "Folder or hub id of the classifier (transformers).")
    weight: NonNegative = key(0.05, "Weight of the reward's gradient beside the DMD gradient; 0: no reward.")
    chunk: Positive = key(64, "Samples decoded and scored at a time; less is less memory.")


class AdamW(Section):
    """AdamW of one role."""

    lr: PositiveFloat = key(2e-5, "Learning rate in the cold start.")
    rl_lr: PositiveFloat | None = key(None, "Learning rate after the cold start; null: the same.")
    decay: Fraction = key(0.0, "Last share of each phase in which the learning rate falls linearly to a tenth.")
    betas: tuple[Fraction, Fraction] = key((0.9, 0.999), "Moment decays.")
    weight_decay: NonNegative = key(0.0, "Decoupled weight decay.")
    eps: PositiveFloat = key(1e-8, "Denominator term.")


class Optimizer(Section):
    """Optimizers of the trained roles."""

    generator: AdamW = key(AdamW(), "The generator's.")
    fake: AdamW = key(AdamW(), "The fake score's.")
    clip: NonNegative = key(1.0, "Gradient-norm bound per role; 0: none.")


class DeepSpeed(Section):
    """How the engines run."""

    stage: Literal[0, 2, 3] = key(0, "ZeRO stage: 0 replicates, 2 shards gradients and optimizer, 3 weights too.")
    dtype: Literal["fp32", "bf16"] = key("fp32", "Compute type of the networks; master weights are fp32.")
    config: Path | None = key(None, "A DeepSpeed JSON whose keys come on top (offload, buckets, optimizer, ...).")


class Checkpoint(Section):
    """Checkpoints."""

    every: Positive = key(100, "Generator updates between checkpoints.")
    keep: Positive = key(2, "How many stay.")


class Log(Section):
    """Logs."""

    every: Positive = key(10, "Generator updates between log lines; metrics stay on the device in between.")
    wandb: str | None = key(None, "Weights & Biases project, when installed; null: none.")


class Evaluation(Section):
    """The honest table at the end: metrics.json."""

    samples: Count = key(2000, "Samples per row; 0: no evaluation.")
    data: str | None = key(None, "Real images: digits, or a folder of images. null: no evaluation.")
    features: str | None = key(None, "Feature classifier: digits, or folder or hub id of an image classifier.")
    teacher_steps: Positive = key(50, "Euler steps of the multi-step teacher.")
    batch_size: Positive = key(128, "Samples per rank and forward.")


class Config(Section):
    """dmdr_fast: distil a multi-step diffusion transformer into a 1-4 step generator by DMD and RL at once."""

    run_dir: Path = key(Path("runs/dmdr"), "Where checkpoints, logs, the final weights and the report go.")
    seed: Count = key(0, "Seed of everything that is drawn.")
    resume: str = key(
        "auto", "auto: the newest good checkpoint in run_dir; never: start anew; or a path. Newer ones are dropped."
    )
    sharing: Literal["separate", "shared_score"] = key(
        "shared_score", "separate: three networks; shared_score: teacher and fake score are one frozen base and a LoRA."
    )
    model: Model = key(Model(), "The network.")
    teacher: Teacher = key(Teacher(), "The teacher.")
    decoder: Decoder = key(Decoder(), "The decoder.")
    student: Student = key(Student(), "The student.")
    train: Train = key(Train(), "The run.")
    dyna_dg: DynaDG = key(DynaDG(), "DynaDG.")
    dyna_rs: DynaRS = key(DynaRS(), "DynaRS.")
    renoise: Renoise = key(Renoise(), "Renoise time.")
    lora: LoRA = key(LoRA(), "LoRA of the fake score.")
    dmd: DMD = key(DMD(), "DMD gradient.")
    reward: Reward = key(Reward(), "Reward.")
    optimizer: Optimizer = key(Optimizer(), "Optimizers.")
    deepspeed: DeepSpeed = key(DeepSpeed(), "DeepSpeed.")
    checkpoint: Checkpoint = key(Checkpoint(), "Checkpoints.")
    log: Log = key(Log(), "Logs.")
    eval: Evaluation = key(Evaluation(), "Evaluation.")

    @property
    def latent_size(self) -> int:
        """Side of the latent, in latent pixels."""
        return self.model.resolution // self.decoder_factor

    @property
    def decoder_factor(self) -> int:
        """Image pixels per latent pixel: 8 for the AutoencoderKL of Stable Diffusion, 1 without a decoder."""
        return 8 if self.decoder.kind == "vae" else 1

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        for problem in self._problems():
            raise ValueError(problem)
        return self

    def _problems(self):
        model, unit = self.model, self.decoder_factor * self.model.patch_size
        if model.resolution % unit:
            yield (
                f"model.resolution: {model.resolution} is not a multiple of {unit} "
                f"(decoder factor {self.decoder_factor} x model.patch_size {model.patch_size})"
            )
        if model.hidden_size % model.num_heads or model.hidden_size % 4:
            yield (
                f"model.hidden_size: {model.hidden_size} must be a multiple of 4 "
                f"and of model.num_heads ({model.num_heads})"
            )
        if self.student.steps > self.student.grid_points:
            yield (
                f"student.steps: {self.student.steps} steps do not fit a grid of {self.student.grid_points} times; "
                "set student.steps to at most student.grid_points"
            )
        if self.teacher.weights is None and self.teacher.train.data is None:
            yield "teacher.weights: missing; name the teacher's weights, or set teacher.train.data to train one first"
        if self.train.cold_start_steps > self.train.generator_steps:
            yield (
                f"train.cold_start_steps: {self.train.cold_start_steps} is more than "
                f"train.generator_steps ({self.train.generator_steps}), the total"
            )
        if self.renoise.t_min >= self.renoise.t_max:
            yield f"renoise.t_min: {self.renoise.t_min} must be below renoise.t_max ({self.renoise.t_max})"
        uses_digits = [
            name
            for name, value in (
                ("teacher.train.data", None if self.teacher.weights else self.teacher.train.data),
                ("reward.kind", self.reward.kind),
                ("eval.data", self.eval.data),
                ("eval.features", self.eval.features),
            )
            if value == "digits"
        ]
        if uses_digits and (model.num_classes, model.resolution, model.channels) != (10, 8, 1):
            yield (
                f"model.num_classes: {uses_digits[0]}=digits has 10 classes of 8x8x1 images; the model is set to "
                f"num_classes {model.num_classes}, resolution {model.resolution}, channels {model.channels}"
            )
        if self.decoder.kind == "vae" and self.decoder.path is None:
            yield "decoder.path: missing; decoder.kind=vae needs the folder or hub id of an AutoencoderKL"
        if self.reward.kind == "classifier" and self.reward.path is None:
            yield "reward.path: missing; reward.kind=classifier needs the folder or hub id of an image classifier"
        if self.eval.data is not None and self.eval.features is None:
            yield "eval.features: missing; eval.data needs a feature classifier (digits, or a folder or hub id)"
