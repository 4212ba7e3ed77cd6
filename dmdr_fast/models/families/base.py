"""What a family of text-to-image teachers is to the trainer: one network with one convention for all of them.

A family knows how a diffusers pipeline feeds its denoiser: latent packing, position ids, time convention, guidance
embedding, text conditioning, and how latents become images. The trainer sees ``forward(network, x_t, t, condition)``:

    x_t        [B, C, H, W] in the network's dtype, the latent that the pipeline draws its noise in (before packing)
    t          fp32 [B] in [0, 1], 1 pure noise
    condition  a dictionary of tensors, batch first and of one length, so that torch.cat and slicing keep it whole
    returns    the prediction in x_t's shape: v = eps - x0 (``prediction`` "flow") or eps ("eps")

on the path x_t = alpha(t) x0 + sigma(t) eps of ``alpha_sigma``. A new family is one file with a subclass of
``Family``, named in ``dmdr_fast.models.families``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from dmdr_fast.models.families import loading
from dmdr_fast.models.families.backbone import Backbone, empty
from dmdr_fast.ops.dmd import Prediction

if TYPE_CHECKING:
    from diffusers import ModelMixin

Condition = dict[str, Tensor]
HOST_KEYS = frozenset({"lengths"})  # read by Python in the forward: on the device each read would wait for it


@dataclass(frozen=True)
class Family(Backbone):
    """A teacher pipeline of one family. Made by ``open_family``; ``dataclasses.replace`` changes a field.

    Attributes:
        path: pipeline folder or hub id.
        network_config, vae_config, scheduler_config: as the pipeline's files have them.
        length: text tokens of a condition, and the encoder's limit for a prompt.
        guidance: the guidance scale that a guidance-distilled network is told; None where it takes none.
        revision: branch, tag or commit of a hub id; its default branch where None.
    """

    pipelines: ClassVar[tuple[str, ...]]  # the pipeline classes it reads
    network: ClassVar[str]  # the denoiser's class in diffusers
    folder: ClassVar[str] = "transformer"  # where the pipeline keeps it
    vae: ClassVar[str] = "AutoencoderKL"
    prediction: ClassVar[Prediction] = "flow"
    block_names: ClassVar[tuple[str, ...]]  # patterns of the nn.ModuleLists that hold the repeated blocks
    default_length: ClassVar[int]
    default_guidance: ClassVar[float | None] = None
    encode_batch: ClassVar[int] = 8  # prompts in one pass of the encoders, always as many
    unguided: ClassVar[Mapping[str, float]] = {"guidance_scale": 0}  # its pipeline's call without guidance
    passes_sigmas: ClassVar[bool] = True  # its pipeline gives the scheduler the sigmas 1 - i / N
    sized: ClassVar[bool] = False  # its pipeline's default image size is the network's sample_size
    text_width: ClassVar[str] = "joint_attention_dim"  # the key of its configuration with the embeddings' width

    path: str
    network_config: Mapping[str, Any]
    vae_config: Mapping[str, Any]
    scheduler_config: Mapping[str, Any]
    length: int
    guidance: float | None = None
    revision: str | None = None

    # Networks

    @classmethod
    def of(cls, name: str, network_config: Mapping[str, Any], vae_config: Any, length: int) -> Family:
        guided = cls.default_guidance if network_config.get("guidance_embeds") else None
        return cls(name, network_config, vae_config or {}, {}, length, guided)

    @classmethod
    def build_from_config(cls, config: Mapping[str, Any]) -> ModelMixin:
        import diffusers  # seconds to import

        return getattr(diffusers, cls.network).from_config(dict(config))

    def load_transformer(self, dtype: torch.dtype, **from_pretrained: Any) -> ModelMixin:
        """The pipeline's network with its weights, in ``dtype``, through ``from_pretrained``.

        Raises:
            FileNotFoundError: a weights file is missing; the message names it.
            ValueError: the weights are those of another network, or unreadable.
        """
        return loading.load_module(self.path, self.folder, self.network, dtype, self.revision, **from_pretrained)

    def load_vae(self, dtype: torch.dtype, **from_pretrained: Any) -> ModelMixin:
        """The pipeline's VAE, frozen and in evaluation mode; raises as ``load_transformer``."""
        vae = loading.load_module(self.path, "vae", self.vae, dtype, self.revision, **from_pretrained)
        return vae.requires_grad_(False).eval()

    def blocks(self, network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for name, module in network.named_modules():
            if isinstance(module, nn.ModuleList) and any(fnmatchcase(name, p) for p in self.block_names):
                yield from ((f"{name}.{index}", block) for index, block in enumerate(module))

    # Latents

    @property
    def channels(self) -> int:
        """Channels of the latent x_t."""
        return self.network_config["in_channels"]

    @property
    def factor(self) -> int:
        """Pixels along one edge of a latent pixel."""
        return 2 ** (len(self.vae_config["block_out_channels"]) - 1)

    @property
    def patch(self) -> int:
        """Latent pixels along one edge of what the network sees as one token (1: no constraint on the size)."""
        return 2

    @property
    def longest(self) -> int | None:
        """Tokens along one side that the network has positions for; None: any number."""
        return None

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, H, W) of x_t for an image of ``height`` x ``width`` pixels.

        Raises:
            ValueError: a size that the network cannot cut into tokens.
        """
        unit = self.factor * self.patch
        if height < unit or width < unit or height % unit or width % unit:
            nearest = " x ".join(str(max(unit, round(side / unit) * unit)) for side in (height, width))
            raise ValueError(
                f"{self.name}: height and width must be multiples of {unit} pixels ({self.factor} pixels a latent "
                f"pixel, {self.patch} a token), got {height} x {width}; the nearest is {nearest}"
            )
        if self.longest is not None and max(height, width) // unit > self.longest:
            raise ValueError(
                f"{self.name}: its positions are {self.longest} tokens of {unit} pixels along a side, got "
                f"{height} x {width}; give at most {self.longest * unit} a side"
            )
        return self.channels, height // self.factor, width // self.factor

    def tokens(self, height: int, width: int) -> int:
        """Image tokens that the network attends over."""
        _, rows, columns = self.latent_shape(height, width)
        return (rows // self.patch) * (columns // self.patch)

    def to_pipeline(self, x_t: Tensor) -> Tensor:
        """x_t in the layout that the pipeline keeps its latents in (tokens where it packs them)."""
        return x_t

    def from_pipeline(self, latents: Tensor, height: int, width: int) -> Tensor:
        """The inverse of ``to_pipeline``, for x_t of ``height`` x ``width`` latent pixels."""
        return latents

    # Noise

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha(t), sigma(t) of the path, fp32 [B]: 1 - t and t for flow matching."""
        return 1.0 - t, t

    def default_shift(self, height: int, width: int) -> float:
        """The timestep shift that the pipeline's own scheduler uses at this size: shift_time's ``shift``."""
        return loading.scheduler_shift(self.scheduler_config, self.tokens(height, width))

    # Text

    def condition(self, entries: Sequence[Mapping[str, Tensor]], length: int | None = None) -> Condition:
        """A batch of the text cache's entries (one prompt each, no batch dimension), padded to one length.

        ``length`` (``self.length`` by default) applies where the encoder's output has the prompt's own length; the
        longest prompt of a data set is enough and costs less.
        """
        return {key: torch.stack([entry[key] for entry in entries]) for key in entries[0]}

    def empty_condition(self, batch: int, dtype: torch.dtype) -> Condition:
        return {"prompt_embeds": empty(batch, self.length, self.network_config[self.text_width], dtype=dtype)}

    def null_condition(self, condition: Condition, negative: Condition) -> Condition:
        """``negative`` (the condition of the negative prompt, batch 1) for every sample of ``condition``."""
        batch = next(iter(condition.values())).shape[0]
        return {key: value.expand(batch, *value.shape[1:]) for key, value in negative.items()}

    def encode_arguments(self) -> dict[str, Any]:
        """Keywords of the pipeline's ``encode_prompt`` beside the prompts."""
        return {"max_sequence_length": self.length}

    @abstractmethod
    def read_encoded(self, encoded: Any, index: int) -> dict[str, Tensor]:
        """Prompt ``index`` of what the pipeline's ``encode_prompt`` returned, as an entry of the text cache."""

    @abstractmethod
    def count_tokens(self, pipeline: Any, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt as the encoder with the limit ``length`` would read it, uncut."""

    # The step: ``forward`` is as the top of this file says

    def fold_guidance(self, network: ModelMixin) -> ModelMixin:
        """``network``, changed where it is guidance-distilled: with the pipeline's ``guidance_scale=0`` it then
        computes what it does now with ``guidance``."""
        return network

    def guidance_of(self, t: Tensor) -> Tensor | None:
        """The guidance scale per sample for a guidance-distilled network, None for any other."""
        if not self.network_config.get("guidance_embeds", False):
            return None
        assert self.guidance is not None  # open_family has filled it in
        return torch.full_like(t, self.guidance)


class Denoiser(nn.Module):
    """A family's network in the trainer's convention: what a DeepSpeed engine wraps.

    ``forward(x_t, t, condition)`` is ``family.forward``; ``transformer`` is diffusers' own module, whose parameters'
    names in files are its own, without ``prefix``.
    """

    prefix: ClassVar[str] = "transformer."

    def __init__(self, family: Family, transformer: nn.Module):
        super().__init__()
        self.family, self.transformer = family, transformer

    @property
    def prediction(self) -> Prediction:
        return self.family.prediction

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.family.forward(self.transformer, x_t, t, condition)


def to_device(condition: Condition, device: torch.device) -> Condition:
    """``condition`` on ``device``, but for what the forward reads on the host (``HOST_KEYS``)."""
    return {k: v if k in HOST_KEYS else v.to(device, non_blocking=True) for k, v in condition.items()}


def pad_rows(rows: Sequence[Tensor], length: int, name: str) -> Tensor:
    """[B, length, D] of [L_i, D], zeros behind; ValueError where a row is longer."""
    longest = max(row.shape[0] for row in rows)
    if longest > length:
        raise ValueError(f"{name}: length must hold the longest prompt, {longest} tokens, got {length}")
    padded = rows[0].new_zeros(len(rows), length, rows[0].shape[1])
    for row, target in zip(rows, padded, strict=True):
        target[: row.shape[0]] = row
    return padded


def token_counts(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Tokens of each text, special ones included, nothing cut off."""
    return [len(ids) for ids in tokenizer(list(texts), truncation=False).input_ids] if texts else []
