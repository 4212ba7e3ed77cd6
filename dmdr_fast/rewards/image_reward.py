"""ImageReward: BLIP, which reads the prompt with the image, fitted to human preferences."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dmdr_fast.rewards.base import check_prompts
from dmdr_fast.rewards.linear_head import linear_head
from dmdr_fast.rewards.loading import PUBLISHED, FrozenReward, load_pretrained, load_state, load_tokenizer
from dmdr_fast.rewards.pixels import square_pixels

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the head's output on ImageReward's own data
PROMPT_TOKENS = 35
HEAD_WIDTH = 64  # of every attention head, in ViT-L and in BERT
# timm's names in the checkpoint, and transformers'
_VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.": "embeddings.patch_embedding.",
    "norm.": "post_layernorm.",
}
_VISION_BLOCK = {
    "norm1.": "layer_norm1.",
    "norm2.": "layer_norm2.",
    "attn.qkv.": "self_attn.qkv.",
    "attn.proj.": "self_attn.projection.",
    "mlp.": "mlp.",
}


class ImageRewardReward(FrozenReward):
    """r(image, prompt) = (head(h) - 0.167) / 1.033, h the [CLS] state of BLIP's text encoder attending to the image.

    About standard normal over the images of diffusion models. Prompts are cut at 35 tokens.

    Args:
        path: the checkpoint, or a folder or hub id that has ``file``. Sizes are read off its weights.
        file: its name there.
        tokenizer: folder or hub id of BERT's tokenizer.
        dtype: of the frozen BLIP and its forward; the head is fp32.

    Raises:
        FileNotFoundError, ValueError: what is missing or does not fit, and what to change.

    Source: ImageReward (arXiv 2304.05977).
    """

    def __init__(
        self,
        path: str | Path = "THUDM/ImageReward",
        *,
        file: str = "ImageReward.pt",
        tokenizer: str | Path = "bert-base-uncased",
        dtype: torch.dtype = torch.float32,
        name: str = "image_reward",
    ) -> None:
        super().__init__()
        self.name, where = name, f"reward {name!r}"
        state = load_state(path, file, where=where)
        self.vision = _vision(_part(state, "blip.visual_encoder.", where), dtype, where)
        self.text = _text(_part(state, "blip.text_encoder.", where), self.vision.config.hidden_size, dtype, where)
        width, vocabulary = self.text.config.hidden_size, self.text.config.vocab_size
        self.head = linear_head(state, "mlp.", width, where=where)
        self._tokenizer = load_tokenizer(tokenizer, vocabulary=vocabulary, where=where)

    def forward(self, images: Tensor, *, labels: Tensor | None = None, prompts: list[str] | None = None) -> Tensor:
        """Rewards fp32 [B] of images [B, 3, H, W] in [-1, 1] and B prompts (``labels`` are not read)."""
        prompts = check_prompts(prompts, images, self.name)
        pixels = square_pixels(images, self.vision.config.image_size).to(self.vision.dtype)
        seen = self.vision(pixel_values=pixels).last_hidden_state
        tokens = self._tokenizer(
            prompts, padding="max_length", truncation=True, max_length=PROMPT_TOKENS, return_tensors="pt"
        )
        states = self.text(
            input_ids=tokens.input_ids.to(images.device, non_blocking=True),
            attention_mask=tokens.attention_mask.to(images.device, non_blocking=True),
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
        ).last_hidden_state
        return (self.head(states[:, 0].float()).squeeze(1) - MEAN) / STD


def _part(state: dict[str, Tensor], prefix: str, where: str) -> dict[str, Tensor]:
    part = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if not part:
        raise ValueError(
            f"{where}: its checkpoint has no {prefix}*: expected ImageReward's own names: set path of its reward.terms "
            "entry to the published checkpoint"
        )
    return part


def _vision(state: dict[str, Tensor], dtype: torch.dtype, where: str) -> PreTrainedModel:
    """BLIP's image encoder: a ViT whose last norm is applied to all patches."""
    from transformers import BlipVisionConfig, BlipVisionModel

    position, patch = (_required(state, k, where) for k in ("pos_embed", "patch_embed.proj.weight"))
    width, side = position.shape[-1], int((position.shape[1] - 1) ** 0.5)
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=_required(state, "blocks.0.mlp.fc1.weight", where).shape[0],
        num_hidden_layers=_depth(state, r"blocks\.(\d+)\."),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=side * patch.shape[-1],
        patch_size=patch.shape[-1],
        layer_norm_eps=1e-6,
    )
    renamed = {_vision_name(k): v for k, v in state.items()}
    given = {"config": config, "state_dict": renamed, "expected": PUBLISHED}
    return load_pretrained(BlipVisionModel, None, dtype=dtype, where=where, **given)


def _vision_name(key: str) -> str:
    if match := re.match(r"blocks\.(\d+)\.", key):
        prefix, rest, names = f"encoder.layers.{match[1]}.", key[match.end() :], _VISION_BLOCK
    else:
        prefix, rest, names = "", key, _VISION
    old = next((n for n in names if rest.startswith(n)), None)
    return key if old is None else prefix + names[old] + rest.removeprefix(old)


def _text(state: dict[str, Tensor], vision_width: int, dtype: torch.dtype, where: str) -> PreTrainedModel:
    """BLIP's text encoder: BERT with cross attention; the names are transformers' own."""
    from transformers import BlipTextConfig, BlipTextModel

    words, positions = (_required(state, f"embeddings.{k}_embeddings.weight", where) for k in ("word", "position"))
    config = BlipTextConfig(
        vocab_size=words.shape[0],
        hidden_size=words.shape[1],
        encoder_hidden_size=vision_width,
        intermediate_size=_required(state, "encoder.layer.0.intermediate.dense.weight", where).shape[0],
        num_hidden_layers=_depth(state, r"encoder\.layer\.(\d+)\."),
        num_attention_heads=words.shape[1] // HEAD_WIDTH,
        max_position_embeddings=positions.shape[0],
        hidden_act="gelu",
        layer_norm_eps=1e-12,
    )
    given = {"config": config, "state_dict": state, "expected": PUBLISHED, "add_pooling_layer": False}
    return load_pretrained(BlipTextModel, None, dtype=dtype, where=where, **given)


def _required(state: dict[str, Tensor], key: str, where: str) -> Tensor:
    if key not in state:
        raise ValueError(f"{where}: its checkpoint lacks {key}: set path to ImageReward's published checkpoint")
    return state[key]


def _depth(state: dict[str, Tensor], pattern: str) -> int:
    return 1 + max((int(m[1]) for k in state if (m := re.match(pattern, k))), default=-1)
