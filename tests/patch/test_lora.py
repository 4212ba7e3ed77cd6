"""LoRA layers inside: PEFT's and ours, there before the patch or added after it."""

from __future__ import annotations

import copy

import peft
import pytest
import torch

import dmdr_fast.patch
from dmdr_fast.models.lora import add_lora
from tests.patch.families import FAMILIES, backward, cast, randomised, run


def add_adapter(model, targets) -> None:
    """PEFT's, through diffusers where the model has the door; B is not zero."""
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False)
    if hasattr(model, "add_adapter"):
        model.add_adapter(config)
    else:
        peft.inject_adapter_in_model(config, model)


@pytest.mark.parametrize("first", ["adapter", "patch"])
def test_peft(family, first):
    base = randomised(family.build(1))
    inputs = cast(family.inputs(), torch.float32)
    grad = torch.randn_like(run(base, family, inputs))
    model = copy.deepcopy(base)
    add_adapter(model, family.linears)
    plain = backward(model, family, inputs, grad)
    trained = {name for name in plain if "lora_" in name}
    places = [place.replace(".0", "") for place in family.linears]
    assert all(any(place in name.replace(".0", "") for name in trained) for place in places)
    assert (plain["output"] - run(base, family, inputs)).norm() > 0.01 * plain["output"].norm()

    if first == "adapter":
        dmdr_fast.patch(model, family.ops)
        fused = backward(model, family, inputs, grad)
    else:
        dmdr_fast.patch(base, family.ops)
        add_adapter(base, family.linears)
        base.load_state_dict(model.state_dict())
        fused = backward(base, family, inputs, grad)
    assert fused.keys() == plain.keys()
    torch.testing.assert_close(fused, plain, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("first", ["adapter", "patch"])
def test_adapters_of_several_roles(first):
    """The score pass: fake and real score in one batch, told apart by a scale per sample."""
    family = FAMILIES["sit"]
    base = randomised(family.build(1))
    model = copy.deepcopy(base)
    if first == "patch":
        dmdr_fast.patch(model)
    generator = torch.Generator().manual_seed(1)
    for patched in (base, model):
        adapter = add_lora(patched, "fake", rank=2, targets=["attn.qkv", "mlp.fc2"], generator=generator)
        with torch.no_grad():
            for index, parameter in enumerate(adapter.parameters()):
                draws = torch.Generator().manual_seed(index)
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=draws))
        adapter.set_scale(torch.tensor([2.0, 0.75]))
    if first == "adapter":
        dmdr_fast.patch(model)
    inputs = cast(family.inputs(), torch.float32)
    grad = torch.randn_like(run(base, family, inputs))
    plain, fused = (backward(each, family, inputs, grad) for each in (base, model))
    assert sum("lora_" in name for name in plain) == 4
    torch.testing.assert_close(fused, plain, rtol=1e-3, atol=1e-5)
