"""From a configuration to the three roles: teacher weights, generator, fake score, score pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dmdr_fast.algorithm.score_pass import separate_scores, shared_scores
from dmdr_fast.algorithm.step import Networks
from dmdr_fast.config import Config
from dmdr_fast.engine.engines import DTYPES, Role, TrainedRole, frozen_network, trained_engine
from dmdr_fast.engine.memory import check_levers, class_probe, quantise_frozen, set_levers
from dmdr_fast.errors import UserError
from dmdr_fast.models.lora import LoraAdapter, add_lora
from dmdr_fast.models.sit import SiT, load_sit_weights
from dmdr_fast.preflight import HUB_PREFIX


def build_network(config: Config) -> SiT:
    """The network of ``model``, untrained."""
    m = config.model
    return SiT(
        input_size=config.latent_size,
        patch_size=m.patch_size,
        in_channels=m.channels,
        hidden_size=m.hidden_size,
        depth=m.depth,
        num_heads=m.num_heads,
        num_classes=m.num_classes,
        learn_sigma=m.learn_sigma,
        time_reversed=m.time_reversed,
    )


def load_network(config: Config, weights: Path) -> SiT:
    """The network of ``model`` with the weights of a file, strictly."""
    network = build_network(config)
    try:
        load_sit_weights(network, weights)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(f"teacher.weights: {error}") from None
    return network


def resolve_weights(weights: str) -> Path:
    """A local path from a path or ``hf://ORG/REPO/FILE``, downloaded into the hub's own cache.

    Raises:
        UserError: the hub does not give it.
    """
    if not weights.startswith(HUB_PREFIX):
        return Path(weights).expanduser()
    organisation, repository, file = weights.removeprefix(HUB_PREFIX).split("/", 2)
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(f"{organisation}/{repository}", file))
    except Exception as error:  # the hub's errors have no common base, and all mean the same to the user
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"teacher.weights: {weights} could not be fetched: {reason}; give a local path") from None


@dataclass(frozen=True)
class Roles:
    """The networks of a run as the algorithm, the checkpoint and the evaluation need them."""

    networks: Networks
    generator: TrainedRole
    fake: TrainedRole
    teacher: Callable[[Tensor, Tensor, Tensor], Tensor]  # the plain teacher, without LoRA
    trained_parameters: dict[str, int]
    total_parameters: dict[str, int]
    notes: tuple[str, ...] = ()  # what the memory levers took, and why


def build_roles(config: Config, teacher: Path, device: torch.device, lora_seed: int) -> Roles:
    """Engines for the trained roles over the teacher's weights, with the sharing of ``config``."""
    check_levers(config, device)
    dtype = DTYPES[config.deepspeed.dtype]
    generator_net = load_network(config, teacher).to(device)
    fake_net = load_network(config, teacher).to(device)
    attention, _ = (set_levers(net, config, dtype, device) for net in (generator_net, fake_net))
    notes = [f"attention  {attention}"]
    adapter = _lora(fake_net, config, lora_seed) if config.sharing == "shared_score" else None
    if adapter is not None and config.memory.frozen != "native":
        notes.append(quantise_frozen(fake_net.to(dtype), class_probe(fake_net, config, device), config))
    counts = [_counts(net) for net in (generator_net, fake_net)]
    generator = TrainedRole(trained_engine(generator_net, config, config.optimizer.generator), config)
    fake = TrainedRole(
        trained_engine(fake_net, config, config.optimizer.fake), config, adapter, config.dyna_dg.fake_scale
    )
    if adapter is not None:
        shared = Role(fake.engine, dtype)
        score = shared_scores(shared, adapter.set_scale, fake_scale=config.dyna_dg.fake_scale)

        def plain_teacher(x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            adapter.set_scale(None)
            return shared(x_t, t, condition)
    else:
        teacher_net = load_network(config, teacher).to(device, dtype)
        set_levers(teacher_net, config, dtype, device)
        if config.memory.frozen != "native":
            notes.append(quantise_frozen(teacher_net, class_probe(teacher_net, config, device), config))
        plain_teacher = Role(frozen_network(teacher_net, config, device), dtype)
        score = separate_scores(fake, plain_teacher)
        counts.append(counts[0])
    names = ("generator", "fake", "teacher")
    return Roles(
        networks=Networks(generator, fake, score, generator_net.null_condition),
        generator=generator,
        fake=fake,
        teacher=plain_teacher,
        trained_parameters={n: c[0] for n, c in zip(names, counts, strict=False) if n != "teacher"},
        total_parameters={n: c[1] for n, c in zip(names, counts, strict=False)},
        notes=tuple(notes),
    )


def _lora(network: nn.Module, config: Config, seed: int) -> LoraAdapter:
    network.requires_grad_(False)
    try:
        return add_lora(
            network,
            "fake",
            rank=config.lora.rank,
            targets=config.lora.targets,
            form=config.lora.form,
            init_std=config.lora.init_std,
            generator=torch.Generator().manual_seed(seed),
        )
    except ValueError as error:
        raise UserError(f"lora.targets: {error}") from None


def _counts(network: nn.Module) -> tuple[int, int]:
    """(trained, all) parameters."""
    sizes = [(p.numel(), p.requires_grad) for p in network.parameters()]
    return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)
