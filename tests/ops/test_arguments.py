"""Each argument of a valid call made wrong, one at a time: the message names it, expected and got."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from dmdr_fast import ops
from tests.cases import OPS, valid_calls


def cases() -> Iterator[tuple[str, dict, str]]:
    for name, op in OPS.items():
        yield from ((name, change, match) for change, match in op.wrong())
        for constant in op.constants.split():
            value = valid_calls()[name][constant]
            yield name, {constant: value.clone().requires_grad_()}, f"{constant}: expected a constant"


@pytest.mark.parametrize("op", sorted(OPS))
def test_the_unchanged_call_is_valid(op):
    getattr(ops, op)(**valid_calls()[op])


@pytest.mark.parametrize(("op", "change", "match"), list(cases()))
def test_one_wrong_argument(op, change, match):
    with pytest.raises((TypeError, ValueError), match=f"^{op}: {match}"):
        getattr(ops, op)(**{**valid_calls()[op], **change})


@pytest.mark.parametrize("op", sorted(OPS))
def test_what_no_argument_takes(op):
    call, function = valid_calls()[op], getattr(ops, op)
    for name in call:
        function(**call)  # its plan is known
        for wrong in (object(), {}, np.zeros(3), (torch.float64, "x")):
            with pytest.raises((TypeError, ValueError), match=f"^{op}: {name}: expected"):
                function(**call | {name: wrong})


def test_default_alpha_needs_sigma_up_to_one():
    call = {**valid_calls()["dmd_gradient"], "sigma": torch.tensor([0.5, 1.5, 0.5])}
    ops.dmd_gradient(**call)  # flow does not read alpha
    for prediction in ("eps", "v"):
        with pytest.raises(ValueError, match=r"dmd_gradient: sigma: expected .* at most 1"):
            ops.dmd_gradient(**call, prediction=prediction)
        ops.dmd_gradient(**call, prediction=prediction, alpha=1.0)
