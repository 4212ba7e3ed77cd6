"""The memory levers on every family's denoiser: recomputation under adapters, 8-bit blocks, partitioned loading."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from dmdr_fast.engine import runtime
from dmdr_fast.models.attention import choose_attention, set_attention
from dmdr_fast.models.eight_bit import quantise_blocks
from dmdr_fast.models.families import Denoiser
from dmdr_fast.models.lora import add_lora
from dmdr_fast.models.recompute import MODES, set_recompute
from dmdr_fast.models.stored import load_partitioned, parameters_on_meta, stored_tensors
from tests.algorithm.memory import PeakMemory

SETTINGS = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


@pytest.fixture
def denoiser(case):
    return Denoiser(case.family, copy.deepcopy(case.network))


@pytest.fixture
def inputs(case):
    side = 2 * case.family.factor * case.family.patch
    x = torch.randn(2, *case.family.latent_shape(side, side), generator=torch.Generator().manual_seed(0))
    condition = case.family.condition([case.entries[0], case.entries[1]])
    return x, torch.tensor([0.25, 0.75]), condition


def test_adapters_train_alike_in_every_mode(denoiser, inputs, case):
    adapter = add_lora(denoiser, "fake", rank=2, targets=case.family.lora_targets)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(0, 0.3)
    scale, kept, gradients = torch.tensor([2.0, 0.5]), {}, {}
    for mode in MODES:
        set_recompute(denoiser, mode)
        denoiser.zero_grad()
        with adapter.scaled(scale), PeakMemory() as memory:
            loss = denoiser(*inputs).square().mean()
            kept[mode] = memory.live
        loss.backward()  # the adapter is off by now
        gradients[mode] = {n: p.grad for n, p in adapter.named_parameters() if p.grad is not None}
    assert len(gradients["none"]) > 0.8 * len(list(adapter.parameters()))  # the last block's text branch leads nowhere
    for mode in MODES[1:]:
        assert gradients[mode].keys() == gradients["none"].keys()
        assert all(torch.equal(g, gradients["none"][n]) for n, g in gradients[mode].items())
    assert kept["selective"] < 0.8 * kept["none"]
    assert kept["offload"] <= kept["full"] < 0.8 * kept["selective"]  # least where a UNet keeps its skips


def test_int8_blocks(denoiser, inputs):
    with torch.no_grad():
        want = denoiser(*inputs)
        assert quantise_blocks(denoiser, "int8") > 5
        got = denoiser(*inputs)
    assert 0 < (got - want).norm() / want.norm() < 0.03


def test_attention_falls_back_to_sdpa(denoiser, inputs):
    choice = choose_attention("auto", denoiser, dtype=torch.float32, device=torch.device("cpu"))
    assert choice.kernel == "sdpa" and choice.reason
    with torch.no_grad():
        want = denoiser(*inputs)
        set_attention(denoiser, choice)
        assert torch.equal(denoiser(*inputs), want)


def test_read_while_partitioned(denoiser, inputs, case):
    """Parameters from the shards, tables computed as ever: the prediction of the loaded pipeline, bit for bit."""
    import deepspeed

    runtime.start()
    with torch.no_grad():
        want = denoiser(*inputs)
    with parameters_on_meta():
        network = case.family.build_from_config(case.family.network_config)
    assert all(p.is_meta for p in network.parameters())
    stored = stored_tensors(Path(case.folder) / case.family.folder)
    load_partitioned(network, stored, dtype=torch.float32, settings=SETTINGS)
    assert all(hasattr(p, "ds_tensor") and p.numel() == 0 for p in network.parameters())
    engine = deepspeed.initialize(model=Denoiser(case.family, network.eval()), config=SETTINGS)[0]
    with torch.no_grad():
        assert torch.equal(engine(*inputs), want)
