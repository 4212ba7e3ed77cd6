"""open_clip's names for a CLIP's weights, and transformers'.

open_clip                                      transformers
``visual.conv1.weight``                        ``vision_model.embeddings.patch_embedding.weight``
``visual.{class,positional}_embedding``        ``vision_model.embeddings.{class_embedding,position_embedding.weight}``
``visual.ln_{pre,post}``                       ``vision_model.{pre_layrnorm,post_layernorm}``
``visual.proj`` [width, d]                     ``visual_projection.weight`` [d, width]
``token_embedding``, ``positional_embedding``  ``text_model.embeddings.{token,position}_embedding``
``ln_final``                                   ``text_model.final_layer_norm``
``text_projection`` [width, d]                 ``text_projection.weight`` [d, width]
``[visual.]transformer.resblocks.N``           ``{vision,text}_model.encoder.layers.N``, and in it
``.ln_{1,2}``, ``.mlp.c_{fc,proj}``            ``.layer_norm{1,2}``, ``.mlp.fc{1,2}``
``.attn.in_proj_{weight,bias}``                ``.self_attn.{q,k,v}_proj``, one below the other
``.attn.out_proj``                             ``.self_attn.out_proj``
"""

from __future__ import annotations

import re

from torch import Tensor

_OUTSIDE = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)")


def from_open_clip(state: dict[str, Tensor], *, where: str) -> dict[str, Tensor]:
    """The weights under the names of ``transformers.CLIPModel``; a leading ``module.`` is dropped, masks are left out.

    Raises:
        ValueError: a name that no open_clip CLIP has.
    """
    renamed = {}
    for key, value in state.items():
        name = key.removeprefix("module.")
        if name in _OUTSIDE:
            renamed[_OUTSIDE[name]] = value
        elif name in _TRANSPOSED:
            renamed[_TRANSPOSED[name]] = value.mT.contiguous()
        elif match := _BLOCK.fullmatch(name):
            renamed |= _block(value, *match.groups(), key=key, where=where)
        elif name != "attn_mask":  # a constant
            raise ValueError(_unknown(key, where))
    return renamed


def _block(value: Tensor, visual: str | None, index: str, part: str, kind: str, *, key: str, where: str) -> dict:
    prefix = f"{'vision' if visual else 'text'}_model.encoder.layers.{index}"
    if part == "attn.in_proj":
        thirds = zip("qkv", value.chunk(3), strict=True)
        return {f"{prefix}.self_attn.{n}_proj.{kind}": third.contiguous() for n, third in thirds}
    if part not in _IN_BLOCK:
        raise ValueError(_unknown(key, where))
    return {f"{prefix}.{_IN_BLOCK[part]}.{kind}": value}


def _unknown(key: str, where: str) -> str:
    return (
        f"{where}: {key} is no weight of an open_clip CLIP: expected names such as visual.conv1.weight and "
        "transformer.resblocks.0.ln_1.weight: set path of its reward.terms entry to the published checkpoint"
    )
