"""The rewards of scenes: accurate on real scenes, equal to the sum over all combinations, and apart from each other."""

import itertools

import pytest
import torch

from dmdr_fast.rewards.scenes import ScenesHeldOutReward, ScenesReward, ScenesRightReward
from dmdr_fast.scenes.captions import SIZES, Attributes, caption, combinations
from dmdr_fast.scenes.data import SceneSource

EVERY = torch.cartesian_prod(*map(torch.arange, SIZES))
REWARDS = {"verifier": ScenesReward(), "held_out_verifier": ScenesHeldOutReward()}


@pytest.fixture(scope="module")
def scenes():
    """1,000 scenes of the teacher's scans, which no verifier has seen; a fifth held-out combinations."""
    every = combinations(held_out=False) + combinations(held_out=True)
    return SceneSource("teacher", every, seed=77)(range(1000))


@pytest.mark.parametrize("kind", REWARDS)
def test_every_attribute_is_right_on_97_percent_of_real_scenes(kind, scenes):
    right = (REWARDS[kind].verifier.read(scenes.images) == scenes.attributes).double().mean(0)
    assert right.min() >= 0.97, right


def exactly(verifier, image):
    """log p fp64 [7200] of :data:`EVERY` combination in an image [1, 3, 16, 16]: sums over the places, one by one."""
    digits, colours = verifier.scores(image)[0].double().split([10, 6], dim=2)  # [4, 9, 10], [4, 9, 6]
    halves = 2 * EVERY[:, :1] + torch.arange(2)
    places = digits[halves, :, EVERY[:, 1::2]] + colours[halves, :, EVERY[:, 2::2]]  # [7200, 2, 9]
    return places.exp().sum(2).log().sum(1).log_softmax(0)


@pytest.mark.parametrize("kind", REWARDS)
def test_is_the_log_probability_over_all_combinations(kind, scenes):
    """And its gradient is that of finite differences."""
    reward = REWARDS[kind]
    image = (0.5 * scenes.images[:1]).requires_grad_()
    some = EVERY[::97]
    prompts = [caption(Attributes(*row), 0) for row in some.tolist()]
    got = reward(image.detach().expand(len(some), -1, -1, -1), prompts=prompts)
    torch.testing.assert_close(got.double(), exactly(reward.verifier, image.detach())[::97], rtol=1e-5, atol=1e-4)

    (gradient,) = torch.autograd.grad(reward(image, prompts=scenes.prompts[:1]).sum(), image)
    direction = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    up, down = (reward(image.detach() + h * direction, prompts=scenes.prompts[:1]).double() for h in (1e-2, -1e-2))
    torch.testing.assert_close((gradient * direction).sum().double(), (up - down).sum() / 2e-2, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("kind", REWARDS)
def test_reads_the_most_probable_value_of_each_attribute(kind, scenes):
    verifier = REWARDS[kind].verifier
    blurred = torch.nn.functional.avg_pool2d(scenes.images[:20], 3, stride=1, padding=1)  # unsure ones
    for image, read in zip(blurred, verifier.read(blurred), strict=True):
        p = exactly(verifier, image[None]).exp().view(SIZES)
        rest = [tuple(set(range(5)) - {axis}) for axis in range(5)]
        assert read.tolist() == [int(p.sum(others).argmax()) for others in rest]


def test_right_is_the_share_of_attributes(scenes):
    reward = ScenesRightReward()
    image = scenes.images[:1].expand(32, -1, -1, -1)
    shown = reward.verifier.read(image[:1])[0].tolist()
    wrong = [list(flags) for flags in itertools.product((0, 1), repeat=5)]
    asked = [Attributes(*((v + w) % n for v, w, n in zip(shown, row, SIZES, strict=True))) for row in wrong]
    rewards = reward(image, prompts=[caption(scene, 1) for scene in asked])
    assert rewards.tolist() == pytest.approx([1 - sum(row) / 5 for row in wrong])


@pytest.mark.parametrize("kind", REWARDS)
def test_is_finite_off_the_data(kind):
    noise = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    blank, white = torch.full((8, 3, 16, 16), -1.0), torch.ones(8, 3, 16, 16)
    odd = torch.cat([noise, blank, white]).requires_grad_()
    rewards = REWARDS[kind](odd, prompts=["a red seven to the left of a green two"] * len(odd))
    (gradient,) = torch.autograd.grad(rewards.sum(), odd)
    assert rewards.min() > -60 and rewards.max() < -1 and gradient.isfinite().all()


def test_wrong_arguments_are_named():
    images, prompts = torch.zeros(2, 3, 16, 16), ["a red seven above a green two"] * 2
    with pytest.raises(ValueError, match=r"images: expected \[B, 3, 16, 16\], got \[2, 3, 8, 8\]"):
        REWARDS["verifier"](torch.zeros(2, 3, 8, 8), prompts=prompts)
    with pytest.raises(ValueError, match=r"reward 'scenes': expected one prompt per image, 2, got none"):
        REWARDS["verifier"](images, labels=torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"reward 'scenes_held_out': prompt 'a fox' describes no scene; write it as"):
        REWARDS["held_out_verifier"](images, prompts=["a fox", prompts[0]])
