"""How close generated images are to real ones: Fréchet distance, precision, recall; and their reward."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dmdr_fast.algorithm.monitors import diversity
from dmdr_fast.eval.features import CHUNK, FeatureExtractor

# Of a row, beside ``nfe`` and the parts of the accuracy.
MEASURED = ("fd", "precision", "recall", "reward", "held_out_reward", "diversity", "accuracy")


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Fréchet (2-Wasserstein) distance between Gaussians fitted to two sets of features.

    d^2 = |mu_a - mu_b|^2 + tr C_a + tr C_b - 2 tr (C_a^1/2 C_b C_a^1/2)^1/2, with unbiased covariances C.

    With centred features X = Q R sqrt(n - 1), C = R^T R, and the last trace is the sum of the singular values
    of R_a R_b^T. So no covariance is formed and no root of a rounding error taken: the result is as exact for
    rank-deficient features (fewer samples than dimensions, dead activations) as for others, where the root of
    C_a C_b fails.

    Like every estimate from samples it is biased upwards; compare only values from equally many.

    Args:
        a, b: features [n, d] and [m, d], any float dtype; computed in fp64 on their device.

    Returns:
        d^2 >= 0.

    Raises:
        ValueError: not two matrices of one width, fewer than 2 samples, or a value that is not finite.

    Source: Heusel et al. 2017 (arXiv 1706.08500, eq. 6), there with Inception features.
    """
    _check_features(a, b, least=2)
    a, b = a.double(), b.double()
    mean_a, mean_b = a.mean(0), b.mean(0)
    root_a = torch.linalg.qr((a - mean_a) / (len(a) - 1) ** 0.5, mode="r").R
    root_b = torch.linalg.qr((b - mean_b) / (len(b) - 1) ** 0.5, mode="r").R
    cross = torch.linalg.svdvals(root_a @ root_b.T).sum()
    distance = (mean_a - mean_b).square().sum() + root_a.square().sum() + root_b.square().sum() - 2 * cross
    return max(distance.item(), 0.0)


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall: the share of each set inside the other's k-nearest-neighbour manifold.

    The manifold of a set S is the union over s in S of the closed ball around s with radius the distance to
    its k-th nearest other point of S. precision = share of ``fake`` in the manifold of ``real`` (how
    realistic), recall = share of ``real`` in the manifold of ``fake`` (how much of the variety is covered).

    Args:
        real, fake: features [n, d] and [m, d], any float dtype; distances in fp64 on their device.
        k: which neighbour gives the radius; 3 as published.

    Returns:
        (precision, recall), each in [0, 1].

    Raises:
        ValueError: not two matrices of one width, not more than k samples, or a value that is not finite.

    Source: Kynkäänniemi et al. 2019 (arXiv 1904.06991, eq. 1-3).
    """
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    _check_features(real, fake, least=k + 1)
    real, fake = real.double(), fake.double()
    return _share_inside(fake, real, k), _share_inside(real, fake, k)


def _share_inside(points: Tensor, manifold: Tensor, k: int) -> float:
    # The smallest distance is 0, to itself, so the k-th other neighbour is the (k + 1)-th smallest.
    radii = torch.cat([_distances(rows, manifold).kthvalue(k + 1).values for rows in manifold.split(CHUNK)])
    inside = [(_distances(rows, manifold) <= radii).any(1) for rows in points.split(CHUNK)]
    return torch.cat(inside).double().mean().item()


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # Not by |a|^2 + |b|^2 - 2ab: its cancellation puts equal points at different, nonzero distances.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _check_features(a: Tensor, b: Tensor, *, least: int) -> None:
    for name, features in (("first", a), ("second", b)):
        if features.ndim != 2 or len(features) < least or not features.is_floating_point():
            raise ValueError(
                f"{name} features: expected a float [n, d] with n >= {least}, "
                f"got {features.dtype} {list(features.shape)}"
            )
        if not features.isfinite().all():
            raise ValueError(f"{name} features: expected finite values, got nan or inf")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features: expected both of one width, got {a.shape[1]} and {b.shape[1]}")


@torch.no_grad()
def evaluate(
    images: Tensor,
    classes: Tensor,
    asked: Mapping[str, Any],
    real_images: Tensor,
    features: FeatureExtractor,
    rewards: Mapping[str, float],
    nfe: float,
) -> dict[str, float | None]:
    """The row of ``metrics.json`` for one generator, as plain floats.

    Args:
        images: the generator's [N, C, H, W] in [-1, 1], from fixed noise.
        classes: int64 [N], equal for images of one class or prompt.
        asked: what each was to show: ``labels`` int64 [N], or N ``prompts``.
        real_images: [M, C, H, W] in [-1, 1].
        features: the feature space of ``fd``, ``precision``, ``recall`` and what tells ``accuracy``.
        rewards: mean ``reward`` and ``held_out_reward`` of the images, as far as the run has them.
        nfe: network evaluations per image, handed through.

    Returns:
        ``fd``, ``precision``, ``recall`` against the real images, ``reward`` and ``held_out_reward`` (None without),
        ``diversity`` (mean RMS distance of two images of a class or prompt), ``accuracy`` and ``nfe``, and the parts of
        the accuracy that ``features`` tells.
    """
    real = torch.cat([features.features(part) for part in real_images.split(CHUNK)])
    fake = torch.cat([features.features(part) for part in images.split(CHUNK)])
    precision, recall = precision_recall(real, fake)
    spread = diversity(images, classes).item()
    return {
        "fd": frechet_distance(real, fake),
        "precision": precision,
        "recall": recall,
        "reward": rewards.get("reward"),
        "held_out_reward": rewards.get("held_out_reward"),
        "diversity": spread if math.isfinite(spread) else None,  # no class has two images
        "accuracy": None,
        "nfe": float(nfe),
        **features.accuracy(images, asked),
    }
