"""Sample sheets pixel by pixel, and what the curves decide."""

import io

import numpy as np
import pytest
from PIL import Image

from dmdr_fast.eval import figures
from dmdr_fast.eval.figures import Curve, data_uri, draw_curve, draw_overview, image_png, sample_order, sheet


def test_sheets_have_one_class_per_row_where_every_class_has_enough_samples():
    labels = np.array([2, 0, 2, 0, 2, 7, 0, 7])
    order, classes = sample_order(labels)
    assert classes == [0, 2, 7]
    assert order.tolist() == [[1, 3], [0, 2], [5, 7]]
    many, classes = sample_order(np.repeat(np.arange(12), 20))
    assert classes == list(range(10)) and many.shape == (10, 8)
    assert (np.repeat(np.arange(12), 20)[many] == np.arange(10)[:, None]).all()


def test_sheets_of_rare_classes_are_squares_in_order():
    order, classes = sample_order(np.arange(1000, 1011))
    assert classes is None and order.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert sample_order(np.array([4]))[0].tolist() == [[0]]


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
    assert data_uri(b"\x00\xff") == "data:image/png;base64,AP8="


@pytest.mark.parametrize("width", [2, 5])
def test_the_running_mean_is_the_mean_of_the_neighbours_and_skips_gaps(width):
    values = np.random.default_rng(0).normal(size=30)
    steps = np.arange(30) * 10
    with_gap, gap_steps = np.insert(values, 12, np.nan), np.insert(steps, 12, 115)
    found_steps, found = figures._running_mean(gap_steps, with_gap, width)
    half = width // 2
    expected = [values[max(i - half, 0) : i + half + 1].mean() for i in range(30)]
    assert (found_steps == steps).all()
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_a_log_scale_is_for_positive_values_that_span_more_than_a_factor_of_20():
    def spans(*values):
        return figures._spans_decades(Curve("", "", {"a": (np.arange(len(values)), np.array(values))}))

    assert spans(1.0, 21.0) and spans(1.0, np.nan, 21.0)
    assert not spans(1.0, 19.0) and not spans(0.0, 50.0) and not spans(-1.0, 50.0)


def test_curves_and_overview_are_pngs_of_something():
    steps = np.arange(200)
    curve = Curve("Loss", "", {"a": (steps, np.exp(-steps / 20.0)), "b": (steps[:1], np.ones(1))}, ("level", 0.5))
    with_line = np.asarray(Image.open(io.BytesIO(draw_curve(curve, boundary=100))))
    without = np.asarray(Image.open(io.BytesIO(draw_curve(curve, boundary=None))))
    assert with_line.shape == without.shape and (with_line != without).any()
    half = np.zeros((20, 10, 1), dtype=np.uint8)
    overview = np.asarray(Image.open(io.BytesIO(draw_overview([("a", "FD 1", half), ("b", "", half)]))).convert("L"))
    assert 0.2 < (overview == 0).mean() < 0.95  # two black sheets on white
