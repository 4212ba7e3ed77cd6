"""A family of text-to-image networks as a run's model: everything from one diffusers pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmdr_fast.algorithm.paths import FLOW
from dmdr_fast.algorithm.paths import Path as NoisePath
from dmdr_fast.algorithm.recipe import Decode
from dmdr_fast.config import Config
from dmdr_fast.engine.engines import DTYPES, engine_config
from dmdr_fast.engine.model import Start, partitions_on_load
from dmdr_fast.engine.sit_model import LATENT_SATURATION
from dmdr_fast.errors import UserError
from dmdr_fast.models.families import Denoiser, Family, open_family
from dmdr_fast.models.families.loading import check_weights, weights_of
from dmdr_fast.models.families.student import check_student
from dmdr_fast.models.stored import (
    Stored,
    load_partitioned,
    load_whole,
    parameters_on_meta,
    stored_tensors,
    with_lora,
)
from dmdr_fast.models.vae import decoder_dtype, save_decoder_memory, speed_up_convolutions
from dmdr_fast.ops.dmd import Prediction


@dataclass(frozen=True)
class PipelineModel:
    """A pipeline's denoiser and VAE as a run's model (``dmdr_fast.engine.model.Model``)."""

    config: Config
    family: Family
    latent_shape: tuple[int, int, int]
    more_shapes: tuple[tuple[int, int, int], ...] = ()
    student_family: Family | None = None  # of ``student.pipeline``
    key: str = "teacher.pipeline"  # which names ``family``

    saturation = LATENT_SATURATION
    merges_lora = False  # merged, the weights of a 20B network would take 80 GB of one host's memory
    num_classes = None

    @classmethod
    def open(cls, config: Config) -> PipelineModel:
        """Read the pipeline's configs and look for its weights; nothing is loaded.

        Raises:
            UserError: no pipeline, one of another family, weights that are missing, a resolution it cannot make.
        """
        teacher, name = config.teacher, config.model.family
        assert teacher.pipeline is not None  # every family but SiT has one
        try:
            family = open_family(
                teacher.pipeline, revision=teacher.revision, length=config.data.max_length, guidance=teacher.guidance
            )
            if family.name != name:
                raise ValueError(f"pipeline {teacher.pipeline}: a {family.pipelines[0]}, of model.family {family.name}")
            check_weights(family.path, family.folder)
            check_weights(family.path, "vae")
        except (FileNotFoundError, ValueError) as error:
            raise UserError(f"teacher.pipeline: {error} (model.family is {name})") from None
        _check_guidance(config, family)
        try:
            shape, *more = (family.latent_shape(*size) for size in config.model.sizes)
        except ValueError as error:
            raise UserError(f"model.resolution: {error}") from None
        return cls(config, family, shape, tuple(more), _student(config, family))

    @property
    def student(self) -> PipelineModel:
        if self.student_family is None:
            return self
        return replace(self, family=self.student_family, student_family=None, key="student.pipeline")

    @property
    def prediction(self) -> Prediction:
        return self.family.prediction

    @property
    def path(self) -> NoisePath:
        return FLOW if self.prediction == "flow" else self.family

    @property
    def token(self) -> int:
        return self.family.patch

    @property
    def teacher_shift(self) -> float:
        return self.family.default_shift(*self.config.model.sizes[0])

    @property
    def lora_targets(self) -> tuple[str, ...]:
        return self.family.lora_targets

    def skeleton(self) -> nn.Module:
        with parameters_on_meta():
            return self.family.build_from_config(self.family.network_config)

    def load(self, device: torch.device, generator: Path | Start | None = None, *, whole: bool = False) -> Denoiser:
        settings, dtype = engine_config(self.config, trained=True), DTYPES[self.config.deepspeed.dtype]
        partitioned = partitions_on_load(settings, whole=whole)
        key = generator.key if isinstance(generator, Start) else self.key
        try:
            if generator is None and not partitioned:
                return Denoiser(self.family, self.family.load_transformer(dtype)).to(device)
            network = self.skeleton()
            stored = self._stored(generator)
            if partitioned:
                load_partitioned(network, stored, dtype=dtype, settings=settings)
            else:
                load_whole(network, stored, dtype=dtype, device=device)
        except (ValueError, FileNotFoundError) as error:
            raise UserError(f"{key}: {error}") from None
        return Denoiser(self.family, network.eval()).to(device)

    def weight_files(self) -> list[Path]:
        place = weights_of(self.family.path, self.family.folder, self.family.revision)
        if place.is_file():
            return [place]
        return sorted(place.glob("*.safetensors")) or sorted(place.glob("*.bin"))

    def _stored(self, generator: Path | Start | None) -> dict[str, Stored]:
        """The network's tensors: the pipeline's, with the generator's in their place or its LoRA merged in."""
        own = stored_tensors(weights_of(self.family.path, self.family.folder, self.family.revision))
        if generator is None:
            return own
        if isinstance(generator, Start):
            weights = generator.over(lambda: own)
            odd = sorted(weights.keys() ^ own.keys())
            if odd:
                raise ValueError(f"{generator.source}: {odd[0]} and {len(odd) - 1} more are not of both networks")
            return dict(weights)
        trained = {name.removeprefix(Denoiser.prefix): tensor for name, tensor in stored_tensors(generator).items()}
        if is_lora(trained):
            return with_lora(own, trained, lora_scale(generator))
        return own | trained

    def decoder(self, device: torch.device) -> Decode:
        settings = self.config.decoder
        try:
            vae = self.family.load_vae(decoder_dtype(settings.dtype, device)).to(device)
            speed_up_convolutions(vae, device)
            save_decoder_memory(vae, tiling=settings.tiling, recompute=settings.recompute)
        except (ValueError, FileNotFoundError) as error:
            raise UserError(f"teacher.pipeline: {error}") from None
        return PipelineDecoder(self.family, vae).decode


