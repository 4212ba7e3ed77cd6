"""A patched model against itself unpatched: outputs, input and parameter gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.attention import FeedForward
from diffusers.models.transformers.transformer_sd3 import SD3SingleTransformerBlock
from diffusers.models.transformers.transformer_z_image import FinalLayer, ZImageTransformerBlock
from torch import Tensor

import dmdr_fast.patch
from dmdr_fast.patch import OPS
from tests.patch.families import FAMILIES, backward, cast, counted, leaves, randomised, run


def distance(found: Tensor, truth: Tensor, scale: float) -> float:
    return float((found.detach().double() - truth).norm() / max(truth.norm(), scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_as_close_to_float64_as_the_unpatched_model(family, dtype):
    model = randomised(family.build(2)).to(dtype)
    inputs = cast(family.inputs(), dtype)
    grad = torch.randn_like(run(model, family, inputs))
    truth = backward(copy.deepcopy(model).double(), family, cast(inputs, torch.float64), grad)
    plain = backward(model, family, inputs, grad)
    with dmdr_fast.patch(model, family.ops):
        fused = backward(model, family, inputs, grad)

    assert fused.keys() == plain.keys() == truth.keys()
    assert all(value.dtype is plain[name].dtype for name, value in fused.items())
    # A gradient that is a sum of cancelling terms is rounding noise: it is measured against the others.
    scale = 1e-3 * float(max(value.norm() for value in truth.values()))
    parameters = [name for name, _ in model.named_parameters() if name in truth]
    for name in truth:
        of_model, of_patched = (distance(found[name], truth[name], scale) for found in (plain, fused))
        factor = 4 if name in parameters else 2  # a single small tensor's error is a matter of luck
        assert of_patched <= factor * of_model + 1e-7, name
    together = {
        name: torch.cat([found[p].flatten().double() for p in parameters])
        for name, found in {"plain": plain, "fused": fused, "truth": truth}.items()
    }
    of_model, of_patched = (distance(together[name], together["truth"], 0) for name in ("plain", "fused"))
    assert of_patched <= 2 * of_model


@pytest.mark.parametrize("op", OPS)
def test_only_the_named_op_changes(family, op, monkeypatch):
    """In float32 the reference's gated residual is the model's own expression: then not a bit may differ."""
    monkeypatch.setenv("DMDR_FAST_BACKEND", "reference")
    if op not in family.ops:
        return
    model = randomised(family.build(1))
    inputs = cast(family.inputs(), torch.float32)
    plain = run(model, family, inputs)
    with dmdr_fast.patch(model, [op]), counted() as calls:
        fused = run(model, family, inputs)
    assert set(calls) == {"gated_activation_fwd" if op == "silu_mul" else f"{op}_fwd"}
    torch.testing.assert_close(fused, plain)
    if op == "gated_residual":
        assert torch.equal(fused, plain)


def test_every_reported_place_is_one_call():
    """SD3.5's norm1 of block 0 modulates twice; attentions with a text stream norm two pairs."""
    expected = {
        "sd3": {"layer_norm_modulate": 1, "qk_norm_rope": 2},
        "flux": {"qk_norm_rope": 1},
        "flux2": {"qk_norm_rope": 1},
        "z_image": {},
        "qwen_image": {"qk_norm_rope": 1},
        "sit": {},
    }
    names = {"silu_mul": "gated_activation_fwd"}
    for key, family in FAMILIES.items():
        model = randomised(family.build(1))
        with dmdr_fast.patch(model, family.ops) as report, counted() as calls:
            run(model, family, family.inputs())
        assert report.counts == family.ops
        assert calls == {
            names.get(op, f"{op}_fwd"): count + expected[key].get(op, 0) for op, count in family.ops.items()
        }


def test_gradients_do_not_reach_frozen_parameters():
    family = FAMILIES["flux"]
    model = randomised(family.build(1)).requires_grad_(False)
    inputs = cast(family.inputs(), torch.float32)
    grad = torch.randn_like(run(model, family, inputs))
    plain = backward(model, family, inputs, grad)
    with dmdr_fast.patch(model, family.ops):
        fused = backward(model, family, inputs, grad)
    assert fused.keys() == plain.keys() == {"output", *(f"input {i}" for i in range(len(leaves(inputs))))}
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-6)


