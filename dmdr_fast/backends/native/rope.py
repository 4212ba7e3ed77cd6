"""RMS norm and rotary embedding of queries and keys on the kernels of csrc/."""

from __future__ import annotations

from typing import Any

from dmdr_fast.backends.native.abi import struct_of
from dmdr_fast.backends.native.library import Calls, Library, implements
from dmdr_fast.backends.views import strided, table

_STRUCT = struct_of(
    "dmdr_qk_norm_rope_args",
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
)
_MOST_FEATURES = 1024  # DMDR_ROPE_FEATURES


def _refuses_bwd(library: Library, a) -> str | None:
    wide = (width := a.q.shape[3]) > _MOST_FEATURES
    return f"its backward takes heads of at most {_MOST_FEATURES} features, got {width}" if wide else None


@implements("qk_norm_rope_fwd")
def qk_norm_rope_fwd(run: Calls, a, out) -> None:
    _call(run, "qk_norm_rope_fwd", a, out, {"q_x": a.q, "k_x": a.k})


@implements("qk_norm_rope_bwd", refuses=_refuses_bwd)
def qk_norm_rope_bwd(run: Calls, a, out) -> None:
    sides = {
        "q_x": a.q, "q_grad": a.grad_q_out, "q_grad_x": out.grad_q, "q_grad_weight": out.grad_q_weight,
        "k_x": a.k, "k_grad": a.grad_k_out, "k_grad_x": out.grad_k, "k_grad_weight": out.grad_k_weight,
        "workspace": run.workspace("qk_norm_rope", *a.q.shape[:2], a.q.shape[3]),
    }  # fmt: skip
    _call(run, "qk_norm_rope_bwd", a, out, sides)


def _call(run: Calls, name: str, a, out, sides: dict[str, Any]) -> None:
    batch, rows, heads, features = a.q.shape
    fields = run.fields(
        _STRUCT, a, out, strided, batch=batch, rows=rows, features=features, q_heads=heads, k_heads=a.k.shape[2],
        cos=table(a.cos), sin=table(a.sin), **sides,
    )  # fmt: skip
    run.call(name, _STRUCT, fields)
