"""CLIP, BLIP and their preprocessing from plain tensor operations, over weights under their published names."""

import torch
from torch.nn import functional as F

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def pixels(images, size, height=None, width=None):
    """Images in [-1, 1] resized to (height, width) (default: size) and normalised."""
    zero_to_one = (images.clamp(-1, 1) + 1) / 2
    resized = F.interpolate(zero_to_one, (height or size, width or size), mode="bicubic", antialias=True)
    return (resized - MEAN) / STD


def attend(q, k, v, heads, mask=None):
    """softmax(q k^T / sqrt(d) + mask) v over the heads of [B, T, C]."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return ((scores if mask is None else scores + mask).softmax(-1) @ v).transpose(1, 2).flatten(2)


class Weights:
    """Functional layers that take their weights from a state dict by name."""

    def __init__(self, state):
        self.state = state

    def __getitem__(self, key):
        return self.state[key]

    def linear(self, name, x):
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def norm(self, name, x, eps):
        weight = self.state[f"{name}.weight"]
        return F.layer_norm(x, weight.shape, weight, self.state[f"{name}.bias"], eps)

    def vit_tokens(self, image, patch, classes, position):
        """Patches behind the class token, with positions: [B, 1 + N, C]."""
        bias = self.state.get(patch.replace("weight", "bias"))
        kernel = self.state[patch]
        patches = F.conv2d(image, kernel, bias, stride=kernel.shape[-1]).flatten(2).mT
        first = self.state[classes].reshape(1, 1, -1).expand(len(image), 1, -1)
        return torch.cat([first, patches], 1) + self.state[position]


def open_clip_block(w, prefix, x, heads, mask=None):
    h = w.norm(f"{prefix}.ln_1", x, 1e-5)
    q, k, v = F.linear(h, w[f"{prefix}.attn.in_proj_weight"], w[f"{prefix}.attn.in_proj_bias"]).chunk(3, dim=-1)
    x = x + w.linear(f"{prefix}.attn.out_proj", attend(q, k, v, heads, mask))
    h = w.norm(f"{prefix}.ln_2", x, 1e-5)
    return x + w.linear(f"{prefix}.mlp.c_proj", F.gelu(w.linear(f"{prefix}.mlp.c_fc", h)))


def open_clip_image(w, image, heads, depth):
    x = w.vit_tokens(image, "visual.conv1.weight", "visual.class_embedding", "visual.positional_embedding")
    x = w.norm("visual.ln_pre", x, 1e-5)
    for n in range(depth):
        x = open_clip_block(w, f"visual.transformer.resblocks.{n}", x, heads)
    return F.normalize(w.norm("visual.ln_post", x[:, 0], 1e-5) @ w["visual.proj"], dim=-1)


def open_clip_text(w, tokens, end, heads, depth):
    x = F.embedding(tokens, w["token_embedding.weight"]) + w["positional_embedding"][: tokens.shape[1]]
    mask = torch.full((tokens.shape[1],) * 2, -torch.inf).triu(1)
    for n in range(depth):
        x = open_clip_block(w, f"transformer.resblocks.{n}", x, heads, mask)
    ends = (tokens == end).int().argmax(1)
    last = w.norm("ln_final", x, 1e-5)[torch.arange(len(x)), ends]
    return F.normalize(last @ w["text_projection"], dim=-1)


def image_reward(w, image, tokens, mask, *, vision_heads, text_heads, depth):
    """ImageReward's score [B] of preprocessed images, from the names in its checkpoint."""
    v = "blip.visual_encoder"
    x = w.vit_tokens(image, f"{v}.patch_embed.proj.weight", f"{v}.cls_token", f"{v}.pos_embed")
    for n in range(depth):
        b = f"{v}.blocks.{n}"
        q, k, values = w.linear(f"{b}.attn.qkv", w.norm(f"{b}.norm1", x, 1e-6)).chunk(3, dim=-1)
        x = x + w.linear(f"{b}.attn.proj", attend(q, k, values, vision_heads))
        x = x + w.linear(f"{b}.mlp.fc2", F.gelu(w.linear(f"{b}.mlp.fc1", w.norm(f"{b}.norm2", x, 1e-6))))
    seen = w.norm(f"{v}.norm", x, 1e-6)
    t = "blip.text_encoder"
    x = F.embedding(tokens, w[f"{t}.embeddings.word_embeddings.weight"])
    x = x + w[f"{t}.embeddings.position_embeddings.weight"][: tokens.shape[1]]
    x = w.norm(f"{t}.embeddings.LayerNorm", x, 1e-12)
    padding = torch.where(mask.bool(), 0.0, -torch.inf)[:, None, None]
    for n in range(depth):
        b = f"{t}.encoder.layer.{n}"
        for kind, other, bias in (("attention", None, padding), ("crossattention", seen, None)):
            source = x if other is None else other
            q = w.linear(f"{b}.{kind}.self.query", x)
            k, values = (w.linear(f"{b}.{kind}.self.{p}", source) for p in ("key", "value"))
            h = w.linear(f"{b}.{kind}.output.dense", attend(q, k, values, text_heads, bias))
            x = w.norm(f"{b}.{kind}.output.LayerNorm", x + h, 1e-12)
        h = w.linear(f"{b}.output.dense", F.gelu(w.linear(f"{b}.intermediate.dense", x)))
        x = w.norm(f"{b}.output.LayerNorm", x + h, 1e-12)
    return (linear_layers(w, "mlp.layers", x[:, 0]) - 0.16717362830052426) / 1.0333394966054072


def linear_layers(w, prefix, x):
    for place in (0, 2, 4, 6, 7):
        x = w.linear(f"{prefix}.{place}", x)
    return x[:, 0]
