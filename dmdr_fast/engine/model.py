"""What a run's network is: SiT on class labels, or a family of text-to-image networks, behind one small protocol."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, Protocol

import torch
from torch import nn

from dmdr_fast.algorithm.paths import Path
from dmdr_fast.algorithm.recipe import Decode
from dmdr_fast.config import Config, LoRA, StudentLoRA
from dmdr_fast.errors import UserError
from dmdr_fast.models.lora import LoraAdapter, target_layers
from dmdr_fast.models.stored import Stored, parameter_value, with_lora
from dmdr_fast.ops.dmd import Prediction

# What stands before a network's own names in files of wrappers, PEFT and pipelines, and in our own modules.
PREFIXES = re.compile(r"^(module\.|base_model\.model\.|transformer\.|unet\.|diffusion_model\.)+")


@dataclass(frozen=True)
class Start:
    """Weights by the network's own names, and an adapter's as "LAYER.lora_A" [in, r], "LAYER.lora_B" [r, out]."""

    key: str  # of the configuration
    source: str
    weights: Mapping[str, Stored]
    lora: Mapping[str, Stored]
    lora_scale: float = 1.0
    is_partial: bool = False  # a checkpoint, which holds what is trained: the rest is the teacher's

    def fill(self, adapter: LoraAdapter, scale: float) -> None:
        """Put the adapter's values into one that will act at ``scale``, before an engine takes it over.

        Raises:
            UserError: there is none, or it is one of other layers, another rank or another form.
        """
        if not self.lora:
            raise UserError(f"{self.key}: {self.source} holds no adapter (LoRA), as this role is; name one")
        names = {PREFIXES.sub("", name): name for name, _ in adapter.named_parameters()}
        factor = self.lora_scale / scale
        try:
            values = {
                names.get(name, name): parameter_value(self.lora, name).float() * (factor if ".lora_B" in name else 1.0)
                for name in self.lora
            }
            adapter.load_state_dict(values)
        except ValueError as error:
            raise UserError(f"{self.key}: {self.source}: {error}") from None

    def over(self, teacher: Callable[[], Mapping[str, Stored]]) -> Mapping[str, Stored]:
        """Whole weights: its own, or its adapter merged into the teacher's.

        Raises:
            ValueError: there are both, or the adapter cannot be merged.
        """
        if self.lora and self.weights:
            raise ValueError(f"{self.source} holds weights and an adapter beside them; merge them, or train an adapter")
        if not self.lora:
            return {**teacher(), **self.weights} if self.is_partial else self.weights
        if not all(name.endswith((".lora_A", ".lora_B")) for name in self.lora):
            raise ValueError(f"{self.source}: an adapter on qkv's output is no part of weights; train an adapter")
        return with_lora(teacher(), self.lora, self.lora_scale)


class Model(Protocol):
    """The network that teacher, fake score and generator start from, and what belongs to it.

    A generator of another size has a model of its own, ``student``, in which "the teacher" below is that network as it
    was before training.

    Networks are called as ``network(x_t, t, condition)``: x_t [B, *latent_shape] in the compute dtype, t fp32 [B]; they
    return ``prediction`` ("flow" or "eps") on ``path`` in x_t's shape.

    Attributes:
        more_shapes: latents of the other sizes of ``model.resolution``, whose first is ``latent_shape``'s.
        token: latent pixels along one edge of a token, over which per-token guidance takes its norms.
        teacher_shift: the timestep shift of the teacher's own multi-step samples.
        saturation: |x0| beyond which a value counts as saturated.
        lora_targets: layers of an adapter where the configuration names none.
        merges_lora: a generator that is a LoRA is saved merged into the weights; False: by itself.
        num_classes: None for networks that read prompts.
    """

    @property
    def config(self) -> Config: ...
    @property
    def student(self) -> Model:
        """The generator's: itself, unless ``student.pipeline`` or ``student.model`` names another network."""
        ...

    @property
    def prediction(self) -> Prediction: ...
    @property
    def path(self) -> Path: ...
    @property
    def latent_shape(self) -> tuple[int, ...]: ...
    @property
    def more_shapes(self) -> tuple[tuple[int, ...], ...]: ...
    @property
    def token(self) -> int: ...
    @property
    def teacher_shift(self) -> float: ...
    @property
    def saturation(self) -> float: ...
    @property
    def lora_targets(self) -> tuple[str, ...]: ...
    @property
    def merges_lora(self) -> bool: ...
    @property
    def num_classes(self) -> int | None: ...

    def skeleton(self) -> nn.Module:
        """The network with its parameters on the meta device: its layers, without weights."""
        ...

    def load(
        self, device: torch.device, generator: FilePath | Start | None = None, *, whole: bool = False
    ) -> nn.Module:
        """The teacher's network on ``device``, or with the weights of a file that ``save_generator`` wrote or a start.

        Under stage 3 it is partitioned while it is read, in the compute dtype, and no rank ever holds all of it; unless
        ``whole``, or where partitions go to NVMe: DeepSpeed sends them there when it takes over the network.

        Raises:
            UserError: weights that are missing, damaged or another network's.
        """
        ...

    def weight_files(self) -> list[FilePath]:
        """The files of the teacher's weights, in an order of their own."""
        ...

    def decoder(self, device: torch.device) -> Decode:
        """Latents fp32 to images in about [-1, 1]."""
        ...


def open_model(config: Config) -> Model:
    """The model of ``model.family``; a digits teacher is trained first where the recipe says so. Any rank may call.

    Raises:
        UserError: the teacher cannot be had, or does not fit the configuration.
    """
    if config.model.family == "sit":
        from dmdr_fast.engine.sit_model import SiTModel
        from dmdr_fast.engine.teacher import teacher_weights

        _check_adapters(config, SiTModel(config, FilePath()))
        sit = SiTModel(config, teacher_weights(config))
        sit.check_student()
        return sit
    from dmdr_fast.engine.pipeline_model import PipelineModel

    model = PipelineModel.open(config)
    _check_adapters(config, model)
    return model


def _check_adapters(config: Config, model: Model) -> None:
    """Whether the network has the layers that get a LoRA, one of them at least as wide as its rank."""
    settings: dict[str, tuple[Model, LoRA | StudentLoRA]] = {}
    if config.sharing != "separate":
        settings["lora"] = model, config.lora
    if config.student.lora.rank:
        settings["student.lora"] = model.student, config.student.lora
    for key, (adapted, lora) in settings.items():
        try:
            layers = target_layers(adapted.skeleton(), key, lora.targets or adapted.lora_targets)
        except ValueError as error:
            raise UserError(f"{key}.targets: {error}") from None
        most = max(min(layer.in_features, layer.out_features) for layer in layers.values())
        if lora.rank > most:
            raise UserError(f"{key}.rank: {lora.rank} is more than the {most} features of the widest layer; lower it")


def partitions_on_load(settings: dict[str, Any], *, whole: bool) -> bool:
    """Whether the weights of a network with these DeepSpeed settings are partitioned as they are read."""
    zero = settings["zero_optimization"]
    return zero["stage"] == 3 and not whole and zero.get("offload_param", {}).get("device") != "nvme"
