"""Small classifiers fitted on the digits: what the digits reward and the digits evaluation are each made of.

They share this recipe and nothing else: architecture, seed and weights are each caller's own.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmdr_fast.cache import cached
from dmdr_fast.data.digits import held_out, load_digits

# Label smoothing keeps log p(label | image) finite where a generator's early images are, far from the data.
RECIPE = {
    "batch_size": 128,
    "learning_rate": 3e-3,
    "weight_decay": 1e-2,
    "label_smoothing": 0.05,
    "max_rotation_degrees": 10.0,
    "max_scaling": 0.1,
    "max_shift": 0.1,
}

Network = TypeVar("Network", bound=nn.Module)


def fit_classifier(model: nn.Module, images: Tensor, labels: Tensor, *, seed: int, steps: int, noise: float) -> None:
    """Fit ``model`` in place to give logits [B, K] for images: cross entropy over augmented batches.

    AdamW with a cosine learning rate to 0; each batch is drawn with replacement and augmented by a small
    rotation, scaling and shift (:data:`RECIPE`), then Gaussian noise of a standard deviation drawn per image.
    Runs on one thread, so that the weights do not depend on how many the machine has; the process's random
    state is not touched.

    Args:
        model: maps float32 [B, C, H, W] to logits [B, K]; initialised; left in evaluation mode.
        images: float32 [N, C, H, W] in [-1, 1], -1 being background.
        labels: int64 [N] in 0..K-1.
        seed: of the batches and augmentations.
        steps: optimizer updates.
        noise: largest standard deviation of the augmentation's noise.
    """

    def loss(rng: torch.Generator) -> Tensor:
        chosen = torch.randint(len(images), (int(RECIPE["batch_size"]),), generator=rng)
        logits = model(augment(images[chosen], rng, noise=noise))
        return F.cross_entropy(logits, labels[chosen], label_smoothing=RECIPE["label_smoothing"])

    fit(model, loss, seed=seed, steps=steps)


def fit(model: nn.Module, loss: Callable[[torch.Generator], Tensor], *, seed: int, steps: int) -> None:
    """Minimise ``loss(rng)``, which draws a batch from ``rng`` (seeded by ``seed``), over ``model`` in place.

    AdamW of :data:`RECIPE` with a cosine learning rate to 0, on one thread; ``model`` is left in evaluation mode.
    """
    rng = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RECIPE["learning_rate"], weight_decay=RECIPE["weight_decay"])
    model.train()
    with _one_thread():
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = RECIPE["learning_rate"] * 0.5 * (1 + math.cos(math.pi * step / steps))
            value = loss(rng)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    model.eval()


def augment(images: Tensor, rng: torch.Generator, *, noise: float) -> Tensor:
    """Images [B, C, H, W], each rotated, scaled, shifted (in halves of its side) and noised by ``rng``."""
    count = len(images)
    angle, scaling, shift_x, shift_y = torch.rand(4, count, generator=rng) * 2 - 1
    angle = angle * math.radians(RECIPE["max_rotation_degrees"])
    scale = 1 + scaling * RECIPE["max_scaling"]
    cos, sin = scale * angle.cos(), scale * angle.sin()
    shift_x, shift_y = shift_x * RECIPE["max_shift"], shift_y * RECIPE["max_shift"]
    affine = torch.stack([cos, -sin, shift_x, sin, cos, shift_y], dim=1).view(count, 2, 3)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    moved = F.grid_sample(images + 1, grid, align_corners=False) - 1  # what comes in at the edge is background
    std = torch.rand(count, 1, 1, 1, generator=rng) * noise
    return moved + std * torch.randn(images.shape, generator=rng)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images [N, C, H, W] whose largest logit is their label's."""
    return (model(images).argmax(1) == labels).double().mean().item()


def digits_classifier(
    kind: str,
    architecture: Callable[[], Network],
    *,
    seed: int,
    steps: int,
    noise: float,
    on_held_out: bool = False,
    root: Path | None = None,
) -> tuple[Network, float]:
    """``architecture()`` fitted on the digits not held out: (frozen model on the CPU, accuracy on the held-out ones).

    With ``on_held_out`` the two parts change places: a judge that has seen none of the other classifiers' data.
    Fitted once and cached under ``kind``; the key holds the architecture, the recipe, seed, steps, noise and part,
    the data's checksum and torch's version. The process's random state is left as it was, cached or not.
    """
    from safetensors.torch import load_file, save_file

    images, labels = load_digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = architecture()
    fitted = held_out(labels) if on_held_out else ~held_out(labels)

    def build(directory: Path) -> None:
        fit_classifier(model, images[fitted], labels[fitted], seed=seed, steps=steps, noise=noise)
        save_file(model.state_dict(), directory / "model.safetensors")

    key = {
        "architecture": str(model),
        "recipe": RECIPE,
        "seed": seed,
        "steps": steps,
        "noise": noise,
        "on_held_out": on_held_out,
        "data": hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest(),
        "torch": torch.__version__,
    }
    model.load_state_dict(load_file(cached(kind, key, build, root) / "model.safetensors"))
    model.eval().requires_grad_(False)
    return model, accuracy(model, images[~fitted], labels[~fitted])


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
