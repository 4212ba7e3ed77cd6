"""Metrics against closed forms and second implementations."""

import math

import numpy as np
import pytest
import torch
from scipy import linalg

from dmdr_fast.eval.features import class_accuracy
from dmdr_fast.eval.metrics import CHUNK, evaluate, frechet_distance, precision_recall


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def with_moments(n, mean, covariance, seed=0):
    """fp64 samples [n, d] whose sample mean and unbiased covariance are exactly these."""
    d = len(mean)
    x = torch.randn(n, d, generator=rng(seed), dtype=torch.float64)
    x = x - x.mean(0)
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T).view(d, d)), x.T, upper=False).T
    return whitened @ torch.linalg.cholesky(covariance).T + mean


def scipy_frechet(a, b):
    """The textbook formula, root of the product by Schur decomposition."""
    a, b = a.double().numpy(), b.double().numpy()
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(cov_a @ cov_b)
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a + cov_b - 2 * np.real(root)))


def test_frechet_in_one_dimension_is_the_closed_form():
    """d^2 = (mu_a - mu_b)^2 + (sigma_a - sigma_b)^2."""
    a = with_moments(50, torch.tensor([1.0]), torch.tensor([[4.0]], dtype=torch.float64))
    b = with_moments(70, torch.tensor([-2.0]), torch.tensor([[0.25]], dtype=torch.float64), seed=1)
    assert frechet_distance(a, b) == pytest.approx(9 + 1.5**2, rel=1e-12)


def test_frechet_of_known_gaussians():
    """Commuting covariances: d^2 = |mu|^2 + sum_i (sqrt(l_i) - sqrt(m_i))^2 over common eigenvectors."""
    basis = torch.linalg.qr(torch.randn(6, 6, generator=rng(), dtype=torch.float64)).Q
    eigen_a = torch.tensor([9.0, 4, 1, 1, 0.01, 1e-6], dtype=torch.float64)
    eigen_b = torch.tensor([1.0, 4, 16, 0.25, 0.04, 1.0], dtype=torch.float64)
    mean = torch.arange(6, dtype=torch.float64)
    a = with_moments(400, mean, basis @ eigen_a.diag() @ basis.T)
    b = with_moments(300, torch.zeros(6), basis @ eigen_b.diag() @ basis.T, seed=1)
    expected = 55 + (eigen_a.sqrt() - eigen_b.sqrt()).square().sum().item()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-10)


def test_frechet_agrees_with_scipys_matrix_root():
    mix = torch.randn(2, 12, 12, generator=rng(5))
    a = torch.randn(300, 12, generator=rng(1)) @ mix[0] + 0.3
    b = torch.randn(200, 12, generator=rng(2)) @ mix[1]
    assert frechet_distance(a, b) == pytest.approx(scipy_frechet(a, b), rel=1e-9)


def test_frechet_of_rank_deficient_features():
    """Fewer samples than dimensions: embedding in more dimensions by a rotation changes nothing."""
    a, b = torch.randn(2, 20, 15, generator=rng(3), dtype=torch.float64)
    b = b * 2 + 1
    rotation = torch.linalg.qr(torch.randn(40, 40, generator=rng(4), dtype=torch.float64)).Q[:15]
    assert frechet_distance(a @ rotation, b @ rotation) == pytest.approx(scipy_frechet(a, b), rel=1e-9)
    assert frechet_distance(a @ rotation, a @ rotation) == pytest.approx(0, abs=1e-12)
    point = torch.ones(5, 3)
    assert frechet_distance(point, point + 2) == pytest.approx(12, rel=1e-12)  # two points: |mu_a - mu_b|^2


def brute_force(real, fake, k):
    def radii(points):
        return [sorted(math.dist(p, q) for j, q in enumerate(points) if j != i)[k - 1] for i, p in enumerate(points)]

    def share(points, manifold):
        r = radii(manifold)
        return sum(any(math.dist(p, m) <= r[j] for j, m in enumerate(manifold)) for p in points) / len(points)

    return share(fake, real), share(real, fake)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_recall_agree_with_brute_force(k):
    real = torch.randn(60, 3, generator=rng(0), dtype=torch.float64)
    fake = torch.randn(40, 3, generator=rng(1), dtype=torch.float64) * 0.7 + 1
    found = precision_recall(real, fake, k=k)
    assert found == pytest.approx(brute_force(real.tolist(), fake.tolist(), k), abs=1e-15)
    assert 0 < found[0] < 1 and 0 < found[1] < 1


