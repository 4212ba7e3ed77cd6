"""RMS norms with a scale, and the gated residual of one, on the Triton kernels."""

from __future__ import annotations

from dmdr_fast.backends.rows import Grouped
from dmdr_fast.backends.triton.launch import Launches, implements
from dmdr_fast.backends.triton.modulation import Gradient, finish, norm_forward, refuses, row_tile, rows, spread
from dmdr_fast.kernels.gated_residual_rms_norm import gated_residual_rms_norm_kernel
from dmdr_fast.kernels.rms_norm_scale import rms_norm_scale_bwd_kernel, rms_norm_scale_kernel

norm_forward("rms_norm_scale_fwd", rms_norm_scale_kernel, "x weight scale")
norm_forward("gated_residual_rms_norm_fwd", gated_residual_rms_norm_kernel, "x h weight gate")


@implements("rms_norm_scale_bwd", refuses=refuses("x", "scale"))
def rms_norm_scale_bwd(run: Launches, a, out) -> None:
    g = Grouped(run, a.x, a.scale)
    # A weight is a scale that all samples and tokens share.
    grad_weight, grad_scale = Gradient(g, a.weight, out.grad_weight), Gradient(g, a.scale, out.grad_scale)
    chunks, chunk = spread(run, g, 512, grad_weight, grad_scale)
    run.launch(
        rms_norm_scale_bwd_kernel, (g.groups * chunks,), rows(g.rows(a.grad_y)), rows(g.rows(a.x)),
        rows(g.vectors(a.weight)), rows(g.vectors(a.scale)), a.rstd.contiguous(), out.grad_x,
        grad_weight.target, grad_scale.target, g.tokens, chunks, chunk, PER_TOKEN=grad_scale.per_token,
        **row_tile(g.width, 32),
    )  # fmt: skip
    finish(run, grad_weight, grad_scale)
