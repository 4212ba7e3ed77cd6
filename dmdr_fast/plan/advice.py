"""The cheapest change that makes a plan fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations

from dmdr_fast.plan.plan import Plan, make_plan, phase_bytes
from dmdr_fast.plan.workload import Activation, Adapter, Hardware, Workload

FEWER: dict[Activation, tuple[Activation, ...]] = {
    "none": ("selective", "full", "offload"),
    "selective": ("full", "offload"),
    "full": ("offload",),
}


@dataclass(frozen=True)
class Change:
    """One change: the keys to set, and the workload with it. ``price`` orders changes that cost the same time.

    0: nothing but time. 1: rounding (8 bits). 2: what is trained, or the samples of an update.
    """

    keys: str
    work: Workload
    price: int


def changes(work: Workload) -> Iterator[Change]:
    """Every single change that takes less memory than ``work`` does now."""
    compiled = work.blocks == "compiled"
    if compiled and work.activation in ("none", "selective") and work.shape.opened().fused:
        keys = "compute.blocks: fused, memory.activation: selective"
        yield Change(keys, replace(work, blocks="fused", activation="selective"), 0)
    for mode in FEWER.get(work.activation, ()):
        if not (compiled and mode == "selective"):  # to the compiler the same as none
            yield Change(f"memory.activation: {mode}", replace(work, activation=mode), 0)
    if work.zero.stage < 3:
        yield Change("deepspeed.stage: 3", replace(work, zero=replace(work.zero, stage=3)), 0)
    engines = work.zero.stage and work.sharing != "shared_all"  # whose adapters have neither buckets nor shards
    if engines and work.zero.reduce_bucket > 50_000_000:
        zero = replace(work.zero, reduce_bucket=50_000_000)
        yield Change("zero_optimization.reduce_bucket_size: 5e7", replace(work, zero=zero), 0)
    if work.keep_gathered:
        yield Change("rollout.keep_gathered: false", replace(work, keep_gathered=False), 0)
    if engines and not work.zero.offload_optimizer:
        zero = replace(work.zero, offload_optimizer=True)
        yield Change("zero_optimization.offload_optimizer.device: cpu", replace(work, zero=zero), 0)
    yield from _reward_changes(work)
    if work.frozen == "native":
        yield Change("memory.frozen: int8", replace(work, frozen="int8"), 1)
    if work.optimizer == "adamw":
        yield Change("optimizer.kind: adamw_8bit", replace(work, optimizer="adamw_8bit"), 1)
    yield from _other_runs(work)
    if work.batch % 2 == 0:
        halved = replace(work, batch=work.batch // 2, accumulation=2 * work.accumulation)
        keys = f"train.micro_batch_size: {halved.batch}, train.gradient_accumulation: {halved.accumulation}"
        yield Change(keys, halved, 0)


def _reward_changes(work: Workload) -> Iterator[Change]:
    reward = work.reward
    if reward is None or not reward.scores:
        return
    if min(reward.chunk, work.batch) > 1:
        yield Change("rl.refl.chunk: 1", replace(work, reward=replace(reward, chunk=1)), 0)
    if work.shape.vae_recomputes and not reward.recompute:
        yield Change("decoder.recompute: true", replace(work, reward=replace(reward, recompute=True)), 0)
    if not reward.checkpoint:
        yield Change("rl.refl.checkpoint: true", replace(work, reward=replace(reward, checkpoint=True)), 0)
    if reward.dtype == "fp32":
        yield Change("decoder.dtype: bf16", replace(work, reward=replace(reward, dtype="bf16")), 1)


def _other_runs(work: Workload) -> Iterator[Change]:
    """Changes that train something else."""
    lora = work.fake_lora or Adapter(32, work.shape.opened().lora_targets)
    if work.sharing == "separate":
        yield Change("sharing: shared_score", replace(work, sharing="shared_score", fake_lora=lora), 2)
    if work.sharing != "shared_all" and work.student is None:
        student = work.student_lora or lora
        changed = replace(work, sharing="shared_all", fake_lora=lora, student_lora=student)
        yield Change(f"sharing: shared_all, student.lora.rank: {student.rank}", changed, 2)


def fits(work: Workload, hardware: Hardware) -> bool:
    """Whether one update is within the memory of every GPU."""
    return max(sum(kinds.values()) for kinds in phase_bytes(work, hardware).values()) <= hardware.memory


def cheapest_change(plan: Plan, most: int = 3) -> tuple[tuple[str, ...], Plan] | None:
    """The keys to set, and the plan with them; None where no ``most`` changes together are enough.

    Rather time than rounding, rather rounding than another run; then fewest changes, then the shortest update.
    """
    for price in (1, 2):
        if not fits(_all_changes(plan.work, price), plan.hardware):
            continue
        for count in range(1, most + 1):
            found = [
                combined for combined in _combined(plan.work, count, price) if fits(combined[-1].work, plan.hardware)
            ]
            if found:
                return _shortest(found, plan.hardware)
    return None


def _shortest(found: list[tuple[Change, ...]], hardware: Hardware) -> tuple[tuple[str, ...], Plan]:
    """Of the combinations of the lowest price, the one whose update is shortest."""
    prices = [sorted((change.price for change in combined), reverse=True) for combined in found]
    lowest = min(prices)
    cheap = [combined for combined, price in zip(found, prices, strict=True) if price == lowest]
    plans = [(combined, make_plan(combined[-1].work, hardware)) for combined in cheap]
    combined, best = min(plans, key=lambda item: item[1].seconds / item[1].samples)
    return tuple(change.keys for change in combined), best


def _all_changes(work: Workload, price: int) -> Workload:
    """Every change up to ``price`` at once: what does not fit then fits with none of them."""
    while True:
        possible = [c for c in changes(work) if c.price <= price]
        # Recomputing the whole decoder may take more.
        possible = [c for c in possible if not c.keys.startswith("rl.refl.checkpoint")]
        if not possible:
            return work
        work = possible[0].work


def _combined(work: Workload, count: int, price: int) -> Iterator[tuple[Change, ...]]:
    """Sequences of ``count`` different changes up to ``price``, each applied to the result of the ones before."""
    for names in combinations([change.keys for change in changes(work) if change.price <= price], count):
        done: list[Change] = []
        for name in names:
            now = done[-1].work if done else work
            step = next((change for change in changes(now) if change.keys == name), None)
            if step is None:
                break
            done.append(step)
        else:
            yield tuple(done)
