"""Class labels: a pure function of seed, step and global index, uniform, independent from step to step."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dmdr_fast.data.labels import class_labels


def test_matches_an_integer_evaluation_of_the_formula():
    words = [int(w) for w in np.random.Philox(key=[7, 3]).random_raw(20)]
    expected = [(1000 * (w >> 32)) >> 32 for w in words]
    assert class_labels(7, 3, (0, 20), 1000).tolist() == expected


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**63), st.integers(0, 10**9), st.lists(st.integers(0, 200), min_size=3, max_size=3))
def test_any_split_over_ranks_sees_the_same_global_batch(seed, step, cuts):
    a, b, c = sorted(cuts)
    whole = class_labels(seed, step, (a, c), 10)
    assert whole.dtype == torch.int64
    assert torch.equal(whole, torch.cat([class_labels(seed, step, r, 10) for r in ((a, b), (b, c))]))


@pytest.mark.parametrize("num_classes", [10, 1000])
def test_labels_are_uniform_and_steps_independent(num_classes):
    """Chi-square tests that a fair generator fails with probability 1e-4 each; the draws are fixed."""
    draws = np.stack([class_labels(0, step, (0, 500), num_classes).numpy() for step in range(200)])
    counts = np.bincount(draws.ravel(), minlength=num_classes)
    assert stats.chisquare(counts).pvalue > 1e-4
    pairs = (draws[:-1] % 10) * 10 + draws[1:] % 10
    assert stats.chisquare(np.bincount(pairs.ravel(), minlength=100)).pvalue > 1e-4
    assert not torch.equal(class_labels(1, 0, (0, 500), num_classes), class_labels(0, 1, (0, 500), num_classes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "seed: expected 0 or more, got -1"),
        ({"step": -2}, "step: expected 0 or more, got -2"),
        ({"index_range": (-1, 2)}, "start: expected 0 or more, got -1"),
        ({"index_range": (3, 2)}, r"expected start <= stop, got \(3, 2\)"),
        ({"num_classes": 0}, "num_classes: expected 1 to"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    valid = {"seed": 0, "step": 0, "index_range": (0, 4), "num_classes": 10}
    with pytest.raises(ValueError, match=message):
        class_labels(**(valid | change))
