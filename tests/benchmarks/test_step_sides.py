"""The two structures of bench_step.py are the same update: their generator gradients agree."""

import pytest
import torch

from benchmarks import bench_step
from benchmarks.gate import GateFailure
from benchmarks.step_sides import FAKE_UPDATES, REAL_SCALE, ComputePath, Eager, Fused, Size, _stops, balanced_steps
from dmdr_fast.algorithm.dmd import DMDOptions
from dmdr_fast.algorithm.recipe import Recipe
from dmdr_fast.algorithm.rl.refl import ReFL
from dmdr_fast.algorithm.schedules import timestep_grid

CPU = torch.device("cpu")
PLAIN = ComputePath()
SMALL = Size(
    "small",
    {"hidden_size": 32, "depth": 2, "num_heads": 2, "patch_size": 8},
    2,
    torch.float32,
    decoder_width=4,
)


def sides(steps, cfg_scale, path=PLAIN, reuse=1, **changes):
    recipe = Recipe(
        grid=timestep_grid(steps),
        latent_shape=(4, 32, 32),
        cold_start_steps=0,
        generator_steps=10**9,
        fake_updates=FAKE_UPDATES,
        rollout_reuse=reuse,
        real_lora_scale=REAL_SCALE,
        dynamic_guidance_step=10**9,
        dmd=DMDOptions(cfg_scale=cfg_scale),
        **({"reward_weight": 0.05, "method": ReFL(chunk=1)} | changes),
    )
    counters = balanced_steps(steps, reuse)
    fused = Fused(SMALL, recipe, CPU, path)
    return {"fused": fused, "eager": Eager(SMALL, recipe, CPU, counters)}, counters[0], recipe


@pytest.mark.parametrize(
    ("steps", "cfg_scale", "path", "reuse"),
    [
        (1, 1.0, PLAIN, 1),
        (4, 4.0, PLAIN, 1),
        (1, 1.0, ComputePath("fused"), 1),
        (4, 4.0, ComputePath(scores=torch.float64), FAKE_UPDATES),
    ],
)
def test_same_generator_gradient(steps, cfg_scale, path, reuse):
    both, step, _ = sides(steps, cfg_scale, path, reuse)
    peak, error, seconds = bench_step._first_update(both, step, 1e-3, CPU)
    assert 0 < error.fused <= error.bound == 1e-3
    assert peak["fused"] < peak["eager"]
    assert all(0 < seconds[side] < 60 for side in both)


def test_another_update_is_stopped():
    both, step, _ = sides(1, 1.0)
    both["eager"].engine.reward_weight *= 1.5
    with pytest.raises(GateFailure, match="nothing is timed"):
        bench_step._first_update(both, step, 1e-3, CPU)


@pytest.mark.parametrize("reuse", [1, 2, FAKE_UPDATES])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_stop_steps_average_exactly(steps, reuse):
    first, second = balanced_steps(steps, reuse)
    stops = _stops(first, steps, reuse) + _stops(second, steps, reuse)
    assert len(stops) == 2 * -(-FAKE_UPDATES // reuse)
    assert first != second
    assert sum(stops) / len(stops) == (steps - 1) / 2
