"""State and gathers against the closed forms of ZeRO, for the shapes whose tables the guide shows."""

from dataclasses import replace

import pytest

from dmdr_fast.plan.shapes import count, find_shape
from dmdr_fast.plan.workload import Adapter, Workload, Zero
from dmdr_fast.plan.zero import engines, gathered, resident, trained_by

SHAPE = find_shape("flux.1-dev").with_depths((2, 3))
LORA = Adapter(8, SHAPE.opened().lora_targets)
BARE = Zero(stage=3, reduce_bucket=0)


def state(work: Workload, gpus: int) -> float:
    return sum(resident(work, gpus).values())


def test_bytes_per_parameter_of_each_sharing():
    """38 bytes for three whole networks, 22 with a shared score base, 2 with one base, LoRAs aside."""
    weights, tables = count(SHAPE)
    assert tables == 0
    work = Workload(SHAPE, zero=BARE)
    assert state(replace(work, sharing="separate"), 8) == pytest.approx(38 * weights / 8)
    adapter = trained_by(replace(work, fake_lora=LORA), "fake")
    shared_score = replace(work, fake_lora=LORA)
    assert state(shared_score, 8) == pytest.approx((22 * weights + 16 * adapter) / 8)
    shared_all = replace(work, sharing="shared_all", fake_lora=LORA, student_lora=LORA)
    # the adapters are whole on every GPU, and their gradients there only from the backward pass to the step
    assert state(shared_all, 8) == pytest.approx(2 * weights / 8 + (12 + 16) * adapter)


@pytest.mark.parametrize(
    ("stage", "dtype", "per_parameter"),
    [(0, "fp32", 4 + 8 + 4), (0, "bf16", 2 + 12 + 4), (2, "bf16", 2 + 16 / 8), (3, "bf16", 20 / 8)],
)
def test_bytes_of_a_generator(stage, dtype, per_parameter):
    work = Workload(SHAPE, dtype=dtype, sharing="separate", zero=Zero(stage=stage, reduce_bucket=0))
    teacher = count(SHAPE)[0] * (4 if dtype == "fp32" else 2) / (8 if stage == 3 else 1)
    fake = per_parameter - (4 if stage == 0 else 4 / 8)  # no EMA
    assert state(work, 8) == pytest.approx(count(SHAPE)[0] * (per_parameter + fake) + teacher)


def test_levers_take_what_they_promise():
    work = Workload(SHAPE, fake_lora=LORA, zero=BARE)
    weights = count(SHAPE)[0]
    own = trained_by(work, "generator") + trained_by(work, "fake")
    plain = resident(work, 8)
    eight_bit = resident(replace(work, optimizer="adamw_8bit"), 8)
    assert plain["optimizer"] - eight_bit["optimizer"] == pytest.approx((8 - 2.03125) * own / 8)
    offloaded = resident(replace(work, zero=replace(BARE, offload_optimizer=True)), 8)
    assert offloaded["optimizer"] == offloaded["gradients"] == 0
    quantised = resident(replace(work, frozen="int8"), 8)
    saved = plain["parameters"] - quantised["parameters"]
    assert 0.9 * weights / 8 < saved < weights / 8  # a byte less for each weight of a block's Linear


def test_gathered_weights():
    """A small network stays gathered; a large one only around the turn from forward to backward."""
    work = Workload(SHAPE, sharing="separate")
    engine = engines(work)["generator"]
    near = replace(work, zero=Zero(reuse_distance=2 * 10**9))
    assert gathered(near, engine, graded=True) == gathered(near, engine, graded=False) == 2 * engine.weights
    far = replace(work, zero=Zero(reuse_distance=10**8, prefetch=10**7))
    assert gathered(far, engine, graded=False) == 2 * (engine.largest + 10**7)
    assert gathered(far, engine, graded=True) == 2 * (engine.largest + 6 * 10**7)
    assert gathered(replace(work, zero=Zero(stage=2)), engine, graded=True) == 0
