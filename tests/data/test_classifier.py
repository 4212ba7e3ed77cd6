"""Fitting the digits classifiers: repeatable on any number of threads, no global randomness touched."""

import torch
from torch import nn

from dmdr_fast.data.classifier import accuracy, augment, digits_classifier, fit_classifier
from dmdr_fast.data.digits import load_digits


def fitted(threads: int, seed: int) -> torch.Tensor:
    images, labels = load_digits()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(144, 10))
        fit_classifier(model, images, labels, seed=seed, steps=5, noise=0.1)
        assert torch.get_num_threads() == threads and not model.training
    finally:
        torch.set_num_threads(before)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_weights_are_the_same_bytes_on_one_thread_and_two_and_depend_on_the_seed():
    assert torch.equal(fitted(1, seed=0), fitted(2, seed=0))
    assert not torch.equal(fitted(1, seed=0), fitted(1, seed=1))


def test_the_processs_random_state_is_left_alone_cached_or_not(tmp_path):
    def build():
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    torch.manual_seed(3)
    expected = torch.rand(1)
    weights = []
    for _ in ("built", "cached"):
        torch.manual_seed(3)
        model, _ = digits_classifier("linear", build, seed=0, steps=20, noise=0.1, root=tmp_path)
        assert torch.equal(torch.rand(1), expected)
        assert not any(p.requires_grad for p in model.parameters()) and not model.training
        weights.append(model[1].weight)
    assert torch.equal(*weights)
    assert len(list(tmp_path.glob("linear-*/model.safetensors"))) == 1


def test_held_out_accuracy_is_that_of_images_it_was_not_fitted_on(tmp_path):
    _, held_out_accuracy = digits_classifier(
        "linear",
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
        seed=0,
        steps=200,
        noise=0.1,
        root=tmp_path,
    )
    assert 0.9 < held_out_accuracy < 0.99  # a linear classifier's on this set


def test_accuracy_counts_the_largest_logits():
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 1.0], [5.0, 4.0]])
    assert accuracy(nn.Identity(), logits, torch.tensor([0, 1, 1, 0])) == 0.75


def test_augmentation_moves_images_by_at_most_its_recipe_and_brings_in_background():
    """A dot's centre of mass moves by less than shift, rotation and scaling allow; its mass stays."""
    dot = torch.full((256, 1, 33, 33), -1.0)
    dot[:, :, 16, 24] = 1.0  # half-side 16.5 pixels; the dot is 8 right of the centre
    moved = augment(dot, torch.Generator().manual_seed(0), noise=0.0) + 1
    mass = moved.sum((1, 2, 3))
    rows, columns = torch.meshgrid(torch.arange(33.0), torch.arange(33.0), indexing="ij")
    row = (moved[:, 0] * rows).sum((1, 2)) / mass - 16
    column = (moved[:, 0] * columns).sum((1, 2)) / mass - 24
    assert moved.min() == 0 and (mass > 1).all() and (mass < 3).all()
    assert row.abs().max() < (1.65 + 8 * 0.174) / 0.9 + 0.5 and column.abs().max() < (1.65 + 0.8 + 0.13) / 0.9 + 0.5
    assert row.std() > 0.5 and column.std() > 0.5
    noisy = augment(dot, torch.Generator().manual_seed(0), noise=0.2) + 1 - moved
    assert 0.1 < noisy.std() < 0.14  # sqrt(mean of (0.2 u)^2) = 0.115
