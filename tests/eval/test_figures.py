"""What the curves decide, and the overview."""

import io

import numpy as np
import pytest
from PIL import Image

from dmdr_fast.eval import figures
from dmdr_fast.eval.figures import Curve, draw_curve, draw_overview


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
