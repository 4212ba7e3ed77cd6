"""What runs the reference, and how often: as each method says to the planner."""

from dataclasses import replace

import pytest
import torch

from dmdr_fast.algorithm.dmd import DMDOptions
from dmdr_fast.algorithm.recipe import Networks
from dmdr_fast.algorithm.rl.advantage_weighted import AdvantageWeightedDMD
from dmdr_fast.algorithm.rl.dpo import DPO
from dmdr_fast.algorithm.rl.grpo import GRPO
from dmdr_fast.algorithm.rl.hybrid import Hybrid
from dmdr_fast.algorithm.rl.nft import NFT
from dmdr_fast.algorithm.rl.refl import ReFL
from dmdr_fast.algorithm.simulation import one_step, simulate_all
from dmdr_fast.algorithm.step import dmdr_update, leaf_gradient
from dmdr_fast.algorithm.streams import Shard, Streams

from ..networks import Denoiser, PlainRole, networks, recipe, reward_model, update

B, K, N = 4, 2, 4
TWICE = GRPO(group_size=K, inner_epochs=2, trained_steps=2)
REWARD = reward_model(lambda x: x, lambda images, labels: images.flatten(1).sum(1))


@pytest.mark.parametrize(
    "method",
    [ReFL(), TWICE, Hybrid(grpo=TWICE), DPO(group_size=K), NFT(group_size=K)],
    ids=lambda method: method.name,
)
def test_forwards_of_the_reference(method):
    reference = PlainRole(Denoiser(2))
    nets = Networks(PlainRole(Denoiser(1)), None, None, reference)
    numbers = recipe(N, method=method, reward_weight=1.0, regularizer="kl", kl_weight=0.5)
    dmdr_update(update(nets, numbers, Streams(3), [Shard(0, B, B)], reward=REWARD))
    assert reference.forwards == method.reference_forwards(N) + method.kl_on_x0
    assert reference.forwards == {"refl": 1, "grpo": 4, "hybrid": 4, "dpo": 2, "nft": 1}[method.name]


def test_a_kl_beside_advantages_on_the_guidance_acts_on_x0():
    """g with the KL is g without it and kl_weight / numel (x0 - x0_ref)."""
    nets, *_ = networks()
    nets = Networks(nets.generator, nets.fake, nets.score, Denoiser(4))
    method = AdvantageWeightedDMD(group_size=K, mode="advantage_weighted_dmd")
    numbers = recipe(N, method=method, reward_weight=1.0, dmd=DMDOptions(cfg_scale=3.0), kl_weight=0.7)
    held = update(nets, numbers, Streams(3), [Shard(0, B, B)], reward=REWARD)
    (sample,) = simulate_all(held, (0, 0), K)
    x0, guidance = sample.rollout.x0, torch.linspace(0.0, 1.5, B)
    g, metrics = leaf_gradient(held, sample, x0, guidance)
    free, _ = leaf_gradient(replace(held, recipe=replace(numbers, kl_weight=0.0)), sample, x0, guidance)
    with torch.no_grad():
        away = x0 - one_step(nets.reference, sample, numbers)
    torch.testing.assert_close(g - free, 0.7 / x0.numel() * away, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(metrics["kl"], 0.5 * away.square().mean(), rtol=1e-5, atol=0)
