"""DeepSpeed engines: one per trained network, and frozen networks that share its ZeRO stage."""

from __future__ import annotations

from itertools import chain
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import nn

from dmdr_fast.config import AdamW, Config
from dmdr_fast.deepspeed_json import read_deepspeed_json
from dmdr_fast.engine.optimizers import build_optimizer, numbers
from dmdr_fast.models.blocks import largest_block

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# A loss scale per role: it halves when a gradient overflows and doubles after 1,000 steps in which none did.
LOSS_SCALE = {"loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 1}


def engine_config(config: Config, *, trained: bool) -> dict[str, Any]:
    """The DeepSpeed configuration of one role; the keys of ``deepspeed.config`` come on top."""
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.train.gradient_accumulation if trained else 1,
        "gradient_clipping": 0.0 if clips_itself(config) else config.optimizer.clip,
        "steps_per_print": 10**9,  # the run has its own log
        "bf16": {"enabled": config.deepspeed.dtype == "bf16"},
        "fp16": {"enabled": config.deepspeed.dtype == "fp16", **LOSS_SCALE},
        "zero_optimization": {"stage": config.deepspeed.stage, "overlap_comm": torch.cuda.is_available()},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    _merge(settings, read_deepspeed_json(config))
    if not trained:  # nothing of it is stepped
        settings.pop("optimizer", None)
        settings["zero_optimization"].pop("offload_optimizer", None)
    return settings


def clips_itself(config: Config) -> bool:
    """Whether the role, not DeepSpeed, looks at and clips the gradients: the plain fp32 engine checks nothing."""
    return config.deepspeed.stage == 0 and config.deepspeed.dtype == "fp32"


def _merge(base: dict[str, Any], top: dict[str, Any]) -> None:
    for name, value in top.items():
        if isinstance(value, dict) and isinstance(base.get(name), dict):
            _merge(base[name], value)
        else:
            base[name] = value


def prefetching(settings: dict[str, Any], module: nn.Module) -> dict[str, Any]:
    """``settings`` under which ZeRO-3 gathers the next block while one runs: a bucket of one block, not half or two."""
    settings["zero_optimization"].setdefault("stage3_prefetch_bucket_size", largest_block(module))
    return settings


def trace_graded_passes(engine: deepspeed.DeepSpeedEngine) -> None:
    """Let ZeRO-3 learn the order of the modules from a graded pass: it prefetches by that order.

    Left alone it records the rollout that comes first, and throws its record away at the first backward pass, update
    for update. A rollout is the beginning of a graded pass, so that pass's record serves both.
    """
    coordinator = getattr(engine.optimizer, "parameter_offload", engine.optimizer).get_param_coordinator()

    def forget(module: nn.Module, inputs: Any, output: Any) -> None:
        if not torch.is_grad_enabled() and coordinator.is_record_trace():
            coordinator._invalidate_trace()

    engine.module.register_forward_hook(forget)


def trained_engine(module: nn.Module, config: Config, optimizer: AdamW) -> deepspeed.DeepSpeedEngine:
    """An engine that trains the parameters of ``module`` that require grad; the rest is frozen and sharded alike.

    The optimizer is the one of ``optimizer.kind``, or of ``deepspeed.config`` where that names one.
    """
    settings = prefetching(engine_config(config, trained=True), module)
    parameters = [p for p in module.parameters() if p.requires_grad]
    client, own = None, settings.get("optimizer")
    if own is None:
        client = build_optimizer(parameters, optimizer, config.optimizer.kind)
    else:
        own["params"] = own.get("params", {}) | numbers(optimizer)
    engine = deepspeed.initialize(model=module, model_parameters=parameters, optimizer=client, config=settings)[0]
    if config.deepspeed.stage == 3:
        trace_graded_passes(engine)
    if isinstance(engine.optimizer, (FP16_Optimizer, FP16_UnfusedOptimizer)):
        forget_first_step(engine.optimizer)
        keep_masters(engine.optimizer)
    return engine


def forget_first_step(optimizer: FP16_Optimizer | FP16_UnfusedOptimizer) -> None:
    """Undo the step on zero gradients by which DeepSpeed makes the moments at stage 0, and at no other stage.

    The moments are zeros. Adam would count the step: with betas 0 and 0.999 the next one would be sqrt(2) as long. And
    weight decay has moved the masters.
    """
    for state in optimizer.optimizer.state.values():
        if "step" in state:
            state["step"] = state["step"] * 0
    if isinstance(optimizer, FP16_Optimizer):
        masters, weights = optimizer.fp32_groups_flat, optimizer.fp16_groups_flat
    else:
        masters, weights = ([*chain(*groups)] for groups in (optimizer.fp32_groups, optimizer.fp16_groups))
    for master, start in zip(masters, weights, strict=True):
        master.data.copy_(start.data)


def keep_masters(optimizer: FP16_Optimizer | FP16_UnfusedOptimizer) -> None:
    """Let every parameter know its fp32 master, which at stage 0 the optimizer alone has.

    The optimizers that DeepSpeed fuses step one flat master per group: a parameter's is a view of it.
    """
    if isinstance(optimizer, FP16_Optimizer):
        for parameters, flat in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True):
            parts = flat.detach().split([p.numel() for p in parameters])
            for parameter, part in zip(parameters, parts, strict=True):
                parameter.fp32_master = part.view_as(parameter)
        return
    for parameters, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        for parameter, master in zip(parameters, masters, strict=True):
            parameter.fp32_master = master


def frozen_network(module: nn.Module, config: Config, device: torch.device) -> nn.Module:
    """A network that is only evaluated: sharded under stage 3, replicated otherwise, in the compute dtype."""
    module = module.requires_grad_(False).to(device, DTYPES[config.deepspeed.dtype])
    if config.deepspeed.stage < 3:
        return module
    return deepspeed.initialize(model=module, config=prefetching(engine_config(config, trained=False), module))[0]
