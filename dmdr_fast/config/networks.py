"""The networks: what they are, where their weights come from, what the student is."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from dmdr_fast.config.base import Count, Fraction, NonNegative, Place, Positive, PositiveFloat, Section, TorchSeed, key
from dmdr_fast.config.distillation import FakeRenoise

# How the pipelines in diffusers that do not take u + w (c - u) guide: see dmdr_fast.algorithm.guidance.
PIPELINE_CFG: dict[str, Literal["offset", "per_token"]] = {"z_image": "offset", "qwen_image": "per_token"}
# What the networks of a family predict that is no flow.
PREDICTIONS = {"sdxl": "eps"}
Size = tuple[Positive, Positive]  # height, width
Time = Annotated[float, Field(gt=0, le=1)]


class Model(Section):
    """The network that teacher, fake score and, unless ``student`` has one of its own, generator share.

    ``sit`` is class-conditional, in latent or pixel space, and described here; the others are text-to-image networks
    that ``teacher.pipeline`` describes: of the keys below they read ``resolution`` alone.
    """

    family: Literal["sit", "sd3", "flux", "flux2", "z_image", "qwen_image", "sdxl"] = key("sit", "Model family.")
    resolution: Positive | Size | tuple[Size, ...] = key(
        8,
        "Images in pixels, multiples of the decoder's factor times the patch. 1024: squares; [768, 1280]: height and "
        "width; [[1024, 1024], [768, 1280]]: several sizes, one drawn for each micro-step, the first for evaluation.",
    )
    channels: Positive = key(1, "Latent channels (4 for sd-vae, the image's own without a decoder).")
    patch_size: Positive = key(2, "Side of a patch in latent pixels.")
    hidden_size: Positive = key(96, "Width.")
    depth: Positive = key(4, "Transformer blocks.")
    num_heads: Positive = key(4, "Attention heads; divides hidden_size.")
    num_classes: Positive = key(10, "Classes; class number num_classes is the null class.")
    learn_sigma: bool = key(False, "The checkpoint predicts 2x channels (public SiT); only the velocity half is used.")
    time_reversed: bool = key(False, "The checkpoint's time runs from noise at 0 to data at 1 (public SiT, not REPA).")

    @field_validator("resolution")
    @classmethod
    def _one_form_each(cls, value: Any) -> Any:
        """``[[768, 1280]]`` is ``[768, 1280]``, and ``[1024, 1024]`` is ``1024``."""
        if isinstance(value, tuple) and len(value) == 1:
            value = value[0]
        if isinstance(value, tuple) and len(value) == 2 and value[0] == value[1] and isinstance(value[0], int):
            value = value[0]
        if value == () or (isinstance(value, tuple) and len(set(value)) < len(value)):
            raise ValueError("no size, or one twice")
        return value

    @property
    def sizes(self) -> tuple[Size, ...]:
        """(height, width) in pixels of every size that is trained."""
        if isinstance(self.resolution, int):
            return ((self.resolution, self.resolution),)
        return (self.resolution,) if isinstance(self.resolution[0], int) else self.resolution


class TeacherTraining(Section):
    """Flow-matching training of the teacher, where the recipe says that it is trained first (digits)."""

    data: Literal["digits"] | None = key(None, "Data set to train a missing teacher on; null: the teacher must exist.")
    steps: Positive = key(3000, "Training steps.")
    batch_size: Positive = key(128, "Samples per step.")
    lr: PositiveFloat = key(2e-3, "Peak learning rate, cosine to zero.")
    ema: Fraction = key(0.995, "EMA decay of the weights that are kept.")
    seed: TorchSeed = key(0, "Seed of the teacher; not the run's, so that runs share the cached teacher.")
    label_dropout: Fraction = key(0.1, "Share of labels replaced by the null class, for CFG.")


class Teacher(Section):
    """The multi-step teacher: real score, and the start of the generator and the fake score."""

    weights: Place | None = key(None, "Weights: a .safetensors or .pt file, or hf://ORG/REPO/FILE. null: train.data.")
    pipeline: Place | None = key(None, "Diffusers pipeline of a text-to-image family: its folder or hub id, or scenes.")
    revision: str | None = key(None, "Branch, tag or commit of a hub id; null: its main branch.")
    guidance: NonNegative | None = key(
        None,
        "Guidance scale that a guidance-distilled network (FLUX.1-dev, FLUX.2-dev) is told; null: its default.",
    )
    cfg_scale: NonNegative | None = key(
        None, "CFG scale w of the real score, in the form of cfg_mode; null: no CFG (as is 1 in the standard form)."
    )
    cfg_mode: Literal["pipeline", "standard", "offset"] = key(
        "pipeline",
        "pipeline: as the family's own pipeline guides (SiT: standard); standard u + w (c - u); offset c + w (c - u).",
    )
    sample_cfg_scale: NonNegative | None = key(
        None, "CFG scale of the teacher's own samples in the evaluation, in the same form; null: no CFG."
    )
    train: TeacherTraining = key(TeacherTraining(), "How a missing teacher is trained.")


class Decoder(Section):
    """From latents to images. A text-to-image family has its pipeline's VAE and reads neither kind nor path."""

    kind: Literal["identity", "vae"] = key("identity", "identity: latents are images; vae: diffusers' AutoencoderKL.")
    path: Place | None = key(None, "Folder or hub id of the VAE.")
    dtype: Literal["auto", "fp32", "bf16"] = key(
        "auto", "Type of the VAE's weights and of the decoding; auto: bf16 on CUDA, fp32 on a CPU."
    )
    tiling: bool = key(False, "Decode large latents tile by tile, blended at the seams: less memory, nearly the same.")
    recompute: bool = key(False, "Recompute the decoder's blocks in the reward's backward pass: less memory, the same.")


