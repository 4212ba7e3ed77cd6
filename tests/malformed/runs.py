"""Small real runs in this process, by the functions that a start of ``dmdr-train`` goes through."""

from __future__ import annotations

import functools
import io
import random
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

from dmdr_fast import cli
from dmdr_fast.preflight import check

from ..engine.conftest import SMALL
from . import inside

FINAL = "final/generator.safetensors"
EVERY = [
    "--train.cold_start_steps",
    "1",
    "--train.generator_steps",
    "4",
    "--checkpoint.every",
    "1",
    "--checkpoint.keep",
    "9",
]


def go(run_dir: Path, *words: str) -> str:
    """``dmdr-train`` in ``run_dir``, which it makes where it is missing; what it printed."""
    from dmdr_fast.engine.trainer import train

    said = io.StringIO()
    with inside(run_dir.parent), redirect_stdout(said), redirect_stderr(io.StringIO()):
        config = cli.parse([*SMALL, *EVERY, "--run_dir", str(run_dir), *words])[0]
        check(config)
        train(config)
    return said.getvalue()


@functools.cache
def _folder() -> TemporaryDirectory:
    return TemporaryDirectory(prefix="dmdr_fast-malformed-")


@functools.cache
def finished() -> Path:
    """The folder of a run of four updates, with a checkpoint of each."""
    run_dir = Path(_folder().name) / "run"
    go(run_dir)
    return run_dir


def flipped(content: bytes, draw: random.Random) -> bytes:
    """``content`` with one to four bits turned, or cut, or with a part of it repeated."""
    changed = bytearray(content)
    match draw.randrange(4):
        case 0:
            return bytes(changed[: draw.randrange(len(changed))])
        case 1:
            at = draw.randrange(len(changed))
            return bytes(changed[:at] + changed[at // 2 :])
        case _:
            for _ in range(draw.randint(1, 4)):
                # Half of them in the first kilobyte, where the headers are.
                changed[draw.randrange(min(len(changed), draw.choice((1024, len(changed)))))] ^= 1 << draw.randrange(8)
            return bytes(changed)
