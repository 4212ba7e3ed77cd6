"""What a run reads besides weights: labels, the decoder, the reward, the evaluation's data and features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dmdr_fast.algorithm.recipe import Batch, Data
from dmdr_fast.algorithm.streams import Shard, Streams
from dmdr_fast.config import Config
from dmdr_fast.engine.rewards import RewardSet, build_reward_set
from dmdr_fast.errors import UserError
from dmdr_fast.eval.features import DigitsFeatures, FeatureExtractor, TransformersFeatures
from dmdr_fast.models.vae import IdentityDecoder, LatentDecoder, save_decoder_memory


def label_source(config: Config, streams: Streams, device: torch.device) -> Data:
    """Uniform class labels for update ``index``: the shard's part of the global draw, each one ``group`` times."""
    classes = config.model.num_classes

    def draw(index: tuple[int, ...], shard: Shard, group: int = 1) -> Batch:
        drawn = streams.rng("labels", *index).integers(classes, size=-(-shard.total // group))
        labels = drawn.repeat(group)[shard.start : shard.stop]
        part = torch.from_numpy(labels.copy()).to(device, non_blocking=True)
        return Batch(part, torch.full_like(part, classes), part, {"labels": part})

    return draw


def build_decoder(config: Config, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Latents to images in about [-1, 1]."""
    if config.decoder.kind == "identity":
        return IdentityDecoder().decode
    try:
        decoder = LatentDecoder.from_pretrained(config.decoder.path).to(device)
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


def build_rewards(config: Config, device: torch.device) -> RewardSet | None:
    """The rewards of the ``reward`` section; None where it names none."""
    if not config.reward.terms and not config.reward.held_out:
        return None
    try:
        return build_reward_set(
            config.reward.terms,
            config.reward.held_out,
            timeout=config.reward.timeout,
            num_classes=config.model.num_classes,
            device=device,
        )
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from None


@dataclass(frozen=True)
class EvaluationData:
    """Real images [M, C, H, W] in [-1, 1] and the feature space they are compared in."""

    real_images: Tensor
    features: FeatureExtractor

    def to(self, device: torch.device) -> EvaluationData:
        return EvaluationData(self.real_images.to(device), self.features.to(device))


def build_evaluation(config: Config) -> EvaluationData | None:
    """What the evaluation compares with, on the CPU until it is needed; None where the configuration asks for none."""
    if config.eval.samples == 0 or config.eval.data is None:
        return None
    if config.eval.data == "digits":
        from dmdr_fast.data.digits import load_digits

        images = load_digits()[0]
    else:
        from dmdr_fast.data.images import load_image_folder

        images = load_image_folder(Path(config.eval.data), config.model.resolution)
    features = DigitsFeatures() if config.eval.features == "digits" else TransformersFeatures(config.eval.features)
    return EvaluationData(images, features)
