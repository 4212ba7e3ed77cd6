"""What makes a run stop before its end, and how fast.

A request is SIGTERM, SIGINT or SIGHUP, the end of the launcher that this rank belongs to, or a file ``stop`` in
run_dir. While updates are made (:meth:`StopRequest.finishes`) it only sets ``asked``: the run finishes its update and
writes a checkpoint. Elsewhere there is nothing to write, and the run leaves at once. A second signal ends the process
at once, anywhere.

A thread reads the signals from a pipe: Python's own handlers run between two bytecodes of the main thread, which may be
minutes away inside of a collective.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TextIO

import psutil

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Under DeepSpeed's launcher one Ctrl-C arrives twice: from the terminal and, milliseconds later, as its SIGTERM.
SAME_REQUEST = 0.5  # seconds
POLL = 0.5  # seconds between two looks at the launcher
UNWIND = 3.0  # seconds that the main thread has to leave at once in good order


class Stopped(BaseException):
    """Raised in the main thread where a request ends the run at once. No error: ``except Exception`` lets it pass."""


class StopRequest:
    """Whether the run is asked to stop. A context: inside it signals are ours; the main thread must enter it.

    Args:
        file: its appearance is a request too; None: not looked for.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.asked = False
        self.unfinished = "before the first update; there is nothing to write"  # what a stop at once leaves undone
        self._file, self._launchers = file, launchers()
        self._finishes, self._number, self._left = False, 0, threading.Event()

    def __enter__(self) -> StopRequest:
        if self._file is not None:
            self._file.unlink(missing_ok=True)
        self._read, write = os.pipe()
        os.set_blocking(write, False)
        heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup's stays so
        self._previous = {number: signal.signal(number, self._note) for number in heard}
        self._streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = (_Output(stream, self) for stream in self._streams)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True, name="stop").start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> bool:
        """Report a stop at once; code 0 for a single rank. One of several must make the launcher end the others."""
        self._left.set()
        self._finishes = True  # what comes now is late
        os.close(signal.set_wakeup_fd(-1))
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if kind is not Stopped:
            self._restore_streams()
            return False
        self._say(f"stopped {self.unfinished}")
        if os.environ.get("WORLD_SIZE", "1") != "1":
            self._end()
        self._restore_streams()
        return True

    def _restore_streams(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = self._streams

    def finishes(self) -> None:
        """From here on a request sets ``asked`` and no more."""
        self._finishes = True

    def leaves(self, unfinished: str) -> None:
        """From here on a request ends the run at once and leaves ``unfinished`` as it is."""
        self.unfinished, self._finishes = unfinished, False
        if self.asked:
            raise Stopped

    def _note(self, number: int, frame: object) -> None:
        """The signal's handler, in the main thread."""
        first, self.asked, self._number = not self.asked, True, number
        if first and not self._finishes:
            raise Stopped

    def _watch(self) -> None:
        """The thread: end the process on a second signal, or where the main thread does not leave at once."""
        first_at: float | None = None
        at_once = False
        while not self._left.is_set():
            received = os.read(self._read, 64) if select.select([self._read], [], [], POLL)[0] else b""
            now = time.monotonic()
            if received and first_at is None:
                first_at, at_once, self._number = now, not self._finishes, received[0]
            elif received and first_at is not None and now - first_at > SAME_REQUEST:
                self._say("stopped by a second signal; what was not in a checkpoint is lost")
                self._end()
            if first_at is None and self._is_told():
                os.kill(os.getpid(), signal.SIGTERM)
            if at_once and first_at is not None and now - first_at > UNWIND:
                self._say(f"stopped {self.unfinished}")
                self._end()
        os.close(self._read)

    def _is_told(self) -> bool:
        if self._file is not None and self._file.exists():
            self._file.unlink(missing_ok=True)
            return True
        return any(is_gone(process) for process in self._launchers)

    def _say(self, text: str) -> None:
        if os.environ.get("RANK", "0") == "0":
            print(text, flush=True)

    def _end(self) -> NoReturn:
        sys.stdout.flush()
        os._exit(128 + self._number)


class _Output:
    """A stream that goes nowhere once the run is asked to stop and its reader has left.

    Ctrl-C ends the ``tee`` behind a pipe too, a closed window takes its terminal along: the checkpoint still comes.
    """

    def __init__(self, stream: TextIO, request: StopRequest) -> None:
        self._stream, self._request = stream, request

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._try(self._stream.write, text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, call: Callable, *words: str) -> Any:
        try:
            return call(*words)
        except OSError:
            if not self._request.asked:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            return call(*words)


def launchers() -> list[psutil.Process]:
    """The processes whose end is this rank's: its parent and, above DeepSpeed's launcher of a node, ``deepspeed``.

    None for a process that no launcher started, which may outlive its shell.
    """
    if "RANK" not in os.environ:
        return []
    parent = psutil.Process().parent()
    if parent is None:
        return []
    above = parent.parent() if "deepspeed.launcher.launch" in _words(parent) else None
    return [parent] if above is None or not _is_deepspeed(above) else [parent, above]


def is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _is_deepspeed(process: psutil.Process) -> bool:
    """Whether it is the ``deepspeed`` command; above a node's launcher that ssh started there is none."""
    return any(Path(word).name in ("deepspeed", "deepspeed.pt", "ds", "runner.py") for word in _words(process)[:3]) or (
        "deepspeed.launcher.runner" in _words(process)
    )


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
