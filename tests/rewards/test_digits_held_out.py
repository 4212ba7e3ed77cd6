"""The held-out digits reward: accurate on digits it has not seen, and apart from the optimised one."""

import copy

import pytest
import torch

from dmdr_fast.data.digits import held_out, load_digits
from dmdr_fast.rewards.digits_held_out import DigitsHeldOutReward


@pytest.fixture(scope="module")
def reward():
    return DigitsHeldOutReward()


def test_recognises_the_digits_that_the_others_are_fitted_on(reward):
    images, labels = load_digits()
    seen = held_out(labels)  # what the others hold out is all that this one has seen
    scores = torch.stack([reward(images[~seen], labels=torch.full(((~seen).sum(),), k)) for k in range(10)], dim=1)
    assert (scores.argmax(1) == labels[~seen]).double().mean().item() == reward.test_accuracy > 0.96
    assert reward.name == "digits_held_out" and reward.differentiable


def test_is_the_log_probability_and_its_gradient_that_of_fp64(reward):
    images, labels = load_digits()
    x = images[:3].clone().requires_grad_()
    values = reward(x, labels=labels[:3])
    exact = copy.deepcopy(reward.classifier).double()
    wide = images[:3].double().requires_grad_()
    want = torch.log_softmax(exact(wide), 1)[torch.arange(3), labels[:3]]
    torch.testing.assert_close(values.double(), want, rtol=1e-5, atol=1e-5)
    got, wanted = (torch.autograd.grad(v.sum(), leaf)[0] for v, leaf in ((values, x), (want, wide)))
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-6)
    assert wanted.abs().max() > 0


def test_is_finite_off_the_data(reward):
    noise = torch.randn(100, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert -40 < reward(noise, labels=torch.arange(100) % 10).min() < -1
