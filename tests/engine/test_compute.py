"""The compute path: eager, fused and compiled blocks on two ZeRO-3 ranks are eager ones on one rank without ZeRO."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dmdr_fast import cli
from dmdr_fast.engine import compute
from tests.tiers import sampled

from .conftest import ROOT
from .pipeline_runs import words

FINAL = "final/generator.safetensors"
CAPTURED = Path(__file__).with_name("train_captured.py")
SD3 = {
    "sharing": "shared_score",
    "teacher__cfg_scale": 3,
    "train__cold_start_steps": 2,
    "train__generator_steps": 5,
    "optimizer__generator__lr": 1e-3,
    "optimizer__fake__lr": 1e-3,
}
# What else goes with the blocks: evaluations in between, of batches of another size, and whole weights in rollouts.
EVALUATED = {"eval__samples": 4, "eval__batch_size": 1, "eval__every": 2, "eval__teacher_steps": 2}
BESIDE = {
    "eager": {"memory__activation": "none"},
    "fused": {"memory__activation": "selective"},
    "compiled": {"memory__activation": "full", "rollout__keep_gathered": "true", **EVALUATED},
}


def losses(run_dir):
    log = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return log, [record[name] for record in log for name in ("dmd_loss", "fake_loss", "reward") if name in record]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("compute")
    shard_all = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    (path / "shard_all.json").write_text(json.dumps(shard_all))
    return path


@pytest.fixture(scope="module")
def zero3(folder):
    """zero3(run_dir, blocks) -> the command line of a run on two ranks that keeps every checkpoint."""
    keys = {"deepspeed__stage": 3, "deepspeed__config": folder / "shard_all.json", "train__micro_batch_size": 2}
    keys |= {"checkpoint__every": 1, "checkpoint__keep": 9}

    def line(run_dir, blocks):
        return words("sd3", folder, run_dir, **SD3, **keys, compute__blocks=blocks, **BESIDE[blocks])

    return line


@pytest.fixture(scope="module")
def plain(run, folder, tmp_path_factory):
    """A run of eager blocks on one rank at stage 0."""
    run_dir = tmp_path_factory.mktemp("plain")
    code, out, err = run(words("sd3", folder, run_dir, **SD3, compute__blocks="eager"), small=False)
    assert code == 0, err
    assert "blocks     eager, 2 blocks" in out and "ZeRO-3" not in out
    return run_dir


@pytest.mark.parametrize("blocks", sampled(["fused", "eager", "compiled"]))
def test_two_zero3_ranks_follow_eager_blocks_without_zero(run, zero3, plain, tmp_path, blocks):
    script = {"script": CAPTURED} if blocks == "compiled" else {}  # graphs are captured whole and run as they are
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    code, out, err = run(zero3(whole, blocks), ranks=2, small=False, **script)
    assert code == 0, err
    assert f"blocks     {blocks}, 2 blocks" in out
    assert losses(whole)[1] == pytest.approx(losses(plain)[1], rel=1e-4)
    if blocks == "compiled":  # two kinds of blocks x generator and fake, with and without grad: all in the first update
        assert [record["compilations"] for record in losses(whole)[0]] == [8.0] * 5
    # What a run that was killed after its third update leaves.
    shutil.copytree(whole, resumed)
    for step in (4, 5):
        shutil.rmtree(resumed / "checkpoints" / f"step_{step:08d}")
    shutil.rmtree(resumed / "final")
    code, out, err = run(zero3(resumed, blocks), ranks=2, small=False, **script)
    assert code == 0, err
    assert "step 3" in out
    for name, weights in load_file(whole / FINAL).items():
        assert torch.equal(load_file(resumed / FINAL)[name], weights), name


def parsed(tmp_path, *flags):
    (tmp_path / "teacher.pt").touch()
    given = ["--teacher.weights", str(tmp_path / "teacher.pt"), "--rl.method", "none", *flags]
    return cli.parse(["--config", str(ROOT / "configs" / "digits.yaml"), *given])[0]


@pytest.mark.parametrize(
    ("width", "device", "wanted", "taken"),
    [
        (96, "cpu", "auto", "eager"),
        (compute.CPU_FUSED_WIDTH, "cpu", "auto", "fused"),
        (96, "cuda", "auto", "compiled"),
        (96, "cpu", "compiled", "compiled"),
        (1152, "cuda", "eager", "eager"),
    ],
)
def test_what_auto_takes(tmp_path, width, device, wanted, taken):
    block = torch.nn.Sequential(torch.nn.Linear(width, 8))
    blocks, reason = compute.choose_blocks(parsed(tmp_path, "--compute.blocks", wanted), block, torch.device(device))
    assert blocks == taken and bool(reason) == (wanted == "auto")


def test_a_family_without_fused_layers_says_so(run, folder, tmp_path):
    arguments = words("sdxl", folder, tmp_path, compute__blocks="fused", student__shift=1)
    code, _, err = run(arguments, small=False)
    assert code == 2 and "compute.blocks: patch: " in err and "set it to compiled or eager" in err
