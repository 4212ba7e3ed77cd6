"""How many collectives of weights and gradients an update of a ZeRO-3 run makes, said at the start."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from dmdr_fast.algorithm.passes import Schedule, gathers
from dmdr_fast.config import Config
from dmdr_fast.engine.engines import engine_config
from dmdr_fast.models.blocks import elements, largest_block, repeated_blocks
from dmdr_fast.models.blocks import gathers as gathers_of_modules

# DeepSpeed's own defaults.
REUSE_DISTANCE, REDUCE_BUCKET, PERSISTENT = 1_000_000_000, 500_000_000, 100_000


def collectives(config: Config, networks: Mapping[str, nn.Module], trained: Mapping[str, int]) -> str:
    """The line of the start-up; ``networks`` by role ("base" where all share one), ``trained`` elements by role."""
    zero = engine_config(config, trained=True)["zero_optimization"]
    shared, method = config.sharing == "shared_all", config.rl.chosen
    plan = Schedule(
        steps=config.student.steps,
        fake_updates=config.train.fake_updates,
        accumulation=config.train.gradient_accumulation,
        rollout_reuse=config.train.rollout_reuse,
        same_step=config.student.rollout == "same_step",
        keep_gathered=config.rollout.keep_gathered,
        epochs=config.epochs,
        plain_steps=method.plain_forwards(),
        policy_steps=method.graded_forwards(config.student.steps) if config.has_rl else 0,
        **(config.reference_passes if config.reference_kind == "lora_off" else {}),
        one_network=shared,
    )
    passes = {name: _Pass.over(network, zero) for name, network in networks.items()}
    weights = 0.0
    for phase, roles in plan.passes().items():
        for role, times in roles.items():
            one = passes.get("base" if shared and role != "teacher" else role)
            if one is not None:
                stays = one.elements <= zero.get("stage3_max_reuse_distance", REUSE_DISTANCE)
                weights += one.gathers * (plan.fresh_passes()[phase][role] if stays else times)
    backwards = {"generator": plan.epochs + plan.policy_steps, "fake": plan.fake_updates}
    steps = {"generator": plan.epochs, "fake": plan.fake_updates}
    bucket = zero.get("reduce_bucket_size", REDUCE_BUCKET)
    gradients = sum(
        steps[role] if shared else plan.accumulation * times * math.ceil(trained[role] / bucket)
        for role, times in backwards.items()
    )
    each = ", ".join(f"{name} {p.gathers} a pass ({p.by_layer} layer by layer)" for name, p in passes.items())
    return f"ZeRO-3     an update gathers weights {weights:.0f} times, reduces gradients {gradients} times; {each}"


@dataclass(frozen=True)
class _Pass:
    """Elements of a network and the all-gathers of one pass over it, by blocks and, to compare with, by layers."""

    elements: int
    gathers: int
    by_layer: int

    @classmethod
    def over(cls, network: nn.Module, zero: dict[str, Any]) -> _Pass:
        persistent = zero.get("stage3_param_persistence_threshold", PERSISTENT)
        bucket = zero.get("stage3_prefetch_bucket_size", largest_block(network))
        count, units = elements(network), gathers_of_modules(network, repeated_blocks(network), persistent)
        return cls(count, gathers(count, bucket, units), gathers_of_modules(network, [], persistent))
