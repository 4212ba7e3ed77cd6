"""Small random pipelines of every teacher family, with diffusers' and transformers' real classes, saved to disk.

``saved(name, folder)`` writes what ``save_pretrained`` of the real pipeline writes: fp32 safetensors, tokenizers that
are built here, text encoders of one or two layers. Every weight is random, so that no branch, gate or norm is without
effect. Real FLUX.2 has a Pixtral processor around its tokenizer (it needs torchvision); here the tokenizer alone
answers ``apply_chat_template`` alike.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
import transformers
from tokenizers import pre_tokenizers
from torch import nn

WIDTH, TEXT = 16, 16  # of the denoisers and of the text encoders
PROMPTS = ("a red cat", "two blue dogs on a green hill", "sea")
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{{ m['content'][0]['text'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def randomised(model: nn.Module, seed: int) -> nn.Module:
    """Weights drawn anew: rows of norm one, vectors moved off their start (norm weights off 1, biases off 0)."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            if parameter.ndim > 1:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.add_(0.2 * noise)
    return model.eval()


def clip_tokenizer() -> transformers.CLIPTokenizer:
    """Bytes as tokens, 77 of them."""
    names = ["<|startoftext|>", "<|endoftext|>", *BYTES, *(b + "</w>" for b in BYTES)]
    return transformers.CLIPTokenizer(vocab={n: i for i, n in enumerate(names)}, merges=[], model_max_length=77)


def t5_tokenizer() -> transformers.T5TokenizerFast:
    """Letters as tokens."""
    letters = [(c, -3.0) for c in "abcdefghijklmnopqrstuvwxyz0123456789.,"]
    start = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return transformers.T5TokenizerFast(vocab=start + letters, extra_ids=0, model_max_length=512)


def qwen_tokenizer() -> transformers.Qwen2Tokenizer:
    """Bytes as tokens, with a chat template."""
    names = {n: i for i, n in enumerate(["<|endoftext|>", *BYTES])}
    tokenizer = transformers.Qwen2Tokenizer(
        vocab=names, merges=[], extra_special_tokens=["<|im_start|>", "<|im_end|>"], model_max_length=4096
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def clip(projection: bool) -> nn.Module:
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    config = transformers.CLIPTextConfig(
        vocab_size=514,
        hidden_size=TEXT,
        intermediate_size=TEXT,
        projection_dim=TEXT,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return kind(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=42, d_model=2 * TEXT, d_kv=8, d_ff=TEXT, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    return transformers.T5EncoderModel(config)


LANGUAGE = {
    "vocab_size": 259,
    "hidden_size": TEXT,
    "intermediate_size": TEXT,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def kl(kind: type, **kwargs) -> nn.Module:
    """A VAE of two levels: a latent pixel is 2 x 2 pixels."""
    return kind(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[4, 8],
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=4,
        **kwargs,
    )


def flow_scheduler(**kwargs) -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler(**kwargs)


def sd3(**changes) -> diffusers.DiffusionPipeline:
    """``changes``: of the network's configuration."""
    settings = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 2 * TEXT,
        "caption_projection_dim": WIDTH,
        "pooled_projection_dim": 2 * TEXT,
        "pos_embed_max_size": 12,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    }
    transformer = diffusers.SD3Transformer2DModel(**(settings | changes))
    return diffusers.StableDiffusion3Pipeline(
        transformer=randomised(transformer, 0),
        scheduler=flow_scheduler(shift=3.0),
        vae=randomised(kl(diffusers.AutoencoderKL, scaling_factor=1.5, shift_factor=0.1), 1),
        text_encoder=randomised(clip(True), 2),
        text_encoder_2=randomised(clip(True), 3),
        text_encoder_3=randomised(t5(), 4),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        tokenizer_3=t5_tokenizer(),
    )


def flux() -> diffusers.DiffusionPipeline:
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * TEXT,
        pooled_projection_dim=TEXT,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    return diffusers.FluxPipeline(
        transformer=randomised(transformer, 0),
        scheduler=flow_scheduler(shift=3.0, use_dynamic_shifting=True),
        vae=randomised(kl(diffusers.AutoencoderKL, scaling_factor=0.4, shift_factor=0.1), 1),
        text_encoder=randomised(clip(False), 2),
        text_encoder_2=randomised(t5(), 3),
        tokenizer=clip_tokenizer(),
        tokenizer_2=t5_tokenizer(),
    )


def flux2_transformer(**kwargs) -> nn.Module:
    return diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=3 * TEXT,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
        **kwargs,
    )


def flux2_vae() -> nn.Module:
    vae = randomised(kl(diffusers.AutoencoderKLFlux2), 1)
    vae.bn.running_mean.copy_(0.3 * torch.randn(16, generator=torch.Generator().manual_seed(2)))
    vae.bn.running_var.copy_(torch.linspace(0.5, 2.0, 16))
    return vae


def flux2() -> diffusers.DiffusionPipeline:
    config = transformers.Mistral3Config(
        text_config=transformers.MistralConfig(num_hidden_layers=30, **LANGUAGE),  # the pipeline reads 10, 20 and 30
        vision_config=transformers.PixtralVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=16, patch_size=8
        ),
        image_token_id=258,
    )
    return diffusers.Flux2Pipeline(
        transformer=randomised(flux2_transformer(), 0),
        scheduler=flow_scheduler(shift=3.0, use_dynamic_shifting=True),
        vae=flux2_vae(),
        text_encoder=randomised(transformers.Mistral3ForConditionalGeneration(config), 3),
        tokenizer=qwen_tokenizer(),
    )


def flux2_klein() -> diffusers.DiffusionPipeline:
    config = transformers.Qwen3Config(num_hidden_layers=27, **LANGUAGE)  # the pipeline reads 9, 18 and 27
    return diffusers.Flux2KleinPipeline(
        transformer=randomised(flux2_transformer(guidance_embeds=False), 0),
        scheduler=flow_scheduler(shift=3.0, use_dynamic_shifting=True),
        vae=flux2_vae(),
        text_encoder=randomised(transformers.Qwen3ForCausalLM(config), 3),
        tokenizer=qwen_tokenizer(),
    )


def z_image() -> diffusers.DiffusionPipeline:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=WIDTH,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=TEXT,
        axes_dims=[2, 2, 4],
        axes_lens=[1024, 64, 64],
    )
    return diffusers.ZImagePipeline(
        transformer=randomised(transformer, 0),
        scheduler=flow_scheduler(shift=3.0),
        vae=randomised(kl(diffusers.AutoencoderKL, scaling_factor=0.4, shift_factor=0.1), 1),
        text_encoder=randomised(
            transformers.Qwen3ForCausalLM(transformers.Qwen3Config(num_hidden_layers=2, **LANGUAGE)), 2
        ),
        tokenizer=qwen_tokenizer(),
    )