def check(module: torch.nn.Module, *args, ops: int, **kwargs) -> None:
    """Outputs and gradients of one layer, patched and not; ``ops`` places are expected."""
    randomised(module)
    floats = [a.requires_grad_() for a in (*args, *kwargs.values()) if a is not None and a.is_floating_point()]

    def gradients() -> list[Tensor]:
        torch.manual_seed(1)
        output = module(*args, **kwargs)
        outputs = [output] if isinstance(output, Tensor) else [o for o in output if o is not None]
        loss = sum((o * torch.randn_like(o)).sum() for o in outputs)
        return [*outputs, *torch.autograd.grad(loss, [*floats, *module.parameters()], allow_unused=True)]

    plain = gradients()
    with dmdr_fast.patch(module, strict=False) as report:
        assert len(report.replaced) == ops
        assert not any(entry.unknown for entry in report.left)
        torch.testing.assert_close(gradients(), plain, rtol=1e-4, atol=1e-5)


def test_sd3_single_block():
    check(SD3SingleTransformerBlock(32, 4, 8), torch.randn(2, 9, 32), torch.randn(2, 32), ops=3)


def test_sd3_in_feed_forward_chunks():
    family = FAMILIES["sd3"]
    model = randomised(family.build(1))
    inputs = family.inputs()
    plain = run(model, family, inputs)
    model.enable_forward_chunking(1, dim=0)
    with dmdr_fast.patch(model):
        torch.testing.assert_close(run(model, family, inputs), plain)


def test_z_image_with_clean_and_noisy_tokens():
    noise_mask = torch.tensor([[1, 1, 0, 0, 1], [0, 1, 1, 1, 0]])
    noisy, clean = torch.randn(2, 32), torch.randn(2, 32)
    angles = torch.polar(torch.ones(2, 5, 8), torch.randn(2, 5, 8))
    block = ZImageTransformerBlock(0, 32, 2, 2, 1e-5, True)
    x = torch.randn(2, 5, 32)
    check(block, x, None, angles, None, noise_mask, noisy, clean, ops=5)
    layer = FinalLayer(32, 4)
    check(layer, x, noise_mask=noise_mask, c_noisy=noisy, c_clean=clean, ops=1)


def test_qwen_image_with_a_clean_reference_image():
    family = FAMILIES["qwen_image"]
    model = randomised(type(family.build(1)).from_config({**family.build(1).config, "zero_cond_t": True}))
    inputs = cast(family.inputs() | {"hidden_states": torch.randn(2, 13, 4)}, torch.float32)
    two_images = {"img_shapes": [[(1, 3, 3), (1, 2, 2)]] * 2}

    def output():
        return model(**inputs, **family.constants | two_images).sample

    plain = output()
    grad = torch.randn_like(plain)
    plain_grads = torch.autograd.grad(plain, list(model.parameters()), grad, allow_unused=True)
    with dmdr_fast.patch(model) as report:
        assert report.counts == family.ops
        fused = output()
        grads = torch.autograd.grad(fused, list(model.parameters()), grad, allow_unused=True)
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grads, plain_grads, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("activation", ["geglu", "swiglu"])
def test_gated_feed_forward_of_any_model(activation):
    check(FeedForward(32, activation_fn=activation), torch.randn(2, 5, 32), ops=1)


def test_autocast():
    family = FAMILIES["flux"]
    model = randomised(family.build(1))
    inputs = family.inputs()
    truth = run(copy.deepcopy(model).double(), family, cast(inputs, torch.float64)).detach()
    with torch.autocast("cpu", torch.bfloat16):
        plain = run(model, family, inputs)
        with dmdr_fast.patch(model):
            fused = run(model, family, inputs)
    assert fused.dtype is plain.dtype
    assert distance(fused, truth, 0) <= 2 * distance(plain, truth, 0)
