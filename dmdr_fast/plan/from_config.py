"""From a run's configuration to the workload that is planned."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

from dmdr_fast.config import Config
from dmdr_fast.deepspeed_json import read_deepspeed_json
from dmdr_fast.errors import UserError
from dmdr_fast.models.families.student import check_student
from dmdr_fast.plan.shapes import Shape, find_shape
from dmdr_fast.plan.workload import Adapter, RewardNet, RewardPass, Workload, Zero

SD_VAE = find_shape("sit-xl-2").vae


def workload(config: Config, shape: Shape | None = None) -> Workload:
    """One update of the run: of ``phases`` the largest micro-batch, in as many micro-steps as their largest batch has,
    the largest R, the least reuse, and guidance if any guides.

    ``shape`` takes the place of the configuration's teacher.

    Raises:
        UserError: a DeepSpeed JSON that a run would refuse, a teacher or a generator's own network whose shape is not
            known, or that do not fit together.
    """
    shape = _as_long(shape or _shape(config), config)
    own = _student(config, shape)
    student, phases, method = config.student, config.each_phase, config.rl.chosen
    micro_batch = max(phase.train.micro_batch_size for phase in phases)
    return Workload(
        shape=shape,
        student=own,
        resolution=_largest(config.model.sizes),
        batch=micro_batch,
        accumulation=math.ceil(max(phase.train.batch for phase in phases) / micro_batch),
        sharing=config.sharing,
        activation=config.memory.activation,
        blocks="compiled" if config.compute.blocks == "auto" else config.compute.blocks,  # auto on CUDA
        cuda_graphs=config.compute.cuda_graphs,
        dtype=config.deepspeed.dtype,
        frozen=config.memory.frozen,
        optimizer=config.optimizer.kind,
        student_lora=_adapter(student.lora, own or shape) if student.lora.rank else None,
        fake_lora=None if config.sharing == "separate" else _adapter(config.lora, shape),
        student_steps=student.steps,
        fake_updates=max(phase.train.fake_updates for phase in phases),
        rollout_reuse=min(phase.train.rollout_reuse for phase in phases),
        stop_step_per_rank=config.rollout.stop_step_per == "rank",
        same_step=student.rollout == "same_step",
        cfg=any(phase.uses_cfg for phase in phases),
        decoupled=config.dmd.decoupled,
        ema=student.ema is not None,
        keep_gathered=config.rollout.keep_gathered,
        reward=_reward(config),
        epochs=config.epochs,
        plain_steps=method.plain_forwards(),
        policy_steps=method.graded_forwards(student.steps) if config.has_rl else 0,
        policy_share=method.graded_share,
        reference=config.reference_kind,
        **config.reference_passes,
        zero=_zero(config),
    )


def _largest(sizes: tuple[tuple[int, int], ...]) -> int | tuple[int, int]:
    """The size with most pixels, which every phase must have room for."""
    height, width = max(sizes, key=lambda size: size[0] * size[1])
    return height if height == width else (height, width)


def _adapter(lora: Any, shape: Shape) -> Adapter:
    return Adapter(lora.rank, tuple(lora.targets or shape.opened().lora_targets), getattr(lora, "form", "standard"))


def _as_long(shape: Shape, config: Config) -> Shape:
    """With ``data.max_length`` text tokens."""
    length = config.data.max_length
    return shape if length is None or not shape.opened().takes_prompts else replace(shape, length=length)


def _shape(config: Config) -> Shape:
    model = config.model
    if config.teacher.pipeline is not None:
        return find_shape(config.teacher.pipeline)
    sizes = ("depth", "hidden_size", "num_heads", "patch_size", "num_classes", "learn_sigma", "time_reversed")
    network = {"_class_name": "SiT", "input_size": config.latent_size, "in_channels": model.channels}
    network |= {name: getattr(model, name) for name in sizes}
    vae = SD_VAE if config.decoder.kind == "vae" else None
    return Shape("SiT", "sit", json.dumps(network), vae, 0)


def _student(config: Config, teacher: Shape) -> Shape | None:
    """The shape of the generator's own network; None where it has the teacher's."""
    student = config.student
    if student.own_network is None:
        return None
    if teacher.family != config.model.family:
        raise UserError(
            f"--model: {teacher.name} is a {teacher.family}, and the generator's own network of model.family "
            f"{config.model.family}; give a teacher of that, or leave student.pipeline and student.model out"
        )
    if student.model is not None:
        sizes = student.model.model_dump(exclude={"weights"})
        name = f"SiT of {student.model.depth} blocks"
        return replace(teacher, name=name, transformer=json.dumps(teacher.config | sizes))
    shape = _as_long(find_shape(student.own_network, "student.pipeline"), config)
    try:
        check_student(teacher.opened(), shape.opened(), config.model.sizes)
    except ValueError as error:
        raise UserError(f"student.pipeline: {student.pipeline}: {error}") from None
    return shape


def _reward(config: Config) -> RewardPass:
    """Decoder and rewards: a run holds them, and those that are only watched, with or without RL."""
    reward, rl, refl = config.reward, config.rl, config.rl.refl_options
    methods = [rl.tilting, rl.chosen] if config.has_rl else [rl.tilting]
    return RewardPass(
        scores=any(method.uses_reward for method in methods) and bool(reward.terms),
        graded=any(method.needs_gradient for method in methods),
        times=max(method.reward_passes() for method in methods),
        chunk=refl.chunk,
        models=tuple(
            RewardNet(term.kind, term.path, json.dumps(term.options, default=str), config.num_classes)
            for term in (*reward.terms, *reward.held_out)
        ),
        tiling=config.decoder.tiling,
        recompute=config.decoder.recompute,
        checkpoint=refl.checkpoint,
        dtype="bf16" if config.decoder.dtype == "auto" else config.decoder.dtype,
    )


def _zero(config: Config) -> Zero:
    settings = read_deepspeed_json(config).get("zero_optimization", {})

    def off_gpu(key: str) -> bool:
        return (settings.get(key) or {}).get("device", "none") in ("cpu", "nvme")

    return Zero(
        stage=config.deepspeed.stage,
        reduce_bucket=settings.get("reduce_bucket_size", Zero.reduce_bucket),
        prefetch=settings.get("stage3_prefetch_bucket_size"),
        reuse_distance=settings.get("stage3_max_reuse_distance", Zero.reuse_distance),
        sub_group=settings.get("sub_group_size", Zero.sub_group),
        offload_optimizer=off_gpu("offload_optimizer"),
        offload_parameters=off_gpu("offload_param"),
        overlap=settings.get("overlap_comm", True),
        efficient_linear=settings.get("memory_efficient_linear", True),
    )
