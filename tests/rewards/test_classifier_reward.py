"""The classifier reward against transformers called by hand, on a small random DINOv2 with a head."""

import pytest
import torch
from torch.nn import functional as F

from dmdr_fast.rewards.base import check_reward
from dmdr_fast.rewards.classifier import IMAGENET_MEAN, IMAGENET_STD, TransformersClassifierReward

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14, num_labels=5
    )
    model = transformers.Dinov2ForImageClassification(config).eval()
    with torch.no_grad():
        model.classifier.weight.normal_(0, 1.0)  # a fresh head is nearly indifferent
    path = tmp_path_factory.mktemp("dinov2")
    model.save_pretrained(path)
    return path, model


def by_hand(model, images, size, mean, std):
    pixels = F.interpolate((images.clamp(-1, 1) + 1) / 2, (size, size), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(v, dtype=images.dtype).view(1, 3, 1, 1) for v in (mean, std))
    return model((pixels - mean) / std).logits


def test_reward_is_minus_the_cross_entropy(saved):
    path, model = saved
    images, labels = 0.8 * torch.randn(4, 3, 20, 20), torch.tensor([0, 4, 2, 2])
    for size, mean, std in ((42, IMAGENET_MEAN, IMAGENET_STD), (28, (0.5,) * 3, (0.25,) * 3)):
        reward = TransformersClassifierReward(path, size=size, mean=mean, std=std)
        got = check_reward(reward(images, labels=labels), images, reward.name)
        want = -F.cross_entropy(by_hand(model, images, size, mean, std), labels, reduction="none")
        torch.testing.assert_close(got, want.detach(), rtol=1e-4, atol=1e-4)
        assert got.std() > 0.1 and reward.num_classes == 5


def test_gradient_reaches_the_images_only(saved):
    path, model = saved
    images, labels = (0.5 * torch.randn(2, 3, 20, 20)).requires_grad_(), torch.tensor([1, 3])
    reward = TransformersClassifierReward(path, size=28)
    (got,) = torch.autograd.grad(reward(images, labels=labels).sum(), images)
    logits = by_hand(model, images, 28, IMAGENET_MEAN, IMAGENET_STD)
    (want,) = torch.autograd.grad(-F.cross_entropy(logits, labels, reduction="sum"), images)
    assert ((got - want).norm() / want.norm()).item() < 1e-4 and want.norm() > 0
    assert reward.differentiable and not any(p.requires_grad for p in reward.parameters())


def test_bf16_weights_and_evaluation_mode(saved):
    path, model = saved
    reward = TransformersClassifierReward(path, size=28, dtype=torch.bfloat16)
    reward.train()
    assert not any(module.training for module in reward.modules())
    images, labels = 0.5 * torch.randn(4, 3, 20, 20), torch.tensor([0, 1, 2, 3])
    got = reward(images, labels=labels)
    want = by_hand(model, images, 28, IMAGENET_MEAN, IMAGENET_STD).log_softmax(-1)[torch.arange(4), labels]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want.detach(), rtol=0.05, atol=0.05)


def test_what_does_not_fit_is_refused(saved, tmp_path):
    path, model = saved
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere: set path of its reward.terms entry"):
        TransformersClassifierReward(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"cannot load .*set path of"):
        TransformersClassifierReward(tmp_path)
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match=r"cannot load .*set path of"):
        TransformersClassifierReward(tmp_path)
    with pytest.raises(ValueError, match=r"expected a classifier of 1000 classes, got 5 .*model.num_classes to 5"):
        TransformersClassifierReward(path, num_classes=1000)
    model.dinov2.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks classifier.*expected all weights.*with its head"):
        TransformersClassifierReward(tmp_path)


@pytest.mark.parametrize("labels", [None, torch.tensor([1]), torch.tensor([0.0, 1.0])])
def test_labels_must_be_one_class_per_image(saved, labels):
    reward = TransformersClassifierReward(saved[0], size=28, num_classes=5)
    with pytest.raises(ValueError, match=r"labels must be int64 \[2\], one per image, got"):
        reward(torch.zeros(2, 3, 20, 20), labels=labels)
