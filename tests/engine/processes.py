"""Runs of train.py in processes of their own, forked from a server that has imported torch and deepspeed already.

A run is then a second shorter by ten: the imports are most of a small one. ``fresh`` runs start a new interpreter, with
the deepspeed launcher where there are ranks, for the tests that are about just that.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PRELOADED = ["dmdr_fast.engine.trainer", "torch.utils.tensorboard", "tqdm", "sklearn.datasets", "scipy.linalg"]
PRELOADED += ["tests.engine.preloaded"]
GRACE = 20.0  # seconds that the other ranks have when one has failed, as under the launcher


def free_port() -> int:
    """A port that nothing listens on, below those that the system hands out by itself while runs start side by side."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


# (rank, ranks, port) -> the variables by which a launcher tells a process its place
Place = Callable[[int, int, str], dict[str, str]]


def torchrun_place(rank: int, ranks: int, port: str) -> dict[str, str]:
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
    return place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def _child(script: str, arguments: list[str], environment: dict[str, str], out: str, err: str) -> None:
    os.setsid()
    for path, descriptor in ((out, 1), (err, 2)):
        opened = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [script, *arguments]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    runpy.run_path(script, run_name="__main__")


class ForkedRun:
    """What ``subprocess.Popen`` offers, for one or more forked ranks of one run."""

    def __init__(
        self, script: Path, arguments: list[str], environment: dict[str, str], ranks: int, place: Place | None = None
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.folder = tempfile.TemporaryDirectory()
        self.out, self.err = (Path(self.folder.name) / name for name in ("out", "err"))
        self.out.touch()
        self.err.touch()
        port = str(free_port())
        self.processes = []
        for rank in range(max(ranks, 1)):
            given = environment | ((place or torchrun_place)(rank, ranks, port) if ranks else {})
            process = context.Process(
                target=_child, args=(str(script), arguments, given, str(self.out), str(self.err)), daemon=True
            )
            process.start()
            self.processes.append(process)
        self.pid = self.processes[0].pid
        self.failed_at: float | None = None

    @property
    def returncode(self) -> int | None:
        """None while a rank runs; then the first code that is not 0."""
        codes = [p.exitcode for p in self.processes]
        failed = next((c for c in codes if c), None)
        if None in codes:
            if failed is not None:
                self.failed_at = self.failed_at or time.monotonic()
                if time.monotonic() - self.failed_at > GRACE:
                    self.kill()
            return None
        return failed or 0

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        for process in self.processes:
            if process.exitcode is None:
                os.kill(process.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.kill()
                raise subprocess.TimeoutExpired(self.processes[0].name, timeout)
            time.sleep(0.01)
        for process in self.processes:
            process.join()
        return self.out.read_text(), self.err.read_text()


def fresh_run(script: Path, arguments: list[str], environment: dict[str, str], ranks: int) -> subprocess.Popen:
    """A new interpreter, with ranks under the deepspeed launcher; in a session of its own, to be killed as a whole."""
    command = [sys.executable, str(script)]
    if ranks:
        launcher = str(Path(sys.executable).parent / "deepspeed")
        command = [launcher, "--num_accelerators", str(ranks), "--master_port", str(free_port()), str(script)]
    return subprocess.Popen(
        [*command, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
