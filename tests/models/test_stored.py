"""Weights on disk: found by name, shards and all, without being read; clear words for what is missing."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dmdr_fast.models.stored import parameters_on_meta, stored_tensors


@pytest.fixture
def shards(tmp_path):
    parts = {"a.safetensors": {"x": torch.arange(6.0).view(2, 3)}, "b.safetensors": {"y": torch.ones(4)}}
    for file, tensors in parts.items():
        save_file(tensors, tmp_path / file)
    index = {name: file for file, tensors in parts.items() for name in tensors}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return tmp_path


def test_tensors_of_all_shards(shards):
    stored = stored_tensors(shards)
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == {"x": (2, 3), "y": (4,)}
    assert torch.equal(stored["x"].read(), torch.arange(6.0).view(2, 3))
    assert set(stored_tensors(shards / "b.safetensors")) == {"y"}


def test_what_is_missing_or_damaged_is_named(shards, tmp_path):
    (shards / "b.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ValueError, match=r"b.safetensors is damaged"):
        stored_tensors(shards)
    (shards / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks shard b.safetensors of 2"):
        stored_tensors(shards)
    with pytest.raises(FileNotFoundError, match=r"got 0 \.safetensors files"):
        stored_tensors(tmp_path / "elsewhere")


def test_parameters_take_no_memory_and_buffers_are_computed():
    class Rotary(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
            self.register_buffer("table", torch.arange(3.0), persistent=False)

    with parameters_on_meta():
        model = Rotary()
    assert all(p.is_meta for p in model.parameters())
    assert not model.frozen.requires_grad and model.linear.weight.requires_grad
    assert model.table.tolist() == [0.0, 1.0, 2.0]
    assert not nn.Linear(1, 1).weight.is_meta
