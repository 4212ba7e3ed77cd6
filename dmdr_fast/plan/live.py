"""Bytes of meta tensors that live at once, below the dispatcher: what an allocator would have to hold."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Key = tuple[str, str]  # (phase of the update, part of the network)


class LiveBytes(TorchDispatchMode):
    """Counts the meta storages that operations make inside the block while they live.

    ``peaks[phase, part]`` is the most at once while ``phase`` and ``part`` were set, in two kinds: gradients of
    parameters, and the rest. Host tensors are not counted: what is copied there from a meta tensor has left the GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase, self.part = "", ""
        self.live = {"activations": 0, "gradients": 0}
        self.kinds: dict[int, str] = {}
        self.peaks: dict[Key, dict[str, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default and args[1].is_meta and not args[0].is_meta:
            return args[0]
        out = func(*args, **(kwargs or {}))
        if not _aliases(func):
            for tensor in (out,) if isinstance(out, Tensor) else tree_leaves(out):
                if isinstance(tensor, Tensor) and tensor.is_meta:
                    storage = tensor.untyped_storage()
                    if storage._cdata not in self.kinds:
                        self._count(storage)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.kinds[key] = "activations"
        self.live["activations"] += size
        weakref.finalize(storage, self._free, key, size)
        now = (self.phase, self.part)
        if now not in self.peaks or sum(self.live.values()) > sum(self.peaks[now].values()):
            self.peaks[now] = dict(self.live)

    def _free(self, key: int, size: int) -> None:
        self.live[self.kinds.pop(key)] -= size

    def keep_gradient(self, parameter: Tensor) -> None:
        """``parameter.grad`` has just been made or added to: its bytes are a gradient's."""
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        if self.kinds.get(storage._cdata) == "activations":
            self.kinds[storage._cdata] = "gradients"
            self.live["activations"] -= storage.nbytes()
            self.live["gradients"] += storage.nbytes()


@cache
def _aliases(func) -> bool:
    """Whether the operation returns views of its arguments, or the arguments themselves."""
    return any(value.alias_info is not None for value in func._schema.returns)


@contextmanager
def no_collector() -> Iterator[None]:
    """Python's cycle collector is off: what only it would free counts as alive, and the peak is the same every time."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def linear_layers(own: bool) -> Iterator[None]:
    """Linear layers are DeepSpeed's ``own``, or torch's, whatever ran in this process before.

    ZeRO-3 puts its linear in the place of ``torch.nn.functional.linear`` for good, for every network of the process: a
    product, then the bias added in place. Its backward pass holds one activation more at once.
    """
    now = functional.linear
    functional.linear = _deepspeed_linear() if own else torch._C._nn.linear
    try:
        yield
    finally:
        functional.linear = now


def _deepspeed_linear() -> Callable[..., Tensor]:
    logging.disable(logging.WARNING)  # on a machine without a GPU it says so
    try:
        from deepspeed.runtime.zero.linear import zero3_linear_wrap  # a second to import
    finally:
        logging.disable(logging.NOTSET)
    return zero3_linear_wrap


@contextmanager
def flash_attention() -> Iterator[None]:
    """Attention keeps what the fused kernels keep: on meta tensors torch would write the [T, T] matrix out."""
    plain = functional.scaled_dot_product_attention

    def fused(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if not query.is_meta:
            return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if attn_mask is not None:
            bias = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
            return torch.ops.aten._scaled_dot_product_efficient_attention(
                query, key, value, bias, query.requires_grad, scale=scale
            )[0]
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)[0]

    functional.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = plain
