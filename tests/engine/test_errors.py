"""Mistakes: one clear line on stderr, exit code 2, no traceback, and at once where nothing must be loaded."""

import time

import pytest
import torch
from safetensors.torch import save_file

TEN_SECONDS = 10.0


def refused(code, err):
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2, err
    assert len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--train.cold_start_step", "3"],
            ["train.cold_start_step: unknown key", "did you mean train.cold_start_steps"],
        ),
        (["--train.generator_steps", "-4"], ["train.generator_steps: expected int > 0; got -4"]),
        (["--train.generator_steps", "many"], ["train.generator_steps: expected int > 0; got 'many'"]),
        (["--deepspeed.stage", "1"], ["deepspeed.stage: expected 0 | 2 | 3; got 1"]),
        (["--teacher.weights", "nowhere/teacher.safetensors"], ["teacher.weights: no such file: nowhere/teacher"]),
        (["--model.num_classes", "12"], ["model.num_classes", "10 classes", "num_classes 12"]),
        (["--model.resolution", "9"], ["model.resolution: 9 is not a multiple of 2"]),
        (["--student.steps", "2000"], ["student.steps: 2000 steps do not fit a grid of 1000"]),
        (["--run_dir", "/proc/nothing/here"], ["run_dir: /proc/nothing/here cannot be written"]),
        (["--config", "nowhere.yaml"], ["--config nowhere.yaml: No such file"]),
        (["--deepspeed.config", "nowhere.json"], ["deepspeed.config: nowhere.json is not a readable JSON file"]),
        (["--sharing", "shared"], ["sharing: expected separate | shared_score | shared_all; got 'shared'"]),
        (["--lora.targets", "[attn.nothing]"], ["lora.targets", "attn.nothing"]),
    ],
    ids=lambda v: v[0].strip("-") if v and v[0].startswith("--") else "",
)
def test_wrong_input_is_one_line(run, tmp_path, arguments, words):
    began = time.monotonic()
    code, _, err = run(["--run_dir", tmp_path, *arguments], fresh=True)
    line = refused(code, err)
    for word in words:
        assert word in line
    if arguments[0] != "--lora.targets":
        assert time.monotonic() - began < TEN_SECONDS


def test_a_lora_as_wide_as_no_layer_is_refused_before_a_teacher_is_trained(run, tmp_path):
    code, _, err = run(["--run_dir", tmp_path, "--lora.rank", "33", "--teacher.train.steps", "9999999"])
    assert "lora.rank: 33 is more than the 32 features of the widest layer" in refused(code, err)


def test_unknown_key_in_the_file(run, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("optimizer:\n  generator: {lr: 1e-4, learning_rate: 3}\n")
    line = refused(*run(["--config", file], small=False, fresh=True)[::2])
    assert "optimizer.generator.learning_rate: unknown key" in line
    assert "keys of optimizer.generator: lr, rl_lr, warmup_steps, decay" in line


@pytest.mark.thorough
def test_launcher_passes_the_code_on(run, tmp_path):
    code, _, err = run(["--run_dir", tmp_path, "--seed", "-1"], ranks=2, fresh=True)
    assert "error: seed: expected int >= 0; got -1" in err and "Traceback" not in err
    assert code == 2


def test_weights_of_another_class_count(run, tmp_path):
    from dmdr_fast.models.sit import SiT

    other = SiT(input_size=8, in_channels=1, hidden_size=32, depth=2, num_heads=2, num_classes=7)
    save_file({n: p.detach().clone() for n, p in other.named_parameters()}, tmp_path / "other.safetensors")
    code, _, err = run(["--run_dir", tmp_path, "--teacher.weights", tmp_path / "other.safetensors"])
    line = refused(code, err)
    assert "y_embedder.embedding_table.weight" in line and "[11, 32]" in line and "[8, 32]" in line


def test_weights_that_are_a_pickle_of_code_are_not_run(run, tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"model": Payload()}, tmp_path / "evil.pt")
    code, _, err = run(["--run_dir", tmp_path, "--teacher.weights", tmp_path / "evil.pt"])
    refused(code, err)
    assert not (tmp_path / "ran").exists()


def test_no_good_checkpoint(run, tmp_path):
    broken = tmp_path / "checkpoints" / "step_00000004"
    broken.mkdir(parents=True)
    (broken / "manifest.json").write_text("{}garbage")
    code, out, err = run(["--run_dir", tmp_path])
    line = refused(code, err)
    assert "step_00000004 refused" in out and "no good checkpoint" in line and "never" in line
