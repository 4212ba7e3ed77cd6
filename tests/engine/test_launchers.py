"""However its ranks are started, a run is one run; what a launcher does not tell is one line."""

import json
import os
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT, TRAIN
from .processes import torchrun_place
from .test_errors import refused

TWO = ["--train.cold_start_steps", "1", "--train.generator_steps", "2", "--train.micro_batch_size", "4"]
# srun as far as a rank sees it: N processes, each with its number; when one has ended badly the others are ended.
SRUN = """#!{python}
import os, subprocess, sys, time
words = sys.argv[1:]
count, task = words[words.index("-n") + 1], words[words.index("-u") - 1 :]
given = {{"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_TASKS": count}}
places = [dict(given, SLURM_PROCID=i, SLURM_LOCALID=i) for i in map(str, range(int(count)))]
ranks = [subprocess.Popen(task, env=dict(os.environ, **place)) for place in places]
while not any(codes := [rank.poll() for rank in ranks]) and None in codes:
    time.sleep(0.1)
for rank in ranks:
    rank.kill()
sys.exit(max(code or 0 for code in codes))
"""


def srun(rank, ranks, port):
    step = {"SLURM_JOB_ID": port, "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost"}
    return step | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_STEP_NUM_TASKS": str(ranks)}


def mpirun(rank, ranks, port):
    values = {"RANK": rank, "SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_SIZE": ranks}
    return {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in values.items()} | {"MASTER_PORT": port}


@pytest.mark.parametrize("launcher", [srun, mpirun], ids=["srun", "mpirun"])
def test_the_processes_of_slurm_and_mpi_are_the_ranks_of_one_run(run, tmp_path, launcher):
    code, out, err = run([*TWO, "--run_dir", tmp_path], ranks=2, place=launcher)
    assert code == 0, err
    assert "2 rank(s) on cpu" in out and json.loads((tmp_path / "summary.json").read_text())["ranks"] == 2
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2


@pytest.mark.thorough
def test_deepspeed_s_slurm_launcher_starts_ranks_of_one_run(environment, tmp_path):
    """Shown by a mistake, which is said once, by rank 0."""
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("sinfo", "#!/bin/sh\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(stat.S_IRWXU)
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    options = ["--hostfile", tmp_path / "hosts", "--launcher", "slurm", "--force_multi", "--no_ssh_check"]
    options += ["--master_addr", "localhost"]
    options += [TRAIN, "--seed", "-1", "--run_dir", tmp_path / "run"]
    command = [Path(sys.executable).parent / "deepspeed", *options]
    given = environment | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(list(map(str, command)), env=given, cwd=ROOT, capture_output=True, text=True)
    assert "seed: expected int >= 0; got -1" in refused(done.returncode, done.stderr)


def test_a_busy_master_port_is_one_line_that_names_it(run, tmp_path):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        code, _, err = run([*TWO, "--run_dir", tmp_path], ranks=1, place=lambda i, n, _: torchrun_place(i, n, port))
    assert f"--master_port: {port} is in use" in refused(code, err)


def test_a_recipe_by_its_name_and_the_commands_as_the_installed_user_types_them(tmp_path):
    """In a folder that has no configs/."""

    def said(command, *words):
        program = Path(sys.executable).parent / command
        return subprocess.run([program, *words], cwd=tmp_path, capture_output=True, text=True)

    shown = said("dmdr-train", "--config", "sd35_large", "--print-config")
    assert shown.returncode == 0 and "family: sd3\n" in shown.stdout
    wrong = said("dmdr-train", "--config", "sd35_larg")
    assert "did you mean the recipe sd35_large?" in refused(wrong.returncode, wrong.stderr)
    for command in ("dmdr-train", "dmdr-plan", "dmdr-export", "dmdr-sample"):
        assert said(command, "--help").stdout.startswith(f"usage: {command} ")


def test_recipes_are_found_by_name_where_a_wheel_puts_them(tmp_path):
    """Inside of the package, with no checkout around it."""
    package = tmp_path / "dmdr_fast"
    shutil.copytree(ROOT / "dmdr_fast", package, ignore=shutil.ignore_patterns("lib", "__pycache__"))
    shutil.copytree(ROOT / "configs", package / "configs")
    program = "import sys; sys.meta_path = [f for f in sys.meta_path if 'ScikitBuild' not in type(f).__name__]; "
    program += f"sys.path.insert(0, {str(tmp_path)!r}); from dmdr_fast import cli; "
    program += "print(cli.__file__, cli.parse(['--config', 'sd35_large'])[0].model.family)"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == [str(package / "cli.py"), "sd3"], done.stderr
