"""The algorithm's own update on meta tensors, the live bytes of each phase counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from dmdr_fast.algorithm.dmd import Augmentation, DMDOptions
from dmdr_fast.algorithm.recipe import Batch, Networks, Recipe
from dmdr_fast.algorithm.schedules import timestep_grid
from dmdr_fast.algorithm.score_pass import ScorePass, separate_scores, shared_scores
from dmdr_fast.algorithm.step import dmdr_update
from dmdr_fast.algorithm.streams import Shard, Streams
from dmdr_fast.algorithm.update import Update
from dmdr_fast.models.recompute import set_recompute
from dmdr_fast.plan.live import Key, LiveBytes, flash_attention, linear_layers, no_collector
from dmdr_fast.plan.networks import DTYPES, META, Roles, as_network, build, latent_shape
from dmdr_fast.plan.shapes import Shape
from dmdr_fast.plan.workload import Workload, Zero

# Compiled blocks keep this much of what `none` keeps beyond `selective`: measured on SD3s, tests/plan/compiled.json.
KEPT_BY_COMPILER = 0.55
Peaks = dict[Key, dict[str, int]]
Network = Callable[[Tensor, Tensor, Any], Tensor]


def update_peaks(work: Workload) -> Peaks:
    """Peak bytes of one update: {(phase, part of the network): {kind: bytes}}, without state, in seconds at any depth.

    While a block of one kind runs, forward or backward, what else lives is linear in the numbers of blocks: a few
    blocks are traced, once more with one block more of each kind, and the rest is extrapolated. Where gradients stay
    (stage 0) the largest sum has no fixed place: then the whole network is traced.
    """
    work = replace(
        work, accumulation=1, optimizer="adamw", ema=False, keep_gathered=False, cuda_graphs=False, reward=None,
        student_steps=min(work.student_steps, 2), fake_updates=1,
        zero=Zero(stage=work.zero.stage, efficient_linear=work.zero.efficient_linear),
    )  # fmt: skip
    if work.blocks == "compiled":
        return _compiled_peaks(replace(work, blocks="eager"))
    shapes = {"shape": work.shape} | ({} if work.student is None else {"student": work.student})
    deeper = [
        (name, shape, index, depth - start)
        for name, shape in shapes.items()
        for index, (depth, start) in enumerate(zip(shape.depths, shape.opened().few, strict=True))
        if depth > start
    ]
    if work.zero.stage == 0 or all(blocks == 1 for *_, blocks in deeper):
        return traced_peaks(work)
    few: dict[str, Any] = {name: shape.with_depths(shape.opened().few) for name, shape in shapes.items()}
    base = traced_peaks(replace(work, **few))
    found = {key: dict(peak) for key, peak in base.items()}
    for name, shape, index, blocks in deeper:
        more = tuple(d + (i == index) for i, d in enumerate(shape.opened().few))
        longer = traced_peaks(replace(work, **(few | {name: shape.with_depths(more)})))
        for key, peak in found.items():
            for kind in peak:
                peak[kind] += blocks * (longer[key][kind] - base[key][kind])
    return found


def _compiled_peaks(work: Workload) -> Peaks:
    """Of compiled blocks: between eager ones that keep everything and those that keep products and attentions.

    Recomputed blocks have that much less at once, one at a time.
    """
    everything, products = (update_peaks(replace(work, activation=mode)) for mode in ("none", "selective"))
    recomputes = work.activation not in ("none", "selective")
    found = {key: dict(kinds) for key, kinds in (update_peaks(work) if recomputes else everything).items()}
    for key, kinds in found.items():
        shape = work.shape_of(key[0])
        blocks = sum(1 for _ in shape.opened().blocks(shape.build())) if recomputes else 1
        for kind in kinds:
            # a recomputed block's own share is that of the phase's fullest moment
            keys = [other for other in everything if other[0] == key[0]] if recomputes else [key]
            less = max(everything[other][kind] - products[other][kind] for other in keys) / blocks
            kinds[kind] -= round((1 - KEPT_BY_COMPILER) * less)
    return found


@dataclass
class MetaRole:
    """A trained role (``dmdr_fast.algorithm.recipe.Trained``) that says which phase runs."""

    network: Network
    trained: list[nn.Parameter]
    live: LiveBytes
    phase: str
    wear: Callable[[], None]

    def __call__(self, x_t: Tensor, t: Tensor, condition: Any) -> Tensor:
        self.live.phase = self.phase if torch.is_grad_enabled() else "rollout"
        self.wear()
        return self.network(x_t, t, condition)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def step(self) -> bool:
        for parameter in self.trained:
            parameter.grad = None
        return True


class Longest(Streams):
    """The streams of the longest rollout."""

    def stop_step(self, steps: int, *counters: int) -> int:
        return steps - 1


@cache
def traced_peaks(work: Workload) -> Peaks:
    """:func:`update_peaks`, with every block traced."""
    live = LiveBytes()
    roles = build(work, lambda shape, model: _watch(work, shape, model, live))
    text = work.shape.opened().empty_condition(work.batch, DTYPES[work.dtype])
    recipe = Recipe(
        grid=timestep_grid(work.student_steps),
        latent_shape=latent_shape(work.shape, work.resolution),
        cold_start_steps=1,
        generator_steps=1,
        fake_updates=work.fake_updates,
        rollout_variant="same_step" if work.same_step else "backward_simulation",
        dmd=DMDOptions(cfg_scale=4.0 if work.cfg else 1.0, ca=Augmentation() if work.decoupled else None),
    )
    shard = Shard(0, work.batch, work.batch)
    batch = Batch(text, text, torch.empty(work.batch, dtype=torch.int64, device=META), {})
    with no_collector(), flash_attention(), linear_layers(work.zero.own_linear), live:
        nets = _networks(work, roles, live)
        dmdr_update(Update(recipe, Longest(0), nets, lambda *draw: batch, None, [shard], META, step=0))
    return {key: peak for key, peak in live.peaks.items() if key[0]}


def _networks(work: Workload, roles: Roles, live: LiveBytes) -> Networks:
    def role(name: str) -> MetaRole:
        network = as_network(work.shape_of(name), getattr(roles, name), DTYPES[work.dtype])
        trained = roles.trained(name)
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(live.keep_gradient if work.zero.stage == 0 else _gone)
        return MetaRole(network, trained, live, f"{name} update", lambda: roles.wear(**{name: 1.0}))

    return Networks(role("generator"), role("fake"), _score(work, roles, live))


def _gone(parameter: Tensor) -> None:
    """Sharded: the gradient leaves for the reduce bucket as soon as it is there."""
    parameter.grad = None


def _score(work: Workload, roles: Roles, live: LiveBytes) -> ScorePass:
    def labelled(model: nn.Module) -> Network:
        network = as_network(work.shape, model, DTYPES[work.dtype])

        def call(x_t: Tensor, t: Tensor, c: Any) -> Tensor:
            live.phase = "score pass"
            return network(x_t, t, c)

        return call

    if roles.teacher is roles.fake:
        return shared_scores(labelled(roles.teacher), lambda scale: roles.wear(fake=scale), fake_scale=1.0)
    return separate_scores(labelled(roles.fake), labelled(roles.teacher))


def _watch(work: Workload, shape: Shape, model: nn.Module, live: LiveBytes) -> None:
    """Recompute as the workload says; each block says that it runs, forward and backward."""
    set_recompute(model, work.activation)
    family = shape.opened()
    for name, block in family.blocks(model):
        kind = family.kind(name, block)
        block.register_forward_pre_hook(lambda *_, kind=kind: setattr(live, "part", kind))
        block.register_forward_hook(lambda _, __, out, kind=kind: _leave(live, out, kind))


def _leave(live: LiveBytes, out: Any, kind: str) -> None:
    live.part = f"after {kind}"
    for tensor in out if isinstance(out, tuple) else (out,):
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            tensor.register_hook(lambda grad: setattr(live, "part", kind))
