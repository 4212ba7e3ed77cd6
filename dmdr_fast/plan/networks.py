"""The networks of a workload on the meta device, called as the algorithm calls them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dmdr_fast.errors import UserError
from dmdr_fast.models.eight_bit import quantise_blocks
from dmdr_fast.models.lora import LoraAdapter, add_lora
from dmdr_fast.patch import patch
from dmdr_fast.plan.shapes import Shape
from dmdr_fast.plan.workload import Adapter, Workload

META = torch.device("meta")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def latent_shape(shape: Shape, resolution: int | tuple[int, int]) -> tuple[int, int, int]:
    """(channels, height, width) of the latent of an image: a square's side, or its height and width.

    Raises:
        UserError: a size that the family cannot make.
    """
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    try:
        return shape.opened().latent_shape(height, width)
    except ValueError as error:
        raise UserError(f"model.resolution: {error}") from None


def as_network(shape: Shape, model: nn.Module, dtype: torch.dtype) -> Callable[[Tensor, Tensor, Any], Tensor]:
    """The role as the engine wraps it: fp32 latents in and out, the compute dtype in between."""
    family = shape.opened()
    return lambda x, t, c: family.forward(model, x.to(dtype), t, c).float()


@dataclass(frozen=True)
class Roles:
    """The meta networks of a workload; those that share a base are the same module.

    ``adapters`` has the LoRA of "generator" and "fake" where the role is one.
    """

    generator: nn.Module
    fake: nn.Module
    teacher: nn.Module
    adapters: dict[str, LoraAdapter]

    def wear(self, **scales: float | Tensor) -> None:
        """Turn on the named roles' adapters, at these scales, and the others off."""
        for role, adapter in self.adapters.items():
            adapter.set_scale(scales.get(role))

    def trained(self, role: str) -> list[nn.Parameter]:
        """The parameters that the role trains."""
        if role in self.adapters:
            return list(self.adapters[role].parameters())
        return [p for p in getattr(self, role).parameters() if p.requires_grad]


def build(work: Workload, prepare: Callable[[Shape, nn.Module], None] = lambda shape, model: None) -> Roles:
    """The three roles' networks with the sharing of ``work``.

    ``prepare`` is called once for every network, with its shape.
    """
    dtype, adapters = DTYPES[work.dtype], {}

    def network(*, score_base: bool = False, shape: Shape = work.shape, **roles: Adapter | None) -> nn.Module:
        model = nn.Module.to(shape.build(), dtype)  # diffusers' own warns about names that fp32 keeps
        if score_base and work.frozen != "native":
            quantise_blocks(model.requires_grad_(False), "int8")  # float8 takes as much, and torchao to make it
        if work.blocks == "fused":
            patch(model)
        prepare(shape, model)
        # Under shared_all adapters are fp32 and no part of the engine, as dmdr_fast.engine.networks has it.
        whole = work.sharing == "shared_all"
        with META:
            for role, lora in roles.items():
                if lora is not None:
                    adapters[role] = add_lora(
                        model, role, rank=lora.rank, targets=lora.targets, form=lora.form,
                        dtype=torch.float32 if whole else dtype, registered=not whole,
                    )  # fmt: skip
        return model

    if work.sharing == "shared_all":
        base = network(score_base=True, generator=work.student_lora, fake=work.fake_lora)
        return Roles(base, base, base, adapters)
    generator = network(shape=work.shape_of("generator"), generator=work.student_lora)
    if work.sharing == "shared_score":
        base = network(score_base=True, fake=work.fake_lora)
        return Roles(generator, base, base, adapters)
    return Roles(generator, network(fake=work.fake_lora), network(score_base=True).requires_grad_(False), adapters)
