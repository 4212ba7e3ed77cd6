"""DeepSpeed engines: one per trained role, and frozen networks that share its ZeRO stage."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from dmdr_fast.config import AdamW, Config
from dmdr_fast.engine.optimizers import build_optimizer
from dmdr_fast.models.lora import LoraAdapter
from dmdr_fast.models.partitioned import kept_whole
from dmdr_fast.preflight import read_deepspeed_json

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
    if config.deepspeed.config is not None:
        _merge(settings, read_deepspeed_json(config.deepspeed.config))
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
    client = None
    if "optimizer" not in settings:
        client = build_optimizer(parameters, optimizer, config.optimizer.kind)
    return deepspeed.initialize(model=module, model_parameters=parameters, optimizer=client, config=settings)[0]


def frozen_network(module: nn.Module, config: Config, device: torch.device) -> nn.Module:
    """A network that is only evaluated: sharded under stage 3, replicated otherwise, in the compute dtype."""
    module = module.requires_grad_(False).to(device, DTYPES[config.deepspeed.dtype])
    if config.deepspeed.stage < 3:
        return module
    return deepspeed.initialize(model=module, config=engine_config(config, trained=False))[0]


class Role:
    """A network as the algorithm calls it: fp32 latents in, fp32 predictions out, compute dtype in between."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        self.network, self.dtype = network, dtype

    def __call__(self, x_t: Tensor, t: Tensor, condition: Any) -> Tensor:
        return self.network(x_t.to(self.dtype), t, condition).float()


class TrainedRole(Role):
    """A role with an engine behind it (``dmdr_fast.algorithm.step.Trained``).

    A LoRA role passes its adapter: the graded forward wears it at ``lora_scale``.
    """

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        config: Config,
        adapter: LoraAdapter | None = None,
        lora_scale: float = 1.0,
    ) -> None:
        super().__init__(engine, DTYPES[config.deepspeed.dtype])
        self.engine, self.adapter, self.lora_scale = engine, adapter, lora_scale
        self.own_clip = config.optimizer.clip if clips_itself(config) else None
        self.keep_gathered = config.rollout.keep_gathered
        self.gradient_norm = float("nan")  # of the last step that was applied, before clipping

    def __call__(self, x_t: Tensor, t: Tensor, condition: Any) -> Tensor:
        if self.adapter is not None:
            self.adapter.set_scale(self.lora_scale)
        return super().__call__(x_t, t, condition)

    def whole_weights(self) -> AbstractContextManager:
        """Inside, forwards without grad find the weights gathered (``rollout.keep_gathered``); none may change them."""
        return kept_whole(self.engine.module.parameters()) if self.keep_gathered else nullcontext()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate gradients; DeepSpeed averages over micro-steps and ranks.

        A micro-batch may have several losses, so DeepSpeed, which would count calls, is told which is the last.
        """
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss)

    def step(self) -> bool:
        """Clip and step. A non-finite gradient anywhere leaves weights and optimizer untouched on every rank.

        ZeRO's optimizers decide that from the global norm that they need for clipping. The plain fp32 engine has no
        such check: its gradients, by now the same on all ranks, are looked at here.
        """
        if self.own_clip is None:
            self.engine.step()
            applied, norm = self.engine.was_step_applied(), self.engine.get_global_grad_norm()
        else:
            norm = self._clip()
            applied = bool(torch.isfinite(norm))
            if not applied:
                self.engine.zero_grad()  # AdamW passes over parameters without a gradient
            self.engine.step()
        if applied:
            self.gradient_norm = float(norm)
        return applied

    def _clip(self) -> Tensor:
        parameters = [p for p in self.engine.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if self.own_clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.own_clip, norm)
        return norm

    def set_lr(self, lr: float) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
