"""The compute path of every network of a run, applied in one place, once, before ``deepspeed.initialize``.

Attention kernel, fused layers, recomputation, compiled blocks, ZeRO-3 leaf modules, in this order: a fused layer is
what is compiled, and DeepSpeed's hooks lie outside the compiled block.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dmdr_fast.config import Config
from dmdr_fast.engine.engines import DTYPES
from dmdr_fast.errors import UserError
from dmdr_fast.models.attention import Choice, choose_attention, set_attention
from dmdr_fast.models.blocks import kind, repeated_blocks
from dmdr_fast.models.families import BACKBONES
from dmdr_fast.models.recompute import set_recompute
from dmdr_fast.patch import patch

Blocks = Literal["eager", "fused", "compiled"]
BACKEND = "inductor"
# Graphs of one forward: kinds of blocks x networks x with and without grad x LoRA scales x batch sizes. An SDXL has 15
# kinds of blocks under two classes, and torch's own limit of 8 is reached by a small SD3.
GRAPHS = 256
# The smallest width of benchmarks/results whose update is faster with fused layers, by 2 to 6 %; networks of a few
# dozen channels are slower with any op of ours.
CPU_FUSED_WIDTH = 256
# Their rotary tables are complex, which the compiler leaves to eager kernels; the fused op reads them as real.
COMPLEX_ROTATION = {"qwen_image", "z_image"}
_UNCOMPILED = ContextVar("uncompiled", default=False)


@dataclass(frozen=True)
class ComputePath:
    """What one network took: attention, how its blocks run and why, how many blocks of how many kinds, fused layers."""

    attention: Choice
    blocks: Blocks
    reason: str
    count: int
    kinds: int
    fused: int
    sizes: int = 1

    def __str__(self) -> str:
        layers = f", {self.fused} fused layers" if self.fused else ""
        kinds = f" of {self.kinds} kind{'s' * (self.kinds > 1)}" if self.blocks == "compiled" else ""
        kinds += f", compiled anew for each of {self.sizes} sizes" if kinds and self.sizes > 1 else ""
        reason = f" ({self.reason})" if self.reason else ""
        return f"{self.blocks}{reason}, {self.count} blocks{kinds}{layers}"


def apply(network: nn.Module, config: Config, device: torch.device) -> ComputePath:
    """Give ``network``, whole or partitioned, adapters and 8-bit weights included, its compute path on ``device``.

    Raises:
        UserError: an attention kernel or fused layers that were asked for by name cannot be.
    """
    attention = _apply_attention(network, config, device)
    blocks = repeated_blocks(network)
    taken, reason = choose_blocks(config, blocks[0], device)
    fused = 0
    if taken == "fused" or (taken == "compiled" and config.model.family in COMPLEX_ROTATION):
        fused = _fuse(network)
    compiled = taken == "compiled"
    # A block's own graph hides its operations from `selective`; the compiler's partitioner does the same by itself: it
    # keeps matrix products and attentions and recomputes what is pointwise.
    own = compiled and config.memory.activation == "selective"
    set_recompute(network, "none" if own else config.memory.activation)
    if compiled:
        compile_blocks(blocks, len(config.model.sizes))
    if config.deepspeed.stage == 3:
        gather_as_one(blocks)
    kinds, sizes = len({kind(block) for block in blocks}), len(config.model.sizes)
    return ComputePath(attention, taken, reason, len(blocks), kinds, fused, sizes)


def lines(paths: Mapping[str, ComputePath]) -> list[str]:
    """What the networks took, for the start-up: one line where they took the same."""

    def told(title: str, words: Mapping[str, str]) -> str:
        different = len(set(words.values())) > 1
        each = "; ".join(f"{name} {word}" for name, word in words.items())
        return f"{title:<11}{each if different else next(iter(words.values()))}"

    return [
        told("attention", {name: str(path.attention) for name, path in paths.items()}),
        told("blocks", {name: str(path) for name, path in paths.items()}),
    ]


def choose_blocks(config: Config, block: nn.Module, device: torch.device) -> tuple[Blocks, str]:
    """How the blocks of a network run, and why where ``compute.blocks`` is auto."""
    wanted = config.compute.blocks
    if wanted != "auto":
        return wanted, ""
    if device.type == "cuda":
        return "compiled", "auto on CUDA"
    width = next(module.in_features for module in block.modules() if isinstance(module, nn.Linear))
    if width < CPU_FUSED_WIDTH or not BACKBONES[config.model.family].fused:
        return "eager", f"auto on a CPU at width {width}"
    return "fused", f"auto on a CPU at width {width}"


def compile_blocks(blocks: list[nn.Module], sizes: int = 1) -> None:
    """Compile the forward of every block on its own: a whole graph, static shapes; blocks of a kind share it.

    Images of ``sizes`` sizes are as many graphs. Hooks stay outside: ZeRO-3 gathers before the graph is entered.
    """
    limits, graphs = torch._dynamo.config, GRAPHS * sizes
    limits.recompile_limit = max(graphs, limits.recompile_limit)
    limits.accumulated_recompile_limit = max(4 * graphs, limits.accumulated_recompile_limit)
    # A saved view of a weight would keep it gathered, past ZeRO-3's release, until the backward pass.
    torch._functorch.config.recompute_views = True
    for block in blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False, backend=BACKEND)


def compiled_graphs() -> int:
    """Graphs that were compiled in this process so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@contextmanager
def uncompiled() -> Iterator[None]:
    """Inside, networks run as written: for batches of other sizes, which are not worth a graph each."""
    token = _UNCOMPILED.set(True)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        _UNCOMPILED.reset(token)


def is_uncompiled() -> bool:
    """Whether this is inside :func:`uncompiled`."""
    return _UNCOMPILED.get()


def gather_as_one(blocks: list[nn.Module]) -> None:
    """Let ZeRO-3 gather, release and reduce each block as one (a leaf module), before ``deepspeed.initialize``.

    Its hooks see positional inputs alone, and reduce a leaf's gradients when those of its inputs are there: so inputs
    become positional, and the first of them requires grad where none does and a weight of the block trains.
    """
    from deepspeed.utils import set_z3_leaf_module

    for block in blocks:
        set_z3_leaf_module(block, True)
        names = list(inspect.signature(type(block).forward).parameters)[1:]
        block.register_forward_pre_hook(_InputsForZero3(names), with_kwargs=True)


class _InputsForZero3:
    """A forward pre-hook; see :func:`gather_as_one`."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def __call__(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        given, kwargs = list(args), dict(kwargs)
        for name in self.names[len(given) :]:
            if name not in kwargs:
                break
            given.append(kwargs.pop(name))
        tensors = [i for i, value in enumerate(given) if isinstance(value, Tensor)]
        if torch.is_grad_enabled() and not any(given[i].requires_grad for i in tensors):
            first = next(i for i in tensors if given[i].is_floating_point())
            if any(p.requires_grad for p in block.parameters()):
                given[first] = given[first].detach().requires_grad_()
        return tuple(given), kwargs


def _apply_attention(network: nn.Module, config: Config, device: torch.device) -> Choice:
    try:
        choice = choose_attention(config.memory.attention, network, dtype=DTYPES[config.deepspeed.dtype], device=device)
    except ValueError as error:
        raise UserError(f"memory.attention: {error}") from None
    set_attention(network, choice)
    return choice


def _fuse(network: nn.Module) -> int:
    """Replace layers by fused ones; returns how many."""
    try:
        return len(patch(network).replaced)
    except ValueError as error:
        raise UserError(f"compute.blocks: {error}; set it to compiled or eager") from None
