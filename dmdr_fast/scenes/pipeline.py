"""The teacher of scenes before training: a small Stable Diffusion 3 pipeline of diffusers' own classes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

from dmdr_fast.scenes.captions import COLOURS, DIGITS, WORDINGS
from dmdr_fast.scenes.data import SIDE

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusion3Pipeline
    from transformers import PreTrainedTokenizerFast

TOKENS = 13  # of the longest caption, with its first and last token
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
WORDS = tuple(dict.fromkeys(re.findall(r"[a-z]+|:", re.sub("{.}", "", " ".join(map(" ".join, WORDINGS))))))
VOCABULARY = (*SPECIAL, *WORDS, *COLOURS, *DIGITS)
CLIP_WIDTH, WIDTH, HEADS, LAYERS = 64, 128, 4, 6
LATENT_CHANNELS = 8


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Words as tokens, in lower case, between <bos> and <eos>."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: index for index, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[(token, ids[token]) for token in ("<bos>", "<eos>")]
    )
    names = {f"{token.strip('<>')}_token": token for token in SPECIAL}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=TOKENS, **names)


def build_vae() -> AutoencoderKL:
    """Canvases [B, 3, 16, 16] to latents [B, 8, 8, 8]; its weights are drawn from torch's random state."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=LATENT_CHANNELS,
        sample_size=SIDE,
    )


def build_pipeline(vae: AutoencoderKL) -> StableDiffusion3Pipeline:
    """Text encoders and transformer with weights from torch's random state, around ``vae``.

    The transformer starts as DiT does: modulations and last layer are zero, so that every block is the identity.
    """
    import transformers
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    tokenizer = build_tokenizer()
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    clip = transformers.CLIPTextConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=CLIP_WIDTH,
        intermediate_size=4 * CLIP_WIDTH,
        projection_dim=CLIP_WIDTH,
        num_hidden_layers=2,  # the pipeline takes the embeddings before the last
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        **ids,
    )
    t5 = transformers.T5Config(
        vocab_size=len(VOCABULARY),
        d_model=WIDTH,
        d_kv=WIDTH // HEADS,
        d_ff=2 * WIDTH,
        num_layers=2,
        num_heads=HEADS,
        dropout_rate=0.0,
        pad_token_id=ids["pad_token_id"],
        eos_token_id=ids["eos_token_id"],
    )
    transformer = SD3Transformer2DModel(
        sample_size=SIDE // 2,
        patch_size=1,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=LAYERS,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * CLIP_WIDTH,
        pos_embed_max_size=SIDE // 2,
        qk_norm="rms_norm",
    )
    for name, parameter in transformer.named_parameters():
        if re.search(r"(norm1|norm1_context|norm_out)\.linear\.|^proj_out\.", name):
            torch.nn.init.zeros_(parameter)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=transformers.CLIPTextModelWithProjection(clip),
        tokenizer=tokenizer,
        text_encoder_2=transformers.CLIPTextModelWithProjection(clip),
        tokenizer_2=tokenizer,
        text_encoder_3=transformers.T5EncoderModel(t5),
        tokenizer_3=tokenizer,
    )
