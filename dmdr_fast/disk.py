"""Writes that a disk refuses: it is full, over a quota, read-only or failing, or takes no file of that size."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from dmdr_fast.errors import UserError

T = TypeVar("T")

REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
QUOTED = re.compile(r"(?:os error |\[Errno )(\d+)")  # in a SafetensorError, and in a shutil.Error of copytree
TORCH = "inline_container.cc"  # torch.save's RuntimeError, which says no more


def refusal(error: BaseException) -> str | None:
    """What the disk said ("No space left on device: FILE") where ``error`` comes from a write that it refused."""
    if TORCH in str(error):
        return "the disk is full, or fails"
    code = error.errno if isinstance(error, OSError) else None
    if code is None and (found := QUOTED.search(str(error))):
        code = int(found[1])
    if code not in REFUSALS:
        return None
    file = getattr(error, "filename", None)
    return os.strerror(code) if file is None else f"{os.strerror(code)}: {file}"


def told(error: BaseException) -> str | None:
    """What a user is told of a mistake, or of a disk that refuses a write; None of other errors."""
    if isinstance(error, UserError):
        return str(error)
    fault = refusal(error)
    return None if fault is None else f"a file cannot be written ({fault}); free some space"


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file aside to write, which then takes the place of ``path``: that is there whole or as it was, whatever ends.

    Where the block raises, the file aside goes.
    """
    aside = path.with_suffix(".tmp")
    try:
        yield aside
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all, whenever the process ends."""
    with whole(path) as aside:
        aside.write_bytes(content)


class Writes:
    """Writes of one rank. After the first one that the disk refuses the others are left out, and ``fault`` says why.

    Ranks that write together meet after it all the same, and agree there.
    """

    fault: str | None = None

    def __call__(self, write: Callable[[], T]) -> T | None:
        if self.fault is None:
            try:
                return write()
            except Exception as error:
                self.fault = refusal(error)
                if self.fault is None:
                    raise
        return None
