"""Runs as processes of ``dmdr_fast/train.py``: some side by side, each resumable, each recognised when finished.

A run's folder is the trainer's own run_dir plus ``claims.json``: what the run is (:func:`identity`), the seconds that
it has taken over all its parts, and how it ended.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dmdr_fast.disk import write_whole
from dmdr_fast.errors import UserError

PACKAGE = Path(__file__).resolve().parents[2]
TRAIN = PACKAGE / "train.py"
STATE = "claims.json"
POLL = 0.2  # seconds


@dataclass(frozen=True)
class Job:
    """One run to be: its folder, its settings on top of a recipe, and the job whose last checkpoint it starts from."""

    name: str
    seed: int
    folder: Path
    recipe: Path
    settings: dict[str, Any]
    after: Job | None = None

    @property
    def words(self) -> str:
        return f"{self.name}, seed {self.seed}"


def identity(job: Job) -> str:
    """A digest of all that decides the run's numbers but the code and the machine: recipe, settings, start, torch."""
    parts = [
        job.recipe.read_text(),
        json.dumps(job.settings, sort_keys=True),
        identity(job.after) if job.after else "",
        version("torch"),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def state_of(job: Job) -> dict[str, Any]:
    """claims.json of the run's folder; that of a run which has not begun where it is missing or another run's."""
    fresh = {"identity": identity(job), "begun": False, "seconds": 0.0, "outcome": None, "message": None, "commits": []}
    path = job.folder / STATE
    if not path.is_file():
        return fresh
    try:
        state = json.loads(path.read_text())
    except ValueError:
        return fresh
    return state if state.get("identity") == fresh["identity"] else fresh


def is_finished(job: Job) -> bool:
    """Whether this run, with these settings, has ended: with its numbers, or by diverging."""
    return state_of(job)["outcome"] is not None


def command(job: Job) -> list[str]:
    """What starts or resumes the run. ``--resume`` names the other run's checkpoint until it has one of its own."""
    words = [sys.executable, str(TRAIN), "--config", str(job.recipe), "--run_dir", str(job.folder)]
    for key, value in job.settings.items():
        words += [f"--{key}", json.dumps(value)]
    own = _checkpoints(job.folder)
    resume = "auto" if own or job.after is None else str(_checkpoints(job.after.folder)[-1])
    return [*words, "--resume", resume]


def _checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("step_*"))


class Process:
    """A job that is under way."""

    def __init__(self, job: Job, commit: str) -> None:
        self.job, self.started, self.settled = job, time.monotonic(), False
        self.state = state_of(job)
        if not self.state["begun"]:  # what lies in the folder is another run's
            shutil.rmtree(job.folder, ignore_errors=True)
            self.state["begun"] = True
        job.folder.mkdir(parents=True, exist_ok=True)
        if commit not in self.state["commits"]:
            self.state["commits"].append(commit)
        self._write()
        with (job.folder / "claims.log").open("a") as log:
            # One thread each: these small models are fastest so, and the numbers do not depend on the cores.
            self.process = subprocess.Popen(
                command(job), stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
            )

    def ended(self) -> bool:
        """Whether the process has left; then the state is on disk.

        Raises:
            UserError: it failed, by neither finishing, stopping on request nor diverging.
        """
        code = self.process.poll()
        if code is None or self.settled:
            return self.settled
        self.settled = True
        self.state["seconds"] += time.monotonic() - self.started
        log = (self.job.folder / "claims.log").read_text(errors="replace")
        if code == 0 and (self.job.folder / "metrics.json").is_file():
            self.state["outcome"] = "finished"
        elif code == 1 and (said := re.findall(r"error: (.*updates in a row were skipped.*)", log)):
            self.state |= {"outcome": "diverged", "message": said[-1]}
        self._write()
        if code not in (0, 1, -signal.SIGTERM, -signal.SIGINT) or (code == 1 and not self.state["outcome"]):
            last = (log.strip().splitlines() or [""])[-1]
            file = self.job.folder / "claims.log"
            raise UserError(f"claims: {self.job.words} ended with exit code {code}: {last} (all of it: {file})")
        return True

    def stop(self) -> None:
        """Ask it to finish its update, write a checkpoint and leave."""
        self.process.terminate()

    def _write(self) -> None:
        write_whole(self.job.folder / STATE, json.dumps(self.state, indent=1).encode())


def run_jobs(jobs: Sequence[Job], *, slots: int, commit: str, deadline: float | None) -> None:
    """Run what is not finished, ``slots`` at a time, a job after the one that it starts from.

    At ``deadline`` (of time.monotonic) nothing more is started and what runs is stopped with a checkpoint.
    """
    waiting = [job for job in jobs if not is_finished(job)]
    running: list[Process] = []
    try:
        while waiting or running:
            if deadline is not None and time.monotonic() >= deadline:
                return
            running = [process for process in running if not _reported(process, len(waiting))]
            for job in _ready(waiting, slots - len(running)):
                print(f"{job.words}: starts", flush=True)
                running.append(Process(job, commit))
                waiting.remove(job)
            if not running:  # all that waits is for a run that was stopped from elsewhere
                return
            time.sleep(POLL)
    finally:
        for process in running:
            process.stop()
        for process in (p for p in running if not p.settled):
            process.process.wait()
            _reported(process, len(waiting))


def _ready(waiting: Sequence[Job], count: int) -> list[Job]:
    """The first ``count`` whose predecessor is finished; nothing is read from disk for a count of 0."""
    ready = (job for job in waiting if job.after is None or is_finished(job.after))
    return list(itertools.islice(ready, count))


def _reported(process: Process, waiting: int) -> bool:
    """Whether the process has ended; then a line says how."""
    if not process.ended():
        return False
    how = process.state["outcome"] or "stopped, to be resumed"
    print(f"{process.job.words}: {how} after {process.state['seconds']:.0f} s; {waiting} waiting", flush=True)
    return True
