"""Finding, loading and calling the kernel libraries of csrc/ through their C ABI.

The argument structs of ``csrc/include/dmdr/abi.h`` hold eight-byte fields only, so a call is one
``struct.pack`` of plain numbers: 0.5 us for 40 fields, where filling a ctypes.Structure takes 2 us.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable
from pathlib import Path

import dmdr_fast

ABI_VERSION = 1
OUTER = 5

# What one field of an argument struct packs into: "q" is int64 or a pointer, "d" a double.
_PACKED = {
    "shape": "q" * (OUTER + 1),
    "tensor": "q" * (2 + OUTER),
    "pointer": "q",
    "int": "q",
    "double": "d",
}

# dmdr_qk_side, which dmdr_qk_norm_rope_args holds twice.
_QK_SIDE = (
    ("int", "heads"),
    ("tensor", "x weight out grad grad_x"),
    ("pointer", "rstd grad_weight"),
)

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
    "dmdr_gated_activation_args": (
        ("shape", "shape"),
        ("tensor", "value gate out grad grad_value grad_gate"),
        ("int", "activation"),
    ),
    "dmdr_qk_norm_rope_args": (
        ("int", "batch rows features"),
        *_QK_SIDE,
        *_QK_SIDE,
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
    "dmdr_grpo_loss_args": (
        ("int", "count"),
        ("pointer", "logprob old_logprob advantage"),
        ("double", "clip_low clip_high adv_clip"),
        ("pointer", "loss stats grad_loss grad_logprob"),
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


class NativeError(RuntimeError):
    """A kernel library refused a call."""


def library_path(stem: str) -> Path:
    """Where ``lib<stem>.so`` lies.

    An editable installation has the sources in one folder and what CMake built in another; both are on the
    package's ``__path__``.

    Raises:
        ImportError: it is in none of them; the message says how to build it.
    """
    folders = [Path(folder) / "lib" for folder in dmdr_fast.__path__]
    for folder in folders:
        path = folder / f"lib{stem}.so"
        if path.is_file():
            return path
    looked = ", ".join(str(folder) for folder in folders)
    raise ImportError(
        f"lib{stem}.so is not in {looked}. Build it with `pip install .` or, in a checkout, "
        "`cmake -S . -B build && cmake --build build` (needs a C++ compiler)"
    )


def load(stem: str) -> ctypes.CDLL:
    """The library ``lib<stem>.so``, loaded and of this ABI.

    Raises:
        ImportError: it is missing, cannot be loaded, or was built for another version of the package.
    """
    path = library_path(stem)
    try:
        library = ctypes.CDLL(os.fspath(path))
    except OSError as error:
        raise ImportError(f"{path} cannot be loaded: {error}") from error
    library.dmdr_abi_version.restype = ctypes.c_int64
    library.dmdr_error_string.restype = ctypes.c_char_p
    version = library.dmdr_abi_version()
    if version != ABI_VERSION:
        raise ImportError(
            f"{path} has ABI version {version}, this package expects {ABI_VERSION}: build it again "
            "(`pip install .`, or `cmake --build build` in a checkout)"
        )
    return library


def count(library: ctypes.CDLL, name: str, sizes: int) -> Callable[..., int]:
    """A function of the library that takes ``sizes`` int64 and returns one: the size of a workspace."""
    entry = getattr(library, name)
    entry.argtypes = (ctypes.c_int64,) * sizes
    entry.restype = ctypes.c_int64
    return entry


def layout(struct_name: str) -> struct.Struct:
    """The packed layout of an argument struct, ``size`` and ``num_threads`` included."""
    fields = "".join(_PACKED[kind] * len(names.split()) for kind, names in STRUCTS[struct_name])
    return struct.Struct("=qq" + fields)


def function(
    library: ctypes.CDLL,
    name: str,
    struct_name: str,
    num_threads: Callable[[], int],
    stream: Callable[[], int | None],
) -> Callable[..., None]:
    """``name`` of the library as ``call(*fields)``, the fields after ``num_threads`` flat and in order.

    Raises (when called):
        NativeError: the kernel returned a status other than 0.
    """
    packed = layout(struct_name)
    pack, size = packed.pack, packed.size
    entry = getattr(library, name)
    entry.argtypes = (ctypes.c_char_p, ctypes.c_void_p)
    entry.restype = ctypes.c_int
    error_string = library.dmdr_error_string

    def call(*fields: float) -> None:
        status = entry(pack(size, num_threads(), *fields), stream())
        if status != 0:
            raise NativeError(f"{name}: {error_string(status).decode()} (status {status})")

    return call
