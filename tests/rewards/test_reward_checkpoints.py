"""What cannot be loaded is said in one line that names the reward, the file, what was expected and what to change."""

import pytest
import torch

from dmdr_fast.rewards.registry import build_reward
from tests.rewards import checkpoints


def refused(kind, path, said, error=ValueError, **options):
    options = {k: str(v) for k, v in options.items()}
    with pytest.raises(error, match=rf"^reward '{kind}': .*{said}"):
        build_reward(kind, str(path), options=options)


def without(state, part):
    return {k: v for k, v in state.items() if part not in k}


def saved(path, state, name="weights.pt"):
    torch.save(state, path / name)
    return path / name


def test_clip_that_is_missing_broken_or_half(small_clip, tmp_path):
    refused(
        "clip_score", "/no/such/folder", r"no folder /no/such/folder: set path of its reward.terms", FileNotFoundError
    )
    refused("pickscore", tmp_path, r"cannot load .*set path", FileNotFoundError)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((small_clip.path / name).read_bytes()[:2000])
    refused("clip_score", tmp_path, r"cannot load .*\(SafetensorError")
    small_clip.model.vision_model.save_pretrained(tmp_path / "vision")
    small_clip.tokenizer.save_pretrained(tmp_path / "vision")
    refused("clip_score", tmp_path / "vision", r"lacks .*expected all weights of a CLIPModel: set path")


def test_a_tokenizer_of_another_model(small_clip, bert_tokenizer):
    refused("clip_score", small_clip.path, r"tokenizer in .* has 57 tokens, its model 54", tokenizer=bert_tokenizer[0])
    refused(
        "clip_score", small_clip.path, r"no folder /gone: set options.tokenizer", FileNotFoundError, tokenizer="/gone"
    )


def test_hps_checkpoints_that_are_none(small_clip, tmp_path):
    given = {"clip": small_clip.path}
    refused("hps", tmp_path, r"no HPS_v2.1_compressed.pt in .*: set path", FileNotFoundError, **given)
    (tmp_path / "HPS_v2.1_compressed.pt").write_bytes(b"not a checkpoint")
    refused("hps", tmp_path, r"cannot read .*HPS_v2.1_compressed.pt .*set path", **given)
    state = checkpoints.open_clip_state()
    refused("hps", saved(tmp_path, {"state_dict": [1, 2]}), r"expected named tensors", **given)
    refused("hps", saved(tmp_path, state | {"head.weight": torch.ones(1)}), r"head.weight is no weight of", **given)
    refused("hps", saved(tmp_path, without(state, "ln_final")), r"lacks text_model.final_layer_norm.bias", **given)
    wrong = state | {"visual.proj": torch.ones(32, 7)}
    refused(
        "hps", saved(tmp_path, wrong), r"visual_projection.weight: expected shape \[12, 32\], got \[7, 32\]", **given
    )
    path = saved(tmp_path, state)
    refused("hps", path, r"no CLIP configuration in .*: set options.clip", FileNotFoundError, clip=tmp_path)


def test_heads_that_are_missing_or_of_another_clip(small_clip, bert_tokenizer, tmp_path):
    head = checkpoints.head_state(12)
    given = {"clip": small_clip.path}
    refused("aesthetic", saved(tmp_path, without(head, "layers.7")), r"lacks layers.7.weight", **given)
    wrong = saved(tmp_path, checkpoints.head_state(768))
    refused("aesthetic", wrong, r"expected shape \[1024, 12\] for features of width 12, got \[1024, 768\]", **given)
    state, words = checkpoints.image_reward_state(), {"tokenizer": bert_tokenizer[0]}
    refused("image_reward", saved(tmp_path, without(state, "mlp.layers")), r"lacks mlp.layers.0.weight", **words)
    refused("image_reward", saved(tmp_path, without(state, "blip.text")), r"no blip.text_encoder", **words)
    refused("image_reward", saved(tmp_path, without(state, "pos_embed")), r"lacks pos_embed", **words)
    refused("image_reward", saved(tmp_path, without(state, "norm2")), r"lacks encoder.layers.0.layer_norm2", **words)
