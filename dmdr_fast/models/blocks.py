"""The repeated blocks of a network: the units that are recomputed, compiled, and gathered under ZeRO-3."""

from __future__ import annotations

from typing import Any

from torch import nn

from dmdr_fast.models.families import Denoiser
from dmdr_fast.models.partitioned import whole_shape
from dmdr_fast.models.sit import SiT


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """Every repeated block of a SiT or of a family's ``Denoiser``, in the model's order."""
    if isinstance(network, Denoiser):
        return [block for _, block in network.family.blocks(network.transformer)]
    assert isinstance(network, SiT)
    return list(network.blocks)


def kind(block: nn.Module) -> tuple[Any, ...]:
    """Equal for two blocks that one compilation serves: the same classes, parameters and adapters, by name."""
    return tuple(
        (name, type(module), *(getattr(module, "adapters", ()))) for name, module in block.named_modules()
    ) + tuple((name, whole_shape(p), p.dtype, p.requires_grad) for name, p in block.named_parameters())


def elements(block: nn.Module) -> int:
    """Elements of the parameters of a block, whether they are partitioned or not."""
    return sum(whole_shape(p).numel() for p in block.parameters())


def largest_block(network: nn.Module) -> int:
    """Elements of the largest repeated block."""
    return max(elements(block) for block in repeated_blocks(network))


def gathers(network: nn.Module, leaves: list[nn.Module], persistent: int) -> int:
    """All-gathers of one pass over a partitioned network that gathers each of ``leaves`` as one.

    What else has parameters of its own is gathered by itself; parameters of at most ``persistent`` elements are never
    let go. A collective has one dtype.
    """
    inside = {id(module) for leaf in leaves for module in leaf.modules()}
    units = [list(leaf.parameters()) for leaf in leaves]
    units += [list(m.parameters(recurse=False)) for m in network.modules() if id(m) not in inside]
    return sum(len({p.dtype for p in unit if whole_shape(p).numel() > persistent}) for unit in units)
