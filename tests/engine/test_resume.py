"""A run that was killed and resumed is the run that never stopped, to the byte."""

import io
import json
import re
import shlex
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dmdr_fast import cli
from dmdr_fast.engine.recipe import learning_rates
from tests.tiers import sampled

from .conftest import TRAIN

TWELVE = ["--train.cold_start_steps", "4", "--train.generator_steps", "12", "--checkpoint.every", "2"]
TWELVE += ["--optimizer.generator.warmup_steps", "8", "--optimizer.fake.warmup_steps", "10"]
EVALUATED = ["--eval.every", "3", "--eval.samples", "24", "--eval.batch_size", "12", "--eval.teacher_steps", "2"]
FINAL = "final/generator.safetensors"


@pytest.fixture(scope="module")
def uninterrupted(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    code, _, err = run([*TWELVE, "--run_dir", folder])
    assert code == 0, err
    return folder


def wait_for_step(process, folder, step):
    """Until the log holds ``step`` finished updates, or the process has ended."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        log = folder / "log.jsonl"
        if log.is_file() and log.read_text().count("\n") >= step:
            return
        time.sleep(0.005)


def same_log(a, b):
    drop = {"samples_per_second", "elapsed_seconds", "host_memory_bytes", "host_peak_memory_bytes"}
    return [
        [
            {k: v for k, v in json.loads(line).items() if k not in drop}
            for line in (f / "log.jsonl").read_text().splitlines()
        ]
        for f in (a, b)
    ]


@pytest.mark.parametrize(("step", "delay", "options"), sampled([(10, 0.01, EVALUATED), (3, 0.0, ()), (6, 0.02, ())]))
def test_killed_at_any_point_and_resumed_gives_the_same_bytes(
    launch, run, uninterrupted, tmp_path, step, delay, options
):
    """And those of a run without evaluations, which change nothing."""
    process = launch([*TWELVE, *options, "--run_dir", tmp_path])
    wait_for_step(process, tmp_path, step)
    time.sleep(delay)
    process.kill()
    process.communicate()
    assert not (tmp_path / FINAL).exists()
    code, out, err = run([*TWELVE, *options, "--run_dir", tmp_path, "--resume", "auto"])
    assert code == 0, err
    assert "resumed from" in out
    assert (tmp_path / FINAL).read_bytes() == (uninterrupted / FINAL).read_bytes()
    assert (tmp_path / "cold_start/generator.safetensors").read_bytes() == (
        uninterrupted / "cold_start/generator.safetensors"
    ).read_bytes()
    one, two = same_log(tmp_path, uninterrupted)
    assert one == two
    if options:
        check_what_there_is_to_see(tmp_path)


def check_what_there_is_to_see(folder):
    """TensorBoard's event files and the sheets of a run that was killed and resumed."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    scalars = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    rows = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 6, 9, 12]
    for name in ("fd", "reward", "held_out_reward", "diversity", "accuracy"):
        assert scalars[f"evaluation/{name}"] == pytest.approx({row["step"] - 1: row[name] for row in rows}, rel=1e-6)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for name in ("generator_lr", "fake_lr", "reward_weight"):
        assert scalars[name] == pytest.approx({r["step"]: r[name] for r in lines if name in r}, rel=1e-6)
    assert scalars["reward_weight"] == pytest.approx(dict.fromkeys(range(4, 12), 0.05))
    drawn = {image.step + 1: image.encoded_image_string for image in events.Images("samples")}
    sheets = {int(file.stem[-8:]): file.read_bytes() for file in (folder / "samples").iterdir()}
    assert drawn.keys() == sheets.keys() == {3, 6, 9, 12}
    for step, content in sheets.items():
        one, two = (np.asarray(Image.open(io.BytesIO(png))) for png in (content, drawn[step]))
        assert one.shape[-1] == 3 and (one == two).all()


@pytest.mark.parametrize("harm", ["truncate", "flip", "remove"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_used(run, uninterrupted, tmp_path, harm):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    (folder / FINAL).unlink()
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    victim = newest / "generator" / "exp_avg.00000.safetensors"
    if harm == "remove":
        victim.unlink()
    else:
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(content if harm == "flip" else content[: len(content) // 2])
    code, out, err = run([*TWELVE, "--run_dir", folder])
    assert code == 0, err
    assert re.search(r"step_00000012 refused: generator/.*; trying the one before it", out)
    assert "step_00000010" in out
    assert (folder / FINAL).read_bytes() == (uninterrupted / FINAL).read_bytes()


def test_the_log_has_the_learning_rates_of_the_warm_up(uninterrupted):
    """Of the last step that a line covers; the fake score steps twice per generator update."""
    optimizer = cli.load(uninterrupted / "config.yaml").optimizer
    for k, text in enumerate((uninterrupted / "log.jsonl").read_text().splitlines()):
        line = json.loads(text)
        assert line["generator_lr"] == learning_rates(optimizer.generator, k, 4, 12)[-1]
        assert line["fake_lr"] == learning_rates(optimizer.fake, k, 4, 12, 2)[-1]


def kept(folder):
    return [int(p.name[-8:]) for p in sorted((folder / "checkpoints").iterdir())]


def test_only_the_newest_checkpoints_and_the_cold_starts_stay(run, uninterrupted, tmp_path):
    assert kept(uninterrupted) == [4, 10, 12]
    options = ["--train.cold_start_steps", "3", "--checkpoint.keep", "1", "--checkpoint.keep_every", "4"]
    code, _, err = run([*TWELVE, *options, "--run_dir", tmp_path])
    assert code == 0, err
    assert kept(tmp_path) == [3, 4, 8, 12]  # the cold start's is written though checkpoint.every passes it by


def test_named_checkpoint_and_what_must_not_change(run, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    checkpoint = folder / "checkpoints" / "step_00000010"
    code, _, err = run([*TWELVE, "--run_dir", folder, "--resume", tmp_path / "nothing"])
    assert code == 2 and "no such folder" in err and len(err.strip().splitlines()[-1:]) == 1
    code, _, err = run([*TWELVE, "--run_dir", folder, "--resume", checkpoint, "--seed", "5"])
    assert code == 2 and "seed 0, this run has 5" in err and "Traceback" not in err
    code, out, err = run([*TWELVE, "--run_dir", folder, "--resume", checkpoint])
    assert code == 0 and "step 10" in out and "dropping checkpoints of steps [12]" in out, err
    assert (folder / FINAL).read_bytes() == (uninterrupted / FINAL).read_bytes()


def test_sigterm_finishes_the_step_checkpoints_and_says_how_to_go_on(launch, run, uninterrupted, tmp_path):
    process = launch([*TWELVE, "--run_dir", tmp_path])
    wait_for_step(process, tmp_path, 5)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    step = int(re.search(r"stopped at step (\d+); to go on: (.*)", out)[1])
    assert (tmp_path / "checkpoints" / f"step_{step:08d}" / "manifest.json").is_file()
    assert "--resume auto" in out and not (tmp_path / FINAL).exists()
    _, where, _, *words = shlex.split(re.search("to go on: (.*)", out)[1])
    arguments = words[words.index(str(TRAIN)) + 1 :]
    assert Path(where) == Path.cwd() and arguments == ["--config", str(tmp_path / "config.yaml"), "--resume", "auto"]
    code, _, err = run(arguments, small=False)
    assert code == 0, err
    assert (tmp_path / FINAL).read_bytes() == (uninterrupted / FINAL).read_bytes()


def test_two_zero3_ranks_resume_exactly(launch, run, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = [*TWELVE, "--train.micro_batch_size", "4", "--deepspeed.stage", "3"]
    code, _, err = run([*options, "--run_dir", whole], ranks=2)
    assert code == 0, err
    process = launch([*options, *EVALUATED, "--run_dir", broken], ranks=2)
    wait_for_step(process, broken, 7)
    process.kill()
    process.communicate()
    code, out, err = run([*options, *EVALUATED, "--run_dir", broken], ranks=2)
    assert code == 0, err
    assert "resumed from" in out and {"step_00000009.png", "step_00000012.png"} <= {
        file.name for file in (broken / "samples").iterdir()
    }
    assert (whole / FINAL).read_bytes() == (broken / FINAL).read_bytes()
