"""Scenes as images: RGB canvases of 16 x 16 pixels with two scanned digits, drawn by number."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dmdr_fast.algorithm.streams import Streams
from dmdr_fast.data.digits import NUM_CLASSES, load_digits
from dmdr_fast.scenes.captions import WORDINGS, Attributes, caption, combinations

SIDE, SCAN = 16, 8  # pixels of a canvas and of a scan
# RGB in 0..1, in the order of ``captions.COLOURS``; the largest channel is 1, so it holds the scan.
PALETTE = torch.tensor([[1, 0, 0], [0, 1, 0], [0.2, 0.4, 1], [1, 1, 0], [1, 0, 1], [1, 1, 1]])

Part = Literal["teacher", "verifier", "held_out_verifier"]
PARTS: tuple[Part, ...] = ("teacher", "verifier", "held_out_verifier")

# First rows (or columns) of the two scans along the axis that their relation leaves free: at most half a scan apart, so
# that what is left of another is not above it as well.
PLACES = [(i, j) for i in range(9) for j in range(9) if abs(i - j) <= 4]


class Scenes(NamedTuple):
    """Images fp32 [N, 3, 16, 16] in [-1, 1] (-1 is the black background), attributes int64 [N, 5] and N captions."""

    images: Tensor
    attributes: Tensor
    prompts: list[str]


def scans(part: Part) -> tuple[Tensor, Tensor]:
    """A part's scans, fp32 [M, 8, 8] in 0..1, and their digits, int64 [M].

    The scans of a digit go round the parts; no scan is in two of them.
    """
    images, labels = load_digits()
    rank = torch.zeros_like(labels)
    for digit in range(NUM_CLASSES):
        rank[labels == digit] = torch.arange(int((labels == digit).sum()))
    mine = rank % len(PARTS) == PARTS.index(part)
    return (images[mine, 0] + 1) / 2, labels[mine]


class SceneSource:
    """Scenes made of one part's scans; each is a function of (seed, number).

    A number draws the combination, a scan of each digit, their places (:data:`PLACES`) and the wording, all uniform.

    Args:
        part: whose scans.
        combinations: what to show, e.g. ``combinations(held_out=False)``.
        seed: of everything drawn.
    """

    def __init__(self, part: Part, combinations: Sequence[Attributes], *, seed: int):
        images, labels = scans(part)
        self._scans = [images[labels == digit] for digit in range(NUM_CLASSES)]
        self._combinations, self._streams = combinations, Streams(seed)

    def __call__(self, numbers: Iterable[int]) -> Scenes:
        """The scenes of these numbers (integers from 0), in their order."""
        drawn = [self._draw(self._streams.rng("scene", number)) for number in numbers]
        attributes, pairs, places, wordings = zip(*drawn, strict=True)
        images = compose(torch.stack(pairs), torch.tensor(attributes), torch.tensor(places))
        prompts = [caption(scene, wording) for scene, wording in zip(attributes, wordings, strict=True)]
        return Scenes(images, torch.tensor(attributes), prompts)

    def _draw(self, rng: np.random.Generator) -> tuple[Attributes, Tensor, tuple[int, int], int]:
        scene = self._combinations[int(rng.integers(len(self._combinations)))]
        choices = [self._scans[digit] for digit in (scene.first_digit, scene.second_digit)]
        pair = torch.stack([scans[rng.integers(len(scans))] for scans in choices])
        return scene, pair, PLACES[rng.integers(len(PLACES))], int(rng.integers(len(WORDINGS[0])))


def evaluation_scenes(count: int, *, seed: int) -> Scenes:
    """``count`` scenes of the teacher's scans: by turns one that training sets may hold, and one that they do not."""
    sources = [SceneSource("teacher", combinations(held_out=held_out), seed=seed) for held_out in (False, True)]
    drawn = [sources[number % 2]([number]) for number in range(count)]
    images, attributes, prompts = zip(*drawn, strict=True)
    return Scenes(torch.cat(images), torch.cat(attributes), [prompt for part in prompts for prompt in part])


def compose(pairs: Tensor, attributes: Tensor, places: Tensor) -> Tensor:
    """Canvases fp32 [N, 3, 16, 16] in [-1, 1] of scans [N, 2, 8, 8] in 0..1 in the colours of ``attributes`` [N, 5].

    The first scan lies in the left or upper half, the second in the other one; ``places`` int64 [N, 2] are their first
    rows (left of) or columns (above).
    """
    canvas = torch.zeros(len(pairs), SIDE, SIDE, 3)
    upper = (attributes[:, 0] == 1).view(-1, 1, 1)
    number, steps = torch.arange(len(pairs)).view(-1, 1, 1), torch.arange(SCAN)
    for k in range(2):
        along, across = places[:, k].view(-1, 1, 1), torch.tensor(k * SCAN)
        rows = torch.where(upper, across, along) + steps.view(1, -1, 1)
        columns = torch.where(upper, along, across) + steps.view(1, 1, -1)
        canvas[number, rows, columns] = pairs[:, k, :, :, None] * PALETTE[attributes[:, 2 + 2 * k]].view(-1, 1, 1, 3)
    return canvas.permute(0, 3, 1, 2).contiguous() * 2 - 1
