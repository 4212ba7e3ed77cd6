"""One job per run_dir: a second one would delete the first one's checkpoints as another lineage's."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from dmdr_fast.engine.runtime import Runtime
from dmdr_fast.errors import UserError

LOCK, OWNER = ".lock", ".lock.json"
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


def lock_run(run_dir: Path, ranks: Runtime) -> BaseFileLock | None:
    """Take ``run_dir`` for this job until it ends, however it ends; rank 0 keeps the lock. All ranks must call.

    The system's lock; on a file system without any, a file whose presence is the lock and which a killed job leaves
    behind: filelock removes it where the job was of this host.

    Raises:
        UserError: another job has it; the line says which.
    """
    lock, fault = None, None
    if ranks.is_main:
        try:
            lock = _acquired(run_dir)
        except (Timeout, OSError) as error:
            fault = _in_use(run_dir) if isinstance(error, Timeout) else f"{run_dir} cannot be locked ({error.strerror})"
        else:
            owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            (run_dir / OWNER).write_text(json.dumps(owner))
    fault = ranks.gather(fault)[0]
    if fault is not None:
        raise UserError(f"run_dir: {fault}")
    return lock


def _acquired(run_dir: Path) -> BaseFileLock:
    lock = FileLock(run_dir / LOCK, timeout=0)
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        lock = SoftFileLock(run_dir / f"{LOCK}.soft", timeout=0)
        lock.acquire()
    return lock


def _in_use(run_dir: Path) -> str:
    try:
        owner = json.loads((run_dir / OWNER).read_text())
        job = f"host {owner['host']}, pid {owner['pid']}, since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        job = "which has not said yet where it runs"
    soft = run_dir / f"{LOCK}.soft"
    gone = f"; if that job is gone, remove {soft}" if soft.exists() else ""
    return f"{run_dir} is in use by another job ({job}); stop it or wait for it, or name another run_dir{gone}"
