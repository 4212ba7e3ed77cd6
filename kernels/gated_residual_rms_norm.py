"""y = x + gate (h rstd weight) with rstd = 1 / sqrt(mean h^2 + eps). One program holds a row.

y's gradient is x's. Those of h, weight and gate are what ``rms_norm_scale_bwd_kernel`` makes of it, with gate as scale.
"""

import triton
import triton.language as tl

from dmdr_fast.kernels.rows import load_row, plus, rms_rstd, scaled, store_row, times_rows


@triton.jit
def gated_residual_rms_norm_kernel(x, h, weight, gate, y, rstd, tokens, eps, ROW: tl.constexpr):
    """One program per row; weight or gate may be None."""
    row = tl.program_id(0)
    batch, token = row // tokens, row % tokens
    value = load_row(h, batch, token, ROW)
    row_rstd = rms_rstd(value, eps, ROW)
    update = times_rows(scaled(value, row_rstd), weight, batch, token, ROW)
    update = times_rows(update, gate, batch, token, ROW)
    result = plus(load_row(x, batch, token, ROW), update)
    store_row(y + row.to(tl.int64) * ROW.width, result, ROW)
    tl.store(rstd + row, row_rstd)
