"""How views of one shape are laid out for the C ABI."""

from __future__ import annotations

import torch

from dmdr_fast.backends import views
from dmdr_fast.backends.cpu import BACKEND
from dmdr_fast.backends.plans import Recorder
from dmdr_fast.backends.rows import Grouped
from tests.raw import RawFunctions


def shared_view(*tensors):
    """(shape, strides, tensors)."""
    shape, held = views.shared_view(*tensors)
    return shape, tuple(one and one.strides for one in held), [one and one.tensor for one in held]


cpu, reference = RawFunctions(BACKEND), RawFunctions(None)


def test_contiguous_tensors_are_one_row_per_sample():
    x = torch.zeros(3, 4, 5, 6)
    shape, strides, held = shared_view(x, None, x.bfloat16())
    assert shape == (3, 1, 1, 1, 1, 120)
    assert strides == ((120, 0, 0, 0, 0), None, (120, 0, 0, 0, 0))
    assert held[0] is x


def test_dimensions_merge_where_all_strides_allow():
    # [2, 3, 4, 6] within [2, 3, 4, 10]: rows of 6; a channel slice of [2, 7, 4, 6]: one row of 72 per sample.
    padded = torch.zeros(2, 3, 4, 10)[..., :6]
    shape, strides, _ = shared_view(padded, torch.zeros(2, 3, 4, 6))
    assert shape == (2, 12, 1, 1, 1, 6)
    assert strides == ((120, 10, 0, 0, 0), (72, 6, 0, 0, 0))
    shape, strides, _ = shared_view(torch.zeros(2, 7, 4, 6)[:, 2:5])
    assert shape == (2, 1, 1, 1, 1, 72) and strides == ((168, 0, 0, 0, 0),)


def test_a_scattered_last_dimension_is_copied_and_only_that_one():
    good, scattered = torch.zeros(2, 3, 8)[..., :4], torch.arange(24.0).view(2, 4, 3).mT
    shape, strides, held = shared_view(good, scattered)
    assert shape == (2, 3, 1, 1, 1, 4)
    assert held[0] is good and held[1].is_contiguous() and torch.equal(held[1], scattered)
    assert strides == ((24, 8, 0, 0, 0), (12, 4, 0, 0, 0))
    expanded = torch.ones(()).expand(2, 3, 4)
    _, _, held = shared_view(good, expanded)
    assert held[1].is_contiguous()


def test_too_many_dimensions_are_copied():
    x = torch.zeros(2, 3, 3, 3, 3, 3, 4)[:, :2, :2, :2, :2, :2, :3]
    shape, _, held = shared_view(x)
    assert shape == (2, 1, 1, 1, 1, 96) and held[0].is_contiguous()


def test_rows_of_one_element_are_never_copied():
    packed = torch.zeros(2, 3, 4, 2)
    shape, strides, held = shared_view(*packed.chunk(2, -1))
    assert shape == (2, 12, 1, 1, 1, 1)
    assert strides == ((24, 2, 0, 0, 0),) * 2 and held[0].data_ptr() == packed.data_ptr()


def test_gradients_of_packed_halves_are_written_in_place_however_many_dimensions():
    packed = torch.randn(2, 2, 3, 2, 3, 2, 4).permute(0, 5, 4, 3, 2, 1, 6)
    grad = torch.randn(2, 2, 3, 2, 3, 2, 2)
    for operands in ((grad, packed), (grad[..., :1], packed[..., ::2])):
        ours, truth = (backend.gated_activation_bwd(*operands, "silu", False) for backend in (cpu, reference))
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-6)


def test_tokens_are_grouped_by_the_vectors_they_share():
    x = torch.zeros(2, 3, 4, 5)
    for shape, groups, vectors in (
        ((5,), (2, 12), (1, 1, 5)),
        ((2, 5), (2, 12), (2, 1, 5)),
        ((2, 3, 1, 5), (6, 4), (6, 1, 5)),
        ((2, 3, 4, 5), (2, 12), (2, 12, 5)),
    ):
        vector = torch.zeros(shape)
        grouped = Grouped(Recorder((x, vector)), x, vector)
        assert (grouped.groups, grouped.tokens) == groups and grouped.rows(x).shape == (*groups, 5)
        assert grouped.vectors(vector).shape == vectors
    transposed = torch.zeros(2, 5, 7).mT
    assert Grouped(Recorder((transposed,)), transposed).rows(transposed).is_contiguous()
