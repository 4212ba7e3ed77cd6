"""What stays on a GPU from phase to phase: weights, gradients, optimizer, EMA, buckets, as DeepSpeed 0.19 keeps them.

Bytes per element of a trained role with N GPUs (bf16; in fp32 the weights and gradients take 4):

=============================  =====================  ==================  ====================
                               stage 0                stage 2             stage 3
=============================  =====================  ==================  ====================
weights                        2                      2                   2 / N
gradients, after the backward  2                      2 / N               2 / N, always
fp32 master, Adam              4, 8                   4 / N, 8 / N        4 / N, 8 / N
EMA                            4                      4 / N               4 / N
fp32 gradients in the step     4                      4 / N               4 x a sub-group
reduce bucket (elements)       -                      2, twice, backward  2, always
=============================  =====================  ==================  ====================

Stage 0 in fp32 has no master: the weights are it. 8-bit Adam keeps 2 bytes and two fp32 scales per 256 elements.
Under `shared_all` the adapters are fp32 and whole on every GPU at every stage: 4 bytes each of weight and gradient,
Adam's 8, the generator's EMA 4, and two copies of the gradients while they are averaged. The base trains nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from torch import nn

from dmdr_fast.models.blocks import elements
from dmdr_fast.models.blocks import gathers as gathers_of_modules
from dmdr_fast.plan.networks import build
from dmdr_fast.plan.shapes import Shape
from dmdr_fast.plan.workload import Workload

PERSISTENT = 100_000  # DeepSpeed's stage3_param_persistence_threshold: smaller parameters stay whole
WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}
# Moments of Adam, bytes per element on the GPU; paged ones live where there is room, at worst on the host.
MOMENTS = {"adamw": 8.0, "adamw_8bit": 2 + 2 * 4 / 256, "paged_adamw_8bit": 0.0}


@dataclass(frozen=True)
class Engine:
    """One network as DeepSpeed holds it.

    Attributes:
        weights: elements, ``trained`` among them.
        size: their bytes in the compute dtype (a byte each where they are frozen in 8 bits).
        trained: elements that get gradients.
        tables: bytes of buffers, which ZeRO leaves whole on every GPU.
        largest: elements of the largest block, or of a module outside the blocks: what is gathered at once.
        block: elements of the largest block: what the trainer lets ZeRO-3 prefetch.
        units: all-gathers of one pass where nothing is prefetched: one per block, and one per module outside them.
        roles: the roles that train a part of it.
    """

    weights: int
    size: int
    trained: int
    tables: int
    largest: int
    block: int
    units: int
    roles: tuple[str, ...]


def networks_of(work: Workload) -> Workload:
    """The part of ``work`` that says which networks there are: what does not matter to them is as in every other."""
    return Workload(
        work.shape,
        student=work.student,
        sharing=work.sharing,
        dtype=work.dtype,
        frozen=work.frozen,
        blocks="eager",
        student_lora=work.student_lora,
        fake_lora=work.fake_lora,
    )


def engines(work: Workload) -> dict[str, Engine]:
    """The networks of a workload by the role that they are for: generator, fake, teacher where it is one of its own."""
    return _built(networks_of(work))[0]


def trained_by(work: Workload, role: str) -> int:
    """Elements that the role trains."""
    return _built(networks_of(work))[1][role]


@cache
def _built(work: Workload) -> tuple[dict[str, Engine], dict[str, int]]:
    roles = build(work)
    found: dict[str, nn.Module] = {}
    names: dict[int, str] = {}
    for role in ("generator", "fake", "teacher"):
        module = getattr(roles, role)
        names.setdefault(id(module), role)
        found.setdefault(names[id(module)], module)
    nets = {
        name: _engine(
            work.shape_of(name), module, tuple(r for r in ("generator", "fake") if getattr(roles, r) is module)
        )
        for name, module in found.items()
    }
    return nets, {role: sum(p.numel() for p in roles.trained(role)) for role in ("generator", "fake")}


def _engine(shape: Shape, module: nn.Module, roles: tuple[str, ...]) -> Engine:
    parameters = list(module.parameters())
    leaves = [block for _, block in shape.opened().blocks(module)]
    inside = {id(part) for leaf in leaves for part in leaf.modules()}
    outside = [list(part.parameters(recurse=False)) for part in module.modules() if id(part) not in inside]
    block = max(elements(leaf) for leaf in leaves)
    return Engine(
        weights=sum(p.numel() for p in parameters),
        size=sum(p.numel() * p.element_size() for p in parameters),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        tables=sum(b.numel() * b.element_size() for b in module.buffers()),
        largest=max(block, *(sum(p.numel() for p in own) for own in outside)),
        block=block,
        units=gathers_of_modules(module, leaves, PERSISTENT),
        roles=roles,
    )


def resident(work: Workload, gpus: int) -> dict[str, float]:
    """Bytes per GPU that every phase finds there, by kind."""
    zero, width = work.zero, WIDTH[work.dtype]
    shards, on_gpu = (gpus if zero.stage else 1), not zero.offload_optimizer
    kinds = dict.fromkeys(("parameters", "gradients", "optimizer", "EMA", "buckets"), 0.0)
    for engine in engines(work).values():
        weights = engine.size if zero.stage < 3 else engine.size / gpus
        kinds["parameters"] += engine.tables + (0 if zero.offload_parameters else weights)
        trained = engine.trained / shards
        if not engine.trained:
            continue
        if zero.stage == 3:
            kinds["gradients"] += trained * width * on_gpu
            kinds["buckets"] += zero.reduce_bucket * width
        master = 0 if zero.stage == 0 and work.dtype == "fp32" else 4
        kinds["optimizer"] += trained * (master + MOMENTS[work.optimizer]) * on_gpu
    if work.sharing == "shared_all":
        adapters = trained_by(work, "generator") + trained_by(work, "fake")
        kinds["parameters"] += 4 * adapters
        kinds["optimizer"] += MOMENTS[work.optimizer] * adapters
        shards = 1
    if work.reference == "frozen":  # a copy of the generator as RL starts
        size = engines(work)["generator"].size
        kinds["parameters"] += size / gpus if zero.stage == 3 else size
    if work.ema:
        kinds["EMA"] = 4 * trained_by(work, "generator") / shards
    return kinds


def backward_buffers(work: Workload, role: str, gpus: int) -> dict[str, float]:
    """Bytes per GPU beside the activations while the role runs backward, by kind."""
    zero, width = work.zero, WIDTH[work.dtype]
    if zero.stage and work.sharing == "shared_all":  # at stage 0 the trace has them
        return {"gradients": 4.0 * trained_by(work, role)}
    if zero.stage != 2:
        return {}
    return {
        "gradients": trained_by(work, role) * width / gpus,
        "buckets": zero.reduce_bucket * width * (2 if zero.overlap else 1),
    }


def step_buffers(work: Workload, role: str, gpus: int) -> dict[str, float]:
    """Bytes per GPU while the role's optimizer steps, by kind."""
    zero, width = work.zero, WIDTH[work.dtype]
    trained = trained_by(work, role)
    if work.sharing == "shared_all":
        return {"gradients": 4.0 * trained * (3 if gpus > 1 else 1)}
    if zero.offload_optimizer:
        return {}
    if zero.stage == 0:
        return {"gradients": trained * (width + (4 if work.dtype != "fp32" else 0))}
    if zero.stage == 2:
        return {"gradients": trained / gpus * (width + 4)}
    return {"gradients": min(trained / gpus, zero.sub_group) * 4.0}


def prefetch(work: Workload, engine: Engine) -> int:
    """Elements that ZeRO-3 gathers ahead of their use: a block's, unless the DeepSpeed JSON says otherwise."""
    return engine.block if work.zero.prefetch is None else work.zero.prefetch


def gathered(work: Workload, engine: Engine, *, graded: bool) -> float:
    """Bytes of whole weights that stage 3 has on every GPU while the network runs.

    A module's weights go when no use is nearer than the reuse distance d. A network of fewer elements stays. Of a
    larger one a forward leaves the last d / 2 for the backward pass, a rollout's too: it is the beginning of a graded
    pass to DeepSpeed. Where no backward pass ever follows, only the block that runs and the next one are there.
    """
    zero = work.zero
    if zero.stage != 3:
        return 0.0
    near = engine.largest + prefetch(work, engine)
    if engine.weights <= zero.reuse_distance:
        kept = engine.weights
    else:
        kept = min(engine.weights, near + (zero.reuse_distance // 2 if graded else 0))
    return float(kept * WIDTH[work.dtype])
