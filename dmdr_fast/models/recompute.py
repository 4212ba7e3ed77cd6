"""Which activations of a graded forward are kept for the backward pass, block by block.

==========  =============================================  ==========================
mode        kept per block                                 run again in the backward
==========  =============================================  ==========================
none        everything that autograd saves                 nothing
selective   outputs of attentions and matrix products      norms, activations, adapters
full        the block's inputs                             the block
offload     the same, in (pinned) host memory              the block
==========  =============================================  ==========================

The model says where its blocks are: it calls ``func(block, *inputs)`` given to ``enable_gradient_checkpointing``,
which every diffusers transformer, UNet and VAE has, and SiT too. Blocks are entered through ``__call__``, so ZeRO-3
gathers and releases their parameters in the recomputation as in the forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dmdr_fast.models.lora import recompute_contexts

Recompute = Literal["none", "selective", "full", "offload"]
MODES = ("none", "selective", "full", "offload")

# Operations whose outputs `selective` keeps: nearly all of a block's FLOPs, about half of its activations. Names, not
# the operations themselves: those of flash-attn exist only where it is installed.
MATRIX_PRODUCTS = {"aten::mm", "aten::addmm", "aten::convolution", "aten::_scaled_mm"}
ATTENTIONS = {
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "flash_attn::_flash_attn_forward",
    "flash_attn::_flash_attn_varlen_forward",
    "flash_attn_3::_flash_attn_forward",
    "flash_attn_3::fwd",
    "_diffusers_flash_attn_3::_flash_attn_forward",
}
BATCHED_PRODUCTS = {"aten::bmm", "aten::baddbmm"}
VIEWS = {"aten::view", "aten::_unsafe_view"}


def set_recompute(model: nn.Module, mode: Recompute) -> None:
    """Let ``model`` keep what ``mode`` says in its graded forwards from now on; others are not touched.

    Gradients are the same in every mode, those of LoRA adapters too (``dmdr_fast.models.lora``): the recomputation
    uses the scales of its forward. Call it before or after ``add_lora`` and ``patch``, on the module that the adapters
    are added to: it may be the model with the blocks, or one around it. torch.compile traces none, selective and full
    in one graph; offload breaks it at every block.

    Raises:
        ValueError: an unknown mode, or a model that does not say where its blocks are.
    """
    if mode not in MODES:
        raise ValueError(f"set_recompute: mode must be one of {', '.join(MODES)}, got {mode!r}")
    owner: Any = next((m for m in model.modules() if getattr(m, "_supports_gradient_checkpointing", False)), None)
    if owner is None:
        raise ValueError(
            f"set_recompute: {type(model).__name__} has no blocks to recompute: expected a model with "
            "enable_gradient_checkpointing, as in diffusers; set memory.activation to none for this one"
        )
    if mode == "none":
        owner.disable_gradient_checkpointing()
    else:
        owner.enable_gradient_checkpointing(partial(_run_block, model, mode))


def _run_block(model: nn.Module, mode: Recompute, block: nn.Module, *inputs: Any) -> Any:
    """``block(*inputs)``, saving what ``mode`` says. Non-reentrant: inputs need no gradient, weights alone may."""
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # the models have no dropout
    if torch.compiler.is_compiling():
        # torch.compile traces the recomputation with the scales of the forward, and takes no contexts but its own.
        if mode == "selective":
            options["context_fn"] = _kept_products
    else:
        options["context_fn"] = partial(_selective_contexts if mode == "selective" else recompute_contexts, model)
    with _inputs_on_the_host(inputs) if mode == "offload" else nullcontext():
        return checkpoint(block.__call__, *inputs, **options)


class _Policy:
    """What `selective` keeps of one run of a block (``create_selective_checkpoint_contexts``).

    DeepSpeed's ZeRO-3 replaces torch's linear by one that adds the bias to the product in place. The kept product is
    then the sum, so the addition that follows a product counts as kept too and is not done again.
    """

    def __init__(self) -> None:
        self.after_product = False

    def __call__(self, context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = operation._schema.name if hasattr(operation, "_schema") else ""
        keeps = name in MATRIX_PRODUCTS or name in ATTENTIONS or (name in BATCHED_PRODUCTS and _shrinks(*args[-2:]))
        adds_bias = name == "aten::add_" and self.after_product
        self.after_product = keeps or (self.after_product and name in VIEWS)
        return CheckpointPolicy.MUST_SAVE if keeps or adds_bias else CheckpointPolicy.PREFER_RECOMPUTE


def _storage(value: Any) -> int | None:
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def _shrinks(left: Tensor, right: Tensor) -> bool:
    """Whether a batched product is no larger than its factors: attention logits [T, T], written out, are."""
    rows, inner, columns = *left.shape[1:], right.shape[2]
    return rows * columns <= inner * (rows + columns)


def _kept_products() -> tuple[AbstractContextManager, AbstractContextManager]:
    in_place_bias = getattr(torch.nn.functional.linear, "__module__", "").startswith("deepspeed.")
    return create_selective_checkpoint_contexts(_Policy(), allow_cache_entry_mutation=in_place_bias)


def _selective_contexts(model: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """The recomputation finds the kept outputs, and uses the adapters' scales of the forward."""
    keep, find = _kept_products()
    return keep, _Both(recompute_contexts(model)[1], find)


class _Both(AbstractContextManager):
    """``outer``, then ``inner`` in it. Unlike an ExitStack it may be entered again, by another backward pass."""

    def __init__(self, outer: AbstractContextManager, inner: AbstractContextManager) -> None:
        self.outer, self.inner = outer, inner

    def __enter__(self) -> None:
        self.outer.__enter__()
        self.inner.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.inner.__exit__(*error)
        self.outer.__exit__(*error)


@contextmanager
def _inputs_on_the_host(inputs: tuple) -> Iterator[None]:
    """Tensors among ``inputs`` that ``checkpoint`` saves wait for the backward pass in host memory.

    Those without gradient stay where they are: rotary tables and masks are one tensor for all blocks. The copies run
    on the compute stream: at 25 GB/s a block of SD3.5-Large at 1024 px waits 1 ms for 20 MB per sample and computes
    for about 14.
    """
    shared = {_storage(t) for t in inputs if isinstance(t, Tensor) and not t.requires_grad}

    def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
        if tensor.device.type == "cpu" or _storage(tensor) in shared:
            return tensor.device, tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return tensor.device, host.copy_(tensor, non_blocking=True)

    def unpack(packed: tuple[torch.device, Tensor]) -> Tensor:
        device, tensor = packed
        return tensor.to(device, non_blocking=True)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
