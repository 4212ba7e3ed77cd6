"""The leaf gradients of ReFL and of the KL: plain autograd's, whatever the chunk."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from dmdr_fast.algorithm.rl.kl import kl_leaf_gradient
from dmdr_fast.algorithm.rl.refl import ReFL
from dmdr_fast.algorithm.rl.reward_gradient import refl_leaf_gradient

B, SHAPE = 5, (2, 4, 4)
RNG = torch.Generator().manual_seed(8)
X0 = torch.randn(B, *SHAPE, dtype=torch.float64, generator=RNG)
MIX = torch.randn(SHAPE[0], 3, dtype=torch.float64, generator=RNG)
PLACE = torch.randn(B, dtype=torch.float64, generator=RNG)


def decode(x):
    return torch.tanh(torch.einsum("bchw,cd->bdhw", x, MIX))


def score(images, rows):
    """A reward that tells the rows apart."""
    return (images.square().flatten(1).mean(1) - PLACE[rows]).sin()


def autograd(objective, margin):
    leaf = X0.clone().requires_grad_()
    rewards = score(decode(leaf), slice(None))
    loss = -rewards.mean() if objective == "linear" else (margin - rewards).clamp_min(0).mean()
    return torch.autograd.grad(loss, leaf)[0], rewards.detach()


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("objective", ["linear", "hinge"])
def test_the_gradient_is_autograds_for_every_chunk(objective, checkpoint):
    margin = score(decode(X0), slice(None)).median().item() + 1e-3
    expected, rewards_expected = autograd(objective, margin)
    assert (objective == "hinge") == bool((expected.flatten(1).norm(dim=1) == 0).any())
    for chunk in (1, 2, 5, 9):
        options = ReFL(chunk, checkpoint, objective, margin)
        gradient, rewards = refl_leaf_gradient(X0, decode, score, options)
        torch.testing.assert_close(gradient, expected)
        torch.testing.assert_close(rewards, rewards_expected.float())
        assert not gradient.requires_grad and not rewards.requires_grad


def test_a_checkpointed_decoder_runs_again_in_its_backward_and_the_reward_does_not():
    calls = {"decode": 0, "score": 0}

    def counted(name, function):
        def call(*args):
            calls[name] += 1
            return function(*args)

        return call

    options = ReFL(chunk=2, checkpoint=True)
    refl_leaf_gradient(X0, counted("decode", decode), counted("score", score), options)
    assert calls == {"decode": 6, "score": 3}


def test_an_unknown_objective_is_refused():
    with pytest.raises(ValueError, match="objective must be 'linear' or 'hinge', got 'square'"):
        refl_leaf_gradient(X0, decode, score, ReFL(objective="square"))


def test_kl_on_the_leaf():
    reference = torch.randn(B, *SHAPE, dtype=torch.float64, generator=RNG)
    gradient, value = kl_leaf_gradient(X0, reference, 0.3)
    leaf = X0.clone().requires_grad_()
    one = torch.ones((), dtype=torch.float64)
    expected = kl_divergence(Normal(leaf, one), Normal(reference, one)).mean()
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(0.3 * expected, leaf)[0])


def test_kl_of_bf16_samples_is_computed_in_fp32():
    x0, reference = X0.bfloat16(), (X0 + 0.01).bfloat16()
    gradient, value = kl_leaf_gradient(x0, reference, 1.0)
    difference = x0.double() - reference.double()
    assert gradient.dtype is torch.bfloat16 and value.dtype is torch.float32
    torch.testing.assert_close(value.double(), 0.5 * difference.square().mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.double(), difference / X0.numel(), rtol=4e-3, atol=0)
