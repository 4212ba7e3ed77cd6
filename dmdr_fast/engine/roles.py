"""Networks as the algorithm calls them, and what trains one: an engine of its own, or an adapter on a shared base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import deepspeed
import torch
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler, LossScalerBase
from torch import Tensor, nn

from dmdr_fast.algorithm.rollout import Network
from dmdr_fast.config import AdamW, Config
from dmdr_fast.engine.engines import DTYPES, clips_itself, engine_config
from dmdr_fast.engine.optimizers import build_optimizer
from dmdr_fast.engine.runtime import Runtime
from dmdr_fast.errors import UserError
from dmdr_fast.models.lora import LoraAdapter, Scale
from dmdr_fast.models.partitioned import kept_whole

LOSS_SCALE_STATE = ("cur_scale", "cur_iter", "last_overflow_iter")
Worn = Mapping[LoraAdapter, Scale]


class Role:
    """A network as the algorithm calls it: fp32 latents in, fp32 predictions out, compute dtype in between.

    ``worn`` says which adapters of the network act in this role, and how much; None is off.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype, worn: Worn | None = None) -> None:
        self.network: Network = network
        self.dtype, self.worn = dtype, dict(worn or {})

    def __call__(self, x_t: Tensor, t: Tensor, condition: Any) -> Tensor:
        for adapter, scale in self.worn.items():
            adapter.set_scale(scale)
        return self.network(x_t.to(self.dtype), t, condition).float()


class FrozenRole(Role):
    """A role that is only evaluated."""

    @torch.no_grad()
    def __call__(self, x_t: Tensor, t: Tensor, condition: Any) -> Tensor:
        return super().__call__(x_t, t, condition)


class _Trained(Role):
    """What the trained roles share: where ``optimizer`` steps the weights, or the adapter, of ``module``."""

    module: nn.Module
    adapter: LoraAdapter | None
    optimizer: Any
    scaler: Any  # DeepSpeed's, with LOSS_SCALE_STATE in fp16
    gradient_norm = float("nan")  # of the last step that was applied since it was logged, before clipping
    _rates: Sequence[float] = ()

    def __init__(self, network: nn.Module, config: Config, worn: Worn) -> None:
        super().__init__(network, DTYPES[config.deepspeed.dtype], worn)
        self.keep_gathered = config.rollout.keep_gathered

    def whole_weights(self) -> AbstractContextManager:
        """Inside, forwards without grad find the weights gathered (``rollout.keep_gathered``); none may change them."""
        return kept_whole(self.module.parameters()) if self.keep_gathered else nullcontext()

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """What the optimizer moves, by the module's names; an adapter's as "LAYER.lora_A"."""
        if self.adapter is not None:
            return dict(self.adapter.named_parameters())
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    @property
    def lr(self) -> float:
        """The learning rate of the last step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def set_lr(self, rates: Sequence[float]) -> None:
        """The learning rates of the steps to come, in turn; the last one stays."""
        self._rates = list(rates)

    def _begin_step(self) -> None:
        if self._rates:
            rate, *self._rates = self._rates
            for group in self.optimizer.param_groups:
                group["lr"] = rate

    @property
    def loss_scale(self) -> float | None:
        """The dynamic loss scale of fp16; None in other types."""
        return float(self.scaler.cur_scale) if self.dtype == torch.float16 else None

    @property
    def loss_scale_state(self) -> dict[str, float]:
        """What a checkpoint keeps of the loss scale; {} in other types than fp16."""
        kept = LOSS_SCALE_STATE if self.dtype == torch.float16 else ()
        return {n: getattr(self.scaler, n) for n in kept if hasattr(self.scaler, n)}  # a fixed one has fewer

    @loss_scale_state.setter
    def loss_scale_state(self, state: dict[str, float]) -> None:
        for name, value in state.items():
            setattr(self.scaler, name, value)


class TrainedRole(_Trained):
    """A role with an engine behind it (``dmdr_fast.algorithm.recipe.Trained``).

    A LoRA role passes its adapter, which acts in the graded forward at ``lora_scale``.

    Raises:
        UserError: the engine steps a parameter beside the adapter, which no checkpoint would have.
    """

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        config: Config,
        adapter: LoraAdapter | None = None,
        lora_scale: float = 1.0,
    ) -> None:
        super().__init__(engine, config, {} if adapter is None else {adapter: lora_scale})
        self.engine, self.module, self.adapter, self.lora_scale = engine, engine.module, adapter, lora_scale
        self.optimizer = engine.optimizer
        kept = {id(p) for p in self.trained.values()}
        beside = [n for n, p in self.module.named_parameters() if p.requires_grad and id(p) not in kept]
        if beside:
            raise UserError(
                f"{beside[0]} is trainable beside the LoRA, and no checkpoint has it: let the family freeze it"
            )
        if self.dtype == torch.float16:  # ZeRO's optimizers have a scaler, those of stage 0 its numbers
            self.scaler = getattr(self.optimizer, "loss_scaler", None) or self.optimizer.loss_scale_config
            self.scaler.raise_error_at_min_scale = False  # train.max_skipped ends such a run, with a checkpoint
        self.scales_itself = self.dtype == torch.float16 and not isinstance(self.optimizer, ZeROOptimizer)
        self.own_clip = config.optimizer.clip if clips_itself(config) else None

    def set_batch(self, micro_batch: int, micro_steps: int) -> None:
        """The batch of this rank's steps to come, in ``micro_steps`` of ``micro_batch``: the losses' mean over them."""
        self.engine.set_train_micro_batch_size(micro_batch)
        self.engine.set_train_batch_size(micro_batch * micro_steps * self.engine.dp_world_size)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate gradients; DeepSpeed averages over micro-steps and ranks.

        A micro-batch may have several losses, so DeepSpeed, which would count calls, is told which is the last.
        """
        self.engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed divides by the loss scale at every stage and multiplies at stages 1 to 3 alone.
        self.engine.backward(loss * self.scaler.cur_scale if self.scales_itself else loss)

    def step(self) -> bool:
        """Clip and step. A non-finite gradient anywhere leaves weights and optimizer untouched on every rank.

        ZeRO's optimizers decide that from the global norm that they need for clipping. The plain fp32 engine has no
        such check: its gradients, by now the same on all ranks, are looked at here.
        """
        self._begin_step()
        if self.own_clip is None:
            scale = self.loss_scale if self.scales_itself else 1.0
            self.engine.step()
            applied, norm = self.engine.was_step_applied(), self.engine.get_global_grad_norm()
            norm = norm / scale if applied else norm
        else:
            norm = clip(self.module.parameters(), self.own_clip)
            applied = bool(torch.isfinite(norm))
            if not applied:
                self.engine.zero_grad()  # AdamW passes over parameters without a gradient
            self.engine.step()
        if applied:
            self.gradient_norm = float(norm)
        return applied


