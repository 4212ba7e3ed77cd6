"""A whole DMDR update (5 fake updates, a generator update of DMD and reward) against the paper's reference structure.

Both start from the same weights and draw the same labels, noises, times and stop steps, so the gate compares the
gradients that reach the generator's optimizer. At N = 4 the stop step varies: the two updates that are timed in turn
have stop steps whose mean is exactly (N - 1) / 2. What a machine cannot run is skipped with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks.gate import GateError, GateFailure, relative_error
from benchmarks.measure import Row, ratio
from benchmarks.memory import peak_bytes
from benchmarks.step_sides import FAKE_UPDATES, LATENT, REAL_SCALE, ComputePath, Eager, Fused, Size, balanced_steps
from benchmarks.timing import Run, Spread, interleave, wall
from dmdr_fast import ops
from dmdr_fast.algorithm.dmd import DMDOptions
from dmdr_fast.algorithm.recipe import Recipe
from dmdr_fast.algorithm.rl.refl import ReFL
from dmdr_fast.algorithm.schedules import timestep_grid
from dmdr_fast.models.eight_bit import float8_refusal
from dmdr_fast.models.sit import SIT_CONFIGS

# Relative L2 difference of the generator's gradients, after five fake updates. Rounding in the networks decides it:
# the score pass has other batch sizes, and AdamW's first steps are as large for a tiny gradient as for any.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1}
FLOAT8_TOLERANCE = 0.5  # the scores' weights and activations have 3 bits then, the reference's do not
LONG = 10.0  # seconds: in an update that takes longer a warm-up does not show, and the gate's is a reading too

UPDATES = pytest.mark.parametrize(("steps", "cfg_scale"), [(1, 1.0), (4, 4.0)], ids=["N=1", "N=4, CFG 4"])


def size_for(device: torch.device, small: bool, batch: int = 16) -> Size:
    """SiT-XL/2 where there is a GPU; on a CPU what a few updates of fit in a minute on two cores; or a few seconds."""
    if small:
        network = {"hidden_size": 64, "depth": 2, "num_heads": 2, "patch_size": 2}
        return Size("SiT 64x2, 2x256 tokens", network, 2, torch.float32, decoder_width=8)
    if device.type == "cuda":
        return Size(f"SiT-XL/2, {batch}x256 tokens", SIT_CONFIGS["SiT-XL/2"], batch, torch.bfloat16, decoder_width=128)
    network = {"hidden_size": 256, "depth": 6, "num_heads": 4, "patch_size": 2}
    return Size("SiT 256x6, 4x256 tokens", network, 4, torch.float32, decoder_width=32)


@UPDATES
@pytest.mark.parametrize("batch", [16, 64], ids="micro-batch {}".format)
@pytest.mark.parametrize("blocks", ["eager", "fused", "compiled"])
def test_update(record, device, request, steps, cfg_scale, batch, blocks):
    option = request.config.getoption
    path = ComputePath(blocks, option("bench_attention"), option("bench_graphs"))
    if batch > 16 and device.type == "cpu":
        pytest.skip(f"a micro-batch of {batch} needs a GPU")
    if path.graphs and device.type != "cuda":
        pytest.skip("CUDA graphs need a CUDA device")
    if blocks == "compiled":
        pytest.importorskip("pydantic")
    size = size_for(device, option("bench_small"), batch)
    record(lambda: [measured(size, path, device, steps, cfg_scale)])


@UPDATES
def test_everything_on(record, device, steps, cfg_scale):
    if device.type == "cpu":
        pytest.skip("cuDNN's attention, float8 products and fp16 scores need a GPU")
    pytest.importorskip("pydantic")
    refusal = float8_refusal(device)
    path = ComputePath("compiled", "cudnn", float8=refusal is None, scores=torch.float16)
    missing = "" if refusal is None else f"everything on, but no float8: it {refusal}"
    size = size_for(device, small=False)
    record(lambda: [measured(size, path, device, steps, cfg_scale, reuse=FAKE_UPDATES, missing=missing)])


@UPDATES
@pytest.mark.parametrize("reuse", [1, FAKE_UPDATES], ids="reuse {}".format)
def test_update_of_sit_b_on_a_cpu(record, device, request, steps, cfg_scale, reuse):
    """With the blocks that ``compute.blocks: auto`` takes there."""
    if not request.config.getoption("bench_large"):
        pytest.skip("takes minutes: ask for it with --bench-large")
    if device.type != "cpu":
        pytest.skip("there is a GPU")
    size = Size("SiT-B/2, 4x256 tokens", SIT_CONFIGS["SiT-B/2"], 4, torch.float32, decoder_width=32)
    record(lambda: [measured(size, ComputePath("fused"), device, steps, cfg_scale, reuse=reuse)])


def measured(
    size: Size,
    path: ComputePath,
    device: torch.device,
    steps: int,
    cfg_scale: float,
    *,
    reuse: int = 1,
    missing: str = "",
) -> Row:
    """The row of an update of ``steps`` sampling steps, ``reuse`` fake updates to a rollout, after its gate."""
    recipe = Recipe(
        grid=timestep_grid(steps),
        latent_shape=LATENT,
        cold_start_steps=0,
        generator_steps=10**9,
        fake_updates=FAKE_UPDATES,
        rollout_reuse=reuse,
        real_lora_scale=REAL_SCALE,
        dynamic_guidance_step=10**9,  # the scale stays where it starts
        dmd=DMDOptions(cfg_scale=cfg_scale),
        reward_weight=0.05,
        method=ReFL(chunk=max(1, size.batch // 4)),
    )
    counters = balanced_steps(steps, reuse)
    sides: dict[str, Fused | Eager] = {
        "fused": Fused(size, recipe, device, path),
        "eager": Eager(size, recipe, device, counters),
    }
    tolerance = FLOAT8_TOLERANCE if path.float8 else TOLERANCE[size.dtype]
    peak, error, first = _first_update(sides, counters[0], tolerance, device)
    runs = {name: wall(partial(_update, side, counters), device) for name, side in sides.items()}
    if min(first.values()) > LONG:
        readings = interleave(runs, seconds=0, least=1)
        times = {name: [first[name], *reading.total] for name, reading in readings.items()}
    else:
        readings = interleave(runs, seconds=0, least=4 if device.type == "cuda" else 2)
        times = {name: reading.total for name, reading in readings.items()}
    guided = f", CFG {cfg_scale:g}" if recipe.dmd.uses_cfg else ""
    reused = f", rollout reuse {reuse}" if reuse > 1 else ""
    return Row(
        op=f"dmdr_update (N={steps}{guided}{path}{reused})",
        size=size.name,
        dtype=str(size.dtype).removeprefix("torch."),
        backend=ops.explain("gelu_mul", torch.empty(2, device=device)).backend,
        what="update",
        times={name: Spread.of(seconds) for name, seconds in times.items()},
        eager_ratio=ratio(times["eager"], times["fused"]),
        peak=peak,
        errors={"grad of the generator": error},
        missing=missing,
        note="at N = 1 without CFG both structures make the same passes: what is gained is the memory",
    )


def _update(side: Fused | Eager, counters: Sequence[int], index: int) -> None:
    side(counters[(index + 1) % 2])


def _timed(run: Run, step: int, seconds: dict[str, float], name: str) -> None:
    seconds[name] = run(step)[1]


def _first_update(
    sides: dict[str, Fused | Eager], step: int, tolerance: float, device: torch.device
) -> tuple[dict[str, int], GateError, dict[str, float]]:
    """The gate: one update on both sides, their generator gradients compared. Also each one's peak memory, seconds."""
    peak, gradients = {}, {}
    seconds: dict[str, float] = {}
    for name, side in sides.items():
        run = wall(side, device)
        with _gradients(side.optimizers[0]) as gradients[name]:
            peak[name] = peak_bytes(partial(_timed, run, step, seconds, name), device)
    error = relative_error(*(torch.cat(gradients[name]).double() for name in ("fused", "eager")))
    if not error <= tolerance:
        raise GateFailure(
            f"dmdr_update: the generator's gradient differs from the reference structure's by {error:.2e} "
            f"(relative L2), allowed {tolerance:.0e}; nothing is timed"
        )
    return peak, GateError(error, None, tolerance), seconds


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
