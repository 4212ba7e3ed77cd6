"""ImageReward against its network written out by hand, on a small random checkpoint under the published names."""

import pytest
import torch

from dmdr_fast.rewards.registry import build_reward
from tests.rewards import by_hand, checkpoints

PROMPTS = ["a red tower", "seven geese on a roof at noon and then some more of them than one reads"]


@pytest.fixture(scope="module")
def reward(tmp_path_factory, bert_tokenizer):
    path = tmp_path_factory.mktemp("image_reward")
    torch.save(checkpoints.image_reward_state(), path / "ImageReward.pt")
    return build_reward("image_reward", str(path), options={"tokenizer": str(bert_tokenizer[0])})


def by_its_formula(bert_tokenizer, images):
    given = bert_tokenizer[1](PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    w = by_hand.Weights(checkpoints.image_reward_state(vision=64, text=128))
    tokens, mask = given.input_ids, given.attention_mask
    seen = by_hand.pixels(images, 24)
    return by_hand.image_reward(w, seen, tokens, mask, vision_heads=1, text_heads=2, depth=2)


def test_scores_and_gradients_are_the_network_s(reward, bert_tokenizer, images):
    x, y = (images.clone().requires_grad_() for _ in range(2))
    got, want = reward(x, prompts=PROMPTS), by_its_formula(bert_tokenizer, y)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert (got[0] - got[1]).abs() > 0.01 and got.dtype == torch.float32 and reward.name == "image_reward"
    (a,), (b,) = torch.autograd.grad(got.sum(), x), torch.autograd.grad(want.sum(), y)
    assert (a - b).norm() / b.norm() < 1e-4 and b.norm() > 0
    assert not any(p.requires_grad for p in reward.parameters())


def test_an_image_s_score_does_not_depend_on_its_company(reward, images):
    swapped = reward(images.flip(0), prompts=PROMPTS[::-1]).flip(0)
    torch.testing.assert_close(swapped, reward(images, prompts=PROMPTS), rtol=1e-5, atol=1e-5)
