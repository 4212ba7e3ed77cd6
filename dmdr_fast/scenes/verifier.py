"""Verifiers: networks that read the five attributes of a scene off its pixels.

A verifier scores the windows of 8 x 8 pixels in which a scan may lie: D_d(p) for each digit and C_c(p) for each colour
at place p. With h the half (left, right, upper, lower) and p its nine places,

    E_h(d, c) = log sum_p exp(D_d(p) + C_c(p))
    log p(r, d1, c1, d2, c2 | image) = E_h1(r)(d1, c1) + E_h2(r)(d2, c2) - log Z,

Z being the sum over all 7,200 combinations. Nothing tells it where the scans lie: it is fitted by this likelihood.
There are two, of other architectures, seeds and scans; no generator is trained for the second, ``held_out_verifier``.

``python -m dmdr_fast.scenes.verifier`` fits both, in minutes on one core, and writes their weights beside this
file, with what they were made from in the file's metadata.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dmdr_fast.data.classifier import augment, fit
from dmdr_fast.scenes.captions import COLOURS, DIGITS, SIZES, Attributes
from dmdr_fast.scenes.data import PLACES, SCAN, SIDE, Scenes, compose, scans

Kind = Literal["verifier", "held_out_verifier"]
WEIGHTS = Path(__file__).with_name("verifiers.safetensors")
SEEDS: dict[Kind, int] = {"verifier": 4_321, "held_out_verifier": 777_001}
SCORES = len(DIGITS) + len(COLOURS)
BATCH, STEPS, SMOOTHING = 64, 1500, 0.05
NOISE = 0.3  # as in rewards.digits: it smooths log p around the data


class ConvolutionalScores(nn.Module):
    """Two convolutions over the canvas, then a layer that sees one window: [B, 3, 16, 16] to [B, 4, 9, 16]."""

    def __init__(self, channels: int = 32, width: int = 128) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, channels, 3), nn.SiLU(), nn.Conv2d(channels, channels, 3), nn.SiLU())
        self.read = nn.Sequential(nn.Linear(16 * channels, width), nn.SiLU(), nn.Linear(width, SCORES))

    def forward(self, images: Tensor) -> Tensor:
        return self.read(windows(self.trunk(images), 4))  # 4 x 4 of these see 8 x 8 pixels


class ResidualScores(nn.Module):
    """A residual perceptron on the pixels of one window: [B, 3, 16, 16] to [B, 4, 9, 16]."""

    def __init__(self, width: int = 128, blocks: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(3 * SCAN * SCAN, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(blocks)
        )
        self.read = nn.Linear(width, SCORES)

    def trunk(self, images: Tensor) -> Tensor:
        """[B, 4, 9, width]."""
        x = self.embed(windows(images, SCAN))
        for block in self.blocks:
            x = x + block(x)
        return x

    def forward(self, images: Tensor) -> Tensor:
        return self.read(self.trunk(images))


def windows(x: Tensor, size: int) -> Tensor:
    """The windows of ``size`` in which a scan may lie, [B, 4, 9, C size size] of [B, C, size + 8, size + 8].

    The second axis: left, right, upper and lower half; the third: the place along it.
    """
    tall = [half.unfold(2, size, 1).permute(0, 2, 1, 4, 3) for half in (x[..., :size], x[..., -size:])]
    wide = [half.unfold(3, size, 1).permute(0, 3, 1, 2, 4) for half in (x[..., :size, :], x[..., -size:, :])]
    return torch.stack(tall + wide, dim=1).flatten(3)  # [B, 4, 9, C, size, size] before it is flattened


ARCHITECTURES: dict[Kind, type[nn.Module]] = {
    "verifier": ConvolutionalScores,
    "held_out_verifier": ResidualScores,
}


class Verifier(nn.Module):
    """p(attributes | image) by the formula at the top of this file; ``scores`` maps images to [B, 4, 9, 16]."""

    def __init__(self, scores: nn.Module) -> None:
        super().__init__()
        self.scores = scores

    def log_probability(self, images: Tensor, attributes: Tensor) -> Tensor:
        """log p fp32 [B] of attributes int64 [B, 5] in images [B, 3, 16, 16] (any float dtype); differentiable.

        Raises:
            ValueError: images of another shape.
        """
        energy = self._energies(images)
        relation, digit_1, colour_1, digit_2, colour_2 = attributes.unbind(1)
        rows = torch.arange(len(images), device=images.device)
        chosen = energy[rows, 2 * relation, digit_1, colour_1] + energy[rows, 2 * relation + 1, digit_2, colour_2]
        return chosen - _log_partition(energy).logsumexp(1)

    @torch.no_grad()
    def read(self, images: Tensor) -> Tensor:
        """The most probable value of each attribute by itself, int64 [B, 5]; arguments as ``log_probability``."""
        energy = self._energies(images)
        log_relation = _log_partition(energy).log_softmax(1)
        values = [log_relation.argmax(1)]
        for first_or_second in (0, 1):
            for summed in (3, 2):  # over colours for the digit, over digits for the colour
                given_relation = energy[:, first_or_second::2].logsumexp(summed).log_softmax(2)
                values.append((log_relation[:, :, None] + given_relation).logsumexp(1).argmax(1))
        return torch.stack(values, dim=1)

    def _energies(self, images: Tensor) -> Tensor:
        """E_h(d, c) of every half, fp32 [B, 4, 10, 6]."""
        if images.ndim != 4 or images.shape[1:] != (3, SIDE, SIDE):
            raise ValueError(f"images: expected [B, 3, {SIDE}, {SIDE}], got {list(images.shape)}")
        digits, colours = self.scores(images.float()).split([len(DIGITS), len(COLOURS)], dim=3)
        return (digits[..., :, None] + colours[..., None, :]).logsumexp(2)


def _log_partition(energy: Tensor) -> Tensor:
    """log of the sum over all digits and colours for each relation, [B, 2]."""
    return energy.flatten(2).logsumexp(2).unflatten(1, (2, 2)).sum(2)


def fit_verifier(kind: Kind, steps: int = STEPS) -> Verifier:
    """A verifier fitted on scenes of its own scans, all combinations alike, in evaluation mode.

    Minimises -log p of the scene shown, with a share :data:`SMOOTHING` for one that is drawn at random, so that log p
    stays finite far from the data. Scans are augmented as the digits classifiers' are (a small rotation, scaling and
    shift), canvases by noise of a standard deviation up to :data:`NOISE`. On one thread; the process's random state
    is left alone.
    """
    images, labels = scans(kind)
    images, order = images[labels.argsort(stable=True)], torch.tensor(SIZES)
    count = labels.bincount()
    first = count.cumsum(0) - count
    places = torch.tensor(PLACES)

    def loss(rng: torch.Generator) -> Tensor:
        def combination() -> Tensor:
            return (torch.rand(BATCH, len(SIZES), generator=rng) * order).long()

        shown, other = combination(), combination()
        digits = shown[:, 1::2]
        chosen = first[digits] + (torch.rand(digits.shape, generator=rng) * count[digits]).long()
        pairs = augment(2 * images[chosen].view(-1, 1, SCAN, SCAN) - 1, rng, noise=0.0).view(BATCH, 2, SCAN, SCAN)
        where = places[torch.randint(len(places), (BATCH,), generator=rng)]
        canvas = compose((pairs + 1) / 2, shown, where)
        noise = torch.rand(BATCH, 1, 1, 1, generator=rng) * NOISE
        canvas = canvas + noise * torch.randn(canvas.shape, generator=rng)
        right, smooth = (verifier.log_probability(canvas, scene).mean() for scene in (shown, other))
        return -torch.lerp(right, smooth, SMOOTHING)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEEDS[kind])
        verifier = Verifier(ARCHITECTURES[kind]())
    fit(verifier, loss, seed=SEEDS[kind], steps=steps)
    return verifier


def load_verifier(kind: Kind) -> Verifier:
    """A verifier with the stored weights, frozen, in evaluation mode, on the CPU."""
    with torch.device("meta"):
        verifier = Verifier(ARCHITECTURES[kind]())
    prefix = f"{kind}."
    state = {n.removeprefix(prefix): t for n, t in load_file(WEIGHTS).items() if n.startswith(prefix)}
    verifier.load_state_dict(state, assign=True)
    return verifier.eval().requires_grad_(False)


def shares_right(scenes: Scenes) -> dict[Kind, dict[str, float]]:
    """Of each verifier, the share of ``scenes`` in which it reads an attribute right, by the attribute's name."""
    shares = {}
    for kind in SEEDS:
        right = load_verifier(kind).read(scenes.images) == scenes.attributes
        shares[kind] = dict(zip(Attributes._fields, right.double().mean(0).tolist(), strict=True))
    return shares


def main() -> None:
    """Fit both verifiers and store them."""
    tensors: dict[str, Tensor] = {}
    for kind in SEEDS:
        state = fit_verifier(kind).state_dict()
        tensors |= {f"{kind}.{name}": tensor for name, tensor in state.items()}
    made_from = {"command": "python -m dmdr_fast.scenes.verifier", "steps": str(STEPS), "torch": torch.__version__}
    save_file(tensors, WEIGHTS, metadata=made_from | {f"seed of {kind}": str(seed) for kind, seed in SEEDS.items()})


if __name__ == "__main__":
    main()
