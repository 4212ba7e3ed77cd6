"""What a run reads besides weights: labels, the decoder, the reward, the evaluation's data and features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dmdr_fast.algorithm.step import Batch, RewardModel
from dmdr_fast.algorithm.streams import Shard, Streams
from dmdr_fast.config import Config
from dmdr_fast.errors import UserError
from dmdr_fast.eval.features import DigitsFeatures, FeatureExtractor, TransformersFeatures
from dmdr_fast.models.vae import IdentityDecoder, LatentDecoder


def label_source(config: Config, streams: Streams, device: torch.device) -> Callable[[tuple[int, ...], Shard], Batch]:
    """Uniform class labels for update ``index``: the shard's part of the global draw."""

    def draw(index: tuple[int, ...], shard: Shard) -> Batch:
        labels = streams.rng("labels", *index).integers(config.model.num_classes, size=shard.total)
        part = torch.from_numpy(labels[shard.start : shard.stop].copy()).to(device, non_blocking=True)
        return Batch(condition=part, reward_inputs={"labels": part})

    return draw


def build_decoder(config: Config, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Latents to images in about [-1, 1]."""
    if config.decoder.kind == "identity":
        return IdentityDecoder().decode
    try:
        decoder = LatentDecoder.from_pretrained(config.decoder.path).to(device)
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


def build_reward(config: Config, device: torch.device) -> nn.Module | None:
    """The reward of ``reward.kind``; None for ``none``."""
    if config.reward.kind == "none":
        return None
    if config.reward.kind == "digits":
        from dmdr_fast.rewards.digits import DigitsReward

        return DigitsReward().to(device)
    from dmdr_fast.rewards.classifier import TransformersClassifierReward

    try:
        return TransformersClassifierReward(config.reward.path, num_classes=config.model.num_classes).to(device)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"reward.path: {error}") from None


def reward_model(reward: nn.Module | None, decoder: Callable[[Tensor], Tensor]) -> RewardModel | None:
    """Decoder and reward as the generator update takes them."""
    return None if reward is None else RewardModel(decoder, reward)


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
