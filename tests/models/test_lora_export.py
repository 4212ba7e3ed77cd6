"""Merged weights and exported adapters give the numbers of the adapter they came from."""

import pytest
import torch

from dmdr_fast.models.lora import add_lora
from dmdr_fast.models.lora_export import diffusers_lora, merge
from dmdr_fast.models.sit import SiT

SMALL = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 3,
    "hidden_size": 24,
    "depth": 2,
    "num_heads": 3,
    "num_classes": 5,
}


def trained(form="standard", targets=("attn.qkv", "mlp.fc1"), dtype=torch.float32):
    """A SiT with two adapters, no parameter zero, and inputs."""
    model = SiT(**SMALL)
    adapter = add_lora(model, "student", rank=4, targets=targets, form=form)
    add_lora(model, "fake", rank=2, targets=["attn.qkv"])
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    inputs = torch.randn(4, 3, 8, 8), torch.rand(4), torch.tensor([0, 1, 4, 5])
    return model.to(dtype), adapter, inputs


def plain_sit(model):
    plain = SiT(**SMALL)
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if "lora_" not in name})
    return plain


def test_merge_equals_the_adapter_at_that_scale():
    model, adapter, inputs = trained(dtype=torch.float64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    merged = SiT(**SMALL).double()
    merged.load_state_dict(merge(adapter, scale=0.6), strict=True)
    with adapter.scaled(0.6):
        want = model(*inputs)
    torch.testing.assert_close(merged(*inputs), want, rtol=1e-10, atol=1e-10)
    assert (want - model(*inputs)).abs().max() > 0.05
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_merge_sums_in_fp32_and_rounds_once():
    model, adapter, _ = trained(dtype=torch.bfloat16)
    merged = merge(adapter, scale=0.25)["blocks.0.mlp.fc1.weight"]
    layer = model.blocks[0].mlp.fc1
    product = layer.lora_A_student.double() @ layer.lora_B_student.double()
    want = layer.weight.double() + 0.25 * product.T
    assert merged.dtype == torch.bfloat16
    assert ((merged.double() - want).norm() / want.norm()).item() < 2.0**-9


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.3])
def test_diffusers_names_hold_the_adapter_at_its_scale(scale):
    _, adapter, _ = trained(targets=("blocks.1.attn.qkv",))
    tensors = diffusers_lora(adapter, scale)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "blocks.1.attn.qkv.lora_A.weight": (4, 24),
        "blocks.1.attn.qkv.lora_B.weight": (72, 4),
    }
    a, b = (tensors[f"blocks.1.attn.qkv.lora_{name}.weight"] for name in "AB")
    state = adapter.state_dict()
    want = scale * (state["blocks.1.attn.qkv.lora_A"] @ state["blocks.1.attn.qkv.lora_B"]).T
    torch.testing.assert_close(b @ a, want)


def test_post_projection_is_refused_with_the_reason():
    _, adapter, _ = trained(form="post_projection", targets=("attn.qkv",))
    for call in (lambda: diffusers_lora(adapter), lambda: merge(adapter)):
        with pytest.raises(ValueError, match=r"post_projection adapter cannot be .*\(b A\) B.*form='standard'"):
            call()
