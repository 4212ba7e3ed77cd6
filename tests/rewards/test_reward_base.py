"""check_reward accepts scores [B] and names what is wrong with anything else."""

import pytest
import torch

from dmdr_fast.rewards.base import check_reward

IMAGES = torch.zeros(3, 1, 8, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_pass_through(dtype):
    values = torch.tensor([1.0, float("nan"), -2.0], dtype=dtype)
    assert check_reward(values, IMAGES, "mine") is values


@pytest.mark.parametrize(
    "values,got",
    [
        ([1.0, 2.0, 3.0], "got list"),
        (torch.zeros(2), r"got torch.float32 \[2\] on cpu"),
        (torch.zeros(3, 1), r"got torch.float32 \[3, 1\]"),
        (torch.zeros(()), r"got torch.float32 \[\]"),
        (torch.zeros(3, dtype=torch.int64), "got torch.int64"),
        (torch.zeros(3, device="meta"), "on meta"),
    ],
)
def test_anything_else_is_refused(values, got):
    with pytest.raises(ValueError, match=rf"reward 'mine': expected .*\[3\].*{got}"):
        check_reward(values, IMAGES, "mine")
