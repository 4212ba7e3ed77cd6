"""What one update costs: F-units, FLOPs, bytes over the network, time.

An F-unit is one forward of the phase's network at the micro-batch. A backward pass is 2 of them where all weights
train, 1 where only a LoRA does; recomputation is one more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from dmdr_fast.algorithm.passes import Schedule, gathers
from dmdr_fast.plan.live import flash_attention
from dmdr_fast.plan.networks import DTYPES, META, as_network, latent_shape
from dmdr_fast.plan.reward import reward_cost, split_flops
from dmdr_fast.plan.trace import update_peaks
from dmdr_fast.plan.workload import Activation, Hardware, Workload
from dmdr_fast.plan.zero import Engine, engines, prefetch, trained_by


@dataclass(frozen=True)
class PhaseCost:
    """One phase of an update on one GPU: F-units, FLOPs (of convolutions apart), bytes received, collectives, bytes."""

    units: float = 0.0
    products: float = 0.0
    convolutions: float = 0.0
    received: float = 0.0
    collectives: float = 0.0
    hbm: float = 0.0
    host: float = 0.0

    @property
    def flops(self) -> float:
        return self.products + self.convolutions

    def seconds(self, hardware: Hardware) -> float:
        """Compute, collectives and host copies overlap: the longest of them."""
        hops = math.ceil(math.log2(max(hardware.gpus, 2)))
        network = self.received / hardware.bandwidth + self.collectives * hops * hardware.latency
        reached = self.products / hardware.utilisation + self.convolutions / hardware.convolutions
        compute = reached / hardware.flops + self.hbm / hardware.hbm
        return max(compute, network if hardware.gpus > 1 else 0.0, self.host / hardware.host)


def forward_flops(work: Workload, role: str = "teacher") -> np.ndarray:
    """FLOPs of one forward of one sample, of matrix products and of convolutions; linear in the numbers of blocks.

    The network is that of ``role``, or of a phase, by ``Workload.shape_of``.
    """
    return _forward(Workload(work.shape_of(role), resolution=work.resolution, dtype=work.dtype))


@cache
def _forward(work: Workload) -> np.ndarray:
    depths, few = work.shape.depths, work.shape.opened().few
    base = _counted(work, few)
    extra = np.zeros(2)
    for index, (depth, start) in enumerate(zip(depths, few, strict=True)):
        if depth > start:
            more = tuple(d + (i == index) for i, d in enumerate(few))
            extra += (depth - start) * (_counted(work, more) - base)
    return base + extra


def _counted(work: Workload, depths: tuple[int, ...]) -> np.ndarray:
    shape = work.shape.with_depths(depths)
    dtype = DTYPES[work.dtype]
    model = torch.nn.Module.to(shape.build(), dtype).requires_grad_(False)
    x, t = torch.empty(1, *latent_shape(shape, work.resolution), device=META), torch.empty(1, device=META)
    with flash_attention(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        as_network(shape, model, dtype)(x, t, shape.opened().empty_condition(1, dtype))
    return np.array(split_flops(counter))


def schedule(work: Workload, gpus: int = 1) -> Schedule:
    """How often the update of ``work`` on ``gpus`` runs each network."""
    return Schedule(
        steps=work.student_steps,
        fake_updates=work.fake_updates,
        accumulation=work.accumulation,
        rollout_reuse=work.rollout_reuse,
        stop_ranks=gpus if work.stop_step_per_rank else 1,
        same_step=work.same_step,
        keep_gathered=work.keep_gathered,
        epochs=work.epochs,
        policy_steps=work.policy_steps,
        plain_steps=work.plain_steps,
        reference_steps=work.reference_steps,
        kl_on_x0=work.kl_on_x0,
        one_network=work.sharing == "shared_all",
    )


def units(work: Workload, gpus: int = 1) -> dict[str, float]:
    """F-units of one update's phases, all micro-batches together."""
    again = 1.0 if work.activation in ("full", "offload") else 0.0
    fake_backward = 1.0 if work.fake_lora else 2.0
    generator_backward = 1.0 if work.student_lora else 2.0
    plan = schedule(work, gpus)
    once = {
        "rollout": plan.rollouts * plan.rollout_steps,
        "fake update": work.fake_updates * (1 + again + fake_backward),
        "score pass": work.epochs * (2.0 + work.cfg + work.decoupled),
        "generator update": work.epochs * (1 + again + generator_backward + work.kl_on_x0) + plan.redrawn,
    }
    if work.policy_steps:
        once["policy rollout"] = float(work.student_steps)
        policy = work.policy_steps * (1 + again + generator_backward) + work.reference_steps + work.plain_steps
        once["policy update"] = work.policy_share * policy
    return {phase: n * work.accumulation for phase, n in once.items()}


