"""Which attention kernel a model runs: torch's own, or FlashAttention where it is installed and fits.

``sdpa`` is torch's scaled_dot_product_attention, which picks among its own kernels: FlashAttention 2 first on CUDA.
``cudnn`` is the same function with cuDNN's kernel first, which others measured to be faster on Hopper; we have not.
Every model calls that function or can be made to, so every model can take it.
``flash_attn`` is the flash-attn package, ``flash_attn_3`` its kernels for Hopper.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

AttentionKernel = Literal["sdpa", "cudnn", "flash_attn", "flash_attn_3"]
# What diffusers' ModelMixin.set_attention_backend calls them; the variable-length forms take the masks of padded texts.
DIFFUSERS = {"sdpa": "native", "cudnn": "native", "flash_attn": "flash", "flash_attn_3": "_flash_3"}
DIFFUSERS_MASKED = {
    "sdpa": "native",
    "cudnn": "native",
    "flash_attn": "flash_varlen",
    "flash_attn_3": "_flash_varlen_3",
}
TORCH = ("sdpa", "cudnn")  # both are torch's function
CUDNN_CAPABILITY = (9, 0)  # Hopper: before it cuDNN's kernel is no faster
PACKAGES = {"flash_attn": "flash_attn", "flash_attn_3": "flash_attn_interface"}
INSTALL = {
    "flash_attn": "pip install flash-attn --no-build-isolation",
    "flash_attn_3": "build hopper/ of github.com/Dao-AILab/flash-attention",
}
# Models of diffusers whose attention takes a mask: prompts of several lengths are padded.
MASKED = {"QwenImageTransformer2DModel", "ZImageTransformer2DModel"}


@runtime_checkable
class Switched(Protocol):
    """A layer of ours that reads its kernel here."""

    attention_kernel: AttentionKernel


@dataclass(frozen=True)
class Choice:
    """The kernel that was taken, and why: what speaks for it, or why not a faster one."""

    kernel: AttentionKernel
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.kernel} ({self.reason})" if self.reason else self.kernel


def attend(q: Tensor, k: Tensor, v: Tensor, kernel: AttentionKernel) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for q, k, v [B, T, H, D] of one dtype -> [B, T, H, D]."""
    if kernel in TORCH:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    if kernel == "flash_attn":
        from flash_attn import flash_attn_func
    else:
        from flash_attn_interface import flash_attn_func
    out = flash_attn_func(q, k, v)
    return out[0] if isinstance(out, tuple) else out  # FlashAttention 3 of 2025 returns the log-sum-exp beside it


def choose_attention(
    wanted: Literal["auto"] | AttentionKernel, model: nn.Module, *, dtype: torch.dtype, device: torch.device
) -> Choice:
    """The kernel for ``model`` computing in ``dtype`` on ``device``.

    ``auto``: the first of cudnn (from sm_90 on), flash_attn_3 and flash_attn that runs, else sdpa.

    Raises:
        ValueError: a kernel that was asked for by name cannot run; the message says why, and what to do.
    """
    if wanted == "sdpa":
        return Choice("sdpa")
    refusals = {}
    for kernel in ("cudnn", "flash_attn_3", "flash_attn") if wanted == "auto" else (wanted,):
        refusal = _refusal(kernel, model, dtype, device)
        if kernel == "cudnn" and refusal is None:
            if wanted == "cudnn" or torch.cuda.get_device_capability(device) >= CUDNN_CAPABILITY:
                return Choice("cudnn", f"first of torch's kernels on {torch.cuda.get_device_name(device)}")
            refusal = f"is fastest from Hopper on, this is {torch.cuda.get_device_name(device)}"
        if refusal is None and wanted == "auto" and _diffusers_model(model, MASKED) is not None:
            # The variable-length kernels read the longest text back to the host in every call.
            refusal = "its mask costs a wait for the device in every layer"
        if refusal is None:
            return Choice(kernel)
        refusals[kernel] = refusal
    if wanted == "auto":
        return Choice("sdpa", "; ".join(f"{kernel}: {why}" for kernel, why in refusals.items()))
    raise ValueError(f"{wanted} cannot run: {refusals[wanted]}; set memory.attention to auto or sdpa")


def set_attention(model: nn.Module, choice: Choice) -> None:
    """Let every attention of ``model`` run ``choice.kernel``: SiT's by its attribute, diffusers' by its backend.

    The order of torch's kernels, which ``cudnn`` changes, is the process's, not the model's: the other networks of a
    run, a VAE or a reward model, follow it. What cuDNN does not take goes to torch's next kernel.
    """
    if choice.kernel == "cudnn":
        first, order = SDPBackend.CUDNN_ATTENTION.value, torch._C._get_sdp_priority_order()
        torch.backends.cuda.enable_cudnn_sdp(True)
        torch._C._set_sdp_priority_order([first, *(each for each in order if each != first)])
    for module in model.modules():
        if isinstance(module, Switched):
            module.attention_kernel = choice.kernel
    backends = {processor._attention_backend for processor in _processors(model)}
    if backends - {None} or (backends and choice.kernel not in TORCH):
        names = DIFFUSERS if _diffusers_model(model, MASKED) is None else DIFFUSERS_MASKED
        _diffusers_model(model).set_attention_backend(names[choice.kernel])


@contextmanager
def torch_attention(model: nn.Module) -> Iterator[None]:
    """Inside, every attention of ``model`` runs torch's own: the one that takes fp32."""
    own: list[tuple[Any, str, str | None]] = []
    own += [(m, "attention_kernel", "sdpa") for m in model.modules() if isinstance(m, Switched)]
    own += [(processor, "_attention_backend", None) for processor in _processors(model)]
    before = [getattr(owner, name) for owner, name, _ in own]
    for owner, name, value in own:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for (owner, name, _), value in zip(own, before, strict=True):
            setattr(owner, name, value)


def _refusal(kernel: AttentionKernel, model: nn.Module, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why ``kernel`` cannot run here; None when it can."""
    if kernel != "cudnn" and not (_processors(model) or any(isinstance(m, Switched) for m in model.modules())):
        return f"{type(_diffusers_model(model) or model).__name__} calls torch's attention by name"
    if kernel != "cudnn" and importlib.util.find_spec(PACKAGES[kernel]) is None:
        return f"not installed ({INSTALL[kernel]})"
    if device.type != "cuda":
        return f"needs a CUDA device, this is {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"takes bf16 and fp16, the networks compute in {str(dtype).removeprefix('torch.')}"
    if kernel == "cudnn" and not torch.backends.cudnn.is_available():
        return "this torch was built without cuDNN"
    if kernel == "flash_attn_3" and torch.cuda.get_device_capability(device)[0] != 9:
        return f"is for Hopper, this is {torch.cuda.get_device_name(device)}"
    return None


def _processors(model: nn.Module) -> list[Any]:
    """Those whose kernel diffusers can switch; the processors of SD3 and SDXL call torch's own."""
    processors = [getattr(module, "processor", None) for module in model.modules()]
    return [processor for processor in processors if hasattr(processor, "_attention_backend")]


def _diffusers_model(model: nn.Module, names: Container[str] | None = None) -> Any:
    """The diffusers model that ``model`` is or holds, where its class is one of ``names``."""
    held = (m for m in model.modules() if hasattr(m, "set_attention_backend"))
    return next((m for m in held if names is None or type(m).__name__ in names), None)
