"""What single keys cannot tell: values that do not fit together."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from dmdr_fast.algorithm.rl.method import Setting
from dmdr_fast.algorithm.rl.methods import METHODS
from dmdr_fast.config.networks import PREDICTIONS
from dmdr_fast.config.run import LEAST_IMAGES

if TYPE_CHECKING:
    from dmdr_fast.config import Config


def problems(config: Config) -> Iterator[str]:
    """One line for each fault, naming the key and the remedy; the first is the one that a user sees."""
    yield from _sit_problems(config) if config.model.family == "sit" else _pipeline_problems(config)
    if config.student.steps > config.student.grid_points:
        yield (
            f"student.steps: {config.student.steps} steps do not fit a grid of {config.student.grid_points} times; "
            "set student.steps to at most student.grid_points"
        )
    yield from _times_problems(config)
    yield from _sampler_problems(config)
    if config.train.cold_start_steps > config.train.generator_steps:
        yield (
            f"train.cold_start_steps: {config.train.cold_start_steps} is more than "
            f"train.generator_steps ({config.train.generator_steps}), the total"
        )
    for where, law in (("renoise", config.renoise), ("fake.renoise", config.fake.renoise)):
        if law is not None and law.t_min >= law.t_max:
            yield f"{where}.t_min: {law.t_min} must be below {where}.t_max ({law.t_max})"
    if config.memory.frozen == "float8" and config.deepspeed.stage == 3:
        yield "memory.frozen: float8 weights cannot be partitioned; use int8, or deepspeed.stage 0 or 2"
    if config.rollout.stop_step_per == "rank" and config.deepspeed.stage == 3:
        yield (
            "rollout.stop_step_per: rank; under deepspeed.stage 3 ranks gather weights together and must run the same "
            "steps, set it to micro_step, or the stage to 0 or 2"
        )
    if config.rollout.keep_gathered and config.deepspeed.stage != 3:
        yield "rollout.keep_gathered: only deepspeed.stage=3 partitions the weights; set it, or leave this off"
    if config.compute.cuda_graphs and config.deepspeed.stage == 3:
        yield (
            "compute.cuda_graphs: under deepspeed.stage 3 weights are gathered to new addresses in every pass, which "
            "no graph follows; set it to false, or the stage to 0 or 2"
        )
    if config.compute.cuda_graphs and config.model.family == "z_image":
        yield (
            "compute.cuda_graphs: z_image runs each prompt at its own length, and every length would be a graph; set "
            "it to false"
        )
    if config.dmd.decoupled and not config.uses_cfg:
        yield (
            "dmd.decoupled: without guidance there is one part alone; set teacher.cfg_scale, or dmd.decoupled to false"
        )
    if config.dmd.decoupled and config.dmd.ca.t_min >= (least := _least_time(config)):
        yield (
            f"dmd.ca.t_min: {config.dmd.ca.t_min:g} is not below the student's last time, {least:.4g} before "
            "dmd.ca.shift; lower it"
        )
    yield from _sharing_problems(config)
    yield from _rl_problems(config)
    if config.eval.data is not None and config.eval.features is None:
        yield "eval.features: missing; eval.data needs a feature classifier (digits, scenes, or a folder or hub id)"
    if config.eval.data is not None and 0 < config.eval.samples < LEAST_IMAGES:
        yield (
            f"eval.samples: {config.eval.samples}; precision and recall against eval.data need {LEAST_IMAGES} or more, "
            "raise it, set it to 0, or leave eval.data out"
        )


def _least_time(config: Config) -> float:
    """The last time that the student is asked at, above 0, before ``dmd.ca.shift``."""
    student, shift = config.student, config.dmd.ca.shift
    t = student.times[-1] if student.times else student.shift / (student.steps - 1 + student.shift)
    return t / (shift - (shift - 1.0) * t)


def _sit_problems(config: Config) -> Iterator[str]:
    model, unit = config.model, config.decoder_factor * config.model.patch_size
    if not isinstance(model.resolution, int):
        yield (
            f"model.resolution: {_listed(model.resolution)}; SiT's positions are a table of one square size, give its "
            "side as one number"
        )
    elif model.resolution % unit:
        nearest = max(unit, round(model.resolution / unit) * unit)
        yield (
            f"model.resolution: {model.resolution} is not a multiple of {unit} (decoder factor "
            f"{config.decoder_factor} x model.patch_size {model.patch_size}); the nearest is {nearest}"
        )
    for where, sizes in (("model", model), ("student.model", config.student.model)):
        if sizes is not None and (sizes.hidden_size % sizes.num_heads or sizes.hidden_size % 4):
            yield (
                f"{where}.hidden_size: {sizes.hidden_size} must be a multiple of 4 and of {where}.num_heads "
                f"({sizes.num_heads})"
            )
    if config.student.pipeline is not None:
        yield (
            "student.pipeline: set beside model.family sit; set student.model to the generator's size and weights, or "
            "leave it out"
        )
    if config.teacher.weights is None and config.teacher.train.data is None:
        yield "teacher.weights: missing; name the teacher's weights, or set teacher.train.data to train one first"
    if config.teacher.pipeline is not None:
        yield (
            "teacher.pipeline: set beside model.family sit, which reads teacher.weights; set model.family to the "
            "pipeline's, or leave it out"
        )
    uses_digits = [
        name
        for name, value in (
            ("teacher.train.data", None if config.teacher.weights else config.teacher.train.data),
            *((f"reward.{name}", kind) for name, kind in _reward_kinds(config)),
            ("eval.data", config.eval.data),
            ("eval.features", config.eval.features),
        )
        if value in ("digits", "digits_held_out")
    ]
    if uses_digits and (model.num_classes, model.resolution, model.channels) != (10, 8, 1):
        yield (
            f"model.num_classes: {uses_digits[0]}=digits has 10 classes of 8x8x1 images; the model is set to "
            f"num_classes {model.num_classes}, resolution {model.resolution}, channels {model.channels}"
        )
    if scenes := [f"eval.{key}" for key in ("data", "features") if getattr(config.eval, key) == "scenes"]:
        yield f"{scenes[0]}: scenes are made of prompts, model.family sit makes images of classes; choose another"
    if config.decoder.kind == "vae" and config.decoder.path is None:
        yield "decoder.path: missing; decoder.kind=vae needs the folder or hub id of an AutoencoderKL"
    evaluates = config.eval.samples and (config.eval.every or config.eval.data is not None)
    if evaluates and config.decoder.kind == "identity" and model.channels not in (1, 3):
        yield (
            f"model.channels: {model.channels}; without a decoder the evaluation shows 1 (grey) or 3 (RGB), set "
            "decoder.kind=vae, or eval.samples=0"
        )
    if config.decoder.kind == "identity" and (config.decoder.tiling or config.decoder.recompute):
        yield "decoder.tiling, decoder.recompute: there is no VAE to tile; set decoder.kind=vae, or leave them off"


def _pipeline_problems(config: Config) -> Iterator[str]:
    """Of the text-to-image families."""
    family = config.model.family
    if config.teacher.pipeline is None:
        yield f"teacher.pipeline: missing; model.family {family} needs the folder or hub id of its diffusers pipeline"
    if config.teacher.weights is not None:
        yield f"teacher.weights: model.family {family} takes the weights of teacher.pipeline; leave it out"
    if config.student.model is not None:
        yield f"student.model: it is SiT's; model.family {family} takes student.pipeline, or leave it out"
    if config.data.prompts is None:
        yield f"data.prompts: missing; model.family {family} needs a file of prompts, or a folder of Parquet files"
    if family == "sdxl" and config.student.shift != 1.0:
        yield f"student.shift: {config.student.shift:g}; SDXL's noise path has no shift, set it to 1"
    if config.lora.form != "standard":
        yield f"lora.form: {config.lora.form} needs q, k and v in one layer, unlike {family}; set it to standard"
    digits = [f"reward.{where}" for where, kind in _reward_kinds(config) if kind.startswith("digits")]
    digits += [f"eval.{key}" for key in ("data", "features") if getattr(config.eval, key) == "digits"]
    scenes = [f"reward.{where}" for where, kind in _reward_kinds(config) if kind.startswith("scenes")]
    scenes += [f"eval.{key}" for key in ("data", "features") if getattr(config.eval, key) == "scenes"]
    if scenes and config.model.resolution != 16:
        yield f"model.resolution: {config.model.resolution}; {scenes[0]}: scenes are of 16 x 16 pixels, set it to 16"
    if digits:
        yield f"{digits[0]}: digits are 8x8x1 images of ten classes, model.family {family} makes others of prompts"


def _times_problems(config: Config) -> Iterator[str]:
    """Of ``student.times``."""
    student = config.student
    if student.times is None:
        return
    if student.steps != len(student.times):
        yield f"student.steps: {student.steps}, but student.times names {len(student.times)}; set it to that"
    if student.shift != 1.0:
        yield f"student.shift: {student.shift:g} beside student.times, which are taken as they are; leave it out"
    if any(now <= later for now, later in pairwise(student.times)):
        yield f"student.times: {_listed(student.times)}; expected falling times, each once"
    steps = [math.ceil(1000 * t - 1e-3) for t in student.times]
    if config.model.family == "sdxl" and len(set(steps)) < len(steps):
        yield f"student.times: {_listed(student.times)}; SDXL has 1000 steps, and two of these are one of them"


def _sampler_problems(config: Config) -> Iterator[str]:
    """Of ``student.sampler``."""
    sampler = config.student.sampler
    if sampler == "renoise":
        return
    if config.model.family == "sdxl":
        yield (
            f"student.sampler: {sampler} is a step of flow matching and SDXL predicts eps on another path; set it to "
            "renoise"
        )
    if config.student.rollout == "same_step":
        yield (
            f"student.rollout: same_step trains on fresh noise, which student.sampler {sampler} does not sample with; "
            "set it to backward_simulation, or the sampler to renoise"
        )


def _listed(values: Any) -> str:
    return json.dumps(values)


def _sharing_problems(config: Config) -> Iterator[str]:
    if config.sharing != "shared_all":
        return
    if config.student.own_network is not None:
        key = "student.pipeline" if config.student.model is None else "student.model"
        yield (
            f"sharing: shared_all makes the generator a LoRA on the teacher's network, and {key} names another; set "
            f"sharing to shared_score or separate, or leave {key} out"
        )
    if not config.student.lora.rank:
        yield "student.lora.rank: 0; with sharing shared_all the generator is a LoRA on the shared base, set its rank"
    if config.optimizer.kind != "adamw":
        yield f"optimizer.kind: {config.optimizer.kind}; the small adapters of sharing shared_all take adamw, set it"


def _reward_kinds(config: Config) -> list[tuple[str, str]]:
    reward = config.reward
    return [("terms", term.kind) for term in reward.terms] + [("held_out", term.kind) for term in reward.held_out]


def _rl_problems(config: Config) -> Iterator[str]:
    rl, train = config.rl, config.train
    if rl.tilting.uses_reward:
        if not train.cold_start_steps:
            yield (
                f"rl.tilt.method: {rl.tilt.method} acts in the cold start, and train.cold_start_steps is 0; raise it, "
                "or set the method to none"
            )
        yield from _terms_problems(config, "rl.tilt.method", rl.tilt.method)
    if not config.has_rl:
        return
    yield from _terms_problems(config, "rl.method", rl.method)
    if rl.regularizer == "dm" and not config.uses_cfg:
        yield "rl.regularizer: dm is dmd without guidance, and there is none (teacher.cfg_scale); set it to dmd"
    if rl.regularizer == "kl" and not rl.kl_weight:
        yield "rl.kl_weight: 0 with rl.regularizer kl; set it above 0, or rl.regularizer to none"
    if rl.reference == "lora_off" and not config.student.lora.rank:
        yield "rl.reference: lora_off needs a LoRA generator; set student.lora.rank, or rl.reference to frozen"
    yield from _auto_weight_problems(config)
    setting = Setting(
        config.student.steps,
        rl.regularizer,
        config.teacher.cfg_scale,
        config.uses_cfg,
        config.model.family,
        PREDICTIONS.get(config.model.family, "flow"),
    )
    yield from rl.chosen.problems(setting)


def _terms_problems(config: Config, key: str, method: str) -> Iterator[str]:
    """Of the rewards that a method needs."""
    reward = config.reward
    if not reward.terms:
        yield f"reward.terms: missing; {key} {method} needs a reward, or set {key} to none"
    names = [term.called for term in (*reward.terms, *reward.held_out)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        yield f"reward.terms: two rewards are called {twice!r}; give each a name of its own"


def _auto_weight_problems(config: Config) -> Iterator[str]:
    if config.reward.weight != "auto":
        return
    if not config.rl.chosen.auto_weight:
        matched = " or ".join(f"{method.__name__}'s" for method in METHODS.values() if method.auto_weight)
        yield (
            f"reward.weight: auto matches the DMD loss with {matched}; that of {config.rl.method} is no size of the "
            "reward, set a number"
        )
    if not config.train.cold_start_steps:
        yield "reward.weight: auto needs DMD losses from a cold start; set train.cold_start_steps above 0, or a number"
    if any(term.normalize == "running" for term in config.reward.terms):
        yield (
            "reward.weight: auto beside reward.terms with normalize running, whose scale moves; set a number, or "
            "normalize to none"
        )
