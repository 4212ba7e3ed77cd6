"""The C ABI of the kernel libraries of csrc/: their argument structs, and filling them in.

The structs of ``csrc/include/dmdr/abi.h`` hold eight-byte fields only: any field's place is its number times eight.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dmdr_fast.backends.plans import Live
from dmdr_fast.backends.views import OUTER

VERSION = 2

# What one field of an argument struct packs into: "q" is int64 or a pointer, "d" a double.
_PACKED = {
    "shape": "q" * (OUTER + 1),
    "tensor": "q" * (2 + OUTER),
    "pointer": "q",
    "int": "q",
    "double": "d",
}

# The argument structs, field by field in the header's order after `size` and `num_threads`: kind and names.
STRUCTS: dict[str, tuple[tuple[str, str], ...]] = {
    "dmdr_renoise_args": (
        ("shape", "shape"),
        ("tensor", "x0 noise out"),
        ("pointer", "alpha sigma seed"),
        ("int", "offset"),
        ("pointer", "sample_sum"),
    ),
    "dmdr_dmd_gradient_args": (
        ("shape", "shape"),
        ("tensor", "x0 x_t pred_fake pred_real pred_real_uncond mask grad"),
        ("pointer", "sigma alpha cfg weight"),
        ("double", "cfg_scale eps factor"),
        ("int", "cfg_mode prediction normalizer eps_mode nan_policy reduction_sum scaled"),
        ("pointer", "norm loss loss_scale grad_loss workspace"),
    ),
    "dmdr_multi_lora_args": (
        ("int", "batch rows in_features rank out_features"),
        ("tensor", "x base out A B grad grad_x"),
        ("pointer", "scale low_rank grad_a grad_b workspace"),
    ),
    "dmdr_layer_norm_modulate_args": (
        ("shape", "shape"),
        ("tensor", "x shift scale y grad_y grad_x grad_shift grad_scale"),
        ("pointer", "mean rstd"),
        ("double", "eps"),
        ("int", "gather"),
        ("pointer", "workspace"),
    ),
    "dmdr_gated_residual_args": (
        ("shape", "shape"),
        ("tensor", "x h gate shift scale residual y"),
        ("tensor", "grad_residual grad_y grad_x grad_h grad_gate grad_shift grad_scale"),
        ("pointer", "mean rstd"),
        ("double", "eps"),
        ("int", "gather_gate gather"),
        ("pointer", "workspace"),
    ),
    "dmdr_rms_norm_scale_args": (
        ("shape", "shape"),
        ("tensor", "x weight scale residual y grad_y grad_x grad_weight grad_scale"),
        ("pointer", "rstd"),
        ("double", "eps"),
        ("int", "gather_weight gather"),
        ("pointer", "workspace"),
    ),
    "dmdr_gated_activation_args": (
        ("shape", "shape"),
        ("tensor", "value gate out grad grad_value grad_gate"),
        ("int", "activation"),
    ),
    "dmdr_qk_norm_rope_args": (
        ("int", "batch rows features"),
        *(
            field
            for side in "qk"
            for field in (
                ("int", f"{side}_heads"),
                ("tensor", " ".join(f"{side}_{name}" for name in ("x", "weight", "out", "grad", "grad_x"))),
                ("pointer", f"{side}_rstd {side}_grad_weight"),
            )
        ),
        ("tensor", "cos sin"),
        ("double", "eps"),
        ("int", "interleaved"),
        ("pointer", "workspace"),
    ),
    "dmdr_sde_step_args": (
        ("shape", "shape"),
        ("tensor", "x v next_sample mean grad_next grad_mean grad_x grad_v"),
        ("pointer", "sigma sigma_next seed"),
        ("int", "offset kind"),
        ("double", "eta"),
        ("pointer", "logprob std grad_logprob workspace"),
    ),
    "dmdr_preprocess_reward_args": (
        ("int", "batch channels height width out_height out_width"),
        ("tensor", "image out"),
        ("pointer", "inside mean std"),
        ("double", "low high"),
        ("int", "antialias"),
        ("pointer", "workspace"),
    ),
}


# What a field "int" is for a choice by name: its place here, as in the header's enums.
CHOICES = {
    "cfg_mode": ("standard", "offset"),
    "prediction": ("flow", "eps", "v", "x0"),
    "normalizer": ("per_sample", "global", "none"),
    "eps_mode": ("add", "clamp", "none"),
    "nan_policy": ("zero", "torch", "zero_sample", "keep"),
    "activation": ("gelu", "gelu_tanh", "silu"),
    "kind": ("flow_grpo", "dance", "cps"),
}


DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.bool: 0}


class Pointer(NamedTuple):
    """A field that each call fills in: ``source`` is a tensor, whose data it points to, or a :class:`Live` int."""

    position: int
    source: Tensor | Live
    offset: int = 0


def packed(struct_name: str, fields: dict[str, Any]) -> tuple[bytearray, list[Pointer]]:
    """The bytes of an argument struct, zero where a pointer goes and where nothing is said, and its pointers.

    Args:
        fields: by name. "shape" takes six ints, "tensor" a :class:`~dmdr_fast.backends.views.Strided` or None,
            "pointer" a tensor, None or (tensor, bytes from its start), "double" a number, "int" a number or one of
            :data:`CHOICES`. What is left out is zero.
    """
    data, pointers, fields = bytearray(16), [], dict(fields)
    for kind, names in STRUCTS[struct_name]:
        for name in names.split():
            value = fields.pop(name, None)
            position = len(data)
            data += bytes(8 * len(_PACKED[kind]))
            if value is None:
                continue
            if kind == "tensor":
                tensor, strides = value
                pointers.append(Pointer(position, tensor))
                struct.pack_into(f"={1 + len(strides)}q", data, position + 8, DTYPE_CODE[tensor.dtype], *strides)
            elif kind == "pointer":
                source, offset = value if isinstance(value, tuple) else (value, 0)
                pointers.append(Pointer(position, source, offset))
            elif kind == "shape":
                struct.pack_into("=6q", data, position, *value)
            else:
                if isinstance(value, str):
                    value = CHOICES[name].index(value)
                if isinstance(value, Live):
                    pointers.append(Pointer(position, value))
                struct.pack_into("=" + _PACKED[kind], data, position, value)
    assert not fields, f"{struct_name} has no {', '.join(fields)}"
    struct.pack_into("=q", data, 0, len(data))
    return data, pointers
