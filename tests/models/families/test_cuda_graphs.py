"""Forwards without grad can be CUDA graphs: none reads the device, none keeps what it allocates."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from dmdr_fast.models.eight_bit import quantise_blocks
from dmdr_fast.models.families import Denoiser
from dmdr_fast.models.lora import add_lora
from dmdr_fast.patch import patch
from tests.engine import tape

META = torch.device("meta")  # stands for the device: what meets a CPU tensor there would be a copy from the host


class OnDevice(TorchDispatchMode):
    """Notes the operations with tensors on the host, which a graph would freeze or refuse; values none can read."""

    def __init__(self) -> None:
        super().__init__()
        self.host: list[str] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if any(isinstance(t, torch.Tensor) and t.device != META for t in tree_leaves((args, kwargs, result))):
            self.host.append(str(operation))
        return result


@pytest.fixture(params=["eager", "fused", "int8"])
def made(request, case):
    """(network, its arguments), with an adapter that acts on each sample in its own way."""
    if case.name == "z_image" or (case.name, request.param) == ("sdxl", "fused"):
        pytest.skip("refused by the configuration")
    if request.param == "int8" and case.name != "sd3":
        pytest.skip("the same layers in every family")
    net = Denoiser(case.family, copy.deepcopy(case.network)).requires_grad_(False)
    add_lora(net, "fake", rank=2, targets=case.family.lora_targets).set_scale(torch.tensor([0.5, 2.0]))
    if request.param == "int8":
        quantise_blocks(net, "int8")
    if request.param == "fused":
        patch(net)
    side = 2 * case.family.factor * case.family.patch
    x = torch.randn(2, *case.family.latent_shape(side, side))
    return net, (x, torch.tensor([0.25, 0.75]), case.family.condition([case.entries[0], case.entries[1]]))


@torch.no_grad()
def test_a_capture_keeps_nothing_and_asks_the_host_nothing(made):
    """What it allocates is the graphs' memory: another replay writes there."""
    net, given = made
    net(*given)  # tables that are kept are made
    with tape.Tape() as recorded:
        net(*given)
    results = [weakref.ref(tensor) for *_, written in recorded.calls for tensor in written]
    recorded.calls.clear()
    gc.collect()
    assert len(results) > 100
    assert [kept for result in results if (kept := result()) is not None] == []
    # and no forward meets the host
    net, given = net.to(META), tree_map(lambda value: value.to(META), given)
    net.lora_adapters["fake"].set_scale(torch.ones(2, device=META))
    net(*given)
    with OnDevice() as seen:
        net(*given)
    assert seen.host == []


def test_what_meets_the_host_is_noticed():
    with OnDevice() as seen:
        torch.zeros(2, device=META) + 1.0
        torch.zeros(2).to(META)
    assert seen.host == ["aten.zeros.default", "aten._to_copy.default"]
