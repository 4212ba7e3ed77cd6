"""Scenes show what their attributes say, pixel by pixel, and are functions of their numbers."""

import torch

from dmdr_fast.data.digits import load_digits
from dmdr_fast.scenes.captions import combinations, parse
from dmdr_fast.scenes.data import PALETTE, PARTS, PLACES, SceneSource, compose, scans


def test_every_scan_is_in_one_part():
    images, labels = load_digits()
    parts = [scans(part) for part in PARTS]
    together = torch.cat([torch.cat([x.flatten(1), y[:, None].float()], 1) for x, y in parts])
    whole = torch.cat([(images.flatten(1) + 1) / 2, labels[:, None].float()], 1)
    assert torch.equal(together.unique(dim=0), whole.unique(dim=0)) and len(together) == len(whole.unique(dim=0))
    assert [len(y) for _, y in parts] == [602, 599, 596]
    assert min(int(y.bincount().min()) for _, y in parts) == 58


def test_a_canvas_is_two_scans_in_their_colours():
    images, labels = scans("teacher")
    seven, two = images[labels == 7][3], images[labels == 2][5]
    canvas = compose(torch.stack([seven, two])[None], torch.tensor([[0, 7, 0, 2, 3]]), torch.tensor([[4, 0]]))
    assert canvas.shape == (1, 3, 16, 16) and canvas.min() == -1 and canvas.max() == 1
    expected = torch.full((3, 16, 16), -1.0)
    expected[0, 4:12, :8] = 2 * seven - 1  # red, the left half
    expected[0, :8, 8:] = expected[1, :8, 8:] = 2 * two - 1  # yellow, the right half
    torch.testing.assert_close(canvas[0], expected, rtol=0, atol=0)
    above = compose(torch.stack([seven, two])[None], torch.tensor([[1, 7, 0, 2, 3]]), torch.tensor([[4, 0]]))
    torch.testing.assert_close(above[0, 0, :8, 4:12], 2 * seven - 1, rtol=0, atol=0)
    torch.testing.assert_close(above[0, 1, 8:, :8], 2 * two - 1, rtol=0, atol=0)
    assert (above[0, 2] == -1).all()


def test_scenes_are_functions_of_seed_and_number():
    source = SceneSource("teacher", combinations(held_out=False), seed=3)
    scenes, alone = source(range(40)), source([17])
    assert torch.equal(scenes.images[17], alone.images[0]) and scenes.prompts[17] == alone.prompts[0]
    again = SceneSource("teacher", combinations(held_out=False), seed=3)(range(40))
    assert torch.equal(scenes.images, again.images) and scenes.prompts == again.prompts
    other = SceneSource("teacher", combinations(held_out=False), seed=4)(range(40))
    assert not torch.equal(scenes.images, other.images)


def test_captions_combinations_and_scans_are_those_asked_for():
    allowed = combinations(held_out=True)
    scenes = SceneSource("verifier", allowed, seed=0)(range(400))
    rows = scenes.attributes.tolist()
    assert [list(parse(prompt)) for prompt in scenes.prompts] == rows
    assert {tuple(row) for row in rows} <= set(allowed) and len({tuple(row) for row in rows}) > 200
    images, labels = scans("verifier")
    for image, (relation, digit, colour, *_) in zip(scenes.images[:50], rows, strict=False):
        grey = ((image + 1) / 2).amax(0)  # the palette's largest channel is 1
        half = grey[:, :8] if relation == 0 else grey[:8].mT
        windows = half.unfold(0, 8, 1).mT if relation == 0 else half.unfold(0, 8, 1)
        known = images[labels == digit]
        distance = torch.cdist(windows.flatten(1), known.flatten(1))
        assert distance.min() < 1e-3
        bright = image[:, :, :8] if relation == 0 else image[:, :8]
        assert torch.allclose((bright + 1).amax((1, 2)) / (bright + 1).max(), PALETTE[colour], atol=1e-6)


def test_one_is_left_of_or_above_the_other_and_not_both():
    assert len(PLACES) == 61 and max(abs(i - j) for i, j in PLACES) == 4
