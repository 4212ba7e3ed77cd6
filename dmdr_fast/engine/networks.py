"""From a configuration to the three roles: teacher weights, generator, fake score, score pass."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmdr_fast.algorithm.recipe import Networks
from dmdr_fast.algorithm.rollout import Network
from dmdr_fast.algorithm.score_pass import separate_scores, shared_scores
from dmdr_fast.config import Config, LoRA, StudentLoRA
from dmdr_fast.engine.engines import DTYPES, Role, TrainedRole, engine_config, frozen_network, trained_engine
from dmdr_fast.engine.memory import check_levers, class_probe, quantise_frozen, set_levers
from dmdr_fast.errors import UserError
from dmdr_fast.models.lora import LoraAdapter, add_lora
from dmdr_fast.models.partitioned import whole_shape
from dmdr_fast.models.sit import SiT, load_sit_weights
from dmdr_fast.models.sit_weights import stored_sit_tensors
from dmdr_fast.models.stored import load_partitioned, parameters_on_meta
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


def load_base(config: Config, weights: Path, device: torch.device, *, whole: bool = False) -> SiT:
    """The network of ``model`` with the weights of a file, on ``device``: what an engine is built around.

    Under stage 3 it is partitioned while it is read, in the compute dtype, and no rank ever holds all of it; unless
    ``whole``, or where partitions go to NVMe: DeepSpeed sends them there when it takes over the network.
    """
    settings = engine_config(config, trained=True)
    offload = settings["zero_optimization"].get("offload_param", {}).get("device")
    if settings["zero_optimization"]["stage"] != 3 or whole or offload == "nvme":
        return load_network(config, weights).to(device)
    with parameters_on_meta():
        network = build_network(config)
    try:
        stored = stored_sit_tensors(network, weights)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(f"teacher.weights: {error}") from None
    load_partitioned(network, stored, dtype=DTYPES[config.deepspeed.dtype], settings=settings)
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


class FrozenReference:
    """The generator as it was when RL began, for a KL or DPO: empty until :meth:`load`, then a frozen network."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        self.network: Network | None = None

    def load(self, weights: Path) -> None:
        """Take the weights of a file that :func:`dmdr_fast.engine.shards.save_weights` wrote. All ranks must call."""
        if self.network is None:
            network = load_base(self.config, weights, self.device)
            self.network = Role(frozen_network(network, self.config, self.device), DTYPES[self.config.deepspeed.dtype])

    @torch.no_grad()
    def __call__(self, x_t: Tensor, t: Tensor, condition: Any) -> Tensor:
        return self.network(x_t, t, condition)


@dataclass(frozen=True)
class Roles:
    """The networks of a run as the algorithm, the checkpoint and the evaluation need them."""

    networks: Networks
    generator: TrainedRole
    fake: TrainedRole
    teacher: Network  # the plain teacher, without LoRA
    frozen_reference: FrozenReference | None
    trained_parameters: dict[str, int]
    total_parameters: dict[str, int]
    notes: tuple[str, ...] = ()  # what the memory levers took, and why


def build_roles(config: Config, teacher: Path, device: torch.device, lora_seed: int) -> Roles:
    """Engines for the trained roles over the teacher's weights, with the sharing of ``config``."""
    check_levers(config, device)
    dtype = DTYPES[config.deepspeed.dtype]
    quantised = config.memory.frozen != "native"
    shared_base = config.sharing == "shared_score"
    generator_net = load_base(config, teacher, device)
    fake_net = load_base(config, teacher, device, whole=shared_base and quantised)
    attention, _ = (set_levers(net, config, dtype, device) for net in (generator_net, fake_net))
    notes = [f"attention  {attention}"]
    student = config.student.lora
    generator_adapter = adapter = None
    if student.rank:
        generator_adapter = _lora(generator_net, "generator", student, lora_seed + 1, "student.lora", dtype)
    if shared_base:
        adapter = _lora(fake_net, "fake", config.lora, lora_seed, "lora", dtype)
        if quantised:
            notes.append(quantise_frozen(fake_net.to(dtype), class_probe(fake_net, config, device), config))
    counts = [_counts(net) for net in (generator_net, fake_net)]
    generator = TrainedRole(
        trained_engine(generator_net, config, config.optimizer.generator), config, generator_adapter, student.scale
    )
    fake = TrainedRole(
        trained_engine(fake_net, config, config.optimizer.fake), config, adapter, config.dyna_dg.fake_scale
    )
    if adapter is not None:
        score = shared_scores(Role(fake.engine, dtype), adapter.set_scale, fake_scale=config.dyna_dg.fake_scale)
        plain_teacher = without_adapter(fake)
    else:
        teacher_net = load_base(config, teacher, device, whole=quantised).to(dtype)
        set_levers(teacher_net, config, dtype, device)
        if quantised:
            notes.append(quantise_frozen(teacher_net, class_probe(teacher_net, config, device), config))
        plain_teacher = Role(frozen_network(teacher_net, config, device), dtype)
        score = separate_scores(fake, plain_teacher)
        counts.append(counts[0])
    names = ("generator", "fake", "teacher")
    frozen = FrozenReference(config, device) if reference_kind(config) == "frozen" else None
    reference = without_adapter(generator) if reference_kind(config) == "lora_off" else frozen
    return Roles(
        networks=Networks(generator, fake, score, reference),
        generator=generator,
        fake=fake,
        teacher=plain_teacher,
        frozen_reference=frozen,
        trained_parameters={n: c[0] for n, c in zip(names, counts, strict=False) if n != "teacher"},
        total_parameters={n: c[1] for n, c in zip(names, counts, strict=False)},
        notes=tuple(notes),
    )


def reference_kind(config: Config) -> str | None:
    """What a KL or DPO holds the generator to: ``lora_off``, ``frozen``, or None where neither is used."""
    rl = config.rl
    uses_kl = rl.kl_weight > 0 and rl.regularizer != "none" and rl.method != "none"
    if not uses_kl and rl.method != "dpo":
        return None
    if rl.reference == "auto":
        return "lora_off" if config.student.lora.rank else "frozen"
    return rl.reference


def without_adapter(role: TrainedRole) -> Network:
    """The frozen base of a LoRA role, without grad."""
    plain = Role(role.engine, role.dtype)

    @torch.no_grad()
    def network(x_t: Tensor, t: Tensor, condition: Any) -> Tensor:
        role.adapter.set_scale(None)
        return plain(x_t, t, condition)

    return network


def _lora(
    network: nn.Module, role: str, settings: LoRA | StudentLoRA, seed: int, key: str, dtype: torch.dtype
) -> LoraAdapter:
    network.requires_grad_(False)
    try:
        return add_lora(
            network,
            role,
            rank=settings.rank,
            targets=settings.targets,
            form=getattr(settings, "form", "standard"),
            init_std=getattr(settings, "init_std", None),
            dtype=dtype,  # DeepSpeed casts them to it anyway, unless the network is partitioned
            generator=torch.Generator().manual_seed(seed),
        )
    except ValueError as error:
        raise UserError(f"{key}.targets: {error}") from None


def _counts(network: nn.Module) -> tuple[int, int]:
    """(trained, all) parameters."""
    sizes = [(whole_shape(p).numel(), p.requires_grad) for p in network.parameters()]
    return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)
