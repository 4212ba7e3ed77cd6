"""DeepSpeed engines: one per trained network, and frozen networks that share its ZeRO stage."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from torch import nn

from dmdr_fast.config import AdamW, Config
from dmdr_fast.deepspeed_json import read_deepspeed_json
from dmdr_fast.engine.optimizers import build_optimizer, numbers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def engine_config(config: Config, *, trained: bool) -> dict[str, Any]:
    """The DeepSpeed configuration of one role; the keys of ``deepspeed.config`` come on top."""
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.train.gradient_accumulation if trained else 1,
        "gradient_clipping": 0.0 if clips_itself(config) else config.optimizer.clip,
        "steps_per_print": 10**9,  # the run has its own log
        "bf16": {"enabled": config.deepspeed.dtype == "bf16"},
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


def trained_engine(module: nn.Module, config: Config, optimizer: AdamW) -> deepspeed.DeepSpeedEngine:
    """An engine that trains the parameters of ``module`` that require grad; the rest is frozen and sharded alike.

    The optimizer is the one of ``optimizer.kind``, or of ``deepspeed.config`` where that names one.
    """
    settings = engine_config(config, trained=True)
    parameters = [p for p in module.parameters() if p.requires_grad]
    client, own = None, settings.get("optimizer")
    if own is None:
        client = build_optimizer(parameters, optimizer, config.optimizer.kind)
    else:
        own["params"] = own.get("params", {}) | numbers(optimizer)
    return deepspeed.initialize(model=module, model_parameters=parameters, optimizer=client, config=settings)[0]


def frozen_network(module: nn.Module, config: Config, device: torch.device) -> nn.Module:
    """A network that is only evaluated: sharded under stage 3, replicated otherwise, in the compute dtype."""
    module = module.requires_grad_(False).to(device, DTYPES[config.deepspeed.dtype])
    if config.deepspeed.stage < 3:
        return module
    return deepspeed.initialize(model=module, config=engine_config(config, trained=False))[0]
