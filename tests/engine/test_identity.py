"""A run_dir holds one run, of one job at a time; what makes another run of it is refused, other changes are said."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from dmdr_fast.engine.run_lock import lock_run
from dmdr_fast.engine.runtime import Runtime
from dmdr_fast.errors import UserError

from .test_errors import refused

FINAL = "final/generator.safetensors"
SIX = ["--train.cold_start_steps", "2", "--train.generator_steps", "6", "--checkpoint.every", "3"]
ALONE = Runtime(0, 1, torch.device("cpu"), None)


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    """A finished run on a teacher in a file, and another teacher of the same shapes."""
    folder = tmp_path_factory.mktemp("identity")
    code, _, err = run([*SIX, "--run_dir", folder / "first"])
    assert code == 0, err
    one = load_file(folder / "first" / "cold_start" / "generator.safetensors")
    save_file(one, folder / "one.safetensors")
    save_file({n: t + 0.001 for n, t in one.items()}, folder / "two.safetensors")
    code, _, err = run([*SIX, "--run_dir", folder / "run", "--teacher.weights", folder / "one.safetensors"])
    assert code == 0, err
    return folder


@pytest.fixture
def repeat(run, finished, tmp_path):
    """repeat(arguments) -> (code, out, err) of the finished run in a copy of its folder, whose files must not move."""
    folder = tmp_path / "run"
    shutil.copytree(finished / "run", folder)

    def again(arguments, changes=False):
        teacher = [] if "--teacher.weights" in arguments else ["--teacher.weights", finished / "one.safetensors"]
        left = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".lock")}
        result = run([*SIX, "--run_dir", folder, *teacher, *arguments])
        now = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".lock")}
        assert changes or now == left
        return result

    again.folder = folder
    return again


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--teacher.weights", "two"], ["teacher '", "one.safetensors (sha256 ", "this run has '", "two.safetensors"]),
        (["--student.steps", "2"], ["student.steps 1, this run has 2"]),
        (["--teacher.cfg_scale", "2", "--student.shift", "3"], ["cfg_scale None, this run has 2", "student.shift 1.0"]),
        (["--lora.rank", "2"], ["lora.rank 4, this run has 2"]),
        (["--sharing", "separate"], ["sharing 'shared_score', this run has 'separate'"]),
        (["--student.rollout", "same_step"], ["student.rollout 'backward_simulation', this run has 'same_step'"]),
        (["--student.steps", "2", "--train.generator_steps", "12"], ["student.steps 1, this run has 2"]),
        (["--deepspeed.config", "json"], ["optimizer (deepspeed.config) None, this run has 'AdamW'"]),
    ],
    ids=lambda v: v[0].strip("-") if v and str(v[0]).startswith("--") else "",
)
def test_another_run_in_the_same_folder_is_refused(repeat, finished, tmp_path, arguments, words):
    (tmp_path / "ds.json").write_text(json.dumps({"optimizer": {"type": "AdamW"}}))
    files = {"two": finished / "two.safetensors", "json": tmp_path / "ds.json"}
    line = refused(*repeat([files.get(word, word) for word in arguments])[::2])
    assert "was written with" in line and "another run_dir" in line
    for word in words:
        assert word in line


def test_a_finished_run_has_nothing_to_do_and_says_what_else_differs(repeat, finished, tmp_path):
    code, out, err = repeat(["--optimizer.generator.lr", "1e-4", "--log.every", "3"])
    assert code == 0, err
    assert "since the checkpoint: optimizer.generator.lr 0.0004 -> 0.0001\n" in out
    assert "since the checkpoint: log.every 1 -> 3\n" in out and out.count("since") == 2
    assert "nothing to do" in out and "resumed" not in out
    moved = tmp_path / "moved.safetensors"
    shutil.copy(finished / "one.safetensors", moved)
    code, out, err = repeat(["--teacher.weights", moved])  # the same teacher at another path
    assert code == 0 and "nothing to do" in out and "since" not in out, err


def test_a_finished_run_goes_on_with_more_updates(repeat):
    code, out, err = repeat(["--train.generator_steps", "7"], changes=True)
    assert code == 0, err
    assert "since the checkpoint: train.generator_steps 6 -> 7\n" in out and "step 6" in out
    assert yaml.safe_load((repeat.folder / "config.yaml").read_text())["train"]["generator_steps"] == 7
    assert json.loads((repeat.folder / "summary.json").read_text())["updates"] == 7


@pytest.mark.parametrize(
    ("lost", "arguments", "words"),
    [
        ([], [], None),
        ([], ["--optimizer.generator.lr", "1e-4"], None),
        ([], ["--lora.rank", "2"], ["but no checkpoint, and was written with lora.rank 4, this run has 2"]),
        ([], ["--train.generator_steps", "7"], ["has final/generator.safetensors and cold_start/", "to go on from"]),
        (["summary.json"], [], ["to go on from"]),  # killed in its evaluation
        (["final/settings.json"], [], ["to go on from"]),
        (["final"], [], ["has cold_start/generator.safetensors, but no checkpoint to go on from"]),
    ],
)
def test_weights_without_checkpoints_are_not_written_over(repeat, lost, arguments, words):
    for name in ("checkpoints", *lost):
        path = repeat.folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    code, out, err = repeat(arguments)
    if words is None:
        assert code == 0 and "nothing to do" in out, err
        return
    line = refused(code, err)
    for word in (f"resume: {repeat.folder} has ", *words, "another run_dir", "--resume never"):
        assert word in line


def test_without_weights_another_run_may_start_in_the_folder(repeat):
    """One that was killed before its first checkpoint leaves a configuration and a log."""
    for name in ("checkpoints", "final", "cold_start"):
        shutil.rmtree(repeat.folder / name)
    code, out, err = repeat(["--seed", "5"], changes=True)
    assert code == 0 and "resumed" not in out, err
    assert yaml.safe_load((repeat.folder / "config.yaml").read_text())["seed"] == 5
    assert [json.loads(line)["step"] for line in (repeat.folder / "log.jsonl").read_text().splitlines()] == [*range(6)]


def test_nothing_in_a_checkpoint_is_unpickled(repeat, tmp_path):
    """Pickles that run code, planted beside the files of the manifest, under names old and new."""

    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (repeat.folder / FINAL).unlink()
    newest = sorted((repeat.folder / "checkpoints").iterdir())[-1]
    for name in ("rank_00000.pt", "generator/mp_rank_00_model_states.pt", "generator/blocks.00000.pt", "fake/x.pt"):
        torch.save(Payload(), newest / name)
    code, out, err = repeat([], changes=True)
    assert not (tmp_path / "ran").exists()
    assert code == 0 and "resumed from" in out and "step 6" in out, err


def test_a_second_job_is_refused_in_a_line_that_names_the_first(launch, run, tmp_path):
    first = launch([*SIX, "--train.generator_steps", "100000", "--run_dir", tmp_path])
    deadline = time.monotonic() + 60
    while not (tmp_path / ".lock.json").is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        line = refused(*run([*SIX, "--run_dir", tmp_path])[::2])
        assert f"run_dir: {tmp_path} is in use by another job (host {os.uname().nodename}, pid {first.pid}, " in line
        assert time.strftime("since %Y-%m-") in line
        assert first.poll() is None
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    lock_run(tmp_path, ALONE).release()  # the lock of a killed job is nobody's


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """ENOLCK, as NFS without a lock daemon has it: a file is the lock; one that a killed job left is removed."""
    import fcntl

    def no_locks(*arguments):
        raise OSError(37, os.strerror(37))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    lock = lock_run(tmp_path, ALONE)
    with pytest.raises(UserError, match=rf"in use by another job \(host .*, pid {os.getpid()}, .*remove .*lock.soft"):
        lock_run(tmp_path, ALONE)
    lock.release()
    killed = "import os, sys\nfrom filelock import SoftFileLock\nlock = SoftFileLock(sys.argv[1])\nlock.acquire()\n"
    killed += "os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", killed, str(tmp_path / ".lock.soft")], check=False)
    assert (tmp_path / ".lock.soft").exists()
    lock_run(tmp_path, ALONE).release()
