"""The printed command that goes on with a run: whole, quoted, and good from any folder."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dmdr_fast.engine.go_on import launcher_words

from .processes import free_port

SCRIPT = "/opt/my runs/train.py"
PYTHON = "/usr/bin/python3.11"


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ([PYTHON, "/v/bin/deepspeed", "--num_gpus", "4", SCRIPT, "--seed", "1"], ["--num_gpus", "4", SCRIPT]),
        (["deepspeed", "--hostfile", "hosts", "--include", "a:0,1", SCRIPT], ["--include", "a:0,1", SCRIPT]),
        (["deepspeed", "--hostfile=hosts", SCRIPT], [SCRIPT]),
        ([PYTHON, "-u", "-m", "torch.distributed.run", "--nproc-per-node=2", SCRIPT], ["--nproc-per-node=2", SCRIPT]),
        (["mpirun", "-np", "2", PYTHON, SCRIPT, "--seed", "1"], ["-np", "2", PYTHON, SCRIPT]),
        (["srun", "--ntasks-per-node", "8", PYTHON, SCRIPT], ["--ntasks-per-node", "8", PYTHON, SCRIPT]),
        ([PYTHON, "/v/bin/dmdr-train", "--seed", "1", "--num_gpus", "2"], ["--num_gpus", "2"]),
        ([PYTHON, "-u", "-m", "deepspeed.launcher.launch", "--world_info=e30=", SCRIPT], None),
        ([PYTHON, "/v/bin/deepspeed", "--num_gpus", "4", "/opt/other.py"], None),
        (["bash"], None),
        ([], None),
    ],
    ids=lambda v: " ".join(v[:3]) if v else "none",
)
def test_the_launchers_own_words(tmp_path, monkeypatch, words, wanted):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hosts").write_text("a slots=2\n")
    got = launcher_words(words, Path(SCRIPT))
    if wanted is None:
        assert got is None
        return
    assert got[-len(wanted) :] == wanted
    if any("hosts" in word for word in words):
        assert any(word.removeprefix("--hostfile=") == str(tmp_path / "hosts") for word in got)


@pytest.mark.thorough
def test_the_command_under_the_deepspeed_launcher_starts_it_again(tmp_path):
    """A script in a folder with a space prints its command under the launcher; a shell runs it again."""
    folder = tmp_path / "my runs"
    folder.mkdir()
    script = folder / "train.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom dmdr_fast.engine.go_on import resume_command\n"
        "words = [w for w in sys.argv[1:] if not w.startswith('--local_rank')]\n"
        "print('given:', words)\nprint('command:', resume_command(Path('run')))\n"
    )
    launcher = str(Path(sys.executable).parent / "deepspeed")
    port = str(free_port())
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "DMDR_FAST_CACHE": str(tmp_path / "a cache")}
    first = subprocess.run(
        [launcher, "--num_accelerators", "1", "--master_port", port, script.name, "--seed", "5"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert first.returncode == 0, first.stderr
    command = next(line for line in first.stdout.splitlines() if line.startswith("command: ")).removeprefix("command: ")
    assert command.startswith(f"cd '{folder}' && DMDR_FAST_CACHE='{tmp_path}/a cache' DS_ACCELERATOR=cpu ")
    assert f"--num_accelerators 1 --master_port {port} '{script}'" in command
    assert shlex.split(command)[-4:] == ["--config", str(folder / "run" / "config.yaml"), "--resume", "auto"]
    bare = {n: v for n, v in os.environ.items() if n not in ("DS_ACCELERATOR", "DMDR_FAST_CACHE")}
    again = subprocess.run(command, shell=True, cwd="/", env=bare, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert f"given: ['--config', '{folder}/run/config.yaml', '--resume', 'auto']" in again.stdout
    assert f"command: {command}" in again.stdout
