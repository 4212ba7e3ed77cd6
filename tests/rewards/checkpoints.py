"""Random checkpoints under the names that the published ones have."""

import torch


def randomise(model):
    """Weights large enough that scores differ between images and prompts."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_draw(name, parameter.shape, rng))


def open_clip_state(width=32, hidden=48, depth=2, vocabulary=54, length=20, patches=9, projection=12):
    """An open_clip CLIP of ``small_clip``'s sizes."""
    shapes = {
        "logit_scale": (),
        "positional_embedding": (length, width),
        "text_projection": (width, projection),
        "token_embedding.weight": (vocabulary, width),
        "visual.class_embedding": (width,),
        "visual.positional_embedding": (patches + 1, width),
        "visual.proj": (width, projection),
        "visual.conv1.weight": (width, 3, 8, 8),
    }
    for tower in ("visual.transformer", "transformer"):
        for n in range(depth):
            block = f"{tower}.resblocks.{n}"
            shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
            shapes |= _linear(f"{block}.attn.out_proj", width, width) | _linear(f"{block}.mlp.c_fc", width, hidden)
            shapes |= _linear(f"{block}.mlp.c_proj", hidden, width)
            shapes |= _norm(f"{block}.ln_1", width) | _norm(f"{block}.ln_2", width)
    for name in ("visual.ln_pre", "visual.ln_post", "ln_final"):
        shapes |= _norm(name, width)
    return _drawn(shapes)


def image_reward_state(vision=64, text=128, hidden=40, depth=2, vocabulary=60, patches=9):
    """An ImageReward checkpoint of small sizes; attention heads are 64 wide."""
    v, t = "blip.visual_encoder", "blip.text_encoder"
    shapes = {
        f"{v}.cls_token": (1, 1, vision),
        f"{v}.pos_embed": (1, patches + 1, vision),
        f"{v}.patch_embed.proj.weight": (vision, 3, 8, 8),
        f"{v}.patch_embed.proj.bias": (vision,),
        f"{t}.embeddings.word_embeddings.weight": (vocabulary, text),
        f"{t}.embeddings.position_embeddings.weight": (64, text),
    }
    shapes |= _norm(f"{v}.norm", vision) | _norm(f"{t}.embeddings.LayerNorm", text)
    for n in range(depth):
        b = f"{v}.blocks.{n}"
        shapes |= _norm(f"{b}.norm1", vision) | _norm(f"{b}.norm2", vision)
        shapes |= _linear(f"{b}.attn.qkv", vision, 3 * vision) | _linear(f"{b}.attn.proj", vision, vision)
        shapes |= _linear(f"{b}.mlp.fc1", vision, hidden) | _linear(f"{b}.mlp.fc2", hidden, vision)
        b = f"{t}.encoder.layer.{n}"
        for kind, source in (("attention", text), ("crossattention", vision)):
            shapes |= _linear(f"{b}.{kind}.self.query", text, text)
            shapes |= _linear(f"{b}.{kind}.self.key", source, text) | _linear(f"{b}.{kind}.self.value", source, text)
            shapes |= _linear(f"{b}.{kind}.output.dense", text, text)
            shapes |= _norm(f"{b}.{kind}.output.LayerNorm", text)
        shapes |= _linear(f"{b}.intermediate.dense", text, hidden) | _linear(f"{b}.output.dense", hidden, text)
        shapes |= _norm(f"{b}.output.LayerNorm", text)
    state = _drawn(shapes) | head_state(text, "mlp.")
    # What else the published file holds: a buffer of positions.
    return state | {f"{t}.embeddings.position_ids": torch.arange(64)[None]}


def head_state(width, prefix=""):
    """The five linear layers of the aesthetic predictor and of ImageReward."""
    shapes = {}
    for place, a, b in ((0, width, 1024), (2, 1024, 128), (4, 128, 64), (6, 64, 16), (7, 16, 1)):
        shapes |= _linear(f"{prefix}layers.{place}", a, b)
    return _drawn(shapes)


def _linear(name, a, b):
    return {f"{name}.weight": (b, a), f"{name}.bias": (b,)}


def _norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _drawn(shapes):
    rng = torch.Generator().manual_seed(1)
    return {name: _draw(name, shape, rng) for name, shape in shapes.items()}


def _draw(name, shape, rng):
    """About what keeps activations near 1, and norms near theirs."""
    noise = torch.randn(shape, generator=rng)
    if any(part in name for part in ("norm", "Norm", "ln_")):
        return 0.2 * noise + (1.0 if name.endswith("weight") else 0.0)
    if name.endswith("bias") or len(shape) < 2:
        return 0.3 * noise
    fan_in = shape[0] if name.endswith("proj") or name == "text_projection" else noise[0].numel()
    return noise if "embed" in name and "patch" not in name else noise * fan_in**-0.5
