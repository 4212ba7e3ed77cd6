"""Feature spaces: the digits' own, and any transformers image classifier's."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dmdr_fast.data.digits import held_out, load_digits
from dmdr_fast.errors import UserError
from dmdr_fast.eval.features import DigitsFeatures, ScenesFeatures, TransformersFeatures
from dmdr_fast.eval.metrics import evaluate, frechet_distance
from dmdr_fast.rewards.digits import DigitsReward
from dmdr_fast.scenes.captions import Attributes, caption, is_held_out
from dmdr_fast.scenes.data import evaluation_scenes


@pytest.fixture(scope="module")
def digits_features():
    return DigitsFeatures()


def test_digits_features_classify_what_they_were_not_fitted_on(digits_features):
    images, labels = load_digits()
    held = held_out(labels)
    assert digits_features.test_accuracy >= 0.97
    right = digits_features.predict(images[held]) == labels[held]
    assert right.double().mean().item() == digits_features.test_accuracy
    features = digits_features.features(images)
    assert features.shape == (1797, 64) and features.dtype == torch.float32 and not features.requires_grad
    logits = digits_features.classifier.classify(features)
    assert torch.equal(logits.argmax(1), digits_features.predict(images))


def test_digits_features_order_degradations_and_see_a_missing_class(digits_features):
    images, labels = load_digits()
    real = digits_features.features(images)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    distances = [frechet_distance(real, digits_features.features(images + s * noise)) for s in (0.1, 0.2, 0.4, 0.8)]
    assert distances == sorted(distances) and distances[-1] > 20 * distances[1]
    halves = frechet_distance(real[0::2], real[1::2])
    assert frechet_distance(real, real[labels != 3]) > halves


@pytest.mark.thorough
def test_images_made_to_please_the_reward_do_not_please_the_evaluation(digits_features):
    """Noise driven up the reward's gradient beats real digits in reward, and is far from them."""
    reward = DigitsReward()
    real, real_labels = load_digits()
    labels = torch.arange(400) % 10
    hacked = (0.5 * torch.randn(400, 1, 8, 8, generator=torch.Generator().manual_seed(0))).requires_grad_()
    optimizer = torch.optim.Adam([hacked], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        (-reward(hacked.clamp(-1, 1), labels=labels)).sum().backward()
        optimizer.step()
    hacked = hacked.detach().clamp(-1, 1)
    row = evaluate(hacked, labels, {"labels": labels}, real, digits_features, {}, nfe=1)
    honest = evaluate(real, real_labels, {"labels": real_labels}, real, digits_features, {}, nfe=1)
    assert reward(hacked, labels=labels).mean() > reward(real, labels=real_labels).mean()
    assert row["fd"] > 5 and row["precision"] < 0.2 and row["accuracy"] < honest["accuracy"]


def test_scenes_features_tell_seen_from_unseen_prompts_and_attribute_from_attribute():
    """Of real scenes nearly all is right; with every other one's prompt another, what is left is counted by hand."""
    features, scenes = ScenesFeatures(), evaluation_scenes(400, seed=8)
    found = features.accuracy(scenes.images, {"prompts": scenes.prompts})
    names = ["", "_seen", "_unseen"] + [f"_{name}" for name in Attributes._fields]
    assert list(found) == [f"accuracy{name}" for name in names] and min(found.values()) > 0.93
    read = features.verifier.read(scenes.images).tolist()
    # The first digit of the seen ones, which come first of two, is asked for as the next one: some are unseen then.
    asked = [
        Attributes(*row)._replace(first_digit=(row[1] + 1) % 10) if i % 2 == 0 else Attributes(*row)
        for i, row in enumerate(read)
    ]
    found = features.accuracy(scenes.images, {"prompts": [caption(scene, 0) for scene in asked]})
    held = [is_held_out(scene) for scene in asked]
    assert found["accuracy"] == found["accuracy_first_digit"] == 0.5
    assert found["accuracy_seen"] == sum(i % 2 for i in range(400) if not held[i]) / (400 - sum(held))
    assert found["accuracy_unseen"] == sum(i % 2 for i in range(400) if held[i]) / sum(held)
    others = (name for name in Attributes._fields if name != "first_digit")
    assert all(found[f"accuracy_{name}"] == 1.0 for name in others)


def test_scenes_features_see_blur_missing_variety_and_a_missing_relation():
    features, real = ScenesFeatures(), evaluation_scenes(1000, seed=0)
    drawn = evaluation_scenes(400, seed=1)
    few = drawn.images[:16].repeat(25, 1, 1, 1)
    blurred = torch.nn.functional.avg_pool2d(drawn.images, 3, stride=1, padding=1)
    one = evaluation_scenes(800, seed=2)
    one = one.images[one.attributes[:, 0] == 0][:400]
    known = features.features(real.images)
    honest, *worse = (frechet_distance(known, features.features(x)) for x in (drawn.images, few, blurred, one))
    assert known.shape == (1000, 128) and min(worse) > 5 * honest, (honest, worse)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small ViT classifier with random weights, saved as a published one is; resize to 16, crop to 12."""
    from transformers import ViTConfig, ViTForImageClassification

    path = tmp_path_factory.mktemp("vit")
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=12,
        patch_size=4,
        num_labels=7,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ViTForImageClassification(config).save_pretrained(path)
    preparation = {
        "size": {"shortest_edge": 16},
        "do_center_crop": True,
        "crop_size": {"height": 12, "width": 12},
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.3, 0.4],
    }
    (path / "preprocessor_config.json").write_text(json.dumps(preparation))
    return path


def test_transformers_features_enter_the_head_and_predict_its_classes(checkpoint):
    features = TransformersFeatures(str(checkpoint))
    images = torch.rand(5, 3, 24, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = features.features(images)
    logits = features.model(pixel_values=features.prepare(images)).logits
    assert found.shape == (5, 16) and found.dtype == torch.float32
    torch.testing.assert_close(features.model.classifier(found), logits)
    assert torch.equal(features.predict(images), logits.argmax(1))


def test_transformers_preparation_agrees_with_pil(checkpoint):
    """Resize with PIL's antialiased bicubic filter (8 bits, hence the tolerance), crop, normalise."""
    features = TransformersFeatures(str(checkpoint))
    ramp = np.linspace(20, 230, 24 * 40 * 3).reshape(24, 40, 3).astype(np.uint8)
    image = torch.from_numpy(ramp).permute(2, 0, 1)[None].float() / 127.5 - 1
    resized = np.asarray(Image.fromarray(ramp).resize((27, 16), Image.Resampling.BICUBIC)).astype(np.float64) / 255
    expected = (resized[2:14, 7:19] - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]
    found = features.prepare(image)[0].permute(1, 2, 0).double().numpy()
    np.testing.assert_allclose(found, expected, atol=1.5 / 255 / 0.2)


def test_what_is_not_an_image_classifier_is_refused_in_words(checkpoint, tmp_path):
    with pytest.raises(UserError, match="no image classifier could be loaded"):
        TransformersFeatures(str(tmp_path))
    (checkpoint / "preprocessor_config.json").write_text('{"size": 8, "do_center_crop": true, "crop_size": 12}')
    with pytest.raises(UserError, match=r"preprocessor_config.json: expected size \(at least crop_size\)"):
        TransformersFeatures(str(checkpoint))
    with pytest.raises(ValueError, match=r"images: expected \[N, 3, H, W\], got \[1, 1, 8, 8\]"):
        TransformersFeatures.prepare(None, torch.zeros(1, 1, 8, 8))
