"""Every family's repeated blocks as graphs of their own: one per kind, and the same for all LoRA scales."""

from __future__ import annotations

import copy

import pytest
import torch

from dmdr_fast.engine import compute
from dmdr_fast.models.blocks import kind, repeated_blocks
from dmdr_fast.models.eight_bit import quantise_blocks
from dmdr_fast.models.families import Denoiser
from dmdr_fast.models.lora import add_lora
from dmdr_fast.models.recompute import set_recompute
from tests.families import PIPELINES, VARIANTS
from tests.tiers import sampled


@pytest.fixture
def captured(monkeypatch):
    """The compiler captures graphs and runs them as they are: what is compiled, without the seconds of compiling it."""
    monkeypatch.setattr(compute, "BACKEND", "eager")
    monkeypatch.setattr(torch._logging._internal.trace_log, "propagate", False)  # pytest would keep megabytes of it
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.fixture
def denoiser(case):
    """With more blocks of the last kind where the family lets that be, and adapters that say something."""
    denoiser = Denoiser(case.family, copy.deepcopy(case.network))
    for name, module in list(denoiser.transformer.named_modules()):
        if isinstance(module, torch.nn.ModuleList) and name in ("single_transformer_blocks", "layers"):
            module.extend(copy.deepcopy(module[-1]) for _ in range(2))
    adapter = add_lora(denoiser, "fake", rank=2, targets=case.family.lora_targets)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(0, 0.3)
    return denoiser


NAMES = PIPELINES.keys() | VARIANTS.keys()
# Kinds whose first block has inputs of another shape or stride: FLUX.1's first single block, Z-Image's image refiner.
MORE = {"flux": 1, "z_image": 1}


@pytest.mark.parametrize("case", sampled(["sd3", "z_image", *sorted(NAMES - {"sd3", "z_image"})], 2), indirect=True)
def test_one_graph_per_kind(captured, denoiser, case):
    side = 2 * case.family.factor * case.family.patch
    x = torch.randn(2, *case.family.latent_shape(side, side), generator=torch.Generator().manual_seed(0))
    t, condition = torch.tensor([0.25, 0.75]), case.family.condition([case.entries[0], case.entries[1]])
    adapter, scales = denoiser.lora_adapters["fake"], [torch.tensor([2.0, 0.5]), torch.tensor([0.0, 1.5])]

    def predicted():
        out = []
        for scale in scales:
            with torch.no_grad(), adapter.scaled(scale):
                out.append(denoiser(x, t, condition))
        return out

    want, blocks = predicted(), repeated_blocks(denoiser)
    compute.compile_blocks(blocks)
    got = predicted()
    graphs = len({kind(block) for block in blocks}) + MORE.get(case.name, 0)
    assert compute.compiled_graphs() == graphs
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    with compute.uncompiled(), torch.no_grad(), adapter.scaled(scales[0][:1]):
        denoiser(x[:1], t[:1], case.family.condition(case.entries[:1]))
    assert compute.compiled_graphs() == graphs


@pytest.mark.parametrize("case", ["sd3"], indirect=True)
@pytest.mark.parametrize(("mode", "frozen"), sampled([("offload", "int8"), ("none", "native")]))
def test_gradients_are_the_same(captured, denoiser, case, mode, frozen):
    side = 2 * case.family.factor * case.family.patch
    x = torch.randn(2, *case.family.latent_shape(side, side), generator=torch.Generator().manual_seed(0))
    t, condition = torch.tensor([0.25, 0.75]), case.family.condition([case.entries[0], case.entries[1]])
    adapter, gradients = denoiser.lora_adapters["fake"], []
    if frozen == "int8":
        quantise_blocks(denoiser, "int8")
    set_recompute(denoiser, mode)
    for compiled in (False, True):
        if compiled:
            compute.compile_blocks(repeated_blocks(denoiser))
        denoiser.zero_grad()
        with adapter.scaled(torch.tensor([2.0, 0.5])):
            loss = denoiser(x, t, condition).square().mean()
        loss.backward()  # the adapter is off by now
        gradients.append({n: p.grad for n, p in adapter.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)
