"""Activation checkpointing: the same gradients in every mode, and less kept between forward and backward."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import dmdr_fast.patch
from dmdr_fast.models.lora import add_lora
from dmdr_fast.models.recompute import MODES, set_recompute
from tests.algorithm.memory import PeakMemory
from tests.patch.families import FAMILIES, backward, cast, randomised, run
from tests.tiers import sampled


@pytest.fixture(autouse=True)
def fixed_draws():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, params=sampled(["torch", "deepspeed"]))
def linear(request, monkeypatch):
    """torch's own linear, and the one that ZeRO-3 puts in its place: it adds the bias in place."""
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    monkeypatch.setattr(
        torch.nn.functional, "linear", torch._C._nn.linear if request.param == "torch" else zero3_linear_wrap
    )


def kept_and_peak(compute):
    """What ``compute() -> loss`` leaves alive, the peak with its backward, and the number of activations it stores."""
    with PeakMemory() as memory:
        loss = compute()
        kept = memory.live
        loss.backward()
    return kept, memory.peak


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_gradients_and_less_kept(name):
    family = FAMILIES[name]
    model = randomised(family.build(3)).double()
    dmdr_fast.patch(model, family.ops)
    inputs = cast(family.inputs(), torch.float64)
    grad = torch.randn_like(run(model, family, inputs))
    kept, gradients = {}, {}
    for mode in MODES:
        set_recompute(model, mode)
        gradients[mode] = backward(model, family, inputs, grad)
        kept[mode] = kept_and_peak(lambda: (run(model, family, inputs) * grad).sum())[0]
    for mode in MODES[1:]:
        torch.testing.assert_close(gradients[mode], gradients["none"], rtol=1e-12, atol=1e-14)
    assert kept["selective"] < 0.75 * kept["none"]
    assert kept["offload"] <= kept["full"] < 0.3 * kept["selective"]


def test_the_peak_of_lora_training_falls_in_the_same_order():
    family = FAMILIES["flux"]
    model = randomised(family.build(4))
    adapter = add_lora(model, "fake", rank=2, targets=family.linears)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(0, 0.3)
    adapter.set_scale(torch.tensor([2.0, 0.5]))
    inputs = {k: v.detach() for k, v in cast(family.inputs(), torch.float32).items()}
    peaks, gradients = {}, {}
    for mode in MODES:
        set_recompute(model, mode)
        model.zero_grad()
        peaks[mode] = kept_and_peak(lambda: run(model, family, inputs).square().mean())[1]
        gradients[mode] = [p.grad for p in adapter.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(gradients[mode], gradients["none"], strict=True))
    assert peaks["none"] > 1.2 * peaks["selective"] > 1.5 * peaks["full"]
    assert peaks["full"] >= peaks["offload"]


def unet():
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=4,
    )


@pytest.mark.parametrize("mode", MODES[1:])
def test_a_unet(mode):
    model = unet()
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
    gradients, kept = [], []
    for each in ("none", mode):
        set_recompute(model, each)
        model.zero_grad()
        kept.append(kept_and_peak(lambda: model(x, torch.tensor([10, 700]), text).sample.square().mean())[0])
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert kept[1] < 0.75 * kept[0]


def test_written_out_attention_logits_are_not_kept():
    """Attention of q, k [B, T, D] by batched products: the [T, T] logits are recomputed, the output is kept."""

    class Model(nn.Module):
        _supports_gradient_checkpointing = True

        def enable_gradient_checkpointing(self, func):
            self.func = func

        def forward(self, x):
            return self.func(self.attend, x)

        def attend(self, x):
            return torch.bmm((torch.bmm(x, x.mT) / 8).softmax(-1), x)

    model, tokens = Model(), 256
    set_recompute(model, "selective")
    x = torch.randn(1, tokens, 8, requires_grad=True)
    with PeakMemory() as memory:
        loss = model(x).sum()
    assert memory.live < 4 * 8 * tokens * 2 < 4 * tokens**2
    (got,) = torch.autograd.grad(loss, x)
    (want,) = torch.autograd.grad(model.attend(x).sum(), x)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("mode", ["full", "offload"])
def test_two_backward_passes_through_one_forward(mode):
    family = FAMILIES["sit"]
    model = randomised(family.build(2))
    set_recompute(model, mode)
    loss = run(model, family, family.inputs()).square().mean()
    weights = [p for p in model.parameters() if p.requires_grad]
    first = torch.autograd.grad(loss, weights, retain_graph=True)
    second = torch.autograd.grad(loss, weights)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_copy_recomputes_with_its_own_adapters():
    """An EMA or a teacher made by deepcopy must not wear the original's scales."""
    family = FAMILIES["sit"]
    model = randomised(family.build(2))
    add_lora(model, "fake", rank=2, targets=["attn.qkv"])
    set_recompute(model, "full")
    twin = copy.deepcopy(model)
    assert twin._gradient_checkpointing_func.args[0] is twin
    assert model._gradient_checkpointing_func.args[0] is model


def test_forwards_without_grad_are_untouched():
    family = FAMILIES["sit"]
    model = randomised(family.build(1))
    model.enable_gradient_checkpointing(None)
    with torch.no_grad():
        run(model, family, family.inputs())


@pytest.mark.parametrize(
    ("model", "mode", "message"),
    [
        (nn.Linear(1, 1), "full", "Linear has no blocks to recompute.*memory.activation to none"),
        (FAMILIES["sit"].build(1), "some", "mode must be one of none, selective, full, offload, got 'some'"),
    ],
)
def test_wrong_arguments(model, mode, message):
    with pytest.raises(ValueError, match=message):
        set_recompute(model, mode)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_offload_moves_the_inputs_of_blocks_off_the_device():
    family = FAMILIES["flux"]
    model = randomised(family.build(4)).cuda()
    inputs = {k: v.detach().cuda().requires_grad_() for k, v in family.inputs().items()}
    constants = {k: v.cuda() for k, v in family.constants.items()}
    gradients, kept = {}, {}
    for mode in ("full", "offload"):
        set_recompute(model, mode)
        model.zero_grad()
        before = torch.cuda.memory_allocated()
        loss = model(**inputs, **constants).sample.square().mean()
        kept[mode] = torch.cuda.memory_allocated() - before
        loss.backward()
        gradients[mode] = [p.grad.clone() for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(*gradients.values(), strict=True))
    assert kept["offload"] < kept["full"]
