"""8-bit frozen weights: rounding within half a step, exact products of the rounded weights, gradients to adapters."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dmdr_fast.models.eight_bit import Int8Linear, quantise, quantise_blocks
from dmdr_fast.models.lora import add_lora
from dmdr_fast.models.lora_export import merge
from dmdr_fast.models.recompute import set_recompute
from tests.algorithm.memory import PeakMemory
from tests.patch.families import FAMILIES, cast, randomised, run


@pytest.fixture(autouse=True)
def fixed_draws():
    torch.manual_seed(0)


def dequantised(model):
    """The same model in plain layers, holding the rounded weights."""
    plain = copy.deepcopy(model)
    for layer in plain.modules():
        if isinstance(layer, Int8Linear):
            layer.weight = nn.Parameter(layer.weight.to(layer.weight_scale.dtype) * layer.weight_scale)
            layer.base = lambda x, layer=layer: nn.functional.linear(x, layer.weight, layer.bias)
    return plain


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_weight_is_within_half_a_step(dtype):
    weight = torch.randn(64, 128).mul(torch.logspace(-6, 3, 64)[:, None]).to(dtype)
    weight[5] = 0
    q, scale = quantise(weight)
    assert q.dtype == torch.int8 and q.min() >= -127 and scale.dtype == dtype and scale.shape == (64, 1)
    assert torch.equal(scale, scale.bfloat16().to(dtype))
    error = (q.double() * scale.double() - weight.double()).abs()
    assert (error <= 0.5001 * scale.double()).all() and not q[5].any()
    # a bf16 step above the smallest scale that holds the channel, at most
    assert (scale.double() <= 1.01 * weight.double().abs().amax(1, keepdim=True) / 127)[q.any(1)].all()


def test_product_and_gradient_are_those_of_the_rounded_weights():
    layer = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(6, 4)])}).double()
    quantise_blocks(layer, "int8")
    int8 = layer["blocks"][0]
    x = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)
    want = x @ (int8.weight.double() * int8.weight_scale).T + int8.bias
    torch.testing.assert_close(int8(x), want, rtol=1e-14, atol=1e-14)
    assert torch.autograd.gradcheck(int8, (x,))


@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_train_through_int8_blocks(name):
    """The gradients of the adapters, and of the inputs, are those over plain layers with the same rounded weights."""
    family = FAMILIES[name]
    model = randomised(family.build(2)).double()
    adapter = add_lora(model, "fake", rank=2, targets=family.linears, dtype=torch.float64)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(0, 0.3)
    exact = copy.deepcopy(model)
    layers = quantise_blocks(model, "int8")
    assert layers == sum(isinstance(m, Int8Linear) for m in model.modules()) > 0
    plain = dequantised(model)
    results = {}
    inputs = cast(family.inputs(), torch.float64)
    for each, mode in ((plain, "none"), (model, "none"), (model, "selective"), (exact, "none")):
        set_recompute(each, mode)
        each.lora_adapters["fake"].set_scale(1.5)
        out = run(each, family, inputs)
        parameters = list(each.lora_adapters["fake"].parameters())
        results[each, mode] = [out.detach(), *torch.autograd.grad(out.square().mean(), parameters)]
    want = results[plain, "none"]
    for mode in ("none", "selective"):
        torch.testing.assert_close(results[model, mode], want, rtol=1e-10, atol=1e-12)
    change = (want[0] - results[exact, "none"][0]).norm() / want[0].norm()
    assert 1e-4 < change < 0.05, change


def test_a_quarter_of_the_bytes_and_no_dequantised_weight_in_the_graph():
    family = FAMILIES["sit"]
    model = randomised(family.build(4)).requires_grad_(False)
    before = sum(p.nbytes for b in model.blocks for p in b.parameters())
    quantise_blocks(model, "int8")
    after = sum(p.nbytes for b in model.blocks for p in b.parameters())
    assert after < (0.25 + 2 / 32) * before  # a bias and a scale beside 32 weights
    inputs = {"x": torch.randn(1, 4, 6, 6, requires_grad=True)}
    constants = {k: v[:1] for k, v in family.constants.items()}
    with PeakMemory() as memory:
        out = model(**inputs, **constants)
    assert memory.live < before / 4  # activations of one sample
    out.sum().backward()
    assert inputs["x"].grad.norm() > 0


def test_embeddings_and_the_last_layer_stay_as_they_are():
    model = randomised(FAMILIES["sit"].build(2))
    quantise_blocks(model, "int8")
    kinds = {n: type(m).__name__ for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert all((kind == "Int8Linear") == name.startswith("blocks.") for name, kind in kinds.items()), kinds


def test_adapters_may_come_after_and_are_not_merged():
    model = randomised(FAMILIES["sit"].build(2))
    quantise_blocks(model, "int8")
    adapter = add_lora(model, "fake", rank=2, targets=["attn.qkv"])
    assert isinstance(model.blocks[0].attn.qkv, Int8Linear)
    with pytest.raises(ValueError, match="int8"):
        merge(adapter)


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        (nn.Sequential(nn.Linear(2, 2)), "int8", "Sequential keeps no Linear layers in blocks"),
        (
            nn.ModuleList([nn.modules.linear.NonDynamicallyQuantizableLinear(2, 2)]),
            "int8",
            "NonDynamicallyQuantizableLinear has a forward of its own",
        ),
        (nn.ModuleList([nn.Linear(2, 2)]), "float8", "float8 needs .*: use int8"),
    ],
)
def test_what_cannot_be_quantised(model, kind, message):
    with pytest.raises(ValueError, match=message):
        quantise_blocks(model, kind)
