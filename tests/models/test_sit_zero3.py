"""SiT, its loader and LoRA on two CPU ranks under ZeRO-3: no parameter is whole outside its module's
forward."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dmdr_fast.models.sit import SiT

pytest.importorskip("deepspeed")
WORKER = Path(__file__).with_name("zero3_worker.py")
ROOT = WORKER.parents[2]
SMALL = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 3,
    "hidden_size": 24,
    "depth": 2,
    "num_heads": 3,
    "num_classes": 5,
}


@pytest.mark.slow
def test_built_loaded_and_adapted_while_partitioned(tmp_path):
    torch.manual_seed(4)
    weights = {name: 0.3 * torch.randn_like(value) for name, value in SiT(**SMALL).state_dict().items()}
    save_file(weights, tmp_path / "sit.safetensors")
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
    }
    ranks = [
        subprocess.Popen(
            [
                sys.executable,
                str(WORKER),
                str(rank),
                "2",
                str(tmp_path / "store"),
                str(tmp_path / "sit.safetensors"),
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=180)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for process, output in zip(ranks, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]