def _student(config: Config, teacher: Family) -> Family | None:
    """The family of ``student.pipeline``; None where the generator is the teacher's network.

    Raises:
        UserError: no pipeline, weights that are missing, or a network that this teacher cannot teach.
    """
    student = config.student
    if student.pipeline is None:
        return None
    try:
        family = open_family(
            student.pipeline, revision=student.revision, length=teacher.length, guidance=config.teacher.guidance
        )
        check_weights(family.path, family.folder)
        check_student(teacher, family, config.model.sizes)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"student.pipeline: {student.pipeline}: {error}") from None
    return family


def _check_guidance(config: Config, family: Family) -> None:
    """CFG beside a guidance input is asked for by name.

    Raises:
        UserError: it is not.
    """
    if family.guidance is None or config.teacher.cfg_mode != "pipeline":
        return
    scales = [("cfg_scale", phase.teacher.cfg_scale) for phase in config.each_phase]
    for key, scale in (*scales, ("sample_cfg_scale", config.teacher.sample_cfg_scale)):
        if config.guides(scale):
            raise UserError(
                f"teacher.{key}: {scale:g} on top of guidance {family.guidance:g}, which is an input of this network "
                f"and what its pipeline guides by; leave teacher.{key} out and set teacher.guidance, or ask for both "
                "with teacher.cfg_mode standard"
            )


@dataclass(frozen=True)
class PipelineDecoder:
    """The pipeline's VAE, frozen."""

    family: Family
    vae: nn.Module

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] in about [-1, 1], in the VAE's dtype; differentiable."""
        return self.family.decode(self.vae, latents)


def is_lora(tensors: Mapping[str, Any]) -> bool:
    """Whether a generator's file holds an adapter rather than weights."""
    return any(name.endswith(".lora_A") for name in tensors)


def lora_scale(generator: Path) -> float:
    """The scale that a generator's adapter was trained at, noted in its file."""
    from safetensors import safe_open

    with safe_open(generator, framework="pt") as file:
        return float((file.metadata() or {}).get("lora_scale", "1.0"))
