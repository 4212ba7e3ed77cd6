"""SiT: the class-conditional network of ``model``, with weights from a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch

from dmdr_fast.algorithm.paths import FLOW
from dmdr_fast.algorithm.recipe import Decode
from dmdr_fast.config import Config
from dmdr_fast.engine.engines import DTYPES, engine_config
from dmdr_fast.engine.model import Start, partitions_on_load
from dmdr_fast.errors import UserError
from dmdr_fast.models.sit import SiT, load_sit_weights
from dmdr_fast.models.sit_weights import latent_statistics, stored_sit_tensors
from dmdr_fast.models.stored import Stored, load_partitioned, parameters_on_meta
from dmdr_fast.models.vae import (
    IdentityDecoder,
    LatentDecoder,
    decoder_dtype,
    save_decoder_memory,
    speed_up_convolutions,
)
from dmdr_fast.ops.dmd import Prediction
from dmdr_fast.preflight import HUB_PREFIX

LATENT_SATURATION = 4.0  # latents have unit variance
STUDENT = "student.model.weights"


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


def resolve_weights(weights: str, key: str = "teacher.weights") -> Path:
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
        raise UserError(f"{key}: {weights} could not be fetched: {reason}; give a local path") from None


@dataclass(frozen=True)
class SiTModel:
    """SiT as a run's model (``dmdr_fast.engine.model.Model``). ``teacher`` is the file of the teacher's weights."""

    config: Config
    teacher: Path
    key: str = "teacher.weights"  # which names ``teacher``

    prediction: ClassVar[Prediction] = "flow"
    path = FLOW
    lora_targets = ("attn.qkv",)
    merges_lora = True
    more_shapes = ()

    @property
    def student(self) -> SiTModel:
        own = self.config.student.model
        if own is None:
            return self
        model = self.config.model.model_copy(update=own.model_dump(exclude={"weights"}))
        config = self.config.model_copy(update={"model": model})
        return replace(self, config=config, teacher=resolve_weights(own.weights, STUDENT), key=STUDENT)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        size = self.config.latent_size
        return self.config.model.channels, size, size

    @property
    def token(self) -> int:
        return self.config.model.patch_size

    @property
    def teacher_shift(self) -> float:
        return self.config.student.shift

    @property
    def saturation(self) -> float:
        return 1.0 if self.config.decoder.kind == "identity" else LATENT_SATURATION

    @property
    def num_classes(self) -> int:
        return self.config.model.num_classes

    def skeleton(self) -> SiT:
        with parameters_on_meta():
            return build_network(self.config)

    def load(self, device: torch.device, generator: Path | Start | None = None, *, whole: bool = False) -> SiT:
        settings = engine_config(self.config, trained=True)
        key = generator.key if isinstance(generator, Start) else self.key
        try:
            if not partitions_on_load(settings, whole=whole):
                network = build_network(self.config)
                load_sit_weights(network, self._weights(network, generator))
                return network.to(device)
            network = self.skeleton()
            stored = stored_sit_tensors(network, self._weights(network, generator))
            load_partitioned(network, stored, dtype=DTYPES[self.config.deepspeed.dtype], settings=settings)
        except (ValueError, FileNotFoundError) as error:
            reason = str(error)
            for size in ("hidden_size", "depth") if self.key == STUDENT else ():
                reason = reason.replace(f"model.{size}", f"student.model.{size}")
            raise UserError(f"{key}: {reason}") from None
        return network

    def check_student(self) -> None:
        """Look whether the generator's own network was trained on the teacher's latents, as far as its file tells.

        Raises:
            UserError: it was not.
        """
        if self.student is self:
            return
        try:
            own, taught = (latent_statistics(file) for file in (self.student.teacher, self.teacher))
        except (ValueError, FileNotFoundError) as error:
            raise UserError(f"{STUDENT}: {error}") from None
        if own is not None and not (taught and all(map(torch.equal, own, taught))):
            raise UserError(
                f"{STUDENT}: {self.student.teacher} normalises its latents otherwise than the teacher's file; give "
                "weights that were trained on the teacher's latents"
            )

    def _weights(self, network: SiT, generator: Path | Start | None) -> Path | Mapping[str, Stored]:
        if not isinstance(generator, Start):
            return generator or self.teacher
        return generator.over(lambda: stored_sit_tensors(network, self.teacher))

    def weight_files(self) -> list[Path]:
        return [self.teacher]

    def decoder(self, device: torch.device) -> Decode:
        config = self.config
        if config.decoder.kind == "identity":
            return IdentityDecoder().decode
        try:
            assert config.decoder.path is not None  # a VAE has one
            dtype = decoder_dtype(config.decoder.dtype, device)
            decoder = LatentDecoder.from_pretrained(config.decoder.path, dtype=dtype)
            decoder.denormalise(latent_statistics(self.teacher))
            decoder = decoder.to(device)
            speed_up_convolutions(decoder.vae, device)
            save_decoder_memory(decoder.vae, tiling=config.decoder.tiling, recompute=config.decoder.recompute)
        except (FileNotFoundError, ValueError) as error:
            raise UserError(f"decoder.path: {error}") from None
        factor = 2 ** (len(decoder.vae.config.block_out_channels) - 1)
        if (factor, decoder.vae.config.latent_channels) != (config.decoder_factor, config.model.channels):
            raise UserError(
                f"decoder.path: {config.decoder.path} makes {factor} pixels of a latent pixel and takes "
                f"{decoder.vae.config.latent_channels} channels; expected {config.decoder_factor} and model.channels "
                f"{config.model.channels}"
            )
        return decoder.decode
