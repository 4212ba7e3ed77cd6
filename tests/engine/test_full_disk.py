"""A disk that takes no more: the run ends in one line, what was there stays, and the run goes on where there is space.

The limit on a file's size (RLIMIT_FSIZE) is what a process without privileges can have the system refuse a write by.
"""

import email
import errno
import os
import resource
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dmdr_fast.cli import run_user_command
from dmdr_fast.disk import Writes, refusal
from dmdr_fast.engine.checkpoint import fault

from .test_resume import TWELVE, wait_for_step

LIMIT = 30_000  # bytes; the log is smaller, a file of weights is not


def test_a_checkpoint(launch, tmp_path):
    """The disk of the second rank alone is full: the first one must not wait for it."""
    options = [*TWELVE, "--train.micro_batch_size", "4", "--deepspeed.stage", "3"]
    process = launch([*options, "--run_dir", tmp_path], ranks=2)
    wait_for_step(process, tmp_path, 5)
    resource.prlimit(process.processes[1].pid, resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
    _, err = process.communicate(timeout=120)
    lines = {line for line in err.splitlines() if line.startswith("error: ")}
    assert process.returncode == 1 and len(lines) == 1 and "Traceback" not in err, err
    left = sorted((tmp_path / "checkpoints").iterdir())
    newest = int(left[-1].name.rpartition("_")[2])
    line = lines.pop()
    assert f"the checkpoint of step {newest + 2} cannot be written (File too large" in line
    assert f"that of step {newest} is whole. Free some space, and go on with --resume auto" in line
    assert [fault(path) for path in left] == [None] * len(left)


def test_every_command_says_so_in_one_line(capsys):
    def full(argv):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "grid.png")

    assert run_user_command(full, []) == 2
    assert (
        capsys.readouterr().err
        == "error: a file cannot be written (No space left on device: grid.png); free some space\n"
    )


@pytest.fixture
def small_files():
    """The system refuses this process files of more than LIMIT bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: save_file({"a": torch.zeros(LIMIT)}, path),
        lambda path: torch.save(torch.zeros(LIMIT), path),
        lambda path: path.write_text("a" * 2 * LIMIT),
        lambda path: np.savez(path, a=np.arange(LIMIT)),
        lambda path: shutil.copytree(os.path.dirname(email.__file__), path),
    ],
    ids=["safetensors", "torch", "text", "numpy", "copied folder"],
)
def test_what_libraries_raise_is_known(tmp_path, small_files, write):
    writes = Writes()
    assert writes(lambda: write(tmp_path / "w")) is None and writes.fault
    assert writes(lambda: pytest.fail("written after a refusal")) is None


def test_other_faults_pass():
    with pytest.raises(ValueError, match="reshape"):
        Writes()(lambda: np.zeros(2).reshape(3))
    assert refusal(FileNotFoundError(errno.ENOENT, "No such file")) is None
