"""CLIP from transformers as rewards use it: cosines of images and prompts, prompts embedded once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmdr_fast.rewards.base import check_prompts
from dmdr_fast.rewards.loading import LOADABLE, REMEDY, load_pretrained, load_tokenizer
from dmdr_fast.rewards.pixels import square_pixels

if TYPE_CHECKING:
    from transformers import CLIPConfig, CLIPModel

TEXT_BATCH = 16  # a matrix product's bits depend on its shape: prompts are always embedded this many at a time
CACHED_PROMPTS = 16_384  # 64 MiB of ViT-H's embeddings


class CLIP(nn.Module):
    """Unit embeddings of images and prompts, fp32 [B, d], by a frozen ``transformers.CLIPModel``.

    Args:
        model: the CLIPModel.
        tokenizer: its tokenizer; prompts are cut at, and padded to, the model's longest (77 tokens).
        fit: how images become squares, see :func:`~dmdr_fast.rewards.pixels.square_pixels`.
    """

    def __init__(self, model: CLIPModel, tokenizer: Any, *, fit: Literal["crop", "pad"] = "crop") -> None:
        super().__init__()
        self.model, self.fit = model, fit
        self._tokenizer = tokenizer
        self._prompts: dict[str, Tensor] = {}  # oldest first

    def cosines(self, images: Tensor, prompts: list[str] | None, name: str) -> Tensor:
        """cos(image, prompt) fp32 [B] of images [B, 3, H, W] in [-1, 1]; differentiable in them."""
        prompts = check_prompts(prompts, images, name)
        return (self.embed_images(images) * self.embed_prompts(prompts).to(images.device)).sum(dim=1)

    def embed_images(self, images: Tensor) -> Tensor:
        pixels = square_pixels(images, self.model.config.vision_config.image_size, fit=self.fit)
        return _unit(self.model.get_image_features(pixel_values=pixels.to(self.model.dtype)))

    @torch.no_grad()
    def embed_prompts(self, prompts: list[str]) -> Tensor:
        """Bit for bit the same for a prompt whatever comes with it, and computed once while it is remembered."""
        new = [p for p in dict.fromkeys(prompts) if p not in self._prompts]
        for start in range(0, len(new), TEXT_BATCH):
            batch = new[start : start + TEXT_BATCH]
            tokens = self._tokenizer(
                batch + [""] * (TEXT_BATCH - len(batch)),
                padding="max_length",
                truncation=True,
                max_length=self.model.config.text_config.max_position_embeddings,
                return_tensors="pt",
            ).input_ids
            embedded = _unit(self.model.get_text_features(input_ids=tokens.to(self.model.device, non_blocking=True)))
            rows = (row.clone() for row in embedded[: len(batch)])  # a view would keep all the batch
            self._prompts.update(zip(batch, rows, strict=True))
        embeddings = torch.stack([self._prompts[p] for p in prompts])
        for old in list(self._prompts)[: max(0, len(self._prompts) - CACHED_PROMPTS)]:
            del self._prompts[old]
        return embeddings


def load_clip(
    path: str | Path,
    tokenizer: str | Path | None,
    *,
    dtype: torch.dtype,
    where: str,
    fit: Literal["crop", "pad"] = "crop",
    expected: str = LOADABLE,
    **given: Any,
) -> CLIP:
    """CLIP with the weights at ``path`` (or ``given``) and the tokenizer at ``tokenizer``, by default ``path`` too.

    Raises:
        FileNotFoundError, ValueError: one of them is missing, broken, incomplete, or they are of different models.
    """
    from transformers import CLIPModel  # seconds to import

    model = load_pretrained(CLIPModel, None if given else path, dtype=dtype, where=where, expected=expected, **given)
    text = model.config.text_config
    words = load_tokenizer(tokenizer or path, vocabulary=text.vocab_size, where=where)
    # 2 stands in older configurations, whose models find the end as the largest token
    if text.eos_token_id not in (2, words.eos_token_id):
        raise ValueError(
            f"{where}: the tokenizer in {tokenizer or path} ends prompts by token {words.eos_token_id}, its model "
            f"looks for {text.eos_token_id}: set options.tokenizer to the model's own"
        )
    return CLIP(model, words, fit=fit)


def clip_configuration(path: str | Path, *, where: str) -> CLIPConfig:
    """The CLIPConfig at ``path``, which ``options.clip`` names.

    Raises:
        FileNotFoundError: there is none.
    """
    from transformers import CLIPConfig

    try:
        known, _ = CLIPConfig.get_config_dict(str(path))
    except Exception:  # a hub that cannot be reached, JSON that is none
        known = {}
    if not known:  # transformers would go on with the sizes of ViT-B/32
        remedy = REMEDY.format(key="options.clip", expected="the folder or hub id of its CLIP in transformers' format")
        raise FileNotFoundError(f"{where}: no CLIP configuration in {path}: {remedy}")
    return CLIPConfig.from_pretrained(str(path))


def _unit(features: Any) -> Tensor:
    """fp32 and of norm 1; transformers 5 returns an output object, 4 the tensor."""
    return F.normalize(getattr(features, "pooler_output", features).float(), dim=1)
