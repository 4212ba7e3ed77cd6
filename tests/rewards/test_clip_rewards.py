"""CLIP score, PickScore, HPSv2 and the aesthetic predictor against CLIP called by hand, on small random weights."""

import pytest
import torch
from torch.nn import functional as F

from dmdr_fast.rewards import clip as clip_module
from dmdr_fast.rewards.aesthetic import AestheticReward
from dmdr_fast.rewards.base import check_reward
from dmdr_fast.rewards.clip_score import CLIPScoreReward
from dmdr_fast.rewards.hps import HPSReward
from dmdr_fast.rewards.pickscore import PickScoreReward
from dmdr_fast.rewards.pixels import square_pixels
from dmdr_fast.rewards.registry import build_reward
from tests.rewards import by_hand, checkpoints

PROMPTS = ["a red tower", "seven geese"]


def transformers_cosine(small_clip, images, prompts):
    """The diagonal of CLIPModel's own cosines, its own padding, on pixels made by torch's interpolate."""
    tokens = small_clip.tokenizer(prompts, padding=True, truncation=True, max_length=20, return_tensors="pt")
    out = small_clip.model(**tokens, pixel_values=by_hand.pixels(images, 24))
    return (out.image_embeds * out.text_embeds).sum(1)


@pytest.fixture(scope="module")
def clip_score(small_clip):
    return CLIPScoreReward(small_clip.path)


def test_clip_score_and_pickscore_are_transformers_cosine(small_clip, clip_score, images):
    cosine = transformers_cosine(small_clip, images, PROMPTS).detach()
    score = check_reward(clip_score(images, prompts=PROMPTS), images, "clip_score")
    torch.testing.assert_close(score, 100 * cosine, rtol=1e-4, atol=1e-4)
    pick = build_reward("pickscore", str(small_clip.path), options={"tokenizer": str(small_clip.path)})
    scale = small_clip.model.logit_scale.detach().exp()
    torch.testing.assert_close(pick(images, prompts=PROMPTS), scale * cosine, rtol=1e-4, atol=1e-4)
    assert (score[0] - score[1]).abs() > 1 and isinstance(pick, PickScoreReward) and pick.name == "pickscore"


def test_the_gradient_reaches_the_images_only(small_clip, clip_score, images):
    x, y = (images.clone().requires_grad_() for _ in range(2))
    (got,) = torch.autograd.grad(clip_score(x, prompts=PROMPTS).sum(), x)
    (want,) = torch.autograd.grad(100 * transformers_cosine(small_clip, y, PROMPTS).sum(), y)
    assert (got - want).norm() / want.norm() < 1e-4 and want.norm() > 0
    assert clip_score.differentiable and not any(p.requires_grad for p in clip_score.parameters())
    clip_score.train()
    assert not any(module.training for module in clip_score.modules())


def test_a_prompt_s_embedding_does_not_depend_on_its_company(small_clip, monkeypatch):
    alone = CLIPScoreReward(small_clip.path).clip
    first = alone.embed_prompts(PROMPTS[:1])
    crowd = CLIPScoreReward(small_clip.path).clip
    many = [f"goose {c}" for c in "abcdefghijklmnopqrstuvwxyz"]
    together = crowd.embed_prompts([*many, *PROMPTS, many[3]])
    assert torch.equal(together[26], first[0]) and torch.equal(together[28], together[3])
    monkeypatch.setattr(clip_module, "CACHED_PROMPTS", 4)
    monkeypatch.setattr(crowd, "_tokenizer", None)  # what is known is not computed again
    assert torch.equal(crowd.embed_prompts(PROMPTS), together[26:28])
    assert list(crowd._prompts) == [*many[-2:], *PROMPTS]


def test_long_prompts_are_cut_and_bf16_is_close(small_clip, clip_score, images):
    long = ["a very long prompt " * 20, PROMPTS[1]]
    want = 100 * transformers_cosine(small_clip, images, long).detach()
    torch.testing.assert_close(clip_score(images, prompts=long), want, rtol=1e-4, atol=1e-4)
    half = build_reward("clip_score", str(small_clip.path), options={"dtype": "bf16"})
    got = half(images, prompts=long)
    assert got.dtype == torch.float32 and half.clip.model.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=0.05, atol=2.0)


def test_images_that_are_no_squares():
    wide = torch.rand(1, 3, 20, 31, generator=torch.Generator().manual_seed(3)) * 2 - 1
    full = by_hand.pixels(wide, 10, height=10, width=15)
    torch.testing.assert_close(square_pixels(wide, 10), full[:, :, :, 2:12], rtol=1e-5, atol=1e-5)
    black = by_hand.pixels(-torch.ones(1, 3, 31, 31), 31)
    tall = F.interpolate((wide.mT + 1) / 2, (31, 20), mode="bicubic", antialias=True)
    black[:, :, :, 5:25] = (tall - by_hand.MEAN) / by_hand.STD
    torch.testing.assert_close(square_pixels(wide.mT, 31, fit="pad"), black, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"images: expected \[B, 3, H, W\], got \[1, 1, 8, 8\]"):
        square_pixels(torch.zeros(1, 1, 8, 8), 8)


@pytest.fixture(scope="module")
def hps_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("hps") / "HPS_v2.1_compressed.pt"
    torch.save({"epoch": 1, "state_dict": checkpoints.open_clip_state()}, path)
    return path


def test_hps_reads_open_clip_s_weights(small_clip, hps_file, images):
    reward = HPSReward(hps_file.parent, clip=small_clip.path)
    w = by_hand.Weights(checkpoints.open_clip_state())
    tokens = small_clip.tokenizer(PROMPTS, padding=True, return_tensors="pt").input_ids
    text = by_hand.open_clip_text(w, tokens, small_clip.tokenizer.eos_token_id, heads=2, depth=2)
    x, y = (images.clone().requires_grad_() for _ in range(2))
    want = (by_hand.open_clip_image(w, by_hand.pixels(y, 24), heads=2, depth=2) * text).sum(1)
    got = reward(x, prompts=PROMPTS)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert (got[0] - got[1]).abs() > 0.01
    (a,), (b,) = torch.autograd.grad(got.sum(), x), torch.autograd.grad(want.sum(), y)
    assert (a - b).norm() / b.norm() < 1e-4


def test_the_aesthetic_predictor_is_its_head_on_unit_embeddings(small_clip, tmp_path, images):
    torch.save(checkpoints.head_state(12), tmp_path / "head.pth")
    reward = AestheticReward(tmp_path / "head.pth", clip=small_clip.path)
    embeddings = small_clip.model(
        **small_clip.tokenizer(PROMPTS, padding=True, return_tensors="pt"), pixel_values=by_hand.pixels(images, 24)
    ).image_embeds  # which CLIPModel has normalised
    want = by_hand.linear_layers(by_hand.Weights(checkpoints.head_state(12)), "layers", embeddings)
    torch.testing.assert_close(reward(images), want.detach(), rtol=1e-4, atol=1e-5)
    assert (want[0] - want[1]).abs() > 1e-3


@pytest.mark.parametrize("prompts,got", [(None, "none"), (["one"], "1")])
def test_prompts_must_be_one_per_image(clip_score, images, prompts, got):
    with pytest.raises(ValueError, match=rf"'clip_score': expected one prompt per image, 2, got {got}"):
        clip_score(images, prompts=prompts)
