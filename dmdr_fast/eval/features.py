"""The feature spaces that evaluation measures in; those of digits and scenes share nothing with the rewards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmdr_fast.data.classifier import digits_classifier
from dmdr_fast.data.digits import NUM_CLASSES
from dmdr_fast.errors import UserError
from dmdr_fast.scenes.captions import Attributes, is_held_out, parse
from dmdr_fast.scenes.verifier import load_verifier

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SEED = 98_765
STEPS = 500
# Little: features that learned to ignore noise would see less of what a sampler leaves in its images. Noise
# of 0.3 in the images costs 1.6 times the distance between two halves of the data here, 1.3 times with the
# reward's 0.3.
NOISE = 0.05
CHUNK = 1024  # images at a time; bounds memory, leaves the result alone


class FeatureExtractor(Protocol):
    """What evaluation asks of a feature space; images are [N, C, H, W] in [-1, 1]."""

    def features(self, images: Tensor) -> Tensor:
        """Features fp32 [N, d] on the images' device."""

    def accuracy(self, images: Tensor, asked: Mapping[str, Any]) -> dict[str, float]:
        """The share of images that show what was asked for: ``labels`` int64 [N] or N ``prompts``.

        As ``accuracy``, and parts of it by other names that begin so; nothing where it does not read what was asked.
        """

    def to(self, device: torch.device, /) -> FeatureExtractor:
        """Itself, there."""