def test_precision_recall_by_hand():
    """On a line, k = 1. Radii of real: 1 1 9; of fake: 0.4 0.4 98.6. Inside real's balls: 0.9 and 1.3, for
    the ball of 10 ends at 19. Inside fake's: 1, by 0.9, and 10, 89.9 away from 99.9; 0 is 0.9 away from
    0.9."""
    real = torch.tensor([[0.0], [1.0], [10.0]])
    fake = torch.tensor([[0.9], [1.3], [99.9]])
    precision, recall = precision_recall(real, fake, k=1)
    assert precision == pytest.approx(2 / 3)
    assert recall == pytest.approx(2 / 3)


def test_precision_recall_do_not_depend_on_the_chunk_and_see_collapse():
    real = torch.randn(CHUNK + 77, 2, generator=rng(0))
    collapsed = real[:1].repeat(50, 1)
    precision, recall = precision_recall(real, collapsed)
    assert precision == 1 and recall == pytest.approx(1 / len(real))  # one point, drawn 50 times
    assert precision_recall(real, real.flip(0)) == (1.0, 1.0)
    assert precision_recall(real, real + 1e3) == (0.0, 0.0)


@pytest.mark.parametrize("metric", [frechet_distance, precision_recall])
@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (
            torch.zeros(8),
            torch.zeros(8, 2),
            r"first features: expected a float \[n, d\].*got torch.float32 \[8\]",
        ),
        (torch.zeros(8, 2), torch.zeros(1, 2), r"second features: .*got torch.float32 \[1, 2\]"),
        (torch.zeros(8, 2), torch.zeros(8, 3), "one width, got 2 and 3"),
        (torch.zeros(8, 2, dtype=torch.long), torch.zeros(8, 2), "first features: .*torch.int64"),
        (torch.zeros(8, 2), torch.full((8, 2), torch.nan), "second features: expected finite values"),
    ],
)
def test_wrong_features_are_named(metric, a, b, message):
    with pytest.raises(ValueError, match=message):
        metric(a, b)


def test_wrong_k_is_named():
    with pytest.raises(ValueError, match="k: expected at least 1, got 0"):
        precision_recall(torch.zeros(8, 2), torch.zeros(8, 2), k=0)


class Pixels:
    """Features are the pixels; the class is the index of the largest."""

    def features(self, images):
        return images.flatten(1)

    def accuracy(self, images, asked):
        return class_accuracy(lambda part: part.flatten(1).argmax(1), images, asked)


def test_evaluate_is_its_parts_over_all_chunks():
    count = CHUNK + 3
    real = torch.rand(count, 1, 2, 2, generator=rng(0)) * 2 - 1
    images = torch.rand(count, 1, 2, 2, generator=rng(1)) * 2 - 1
    labels = torch.arange(count) % 4
    asked = {"labels": labels}
    row = evaluate(images, labels, asked, real, Pixels(), {"reward": 0.25, "held_out_reward": -1.0}, nfe=2)
    distances = torch.cdist(images.flatten(1), images.flatten(1)) / 2.0  # sqrt of 4 values
    pairs = (labels[:, None] == labels[None, :]) & ~torch.eye(count, dtype=torch.bool)
    assert row == pytest.approx(
        {
            "fd": scipy_frechet(real.flatten(1), images.flatten(1)),
            "precision": precision_recall(real.flatten(1), images.flatten(1))[0],
            "recall": precision_recall(real.flatten(1), images.flatten(1))[1],
            "reward": 0.25,
            "held_out_reward": -1.0,
            "diversity": distances[pairs].mean().item(),
            "accuracy": float(np.mean(images.flatten(1).numpy().argmax(1) == labels.numpy())),
            "nfe": 2.0,
        }
    )
    assert all(type(value) is float for value in row.values())
    without = evaluate(images, torch.arange(count), {"prompts": []}, real, Pixels(), {}, nfe=2)
    assert without == row | dict.fromkeys(("reward", "held_out_reward", "diversity", "accuracy"))
