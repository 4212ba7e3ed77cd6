"""A whole DMDR update (5 fake updates, a generator update of DMD and reward) against the paper's reference structure.

Both start from the same weights and draw the same labels, noises, times and stop steps, so the gate compares the
gradients that reach the generator's optimizer. At N = 4 the stop step varies: the two updates that are timed in turn
have stop steps whose mean is exactly (N - 1) / 2.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks.gate import GateError, GateFailure, relative_error
from benchmarks.measure import Row, ratio
from benchmarks.memory import peak_bytes
from benchmarks.step_sides import FAKE_UPDATES, LATENT, REAL_SCALE, ComputePath, Eager, Fused, Size, balanced_steps
from benchmarks.timing import Run, Spread, interleave
from dmdr_fast import ops
from dmdr_fast.algorithm.dmd import DMDOptions
from dmdr_fast.algorithm.recipe import Recipe
from dmdr_fast.algorithm.rl.options import ReFLOptions, RLOptions
from dmdr_fast.algorithm.schedules import timestep_grid
from dmdr_fast.models.sit import SIT_CONFIGS

# Relative L2 difference of the generator's gradients, after five fake updates. Rounding in the networks decides it:
# the score pass has other batch sizes, and AdamW's first steps are as large for a tiny gradient as for any.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1}


def size_for(device: torch.device, small: bool) -> Size:
    """SiT-XL/2 where there is a GPU; on a CPU what a few updates of fit in a minute on two cores; or a few seconds."""
    if small:
        network = {"hidden_size": 64, "depth": 2, "num_heads": 2, "patch_size": 2}
        return Size("SiT 64x2, 2x256 tokens", network, 2, torch.float32, decoder_width=8)
    if device.type == "cuda":
        return Size("SiT-XL/2, 16x256 tokens", SIT_CONFIGS["SiT-XL/2"], 16, torch.bfloat16, decoder_width=128)
    network = {"hidden_size": 256, "depth": 6, "num_heads": 4, "patch_size": 2}
    return Size("SiT 256x6, 4x256 tokens", network, 4, torch.float32, decoder_width=32)


@pytest.mark.parametrize(("steps", "cfg_scale"), [(1, 1.0), (4, 4.0)], ids=["N=1", "N=4, CFG 4"])
def test_update(record, device, request, steps, cfg_scale):
    option = request.config.getoption
    size = size_for(device, option("bench_small"))
    path = ComputePath(option("bench_blocks"), option("bench_attention"), option("bench_graphs"))
    if path.graphs and device.type != "cuda":
        pytest.skip("CUDA graphs need a CUDA device")
    record(lambda: [measured(size, path, device, steps, cfg_scale)])


def measured(size: Size, path: ComputePath, device: torch.device, steps: int, cfg_scale: float) -> Row:
    """The row of an update of ``steps`` sampling steps, after its gate."""
    recipe = Recipe(
        grid=timestep_grid(steps),
        latent_shape=LATENT,
        cold_start_steps=0,
        generator_steps=10**9,
        fake_updates=FAKE_UPDATES,
        real_lora_scale=REAL_SCALE,
        dynamic_guidance_step=10**9,  # the scale stays where it starts
        dmd=DMDOptions(cfg_scale=cfg_scale),
        reward_weight=0.05,
        rl=RLOptions(refl=ReFLOptions(chunk=max(1, size.batch // 4))),
    )
    counters = balanced_steps(steps)
    sides: dict[str, Fused | Eager] = {
        "fused": Fused(size, recipe, device, path),
        "eager": Eager(size, recipe, device, counters),
    }
    peak, error = _first_update(sides, counters[0], size.dtype, device)
    runs = {name: _run(side, counters, device) for name, side in sides.items()}
    readings = interleave(runs, seconds=0, least=4 if device.type == "cuda" else 2)
    guided = f", CFG {cfg_scale:g}" if recipe.dmd.uses_cfg else ""
    return Row(
        op=f"dmdr_update (N={steps}{guided}{path})",
        size=size.name,
        dtype=str(size.dtype).removeprefix("torch."),
        backend=ops.explain("gelu_mul", torch.empty(2, device=device)).backend,
        what="update",
        times={name: Spread.of(reading.total) for name, reading in readings.items()},
        eager_ratio=ratio(readings["eager"].total, readings["fused"].total),
        peak=peak,
        errors={"grad of the generator": error},
        note="at N = 1 without CFG both structures make the same passes: what is gained is the memory",
    )


def _first_update(
    sides: dict[str, Fused | Eager], step: int, dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, int], GateError]:
    """The gate: one update on both sides, their generator gradients compared. Also the peak memory of each."""
    peak, gradients = {}, {}
    for name, side in sides.items():
        with _gradients(side.optimizers[0]) as gradients[name]:
            peak[name] = peak_bytes(partial(side, step), device)
    error = relative_error(*(torch.cat(gradients[name]).double() for name in ("fused", "eager")))
    if not error <= TOLERANCE[dtype]:
        raise GateFailure(
            f"dmdr_update: the generator's gradient differs from the reference structure's by {error:.2e} "
            f"(relative L2), allowed {TOLERANCE[dtype]:.0e}; nothing is timed"
        )
    return peak, GateError(error, None, TOLERANCE[dtype])


@contextmanager
def _gradients(optimizer: torch.optim.Optimizer) -> Iterator[list[Tensor]]:
    """The gradients that ``optimizer`` applies inside the block, flat, one per parameter."""
    seen: list[Tensor] = []

    def keep(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        seen.extend(p.grad.detach().flatten().clone() for p in optimizer.param_groups[0]["params"])

    handle = optimizer.register_step_pre_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def _run(side: Callable[[int], None], counters: tuple[int, int], device: torch.device) -> Run:
    def timed(index: int) -> tuple[float, float]:
        start = time.perf_counter()
        side(counters[index % 2])
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        return seconds, seconds

    return timed
