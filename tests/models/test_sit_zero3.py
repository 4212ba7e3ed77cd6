"""SiT, its loader and LoRA on two CPU ranks under ZeRO-3: no parameter is whole outside its module's
forward."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dmdr_fast.models.sit import SiT
from tests.two_ranks import run_two_ranks

pytest.importorskip("deepspeed")
WORKER = Path(__file__).with_name("zero3_worker.py")
SMALL = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 3,
    "hidden_size": 24,
    "depth": 2,
    "num_heads": 3,
    "num_classes": 5,
}


@pytest.mark.thorough
def test_built_loaded_and_adapted_while_partitioned(tmp_path):
    torch.manual_seed(4)
    weights = {name: 0.3 * torch.randn_like(value) for name, value in SiT(**SMALL).state_dict().items()}
    save_file(weights, tmp_path / "sit.safetensors")
    run_two_ranks(WORKER, 2, tmp_path / "store", tmp_path / "sit.safetensors")
