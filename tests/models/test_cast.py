"""Weights read in another dtype: the network of that dtype, to the bit, and nothing stored changes."""

import copy

import torch
from torch import nn

from dmdr_fast.models.cast import ReadAs
from dmdr_fast.models.lora import add_lora
from dmdr_fast.models.sit import SiT


def test_a_network_reads_as_its_half_with_a_lora_scale_per_sample():
    torch.manual_seed(0)
    network = SiT(input_size=8, patch_size=2, in_channels=1, hidden_size=32, depth=2, num_heads=2, num_classes=10)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    adapter = add_lora(network, "fake", rank=4, targets=["attn.qkv"])
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.1)
    half = copy.deepcopy(network).half()
    x, t, y = torch.randn(2, 1, 8, 8).half(), torch.rand(2), torch.tensor([3, 4])
    stored = {name: (p.data_ptr(), p.dtype) for name, p in network.named_parameters()}
    read_as, scale = ReadAs(network, torch.float32), torch.tensor([2.0, 0.5])
    adapter.set_scale(scale)
    half.lora_adapters["fake"].set_scale(scale)
    with torch.no_grad(), read_as(torch.float16):
        assert network.blocks[0].mlp.fc1.weight.dtype == torch.float16
        assert nn.Linear(2, 2).weight.dtype == torch.float32  # another network's
        torch.testing.assert_close(network(x, t, y), half(x, t, y), rtol=0, atol=0)
    assert {name: (p.data_ptr(), p.dtype) for name, p in network.named_parameters()} == stored
    assert network.blocks[0].mlp.fc1.weight.dtype == torch.float32
