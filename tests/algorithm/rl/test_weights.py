"""Weights inside the losses of GRPO and DPO: what they multiply, and what they leave alone."""

import torch

from dmdr_fast.algorithm.rl.dpo import DPO
from dmdr_fast.algorithm.rl.policy_gradient import policy_loss
from dmdr_fast.algorithm.rl.preference import dpo_loss

from ..networks import Denoiser
from .test_dpo import BETA, NOISE, L, P, T, W
from .test_dpo import Y as PAIR_Y
from .test_grpo import ADVANTAGE, KEPT, Y, options, rollout


def test_the_policys_weight_leaves_the_kl_alone():
    numbers = options("dance")
    trajectory = rollout(Denoiser(1), numbers)
    given = (Denoiser(2), trajectory, 1, Y, ADVANTAGE, KEPT, numbers)
    policy, _ = policy_loss(*given)
    weighted, stats = policy_loss(*given, weight=0.05, reference=Denoiser(4), kl_weight=0.7)
    torch.testing.assert_close(weighted, 0.05 * policy + 0.7 * stats["kl"])


def test_dpo_weighs_pair_by_pair():
    weight = torch.tensor([2.0, 0.0, 0.5, 1.0])
    pairs = (W, L, T, NOISE, PAIR_Y)
    each = [
        dpo_loss(Denoiser(1), Denoiser(2), *(part[i : i + 1] for part in pairs), DPO(beta=BETA))[0] for i in range(P)
    ]
    loss, _ = dpo_loss(Denoiser(1), Denoiser(2), *pairs, DPO(beta=BETA), weight=weight)
    torch.testing.assert_close(loss, (torch.stack(each) * weight).mean())
