"""The digits reward: log p(label | image), accurate, differentiable, not certain of anything."""

import copy

import pytest
import torch

from dmdr_fast.data.digits import held_out, load_digits
from dmdr_fast.rewards.digits import DigitsReward


@pytest.fixture(scope="module")
def reward():
    return DigitsReward()


def test_recognises_digits_it_was_not_fitted_on(reward):
    assert reward.name == "digits" and reward.differentiable
    assert reward.test_accuracy >= 0.97
    images, labels = load_digits()
    held = held_out(labels)
    rewards = reward(images[held], labels=labels[held])
    right = torch.stack([reward(images[held], labels=(labels[held] + i) % 10) for i in range(10)]).argmax(0) == 0
    assert right.double().mean().item() == reward.test_accuracy
    assert -0.1 < rewards.mean() < 0


def test_is_the_log_probability_of_the_label(reward):
    images, _ = load_digits()
    images = images[:16]
    log_p = torch.stack([reward(images, labels=torch.full((16,), label)) for label in range(10)], dim=1)
    assert log_p.dtype == torch.float32 and log_p.shape == (16, 10)
    expected = torch.log_softmax(reward.classifier(images).double(), dim=1)
    torch.testing.assert_close(log_p.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(16))
    assert reward(images.bfloat16(), labels=torch.zeros(16, dtype=torch.long)).dtype == torch.float32


def test_its_gradient_is_that_of_fp64_finite_differences(reward):
    images, labels = load_digits()
    image = (0.5 * images[:2]).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(image, labels=labels[:2]).sum(), image)
    exact = copy.deepcopy(reward.classifier).double()
    direction = torch.randn(image.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    h = 1e-5

    def total(x):
        return torch.log_softmax(exact(x), 1)[[0, 1], labels[:2]].sum()

    base = image.detach().double()
    slope = (total(base + h * direction) - total(base - h * direction)) / (2 * h)
    torch.testing.assert_close((gradient.double() * direction).sum(), slope, rtol=1e-4, atol=1e-5)


def test_is_not_certain_off_the_data(reward):
    """Blank images, noise and averages of digits keep finite rewards and gradients for every label."""
    images, labels = load_digits()
    noise = torch.randn(100, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    mean_digit = torch.stack([images[labels == digit].mean(0) for digit in range(10)])
    for odd in (torch.full((10, 1, 8, 8), -1.0), noise, mean_digit):
        odd = odd.clone().requires_grad_()
        rewards = reward(odd, labels=torch.arange(len(odd)) % 10)
        (gradient,) = torch.autograd.grad(rewards.sum(), odd)
        assert rewards.min() > -40 and gradient.isfinite().all()
    assert reward(mean_digit, labels=torch.arange(10)).median() > -0.5
    assert not any(p.requires_grad for p in reward.parameters())


def test_wrong_arguments_are_named(reward):
    images = torch.zeros(4, 1, 8, 8)
    with pytest.raises(ValueError, match=r"images: expected \[B, 1, 8, 8\], got \[4, 3, 8, 8\]"):
        reward(torch.zeros(4, 3, 8, 8), labels=torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"labels: expected one class per image, \[4\], got None"):
        reward(images, prompts=["a three"] * 4)
    with pytest.raises(ValueError, match=r"got \[3\]"):
        reward(images, labels=torch.zeros(3, dtype=torch.long))
