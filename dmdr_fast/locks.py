"""Locks between jobs, on file systems with locks and without."""

from __future__ import annotations

import errno
import logging
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

log = logging.getLogger(__name__)

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
PATIENCE = 60.0  # seconds of waiting without a word


def soft(path: Path) -> Path:
    """The file that is the lock ``path`` where the file system has none."""
    return path.with_name(f"{path.name}.soft")


def take(path: Path, *, wait: bool = True) -> BaseFileLock:
    """The lock of file ``path``, for the caller to release.

    The system's lock; on a file system without any (NFS without a lock daemon), a file whose presence is the lock and
    which a killed job leaves behind: filelock removes it where the job was of this host. Who waits says so after a
    minute.

    Raises:
        Timeout: another has it, without ``wait``.
        OSError: the file cannot be written.
    """
    try:
        return _taken(FileLock(path), wait)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return _taken(SoftFileLock(soft(path)), wait)


def _taken(lock: BaseFileLock, wait: bool) -> BaseFileLock:
    try:
        lock.acquire(timeout=PATIENCE if wait else 0.0)
    except Timeout:
        if not wait:
            raise
        log.warning("waiting for another job, which holds %s; if no job runs, remove that file", lock.lock_file)
        lock.acquire()
    return lock
