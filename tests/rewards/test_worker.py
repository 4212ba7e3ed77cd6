"""The worker gives the reward's own scores, and whatever happens in it becomes one error here."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from dmdr_fast.rewards.worker import RewardTimeout, WorkerReward

OWN = str(Path(__file__).with_name("own_rewards.py"))
IMAGES = torch.zeros(2, 1, 4, 4)


def label(value):
    return torch.full((2,), value)


@pytest.fixture(scope="module")
def fails():
    reward = WorkerReward(f"{OWN}:Fails", timeout=60.0)
    yield reward
    reward.close()


def test_scores_are_the_reward_s_own():
    reward = WorkerReward(f"{OWN}:PromptLength", None, "length", {"threshold": 0.25}, timeout=60.0)
    images = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1).expand(3, 1, 4, 4).to(torch.bfloat16).requires_grad_()
    assert reward.name == "length" and not reward.differentiable
    assert reward(images, prompts=["a", "ab", ""]).tolist() == [1.0, 3.0, 1.0]
    assert reward(images, labels=torch.tensor([1, 2, 3])).tolist() == [1.0, 3.0, 4.0]
    pid = reward._process.pid
    del reward
    assert not psutil.pid_exists(pid)


def test_an_exception_is_passed_on_and_the_worker_goes_on(fails):
    with pytest.raises(RuntimeError, match="KeyError: 'no such tower'"):
        fails(IMAGES, labels=label(0))
    with pytest.raises(RuntimeError, match=r"reward 'Fails': expected one score per image.*\[2, 1\]"):
        fails(IMAGES, labels=label(3))
    pid = fails(IMAGES, labels=label(9))
    assert (pid == float(fails._process.pid)).all() and pid[0] != os.getpid()


def test_a_hang_ends_after_the_timeout(fails):
    fails.timeout = 0.5
    began = time.monotonic()
    with pytest.raises(RewardTimeout, match=r"'Fails': a batch of 2 took longer than 0.5 s .*raise reward.timeout"):
        fails(IMAGES, labels=label(1))
    assert 0.5 <= time.monotonic() - began < 30 and not psutil.pid_exists(fails._process.pid)
    with pytest.raises(RuntimeError, match="worker process has ended"):
        fails(IMAGES, labels=label(9))


def test_a_crash_and_a_reward_that_cannot_be_built():
    reward = WorkerReward(f"{OWN}:Fails", timeout=60.0)
    with pytest.raises(RuntimeError, match=r"'Fails': its worker process ended with exit code 7 in a batch of 2"):
        reward(IMAGES, labels=label(2))
    with pytest.raises(ValueError, match="weights are gone"):
        WorkerReward(f"{OWN}:Unbuildable")


def test_a_worker_ends_with_the_process_that_started_it_even_in_a_hang():
    code = (
        "import os, threading, time, torch; from dmdr_fast.rewards.worker import WorkerReward; "
        f"r = WorkerReward({OWN + ':Fails'!r}); call = lambda: r(torch.zeros(1, 1, 4, 4), labels=torch.tensor([1])); "
        "threading.Thread(target=call, daemon=True).start(); time.sleep(0.5); "
        "print(r._process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    pid = int(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=60).stdout)
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)
