"""Patched models under torch.compile without graph breaks, and with activations recomputed."""

from __future__ import annotations

import pytest
import torch

import dmdr_fast.patch
from dmdr_fast.models.recompute import set_recompute
from tests.patch.families import FAMILIES, backward, cast, randomised, run
from tests.tiers import sampled


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("family", sampled(["sd3", *sorted(FAMILIES.keys() - {"sd3"})]), indirect=True)
def test_full_graph(family):
    model = randomised(family.build(1))
    dmdr_fast.patch(model, family.ops)
    inputs = cast(family.inputs(), torch.float32)
    grad = torch.randn_like(run(model, family, inputs))
    eager = backward(model, family, inputs, grad)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = backward(compiled, family, inputs, grad)
    found = {name.removeprefix("_orig_mod."): value for name, value in found.items()}
    torch.testing.assert_close(found, eager, rtol=1e-4, atol=1e-6)


def test_activation_checkpointing(family):
    model = randomised(family.build(2))
    dmdr_fast.patch(model, family.ops)
    inputs = cast(family.inputs(), torch.float32)
    grad = torch.randn_like(run(model, family, inputs))
    kept = backward(model, family, inputs, grad)
    set_recompute(model, "full")
    recomputed = backward(model, family, inputs, grad)
    assert recomputed.keys() == kept.keys()
    assert all(torch.equal(recomputed[name], kept[name]) for name in kept)