class StudentLoRA(Section):
    """The generator as a LoRA on the frozen teacher's weights."""

    rank: Count = key(0, "Rank; 0: the whole generator is trained.")
    targets: tuple[str, ...] | None = key(
        None, "Module-name suffixes of the Linear layers that get an adapter; null: the family's own."
    )
    scale: PositiveFloat = key(1.0, "Scale of the adapter.")


class StudentModel(Section):
    """A SiT of another size as the generator; what is not here is ``model``'s."""

    weights: Place = key(..., "Its weights, as teacher.weights.")
    hidden_size: Positive = key(..., "Width.")
    depth: Positive = key(..., "Transformer blocks.")
    num_heads: Positive = key(..., "Attention heads; divides hidden_size.")


class Student(Section):
    """The few-step generator."""

    pipeline: Place | None = key(
        None,
        "Diffusers pipeline, as teacher.pipeline, whose network is the generator: of the same family and another size; "
        "null: the teacher's.",
    )
    revision: str | None = key(None, "Branch, tag or commit of its hub id; null: its main branch.")
    model: StudentModel | None = key(
        None, "SiT: the generator's size and weights, where they are not the teacher's; null: the teacher's."
    )
    weights: Place | None = key(
        None,
        "Where the generator starts: a run, a checkpoint, a file of weights or of an adapter, or hf://ORG/REPO/FILE; "
        "null: at the teacher, or at its own network's weights.",
    )
    steps: Positive = key(1, "Student steps N.")
    shift: PositiveFloat = key(1.0, "Timestep shift of the grid, t' = s t / (1 + (s - 1) t).")
    times: tuple[Time, ...] | None = key(
        None,
        "The times themselves in place of steps and shift: falling, the first at most 1 (pure noise); 0 is implied.",
    )
    grid_points: Positive = key(1000, "Distinct times that the teacher was trained on; N cannot exceed them.")
    rollout: Literal["backward_simulation", "same_step"] = key(
        "backward_simulation",
        "Input of the graded step: x at t_i of the full rollout; same_step (the reference's): x0_i renoised to t_i.",
    )
    sampler: Literal["renoise", "ode", "cps"] = key(
        "renoise",
        "Noise of the steps after the first, in rollouts, evaluation and export. renoise: fresh; ode: what is in x "
        "already (deterministic Euler, as few-step pipelines); cps: of both, by eta.",
    )
    eta: Fraction = key(0.5, "Of cps: noise is cos(eta pi / 2) of the old and sin(eta pi / 2) of the fresh.")
    ema: Fraction | None = key(0.99, "EMA decay of the generator that is evaluated and saved; null: none.")
    lora: StudentLoRA = key(StudentLoRA(), "The generator as a LoRA.")

    @property
    def own_network(self) -> str | None:
        """Where the generator's own network comes from; None where it is the teacher's."""
        return self.pipeline if self.model is None else self.model.weights

    @property
    def fresh_noise(self) -> float:
        """``eta`` of the sampler: 1 for renoise, 0 for ode."""
        return {"renoise": 1.0, "ode": 0.0, "cps": self.eta}[self.sampler]

    @model_validator(mode="before")
    @classmethod
    def _times_count_the_steps(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("times"), (list, tuple)) and "steps" not in values:
            return values | {"steps": len(values["times"]) or 1}
        return values


class Fake(Section):
    """The fake score."""

    weights: Place | None = key(
        None, "Where the fake score starts, as student.weights; shared_score and shared_all take an adapter."
    )
    renoise: FakeRenoise | None = key(
        None,
        "Law of the renoise time in the fake updates, {kind: uniform, shift: 3}: a group of the keys of renoise and "
        "dyna_rs with their own defaults; null: those sections, as in the score pass.",
    )


class LoRA(Section):
    """The fake score's LoRA (sharing: shared_score, shared_all)."""

    rank: Positive = key(32, "Rank.")
    targets: tuple[str, ...] | None = key(
        None, "Module-name suffixes of the Linear layers that get an adapter; null: the family's own."
    )
    form: Literal["standard", "post_projection"] = key(
        "standard", "standard: W x + s (x A) B; post_projection: the reference's, on qkv's output."
    )
    init_std: PositiveFloat | None = key(None, "Standard deviation of A at the start; null: the form's own.")
