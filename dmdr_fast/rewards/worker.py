"""A score-only reward in a process of its own, with a time limit: one that hangs or crashes leaves the run alive."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from dmdr_fast.rewards.base import check_reward
from dmdr_fast.rewards.registry import build_reward

START_TIMEOUT = 1800.0  # seconds to load the weights, which may come from a hub


class RewardTimeout(RuntimeError):
    """A worker took longer than its reward may; it has been killed."""


class WorkerReward:
    """A reward without gradient, built and called in a process of its own, on the CPU or where it places itself.

    The process is a fresh interpreter, not a fork (which CUDA and threads do not survive) and not
    multiprocessing's spawn (which would run the run's script again). It goes with :meth:`close`, with this object and
    with this process, however that ends.

    Args:
        kind, path, name, options, num_classes: as :func:`~dmdr_fast.rewards.registry.build_reward` takes them.
        timeout: seconds that one call may take.

    Raises:
        ValueError: the reward cannot be built; the text is the builder's.
        RewardTimeout: it is not ready after half an hour.
    """

    differentiable = False

    def __init__(
        self,
        kind: str,
        path: str | None = None,
        name: str | None = None,
        options: Mapping[str, Any] | None = None,
        *,
        num_classes: int | None = None,
        timeout: float = 300.0,
    ) -> None:
        self.name, self.timeout = name or kind.rpartition(":")[2], timeout
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "dmdr_fast.rewards.worker", str(theirs.fileno())]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[theirs.fileno()])
        self._connection = Connection(ours.detach())
        self._finalizer = weakref.finalize(self, _end, self._process, self._connection)
        built = {"kind": kind, "path": path, "name": name, "options": dict(options or {}), "num_classes": num_classes}
        try:
            self._send((sys.path, built))
            self.name = self._answer(START_TIMEOUT, "loading its weights")
        except RewardTimeout:
            raise
        except RuntimeError as error:
            self.close()
            raise ValueError(str(error)) from None

    def __call__(self, images: Tensor, *, labels: Tensor | None = None, prompts: list[str] | None = None) -> Tensor:
        """Scores [B] on the images' device; the worker gets images and labels as CPU tensors. Waits for the device.

        Raises:
            RewardTimeout: no answer within ``timeout`` seconds.
            RuntimeError: what the reward raised, how its process ended, or that it ended at an earlier call.
        """
        self._send((images.detach().cpu(), None if labels is None else labels.cpu(), prompts))
        return self._answer(self.timeout, f"a batch of {len(images)}").to(images.device)

    def close(self) -> None:
        """End the process now. Later calls raise."""
        self._finalizer()

    def _send(self, message: object) -> None:
        if not self._finalizer.alive:
            raise RuntimeError(f"reward {self.name!r}: its worker process has ended")
        with contextlib.suppress(OSError):  # it has died: the answer says how
            self._connection.send_bytes(pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL))

    def _answer(self, seconds: float, doing: str) -> Any:
        try:
            if not self._connection.poll(seconds):
                self.close()
                raise RewardTimeout(
                    f"reward {self.name!r}: {doing} took longer than {seconds:g} s and its worker process was killed: "
                    "make it faster or raise reward.timeout"
                )
            kind, value = pickle.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            code = self._process.wait()
            self.close()
            ended = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
            raise RuntimeError(f"reward {self.name!r}: its worker process ended {ended} in {doing}") from None
        if kind == "error":
            raise RuntimeError(value)
        return value


def _end(process: subprocess.Popen, connection: Connection) -> None:
    process.kill()
    assert process.stdin is not None  # a pipe
    process.stdin.close()
    process.wait()
    connection.close()


def serve(connection: Connection) -> None:
    """The worker: build the reward that the first message describes, then score batches until the other end closes."""
    sys.path, built = pickle.loads(connection.recv_bytes())
    try:
        reward = build_reward(**built)
    except Exception as error:
        _reply(connection, "error", str(error))
        return
    _reply(connection, "value", reward.name)
    while True:
        try:
            images, labels, prompts = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            with torch.no_grad():
                values = check_reward(reward(images, labels=labels, prompts=prompts), images, reward.name)
            _reply(connection, "value", values.detach())
        except Exception as error:
            traceback.print_exc()  # the reward is likely the user's own: the way there helps
            _reply(connection, "error", f"{type(error).__name__}: {error}")


def _reply(connection: Connection, kind: str, value: object) -> None:
    connection.send_bytes(pickle.dumps((kind, value), protocol=pickle.HIGHEST_PROTOCOL))


def _leave_with_parent() -> None:
    """End when standard input closes: the process that holds its other end is gone."""
    sys.stdin.buffer.read()
    os._exit(1)


def main() -> None:
    """``python -m dmdr_fast.rewards.worker FD``: serve on the socket FD."""
    # Ctrl-C reaches the whole group, and launchers send SIGTERM to every descendant: the run finishes its update first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    serve(Connection(int(sys.argv[1])))
    os._exit(0)  # the thread that reads standard input would hold the interpreter's exit up


if __name__ == "__main__":
    main()
