"""What a run reads besides weights and conditions: the rewards, the evaluation's data and features."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dmdr_fast.config import Config
from dmdr_fast.config.run import LEAST_IMAGES
from dmdr_fast.engine.rewards import RewardSet, build_reward_set
from dmdr_fast.errors import UserError
from dmdr_fast.eval.features import DigitsFeatures, FeatureExtractor, ScenesFeatures, TransformersFeatures

REAL_SCENES = 2000


def build_rewards(config: Config, num_classes: int | None, device: torch.device) -> RewardSet | None:
    """The rewards of the ``reward`` section; None where it names none."""
    if not config.reward.terms and not config.reward.held_out:
        return None
    try:
        return build_reward_set(
            config.reward.terms,
            config.reward.held_out,
            timeout=config.reward.timeout,
            num_classes=num_classes,
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
    elif config.eval.data == "scenes":
        from dmdr_fast.scenes.data import evaluation_scenes

        images = evaluation_scenes(REAL_SCENES, seed=0).images
    else:
        from dmdr_fast.data.images import load_image_folder

        images = load_image_folder(Path(config.eval.data), config.model.sizes[0])
        if len(images) < LEAST_IMAGES:
            raise UserError(f"eval.data: {len(images)} image(s) in {config.eval.data}; give {LEAST_IMAGES} or more")
    if config.eval.features == "digits":
        return EvaluationData(images, DigitsFeatures())
    if config.eval.features == "scenes":
        return EvaluationData(images, ScenesFeatures())
    assert config.eval.features is not None  # asked for with eval.data
    return EvaluationData(images, TransformersFeatures(config.eval.features))