class AdapterRole(_Trained):
    """A role that is one adapter on a frozen base which other roles share (``sharing: shared_all``).

    The base may be partitioned; the adapter, fp32 and small, is whole on every rank, with an AdamW of its own. Its
    gradients are averaged over the ranks in one all-reduce per step.
    """

    def __init__(
        self, base: nn.Module, config: Config, adapter: LoraAdapter, worn: Worn, settings: AdamW, ranks: Runtime
    ) -> None:
        super().__init__(base, config, worn)
        self.module, self.adapter, self.ranks = base, adapter, ranks
        self.lora_scale = cast(float, worn[adapter])  # its own is on
        self.parameters = list(adapter.parameters())
        self.optimizer = build_optimizer(self.parameters, settings, config.optimizer.kind)
        self.micro_steps, self.clip = config.train.gradient_accumulation, config.optimizer.clip
        self.scaler = loss_scaler(config)

    def set_batch(self, micro_batch: int, micro_steps: int) -> None:
        """The same, whatever ``micro_batch`` is."""
        self.micro_steps = micro_steps

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate gradients of one loss; on the last one they are averaged over the ranks."""
        (loss * self.scaler.cur_scale / self.micro_steps).backward()
        for parameter in self.module.parameters():
            # ZeRO-3 lets a module's weights go once its input's gradient is there: before the first adapter, never.
            getattr(parameter, "ds_active_sub_modules", set()).clear()
        if last and self.ranks.world_size > 1:
            gradients = [p.grad for p in self.parameters if p.grad is not None]  # the same ones on every rank
            flat = self.ranks.mean(torch.cat([g.flatten() for g in gradients]))
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def step(self) -> bool:
        """Clip and step; a gradient that is not finite, on whichever rank, leaves everything as it was on all."""
        self._begin_step()
        if self.dtype == torch.float16:
            torch._foreach_div_([p.grad for p in self.parameters if p.grad is not None], self.scaler.cur_scale)
        norm = clip(self.parameters, self.clip)
        applied = bool(torch.isfinite(norm))
        if applied:
            self.optimizer.step()
            self.gradient_norm = float(norm)
        if self.dtype == torch.float16:
            self.scaler.update_scale(not applied)
        self.optimizer.zero_grad()
        return applied


def loss_scaler(config: Config) -> LossScalerBase:
    """What DeepSpeed's engines scale their losses by, for a role without an engine: 1 in other types than fp16."""
    fp16 = engine_config(config, trained=True)["fp16"]
    dynamic = {
        "init_scale": 2.0 ** fp16["initial_scale_power"],
        "scale_window": fp16["loss_scale_window"],
        "min_scale": fp16.get("min_loss_scale", 1.0),
        "delayed_shift": fp16["hysteresis"],
        "consecutive_hysteresis": fp16.get("consecutive_hysteresis", False),
        "raise_error_at_min_scale": False,
    }
    return CreateLossScaler(DTYPES[config.deepspeed.dtype], fp16["loss_scale"], not fp16["loss_scale"], dynamic)


def clip(parameters: Iterable[nn.Parameter], bound: float) -> Tensor:
    """Scale the gradients to norm ``bound`` where theirs is larger (0: never); returns the norm from before."""
    graded = [p for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in graded if p.grad is not None])
    if bound:
        torch.nn.utils.clip_grads_with_norm_(graded, bound, norm)
    return norm
