"""One job per run_dir: a second one would delete the first one's checkpoints as another lineage's."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

from filelock import BaseFileLock, Timeout

from dmdr_fast.engine.runtime import Runtime
from dmdr_fast.errors import UserError
from dmdr_fast.locks import soft, take

LOCK, OWNER = ".lock", ".lock.json"


def lock_run(run_dir: Path, ranks: Runtime) -> BaseFileLock | None:
    """Take ``run_dir`` for this job until it ends, however it ends; rank 0 keeps the lock. All ranks must call.

    Raises:
        UserError: another job has it; the line says which.
    """
    lock, fault = None, None
    if ranks.is_main:
        try:
            lock = take(run_dir / LOCK, wait=False)
        except (Timeout, OSError) as error:
            fault = _in_use(run_dir) if isinstance(error, Timeout) else f"{run_dir} cannot be locked ({error.strerror})"
        else:
            owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            (run_dir / OWNER).write_text(json.dumps(owner))
    fault = ranks.gather(fault)[0]
    if fault is not None:
        raise UserError(f"run_dir: {fault}")
    return lock


def _in_use(run_dir: Path) -> str:
    try:
        owner = json.loads((run_dir / OWNER).read_text())
        job = f"host {owner['host']}, pid {owner['pid']}, since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        job = "which has not said yet where it runs"
    left = soft(run_dir / LOCK)
    gone = f"; if that job is gone, remove {left}" if left.exists() else ""
    return f"{run_dir} is in use by another job ({job}); stop it or wait for it, or name another run_dir{gone}"
