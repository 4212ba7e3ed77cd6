"""A run stops when it is told: a signal to whichever process, a launcher that dies, a file in run_dir."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.tiers import sampled

from .conftest import SMALL
from .processes import free_port
from .test_resume import FINAL, wait_for_step

ENDLESS = ["--train.cold_start_steps", "1", "--train.generator_steps", "100000", "--checkpoint.every", "100000"]
FOUR = ["--train.cold_start_steps", "2", "--train.generator_steps", "4", "--checkpoint.every", "4"]
MANY = ["--eval.samples", "200000", "--eval.batch_size", "64"]  # minutes
SLOW = "import time\nclass Slow:\n    differentiable = False\n    def __call__(self, images, **given):\n"
SLOW += "        time.sleep(120)\n        return images.flatten(1).mean(1)\n"


def wait_for(happened, seconds=60):
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def stopped_step(folder, out):
    """The step that the run says it stopped at; its checkpoint is whole."""
    step = int(re.search(r"stopped at step (\d+); to go on: .*--resume auto", out)[1])
    assert step > 0 and (folder / "checkpoints" / f"step_{step:08d}" / "manifest.json").is_file()
    return step


def test_sigterm_to_the_deepspeed_command_ends_its_ranks_with_a_checkpoint(launch, tmp_path):
    process = launch([*ENDLESS, "--run_dir", tmp_path], ranks=1, fresh=True)
    wait_for_step(process, tmp_path, 3)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) == 2  # the launcher of the node, and the rank
    process.terminate()
    out, _ = process.communicate(timeout=60)  # until the last of the family closes the pipe
    assert process.returncode == -signal.SIGTERM
    stopped_step(tmp_path, out)
    assert psutil.wait_procs(family, timeout=10)[1] == []


@pytest.mark.thorough
def test_dmdr_train_waits_for_its_ranks_however_long_they_take(environment, tmp_path):
    command = [str(Path(sys.executable).parent / "dmdr-train"), "--num_gpus", "2", "--master_port", str(free_port())]
    process = subprocess.Popen(
        [*command, *SMALL, *ENDLESS, "--run_dir", str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True
    )
    wait_for_step(process, tmp_path, 3)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "2 rank(s) on cpu" in out
    stopped_step(tmp_path, out)


@pytest.mark.parametrize(
    ("ranks", "signals", "code"),
    [
        (["sleep(1.5)", "sleep(0.1)"], 1, 0),  # each goes on for as long as it needs
        (["sys.exit(143)", "sys.exit(143)"], 1, 0),  # as while loading
        (["sleep(60)", "sleep(60)"], 2, 128 + signal.SIGTERM),
        (["sys.exit(2)", "sleep(60)"], 0, 2),
        (["os.kill(os.getpid(), 9)", "sleep(0.1)"], 0, 128 + signal.SIGKILL),
    ],
    ids=["waits", "at once", "second signal", "a mistake", "a rank is killed"],
)
def test_what_dmdr_train_makes_of_signals_and_exit_codes(ranks, signals, code):
    rank = "import os, signal, sys; from time import sleep; seen = []\n"
    rank += "signal.signal(15, lambda *_: seen.append(1) or (len(seen) > 1 and os._exit(143)))\n"
    rank += "os.write(1, b'ready\\n')\n"
    rank += "while {wait} and not seen: sleep(0.01)\n"
    scripts = [rank.format(wait=bool(signals)) + work for work in ranks]
    starts = f"[subprocess.Popen([sys.executable, '-c', s]) for s in {scripts!r}]"
    wrapper = f"import subprocess, sys; from dmdr_fast.launch import supervise; sys.exit(supervise(lambda: {starts}))"
    process = subprocess.Popen([sys.executable, "-c", wrapper], stdout=subprocess.PIPE, text=True)
    for _ in ranks:
        assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    for _ in range(signals):
        process.terminate()
        time.sleep(0.3)
    assert process.wait(timeout=10) == code


@pytest.mark.parametrize("ranks", sampled([2, 0]))
def test_a_stop_in_the_final_evaluation_acts_at_once(launch, run, tmp_path, ranks):
    batch = ["--train.micro_batch_size", "4"]
    process = launch([*FOUR, *MANY, *batch, "--run_dir", tmp_path], ranks=ranks)
    wait_for(lambda: (tmp_path / "checkpoints" / "step_00000004").is_dir() and (tmp_path / FINAL).is_file())
    weights = (tmp_path / FINAL).read_bytes()
    time.sleep(0.5)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert time.monotonic() - began < 15
    # One of several ranks must make the launcher end the others.
    assert process.returncode == (0 if ranks == 0 else 128 + signal.SIGTERM), err
    assert "stopped in the final evaluation" in out and "Traceback" not in err
    assert not (tmp_path / "metrics.json").exists()
    code, _, err = run([*FOUR, *batch, "--eval.samples", "64", "--run_dir", tmp_path], ranks=ranks)
    assert code == 0, err
    assert (tmp_path / "metrics.json").is_file() and (tmp_path / FINAL).read_bytes() == weights


def test_a_stop_in_an_evaluation_while_training_writes_the_checkpoint_and_does_the_row_later(launch, run, tmp_path):
    process = launch([*FOUR, *MANY, "--eval.every", "2", "--run_dir", tmp_path])
    wait_for(lambda: (tmp_path / "evaluated.safetensors").is_file())
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert stopped_step(tmp_path, out) == 2 and not (tmp_path / "evaluations.jsonl").exists()
    code, _, err = run([*FOUR, "--eval.samples", "64", "--eval.every", "2", "--run_dir", tmp_path])
    assert code == 0, err
    rows = [json.loads(line)["step"] for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert rows == [2, 4]


@pytest.mark.parametrize("ranks", sampled([2, 0]))
def test_a_second_signal_ends_the_run_at_once_wherever_it_is(launch, tmp_path, ranks):
    (tmp_path / "slow.py").write_text(SLOW)
    terms = f"[{{kind: '{tmp_path}/slow.py:Slow'}}]"
    slow = ["--rl.method", "dpo", "--reward.terms", terms]
    process = launch([*ENDLESS, *slow, "--run_dir", tmp_path / "run"], ranks=ranks)
    wait_for_step(process, tmp_path / "run", 1)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(1.0)
    assert process.poll() is None  # it finishes its update
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert time.monotonic() - began < 10 and process.returncode == 128 + signal.SIGINT
    assert "stopped by a second signal" in out


def test_two_signals_of_one_ctrl_c_are_one_request(launch, tmp_path):
    process = launch([*ENDLESS, "--run_dir", tmp_path])
    wait_for_step(process, tmp_path, 3)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    stopped_step(tmp_path, out)


def test_a_file_called_stop_is_a_request(launch, tmp_path):
    (tmp_path / "stop").touch()  # of an earlier run
    process = launch([*ENDLESS, "--run_dir", tmp_path], ranks=2)
    wait_for_step(process, tmp_path, 3)
    (tmp_path / "stop").touch()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    stopped_step(tmp_path, out)
    assert not (tmp_path / "stop").exists()


def test_before_the_first_update_a_stop_acts_at_once():
    """Where the main thread sits in a call that does not return, too."""
    program = "import ctypes, time; from dmdr_fast.engine.stopping import StopRequest\n"
    program += "with StopRequest():\n    print('in', flush=True)\n    {wait}\n"
    stuck = "mutex = ctypes.create_string_buffer(64); [ctypes.CDLL(None).pthread_mutex_lock(mutex) for _ in range(2)]"
    for wait, code in (("time.sleep(60)", 0), (stuck, 128 + signal.SIGTERM)):
        command = [sys.executable, "-c", program.format(wait=wait)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        process.stdout.readline()
        time.sleep(0.5)  # until it sits there
        process.terminate()
        out, _ = process.communicate(timeout=10)
        assert process.returncode == code and "stopped before the first update" in out


def test_output_that_nobody_reads_any_more_does_not_keep_a_stop_from_its_checkpoint(tmp_path):
    """As with ``dmdr-train ... | tee log`` and Ctrl-C, which ends both."""
    program = "import signal, sys, time; from dmdr_fast.engine.stopping import StopRequest\n"
    program += "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # under nohup it would be ignored
    program += "with StopRequest() as stop:\n    stop.finishes(); print('in', flush=True)\n"
    program += "    while not stop.asked: time.sleep(0.01)\n"
    program += f"    time.sleep(0.2); print('x' * 100_000); open({str(tmp_path / 'checkpoint')!r}, 'w')\n"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "in\n"
    process.stdout.close()
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=10) == 0 and (tmp_path / "checkpoint").exists()