def qwen_image() -> diffusers.DiffusionPipeline:
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        axes_dims_rope=(2, 2, 4),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.7, 1.0, 2.0],
    )
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "num_hidden_layers": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
            **LANGUAGE,
        },
        vision_config={"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": TEXT},
        image_token_id=255,
        video_token_id=256,
        vision_start_token_id=257,
        vision_end_token_id=258,
    )
    return diffusers.QwenImagePipeline(
        transformer=randomised(transformer, 0),
        scheduler=flow_scheduler(use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02),
        vae=randomised(vae, 1),
        text_encoder=randomised(transformers.Qwen2_5_VLForConditionalGeneration(config), 2),
        tokenizer=qwen_tokenizer(),
    )


def sdxl() -> diffusers.DiffusionPipeline:
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=2 * TEXT,
        transformer_layers_per_block=(1, 1),
        attention_head_dim=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + TEXT,
        use_linear_projection=True,
    )
    return diffusers.StableDiffusionXLPipeline(
        unet=randomised(unet, 0),
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        vae=randomised(kl(diffusers.AutoencoderKL, scaling_factor=0.13), 1),
        text_encoder=randomised(clip(False), 2),
        text_encoder_2=randomised(clip(True), 3),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
    )


PIPELINES: dict[str, Callable[[], diffusers.DiffusionPipeline]] = {
    "sd3": sd3,
    "flux": flux,
    "flux2": flux2,
    "z_image": z_image,
    "qwen_image": qwen_image,
    "sdxl": sdxl,
}


def sd3_small() -> diffusers.DiffusionPipeline:
    """What an ``sd3`` may teach: half as wide, other kinds of blocks, a larger table of positions."""
    return sd3(num_attention_heads=1, caption_projection_dim=8, dual_attention_layers=(), pos_embed_max_size=16)


VARIANTS = {"flux2_klein": flux2_klein}  # other pipelines of a family
STUDENTS = {"sd3_small": sd3_small}


def saved(name: str, folder: Path) -> Path:
    """The small pipeline ``name`` of ``PIPELINES``, ``VARIANTS`` or ``STUDENTS``, written once into ``folder/name``."""
    target = folder / name
    if not (target / "model_index.json").is_file():
        with torch.random.fork_rng():
            torch.manual_seed(1)  # of the biases, which ``randomised`` moves from where they start
            (PIPELINES | VARIANTS | STUDENTS)[name]().save_pretrained(target)
    return target
