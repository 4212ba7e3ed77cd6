"""``dmdr-train``: a run on the GPUs of this machine, one process each.

Unlike DeepSpeed's launcher, which kills the ranks 30 seconds after a signal, it passes the signal on and waits for as
long as the update and the checkpoint take. A second signal ends the ranks at once.

Under another launcher (``srun dmdr-train``) it is one rank of that launcher's run.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from dmdr_fast import placement, train
from dmdr_fast.cli import Parser, parse, run_user_command
from dmdr_fast.errors import UserError
from dmdr_fast.preflight import check

POLL = 0.1  # seconds
ORPHANED = 10.0  # seconds that the other ranks have when one has failed


def main(argv: list[str]) -> int:
    """Start one rank per GPU; where that is one, or under another launcher, be it."""
    parser = Parser(prog="dmdr-train", add_help=False, allow_abbrev=False)
    parser.add_argument("--num_gpus", "--num_accelerators", type=int)
    parser.add_argument("--master_port", type=int)
    options, rest = parser.parse_known_args(argv)
    placement.take()
    if "RANK" in os.environ:
        return train.main(rest)
    config, print_only = parse(rest)
    count = _ranks(options.num_gpus)
    if print_only or count == 1:
        return train.main(rest)
    os.environ["WORLD_SIZE"] = str(count)  # of which the checks know
    check(config)
    return supervise(lambda: start(count, rest, options.master_port or _free_port()))


def _ranks(asked: int | None) -> int:
    import torch

    visible = 0 if os.environ.get("DS_ACCELERATOR") == "cpu" else torch.cuda.device_count()
    if asked is not None and not 1 <= asked <= (visible or asked):
        raise UserError(f"--num_gpus: expected 1 to {visible or 'as many processes as you like'}; got {asked}")
    return asked or visible or 1


def start(count: int, arguments: Sequence[str], port: int) -> list[subprocess.Popen]:
    """``count`` ranks of ``train.py``, each in a session of its own: a terminal's Ctrl-C comes here alone."""
    common = {"WORLD_SIZE": str(count), "LOCAL_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-u", str(Path(train.__file__).resolve()), *arguments]
    return [
        subprocess.Popen(
            command, env={**os.environ, **common, "RANK": str(i), "LOCAL_RANK": str(i)}, start_new_session=True
        )
        for i in range(count)
    ]


def supervise(start: Callable[[], Iterable[subprocess.Popen]]) -> int:
    """Pass signals on until all ranks have left; the first exit code that is not 0, 128 + n for signal n.

    When a rank fails, those that then do not leave by themselves are killed: they would wait for it for ever.
    """

    ranks: list[subprocess.Popen] = []
    passed_on: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        passed_on.append(number)
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    ranks.extend(start())
    failed, failed_at = 0, 0.0
    while any(rank.poll() is None for rank in ranks):
        if not failed and (failed := next((rank.returncode for rank in ranks if rank.returncode), 0)):
            failed_at = time.monotonic()
        if failed and (failed == 2 or time.monotonic() - failed_at > ORPHANED):  # 2: a mistake, which rank 0 has named
            for rank in ranks:
                rank.kill()
        time.sleep(POLL)
    failed = failed or next((rank.returncode for rank in ranks if rank.returncode), 0)
    if len(passed_on) == 1 and failed == 128 + passed_on[0]:  # they have left at once, as they were told
        return 0
    return 128 - failed if failed < 0 else failed


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command() -> int:
    """The console script."""
    return run_user_command(main)
