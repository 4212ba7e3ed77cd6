"""Real updates of small networks on the CPU, their live bytes counted: what the planner must predict."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import diffusers
import torch
from torch.profiler import ProfilerActivity, profile

from dmdr_fast.algorithm.dmd import DMDOptions
from dmdr_fast.algorithm.recipe import Batch, Networks, Recipe
from dmdr_fast.algorithm.schedules import timestep_grid
from dmdr_fast.algorithm.score_pass import separate_scores, shared_scores
from dmdr_fast.algorithm.step import dmdr_update
from dmdr_fast.algorithm.streams import Shard, Streams
from dmdr_fast.algorithm.update import Update
from dmdr_fast.engine.compute import compile_blocks
from dmdr_fast.models.families import FAMILIES
from dmdr_fast.models.lora import add_lora
from dmdr_fast.models.recompute import set_recompute
from dmdr_fast.patch import patch
from dmdr_fast.plan.shapes import Shape
from dmdr_fast.plan.workload import Adapter, Workload, Zero
from tests.algorithm.memory import PeakMemory
from tests.algorithm.networks import PlainRole

CPU = torch.device("cpu")
SD3 = {
    "_class_name": "SD3Transformer2DModel", "sample_size": 32, "patch_size": 2, "in_channels": 4, "out_channels": 4,
    "num_layers": 4, "num_attention_heads": 4, "attention_head_dim": 24, "joint_attention_dim": 48,
    "caption_projection_dim": 96, "pooled_projection_dim": 32, "pos_embed_max_size": 16, "qk_norm": "rms_norm",
    "dual_attention_layers": [0],
}  # fmt: skip
FLUX = {
    "_class_name": "FluxTransformer2DModel", "patch_size": 1, "in_channels": 16, "num_layers": 1,
    "num_single_layers": 3, "num_attention_heads": 4, "attention_head_dim": 24, "joint_attention_dim": 48,
    "pooled_projection_dim": 32, "guidance_embeds": True, "axes_dims_rope": [8, 8, 8],
}  # fmt: skip
VAE = {
    "_class_name": "AutoencoderKL", "block_out_channels": [8, 8, 8, 8], "layers_per_block": 1, "latent_channels": 4,
    "norm_num_groups": 4, "shift_factor": 0.1,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
SHAPES = {
    "sd3": Shape("small-sd3", "sd3", json.dumps(SD3), json.dumps(VAE), 20),
    "flux": Shape("small-flux", "flux", json.dumps(FLUX), json.dumps(VAE), 40),
}
RESOLUTION = 256
# Allocated peaks of compiled blocks; `python -m tests.plan.measured` measures them again, in minutes of the compiler.
COMPILED = Path(__file__).with_name("compiled.json")


def measured_peak(work: Workload, updates: int = 2) -> int:
    """Most bytes that live at once in ``updates`` updates on one rank without ZeRO, weights and optimizers included."""
    gc.collect()
    with PeakMemory() as memory:
        update, ema = _update(work)
        for step in range(updates):
            update(step)
    del ema
    return memory.peak


def allocated_peak(work: Workload) -> int:
    """The same of the second update, from the allocator: what compiled code allocates passes the dispatcher by."""
    gc.collect()
    update, _ema = _update(work)
    update(0)
    tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
    live = sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
    del tensors
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        update(1)
    sizes, events = [], profiler.profiler.kineto_results.experimental_event_tree()
    while events:
        event = events.pop()
        events += event.children
        if event.tag.name == "Allocation":
            sizes.append((event.start_time_ns, event.extra_fields.alloc_size))
    return live + max(accumulate(size for _, size in sorted(sizes)))


def _update(work: Workload):
    """(step -> one update of ``work``, the EMA's tensors)."""
    nets, text, ema = _networks(work)
    recipe = Recipe(
        grid=timestep_grid(work.student_steps),
        latent_shape=work.shape.opened().latent_shape(RESOLUTION, RESOLUTION),
        cold_start_steps=10,
        generator_steps=10,
        fake_updates=work.fake_updates,
        dmd=DMDOptions(cfg_scale=4.0 if work.cfg else 1.0),
    )
    shards = [Shard(0, work.batch, work.batch)]
    batch = Batch(text, text, torch.arange(work.batch), {})
    given = recipe, Streams(3), nets, lambda *draw: batch, None, shards, CPU
    return lambda step: dmdr_update(Update(*given, step)), ema


def _networks(work: Workload):
    family = work.shape.opened()
    adapters = {}

    def build(shape=work.shape, **roles):
        torch.manual_seed(0)
        config = {k: v for k, v in shape.config.items() if k != "_class_name"}
        model = getattr(diffusers, shape.config["_class_name"])(**config)
        if work.blocks == "fused":
            patch(model)
        own = work.blocks == "compiled" and work.activation == "selective"  # the compiler's partitioner does it
        set_recompute(model, "none" if own else work.activation)
        if work.blocks == "compiled":
            compile_blocks([block for _, block in work.shape.opened().blocks(model)])
        for role, lora in roles.items():
            if lora is not None:
                adapters[role] = add_lora(model, role, rank=lora.rank, targets=lora.targets)
        return model

    def wear(**scales):
        for role, adapter in adapters.items():
            adapter.set_scale(scales.get(role))

    def call(model):
        return lambda x, t, c: family.forward(model, x, t, c)

    def role(name, model):
        trained = adapters[name].parameters() if name in adapters else model.parameters()
        optimizer = torch.optim.AdamW(list(trained), lr=1e-4, fused=True)
        return PlainRole(call(model), before=lambda: wear(**{name: 1.0}), optimizer=optimizer)

    if work.sharing == "shared_all":
        generator = fake = build(generator=work.student_lora, fake=work.fake_lora)
    else:
        generator = build(work.shape_of("generator"), generator=work.student_lora)
        fake = build(fake=work.fake_lora)
    if work.sharing == "separate":
        score = separate_scores(call(fake), call(build().requires_grad_(False)))
    else:
        score = shared_scores(call(fake), lambda scale: wear(fake=scale), fake_scale=1.0)
    g = role("generator", generator)
    ema = [p.detach().clone() for p in g.optimizer.param_groups[0]["params"]] if work.ema else []
    return Networks(g, role("fake", fake), score), _text(work), ema


def _text(work: Workload):
    config = work.shape.config
    tokens = work.shape.length + (77 if work.shape.family == "sd3" else 0)
    return {
        "prompt_embeds": torch.randn(work.batch, tokens, config["joint_attention_dim"]),
        "pooled_embeds": torch.randn(work.batch, config["pooled_projection_dim"]),
    }


def workload(family: str, **changes) -> Workload:
    """A small workload of the family: fp32 on one rank, as ``measured_peak`` runs it."""
    work = Workload(
        SHAPES[family], resolution=RESOLUTION, batch=2, dtype="fp32", student_steps=1, fake_updates=1, reward=None,
        zero=Zero(stage=0), blocks="eager",
    )  # fmt: skip
    return replace(work, **changes)


def compiled_workload(family: str, sharing: str, activation: str) -> Workload:
    """A case of ``COMPILED``."""
    lora = None if sharing == "separate" else Adapter(4, FAMILIES[family].lora_targets)
    return workload(family, sharing=sharing, activation=activation, fake_lora=lora, blocks="compiled")


if __name__ == "__main__":
    cases = json.loads(COMPILED.read_text())
    for case in cases["bytes"]:
        cases["bytes"][case] = allocated_peak(compiled_workload(*case.split()))
    COMPILED.write_text(json.dumps(cases | {"torch": torch.__version__}, indent=1) + "\n")