def costs(work: Workload, hardware: Hardware) -> dict[str, PhaseCost]:
    """Every phase of one update on one GPU."""
    found = {
        phase: PhaseCost(n, *(n * work.batch * forward_flops(work, phase)).tolist())
        for phase, n in units(work, hardware.gpus).items()
    }
    found = {phase: _with_traffic(work, hardware, phase, cost) for phase, cost in found.items()}
    if work.reward is not None and work.reward.scores:
        samples = work.batch * work.accumulation * work.reward.times
        products, convolutions = reward_cost(work).flops
        found["reward"] = PhaseCost(products=products * samples, convolutions=convolutions * samples)
    found["optimizer step"] = _step(work, hardware)
    return found


def _with_traffic(work: Workload, hardware: Hardware, phase: str, cost: PhaseCost) -> PhaseCost:
    """Gathers of weights under stage 3, reductions of gradients under every stage, offloaded activations."""
    n, micro = hardware.gpus, work.accumulation
    received = collectives = host = 0.0
    for net, passes, fresh in _reads(work, phase):
        if work.zero.stage == 3:
            received += net.size * fresh * (n - 1) / n
            collectives += gathers(net.weights, prefetch(work, net), net.units) * fresh
        if work.zero.offload_parameters:
            host += net.size * passes / n
    backwards = {"fake update": work.fake_updates, "generator update": work.epochs, "policy update": work.policy_steps}
    if repeats := backwards.get(phase, 0):
        role = "fake" if phase == "fake update" else "generator"
        steps = 0 if phase == "policy update" else repeats  # of the optimizer
        whole = work.sharing == "shared_all"  # adapters in fp32, their gradients in one flat tensor
        gradients = trained_by(work, role) * (4 if whole else DTYPES[work.dtype].itemsize)
        if work.zero.stage == 0 or whole:  # all-reduce, once per step: everything is sent twice
            received += 2 * gradients * steps * (n - 1) / n
        else:
            received += gradients * repeats * micro * (n - 1) / n
        buckets = math.ceil(gradients / (work.zero.reduce_bucket * DTYPES[work.dtype].itemsize))
        collectives += steps if whole else (steps if work.zero.stage == 0 else repeats * micro) * buckets
        if work.activation == "offload":
            tokens = _block_inputs(work, role)
            host += 2 * tokens * repeats * micro * (work.policy_share if phase == "policy update" else 1.0)
    return replace(cost, received=received, collectives=collectives, host=host)


def _reads(work: Workload, phase: str) -> Iterator[tuple[Engine, float, float]]:
    """The networks that a phase runs, with their passes, and those of them that find no weights left."""
    nets, plan = engines(work), schedule(work)
    for role, passes in plan.passes()[phase].items():
        net = nets.get(role, nets["generator"] if work.sharing == "shared_all" and role == "fake" else None)
        if net is not None:
            stays = net.weights <= work.zero.reuse_distance
            yield net, passes, plan.fresh_passes()[phase][role] if stays else passes


def _block_inputs(work: Workload, role: str) -> float:
    """Bytes of block inputs that `offload` sends to the host in one forward: tokens times width, every block."""

    def peak(activation: Activation) -> int:
        found = update_peaks(replace(work, activation=activation))
        return max(sum(kinds.values()) for (phase, _), kinds in found.items() if phase == f"{role} update")

    return float(max(peak("full") - peak("offload"), 0))


def _step(work: Workload, hardware: Hardware) -> PhaseCost:
    """Read and write master, moments, gradient and weights of what this GPU steps; stage 2 gathers the weights."""
    whole = work.sharing == "shared_all"
    shards = hardware.gpus if work.zero.stage and not whole else 1
    width = DTYPES[work.dtype].itemsize
    steps = work.epochs * trained_by(work, "generator") + work.fake_updates * trained_by(work, "fake")
    touched = steps / shards * (24 + 3 * width + 4)
    received = steps * width * (hardware.gpus - 1) / hardware.gpus if work.zero.stage == 2 and not whole else 0.0
    if work.zero.offload_optimizer and not whole:
        return PhaseCost(received=received, host=steps / shards * 2 * width + touched / 4)
    host = steps / shards * 4 if work.optimizer == "paged_adamw_8bit" else 0.0
    return PhaseCost(hbm=touched, received=received, host=host)
