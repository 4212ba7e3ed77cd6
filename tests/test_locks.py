"""Locks where the file system has none: ENOLCK, as NFS without a lock daemon gives."""

import errno
import fcntl
import logging
import os
import threading

import pytest
from filelock import Timeout

from dmdr_fast import locks
from dmdr_fast.cache import cached
from dmdr_fast.data.text_cache import TextCache
from tests.data.test_text_cache import Letters, assert_holds


@pytest.fixture(params=[errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def no_locks(request, monkeypatch):
    def flock(*arguments):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_the_caches_are_filled_and_read(tmp_path, no_locks):
    entry = cached("kind", {"a": 1}, lambda folder: (folder / "file").write_text("x"), tmp_path)
    assert (entry / "file").read_text() == "x"
    assert cached("kind", {"a": 1}, lambda folder: pytest.fail("built twice"), tmp_path) == entry
    encoder = Letters()
    cache = TextCache(encoder, tmp_path)
    assert cache.fill(["cat", "dog"]) == 2
    assert_holds(cache, encoder, ["cat", "dog"])
    assert not list(tmp_path.rglob("*.soft"))


def test_a_second_job_waits_and_says_so(tmp_path, no_locks, monkeypatch, caplog):
    monkeypatch.setattr(locks, "PATIENCE", 0.05)
    first, second = locks.take(tmp_path / "a.lock"), []
    with pytest.raises(Timeout):
        locks.take(tmp_path / "a.lock", wait=False)
    with caplog.at_level(logging.WARNING):
        waiting = threading.Thread(target=lambda: second.append(locks.take(tmp_path / "a.lock")))
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive() and not second
        first.release()
        waiting.join(10)
    assert second and f"waiting for another job, which holds {tmp_path}/a.lock" in caplog.text
    second[0].release()


def test_another_fault_is_no_reason_to_do_without(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file"):
        locks.take(tmp_path / "file" / "a.lock")
