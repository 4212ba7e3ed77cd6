"""Z-Image: time that runs from noise at 0 to data at 1, a prediction of x0 - eps, and lists of samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dmdr_fast.models.families.base import Condition, Family, pad_rows, token_counts
from dmdr_fast.models.families.sd3 import decode_shifted

if TYPE_CHECKING:
    from diffusers import ModelMixin


class ZImage(Family):
    """``ZImagePipeline``: prompt_embeds [B, length, D] and lengths int64 [B], a prompt's own number of tokens.

    The network takes each prompt at its own length (it pads to a multiple of 32 with a learnt token that is attended
    to), so the forward must know the lengths in Python: keep ``lengths`` on the CPU (``to_device`` does), and no
    forward waits for the GPU.
    """

    name = "z_image"
    pipelines = ("ZImagePipeline",)
    network = "ZImageTransformer2DModel"
    block_names = ("noise_refiner", "context_refiner", "layers")
    lora_targets = (
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    )
    depth_keys = ("n_layers",)
    text_width = "cap_feat_dim"
    default_length = 512

    @property
    def longest(self) -> int:
        return min(self.network_config["axes_lens"][1:])

    def empty_condition(self, batch: int, dtype: torch.dtype) -> Condition:
        lengths = torch.full((batch,), self.length, device="cpu")
        return super().empty_condition(batch, dtype) | {"lengths": lengths}

    def forward(self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        lengths = condition["lengths"].tolist()
        texts = condition["prompt_embeds"].to(x_t.dtype)
        prediction = network(
            list(x_t.unsqueeze(2).unbind(0)),
            (1000.0 - 1000.0 * t)
            / 1000.0,  # 1 - t in the pipeline's rounding, which the embedding magnifies 1,000 times
            [text[:length] for text, length in zip(texts, lengths, strict=True)],
            return_dict=False,
        )[0]
        return -torch.stack(prediction).squeeze(2)

    def decode(self, vae: ModelMixin, latents: Tensor) -> Tensor:
        return decode_shifted(vae, latents)

    def condition(self, entries: Sequence[Mapping[str, Tensor]], length: int | None = None) -> Condition:
        rows = [entry["prompt_embeds"] for entry in entries]
        lengths = torch.tensor([row.shape[0] for row in rows])
        return {"prompt_embeds": pad_rows(rows, length or self.length, self.name), "lengths": lengths}

    def read_encoded(self, encoded: Any, index: int) -> dict[str, Tensor]:
        return {"prompt_embeds": encoded[0][index]}

    def encode_arguments(self) -> dict[str, Any]:
        return {"do_classifier_free_guidance": False} | super().encode_arguments()

    def count_tokens(self, pipeline: Any, prompts: Sequence[str]) -> list[int]:
        texts = [
            pipeline.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
            )
            for prompt in prompts
        ]
        return token_counts(pipeline.tokenizer, texts)