class ResidualMLP(nn.Module):
    """One residual block over the 64 pixels; its 64 normalised activations are the features.

    One wide block and not three: deeper ones gather each class in a point and see less of the variety within
    it. The Fréchet distance of class means to the digits is 16 times that between two halves of the digits
    here, 8 there.
    """

    def __init__(self, width: int = 64, hidden: int = 256) -> None:
        super().__init__()
        self.embed = nn.Linear(64, width)
        self.block = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.norm = nn.LayerNorm(width)
        self.classify = nn.Linear(width, NUM_CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """[B, 64] of images [B, 1, 8, 8]."""
        x = self.embed(images.flatten(1))
        return self.norm(x + self.block(x))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, 10] of images [B, 1, 8, 8]."""
        return self.classify(self.features(images))


class DigitsFeatures(nn.Module):
    """Features [N, 64] and classes of digits by a residual MLP, fitted on first use (seconds) and cached.

    Another architecture, initialisation and batch order than
    :class:`dmdr_fast.rewards.digits.DigitsReward`'s, so a generator that exploits the reward's classifier is
    not rewarded by the evaluation for it.

    Attributes:
        test_accuracy: on the digits that it was not fitted on, 0..1.
    """

    def __init__(self, *, cache: Path | None = None) -> None:
        super().__init__()
        self.classifier, self.test_accuracy = digits_classifier(
            "digits-features", ResidualMLP, seed=SEED, steps=STEPS, noise=NOISE, root=cache
        )

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """fp32 [N, 64] of images [N, 1, 8, 8] in [-1, 1]."""
        return self.classifier.features(images.float())

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """int64 [N] in 0..9 of images [N, 1, 8, 8] in [-1, 1]."""
        return self.classifier(images.float()).argmax(1)

    def accuracy(self, images: Tensor, asked: Mapping[str, Any]) -> dict[str, float]:
        """The share of images that are of their class."""
        return class_accuracy(self.predict, images, asked)


class ScenesFeatures(nn.Module):
    """Features [N, 128] and prompt accuracy of scenes by the held-out verifier, which no generator is trained for.

    The features are what enters its last layer, averaged over all windows of the canvas.
    """

    def __init__(self) -> None:
        super().__init__()
        self.verifier = load_verifier("held_out_verifier")

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """fp32 [N, 128] of images [N, 3, 16, 16] in [-1, 1]."""
        return self.verifier.scores.trunk(images.float()).mean((1, 2))

    def accuracy(self, images: Tensor, asked: Mapping[str, Any]) -> dict[str, float]:
        """Of N captions of scenes: the share of images with all five attributes right, and parts of it.

        ``accuracy_seen`` and ``accuracy_unseen``, of the captions whose combination training sets hold or do not;
        ``accuracy_relation``, ``accuracy_first_digit`` and so on, of one attribute by itself.
        """
        scenes = [parse(prompt) for prompt in asked["prompts"]]
        read = torch.cat([self.verifier.read(part) for part in images.split(CHUNK)])
        right = (read.cpu() == torch.tensor(scenes)).double()
        unseen, every = torch.tensor([is_held_out(scene) for scene in scenes]), right.prod(1)
        parts = {"": every, "_seen": every[~unseen], "_unseen": every[unseen]}
        parts |= {f"_{name}": column for name, column in zip(Attributes._fields, right.T, strict=True)}
        return {f"accuracy{name}": values.mean().item() for name, values in parts.items() if len(values)}


class TransformersFeatures(nn.Module):
    """Penultimate features and classes of any image classifier that ``transformers`` can load.

    Features are what enters the classifier's last linear layer. Images are clamped to [-1, 1] and prepared as
    the checkpoint's preprocessor_config.json says: shorter edge resized (antialiased bicubic), centre square
    cropped, normalised; on the images' device, in fp32.

    Args:
        path_or_id: a directory or hub id of a checkpoint saved by ``save_pretrained``.

    Raises:
        UserError: it cannot be loaded, or is not an image classifier with a linear head.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, path_or_id: str) -> None:
        super().__init__()
        from transformers import AutoModelForImageClassification
        from transformers.image_processing_base import ImageProcessingMixin

        try:
            self.model = AutoModelForImageClassification.from_pretrained(path_or_id)
            preparation, _ = ImageProcessingMixin.get_image_processor_dict(path_or_id)
        except (OSError, ValueError) as error:
            raise UserError(
                f"evaluation features {path_or_id!r}: no image classifier could be loaded: {error}. "
                "Expected a directory or hub id with config.json, weights and preprocessor_config.json"
            ) from error
        self.model.eval().requires_grad_(False)
        self.head = _last_linear(self.model, path_or_id)
        self.resize_to, self.crop_to = _sizes(preparation, path_or_id)
        self.register_buffer("mean", torch.tensor(preparation["image_mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preparation["image_std"]).view(1, 3, 1, 1), persistent=False)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """fp32 [N, d] of images [N, 3, H, W] in [-1, 1]."""
        entered: list[Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
        try:
            self.model(pixel_values=self.prepare(images))
        finally:
            hook.remove()
        return entered[0].flatten(1).float()

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """int64 [N] of images [N, 3, H, W] in [-1, 1]."""
        return self.model(pixel_values=self.prepare(images)).logits.argmax(-1)

    def accuracy(self, images: Tensor, asked: Mapping[str, Any]) -> dict[str, float]:
        """The share of images that are of their class."""
        return class_accuracy(self.predict, images, asked)

    def prepare(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] in [-1, 1] as the classifier wants them: fp32 [N, 3, crop, crop]."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images: expected [N, 3, H, W], got {list(images.shape)}")
        pixels = images.float().clamp(-1, 1) / 2 + 0.5
        height, width = pixels.shape[2:]
        ratio = self.resize_to / min(height, width)
        size = (round(height * ratio), round(width * ratio))
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        top, left = (size[0] - self.crop_to) // 2, (size[1] - self.crop_to) // 2
        return (pixels[:, :, top : top + self.crop_to, left : left + self.crop_to] - self.mean) / self.std


def class_accuracy(
    predict: Callable[[Tensor], Tensor], images: Tensor, asked: Mapping[str, Any]
) -> dict[str, float]:
    """The share of images of which ``predict`` says the class asked for; nothing of prompts."""
    if "labels" not in asked:
        return {}
    predicted = torch.cat([predict(part) for part in images.split(CHUNK)])
    return {"accuracy": (predicted == asked["labels"]).double().mean().item()}


def _last_linear(model: PreTrainedModel, source: str) -> nn.Linear:
    heads = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == model.config.num_labels]
    if not heads:
        raise UserError(f"evaluation features {source!r}: no linear layer gives its {model.config.num_labels} classes")
    return heads[-1]


def _sizes(preparation: dict, source: str) -> tuple[int, int]:
    """(shorter edge after resizing, side of the centre crop) from a preprocessor_config.json."""

    def side(size: int | dict) -> int:
        return size if isinstance(size, int) else size.get("shortest_edge") or size.get("height") or 0

    resize_to = side(preparation.get("size", 0))
    crop_to = side(preparation.get("crop_size", 0)) if preparation.get("do_center_crop") else resize_to
    if not 0 < crop_to <= resize_to or "image_mean" not in preparation or "image_std" not in preparation:
        raise UserError(
            f"evaluation features {source!r}: preprocessor_config.json: expected size (at least crop_size), "
            f"image_mean and image_std, got {preparation}"
        )
    return resize_to, crop_to
