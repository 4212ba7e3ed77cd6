"""From a configuration to the three roles: teacher, generator, fake score, and the score pass of two of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dmdr_fast.algorithm.recipe import Networks
from dmdr_fast.algorithm.rollout import Network
from dmdr_fast.algorithm.score_pass import separate_scores, shared_scores
from dmdr_fast.config import Config, LoRA, StudentLoRA
from dmdr_fast.engine import compute, graphs
from dmdr_fast.engine.collectives import collectives
from dmdr_fast.engine.conditions import Conditions
from dmdr_fast.engine.engines import DTYPES, frozen_network, trace_graded_passes, trained_engine
from dmdr_fast.engine.graphs import Graphs
from dmdr_fast.engine.memory import build_probe, check_levers, quantise_frozen
from dmdr_fast.engine.model import Model, Start
from dmdr_fast.engine.roles import AdapterRole, FrozenRole, TrainedRole
from dmdr_fast.engine.runtime import Runtime
from dmdr_fast.engine.score import ScoreRole
from dmdr_fast.errors import UserError
from dmdr_fast.models.lora import LoraAdapter, add_lora
from dmdr_fast.models.partitioned import whole_shape


def frozen_role(model: Model, config: Config, device: torch.device, generator: Path | None = None) -> FrozenRole:
    """The teacher, or the generator of a file, only evaluated: sharded under stage 3. All ranks must call."""
    model = model if generator is None else model.student
    network = model.load(device, generator)
    compute.apply(network, config, device)
    return FrozenRole(frozen_network(network, config, device), DTYPES[config.deepspeed.dtype])


class FrozenReference:
    """The generator as it was when RL began, for a KL or DPO: empty until :meth:`load`, then a frozen network."""

    def __init__(self, model: Model, config: Config, device: torch.device) -> None:
        self.model, self.config, self.device = model, config, device
        self.network: Network | None = None

    def load(self, weights: Path) -> None:
        """Take the weights of a file that ``dmdr_fast.engine.shards.save_generator`` wrote. All ranks must call.

        Raises:
            UserError: no such file, as after a move of the run without it.
        """
        if self.network is None:
            if not weights.is_file():
                raise UserError(
                    f"{weights}: missing, and the KL or DPO of this run holds the generator to it: put it back, or "
                    "start again with --resume never"
                )
            self.network = frozen_role(self.model, self.config, self.device, weights)

    def __call__(self, x_t: Tensor, t: Tensor, condition: Any) -> Tensor:
        assert self.network is not None, "load() comes first"
        return self.network(x_t, t, condition)


@dataclass(frozen=True)
class Roles:
    """The networks of a run as the algorithm, the checkpoint and the evaluation need them."""

    networks: Networks
    generator: TrainedRole | AdapterRole
    fake: TrainedRole | AdapterRole
    scorers: tuple[ScoreRole, ...]  # of the score pass
    teacher: Network  # the plain teacher, without LoRA
    trained_parameters: dict[str, int]
    total_parameters: dict[str, int]
    notes: tuple[str, ...] = ()  # what the memory and compute options did, and why
    graphs: Graphs | None = None  # of ``compute.cuda_graphs``

    @property
    def frozen_reference(self) -> FrozenReference | None:
        """The reference where it is one that must be loaded when RL begins."""
        reference = self.networks.reference
        return reference if isinstance(reference, FrozenReference) else None


def build_roles(
    config: Config,
    model: Model,
    conditions: Conditions,
    ranks: Runtime,
    lora_seed: int,
    starts: Mapping[str, Start] | None = None,
) -> Roles:
    """The roles over the teacher's weights, with the sharing of ``config``. All ranks must call.

    ``starts``: of the roles ("generator", "fake") that begin with other weights than the teacher's.
    """
    check_levers(config, ranks.device)
    graphs.check(config, ranks.device)
    build = _shared_all if config.sharing == "shared_all" else _engines
    roles = build(config, model, conditions, ranks, lora_seed, starts or {})
    return _replayed(roles) if config.compute.cuda_graphs else roles


def _engines(
    config: Config, model: Model, conditions: Conditions, ranks: Runtime, lora_seed: int, starts: Mapping[str, Start]
) -> Roles:
    """``separate`` and ``shared_score``: an engine for the generator, one for the fake score, a teacher."""
    dtype, device, student = DTYPES[config.deepspeed.dtype], ranks.device, config.student.lora
    shared_base, quantised = config.sharing == "shared_score", config.memory.frozen != "native"
    generator_net = model.student.load(device, None if student.rank else starts.get("generator"))
    fake_net = model.load(device, None if shared_base else starts.get("fake"), whole=shared_base and quantised)
    notes = []
    generator_adapter = adapter = None
    # DeepSpeed casts adapters to the compute type anyway, unless the network is partitioned.
    if student.rank:
        generator_adapter = _lora(generator_net, "generator", student, model.student, lora_seed + 1, dtype)
    if shared_base:
        adapter = _lora(fake_net, "fake", config.lora, model, lora_seed, dtype)
        if quantised:
            probe = build_probe(model, conditions, config, device)
            notes.append(quantise_frozen(fake_net.to(dtype), probe, config))
    _fill(starts, config, generator_adapter, adapter)
    counts = {"generator": _counts(generator_net), "fake": _counts(fake_net)}
    nets = {"generator": generator_net, "fake": fake_net}
    paths = {name: compute.apply(net, config, device) for name, net in nets.items()}
    generator = TrainedRole(
        trained_engine(generator_net, config, config.optimizer.generator), config, generator_adapter, student.scale
    )
    fake_scale = config.dyna_dg.fake_scale
    fake = TrainedRole(trained_engine(fake_net, config, config.optimizer.fake), config, adapter, fake_scale)
    if adapter is not None:
        scorers: tuple[ScoreRole, ...] = (ScoreRole(fake.engine, config),)
        score = shared_scores(scorers[0], adapter.set_scale, fake_scale=fake_scale)
        teacher = FrozenRole(fake.engine, dtype, {adapter: None})
    else:
        teacher_net = model.load(device, whole=quantised).to(dtype)
        if quantised:
            notes.append(quantise_frozen(teacher_net, build_probe(model, conditions, config, device), config))
        nets["teacher"], paths["teacher"] = teacher_net, compute.apply(teacher_net, config, device)
        counts["teacher"] = (0, _counts(teacher_net)[1])
        frozen = frozen_network(teacher_net, config, device)
        teacher = FrozenRole(frozen, dtype)
        scorers = (ScoreRole(fake.engine, config), ScoreRole(frozen, config))
        score = separate_scores(scorers[0], scorers[1])
    lora_off = None if generator_adapter is None else FrozenRole(generator.engine, dtype, {generator_adapter: None})
    reference = _reference(config, model, device, lora_off)
    trained = {n: trained for n, (trained, _) in counts.items() if trained}
    if config.deepspeed.stage == 3:
        notes.append(collectives(config, nets, trained))
    return Roles(
        networks=Networks(generator, fake, score, reference),
        generator=generator,
        fake=fake,
        scorers=scorers,
        teacher=teacher,
        trained_parameters=trained,
        total_parameters={n: total for n, (_, total) in counts.items()},
        notes=(*compute.lines(paths), *notes),
    )


def _shared_all(
    config: Config, model: Model, conditions: Conditions, ranks: Runtime, lora_seed: int, starts: Mapping[str, Start]
) -> Roles:
    """``shared_all``: one frozen base; generator, fake score and teacher differ in the adapters that act.

    The adapters are kept out of the base's own parameters: ZeRO-3 partitions the base alone. The base has no
    optimizer, so the module is called, not DeepSpeed's engine, which refuses a backward pass from there.
    """
    dtype, device, student = DTYPES[config.deepspeed.dtype], ranks.device, config.student.lora
    quantised, fake_scale = config.memory.frozen != "native", config.dyna_dg.fake_scale
    base = model.load(device, whole=quantised).to(dtype)
    notes = []
    adapters = {
        "generator": _lora(base, "generator", student, model, lora_seed + 1, torch.float32, registered=False),
        "fake": _lora(base, "fake", config.lora, model, lora_seed, torch.float32, registered=False),
    }
    _fill(starts, config, *adapters.values())
    if quantised:
        notes.append(quantise_frozen(base, build_probe(model, conditions, config, device), config))
    total = _counts(base)[1]
    path = compute.apply(base, config, device)
    base = frozen_network(base, config, device)
    if config.deepspeed.stage == 3:
        trace_graded_passes(base)
        base = cast(nn.Module, base.module)
    g, f = adapters.values()
    generator = AdapterRole(base, config, g, {g: student.scale, f: None}, config.optimizer.generator, ranks)
    fake = AdapterRole(base, config, f, {g: None, f: fake_scale}, config.optimizer.fake, ranks)
    teacher = FrozenRole(base, dtype, {g: None, f: None})
    scorers = (ScoreRole(base, config, {g: None}),)
    score = shared_scores(*scorers, f.set_scale, fake_scale=fake_scale)
    reference = _reference(config, model, device, teacher)
    trained = {n: sum(p.numel() for p in a.parameters()) for n, a in adapters.items()}
    if config.deepspeed.stage == 3:
        notes.append(collectives(config, {"base": base}, trained))
    return Roles(
        networks=Networks(generator, fake, score, reference),
        generator=generator,
        fake=fake,
        scorers=scorers,
        teacher=teacher,
        trained_parameters=trained,
        total_parameters={"base": total},
        notes=(*compute.lines({"base": path}), *notes),
    )


def _replayed(roles: Roles) -> Roles:
    """``roles`` whose rollouts and score pass are replayed (``compute.cuda_graphs``)."""
    shared = Graphs()
    for role in (roles.generator, *roles.scorers):
        role.network = shared.of(role.network)
    line = "CUDA graphs of rollouts and the score pass: captured when each first runs, then replayed"
    return replace(roles, graphs=shared, notes=(*roles.notes, line))


def _fill(starts: Mapping[str, Start], config: Config, generator: LoraAdapter | None, fake: LoraAdapter | None) -> None:
    """Give the adapters the values that they start from."""
    for role, adapter, scale in (("generator", generator, config.student.lora.scale), ("fake", fake, 1.0)):
        if adapter is not None and role in starts:
            starts[role].fill(adapter, scale)


def _reference(config: Config, model: Model, device: torch.device, lora_off: Network | None) -> Network | None:
    """What a KL or DPO holds the generator to; a frozen one is loaded when RL begins."""
    kind = config.reference_kind
    return FrozenReference(model, config, device) if kind == "frozen" else lora_off if kind == "lora_off" else None


def _lora(
    network: nn.Module,
    role: str,
    settings: LoRA | StudentLoRA,
    model: Model,
    seed: int,
    dtype: torch.dtype,
    registered: bool = True,
) -> LoraAdapter:
    network.requires_grad_(False)
    try:
        return add_lora(
            network,
            role,
            rank=settings.rank,
            targets=settings.targets or model.lora_targets,
            form=getattr(settings, "form", "standard"),
            init_std=getattr(settings, "init_std", None),
            dtype=dtype,
            generator=torch.Generator().manual_seed(seed),
            registered=registered,
        )
    except ValueError as error:
        raise UserError(f"{'student.lora' if role == 'generator' else 'lora'}.targets: {error}") from None


def _counts(network: nn.Module) -> tuple[int, int]:
    """(trained, all) parameters."""
    sizes = [(whole_shape(p).numel(), p.requires_grad) for p in network.parameters()]
    return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)
