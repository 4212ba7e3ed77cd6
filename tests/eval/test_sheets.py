"""Sample sheets pixel by pixel, and their captions."""

import io

import numpy as np
import pytest
from PIL import Image

from dmdr_fast.eval import sheets
from dmdr_fast.eval.sheets import captioned_sheet, image_png, image_uri, sample_order, sheet


def test_sheets_have_one_class_per_row_where_every_class_has_enough_samples():
    labels = np.array([2, 0, 2, 0, 2, 7, 0, 7])
    order, classes = sample_order(labels)
    assert classes == [0, 2, 7]
    assert order.tolist() == [[1, 3, 6], [0, 2, 4], [5, 7, -1]]


@pytest.mark.parametrize("labels", [np.arange(1000, 1011), np.arange(12).repeat(2), np.array([4]), np.array([1, 1, 2])])
def test_sheets_of_rare_or_many_classes_show_every_sample_in_order(labels):
    order, classes = sample_order(labels)
    assert classes is None and order.shape[1] == min(8, len(labels))
    assert order.ravel().tolist() == [*range(len(labels)), *[-1] * (order.size - len(labels))]


def test_small_images_are_enlarged_with_sharp_pixels_and_placed_in_order():
    samples = np.stack([np.full((1, 8, 8), v, dtype=np.float32) for v in (-1.0, 0.0, 1.0, 3.0)])
    samples[0, 0, 2, 5] = 1.0
    page = sheet(samples, np.array([[1, 0], [3, 2]]))
    assert page.shape == (48 * 2 + 4, 48 * 2 + 4, 1) and page.dtype == np.uint8
    first = np.zeros((48, 48), dtype=np.uint8)
    first[12:18, 30:36] = 255
    assert (page[:48, 52:, 0] == first).all()
    assert (page[:48, :48] == 128).all()  # 0 is 127.5, rounded to even
    assert (page[52:] == 255).all()  # 3 is clamped to 1
    assert (page[48:52] == 255).all() and (page[:, 48:52] == 255).all()


def test_large_images_are_reduced_keeping_their_shape():
    samples = np.full((1, 3, 512, 256), -1.0, dtype=np.float32)
    samples[:, 0] = 1.0
    page = sheet(samples, np.array([[0]]))
    assert page.shape == (160, 80, 3) and (page == [255, 0, 0]).all()


def test_pngs_hold_the_pixels_they_were_given():
    for pixels in (
        np.arange(48, dtype=np.uint8).reshape(6, 8, 1),
        np.arange(144, dtype=np.uint8).reshape(6, 8, 3),
    ):
        assert (np.asarray(Image.open(io.BytesIO(image_png(pixels)))).reshape(pixels.shape) == pixels).all()
    assert image_uri(np.zeros((2, 2, 3), np.uint8)).startswith("data:image/png;base64,")
    photograph = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    assert image_uri(photograph).startswith("data:image/jpeg;base64,")


def ink(pixels):
    """Where a white page was written on."""
    return (pixels < 200).any(-1)


def test_a_caption_stands_beside_each_row_of_a_class():
    labels = np.arange(6) % 2
    samples = np.zeros((6, 1, 8, 8), dtype=np.float32)
    page = captioned_sheet(samples, labels, [f"class {label}" for label in labels])
    plain = sheet(samples, sample_order(labels)[0])
    assert (page[: plain.shape[0], -4 - plain.shape[1] : -4] == plain).all() and page.dtype == np.uint8
    captions = ink(page[:, : -4 - plain.shape[1]])
    assert captions[:48].any() and captions[52:100].any() and not captions[48:52].any()
    other = ink(captioned_sheet(samples, labels, ["class 7"] * 6)[:, : -4 - plain.shape[1]])
    assert (other[:48] != captions[:48]).any()


def test_prompts_stand_under_the_first_sixteen_samples_whole_or_with_an_ellipsis():
    samples = np.ones((20, 3, 300, 200), dtype=np.float32)
    samples[:, 0] = -1.0
    prompts = [f"{i}" for i in range(18)] + ["a fox " * 40] * 2
    page = captioned_sheet(samples, np.arange(20), prompts)
    height, width = 256, 170
    assert page.shape == (4 * (height + 47 + 4), 4 * (width + 4), 3)
    assert (page[:height, :width] == [0, 255, 255]).all()
    below = ink(page[height + 1 : height + 47, :width])
    assert below.any() and not ink(page[:, width : width + 4]).any()
    font = sheets._font(["a"])
    lines = sheets._wrapped("a fox " * 40, font, width, 3)
    assert len(lines) == 3 and lines[-1].endswith("…") and all(font.getlength(line) <= width for line in lines)
    assert sheets._wrapped("a fox\n in  the\tsnow", font, 1000, 3) == ["a fox in the snow"]
    assert sheets._wrapped("a fox", font, 1, 9) == list("afox") and sheets._wrapped("", font, 9, 3) == []
    assert "".join(sheets._wrapped("狐" * 50, font, 100, 99)) == "狐" * 50
    assert captioned_sheet(samples[:1], np.array([3]), ["狐狸 \x07 🦊"]).shape == (height + 51, width + 4, 3)
