"""A directory cache that several ranks and jobs share: built once, renamed into place, verified on every hit.

An entry is a directory ``<kind>-<16 hex digits of sha256(key)>`` holding what its builder wrote, ``key.json``
(what the entry was built from) and ``checksums.json`` (sha256 of every other file).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from dmdr_fast.errors import UserError
from dmdr_fast.locks import take

log = logging.getLogger(__name__)

_CHECKSUMS = "checksums.json"
_CACHE_VARIABLE = "DMDR_FAST_CACHE"
_LARGE = 1 << 26  # bytes: a tenth of a second of hashing


def cache_root() -> Path:
    """Where cached things live: ``$DMDR_FAST_CACHE``, else ``dmdr_fast`` in the user's cache directory.

    The latter is ``~/Library/Caches`` on macOS and ``$XDG_CACHE_HOME`` (default ``~/.cache``) elsewhere.
    """
    if named := os.environ.get(_CACHE_VARIABLE):
        return Path(named).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "dmdr_fast"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dmdr_fast"


def cached(kind: str, key: dict, build: Callable[[Path], None], root: Path | None = None) -> Path:
    """The directory that ``build`` fills for ``key``: from the cache if it is there intact, else built now.

    The build runs in a directory aside, under a lock of the entry's own, and is renamed into place when done:
    another rank or job waits and then finds it, and one that was killed leaves nothing that looks finished.
    On a hit every file's sha256 is compared with the one recorded; a broken entry is built again, with a
    logged warning. A hit only reads, so a cache on a read-only disk serves the entries that it has.

    Args:
        kind: what is cached, the readable half of the entry's name: letters, digits, ``_`` and ``-``.
        key: everything the result depends on, as JSON; the order of its items does not matter.
        build: called with an empty directory; writes at least one file into it. Its errors pass through.
        root: the cache's directory; :func:`cache_root` by default.

    Returns:
        The entry's directory. Its files are shared: read them, do not change them.

    Raises:
        UserError: the cache cannot be written.
        ValueError: ``kind`` is not a plain name, or ``build`` wrote nothing.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", kind):
        raise ValueError(f"kind: expected letters, digits, '_' and '-', got {kind!r}")
    root = cache_root() if root is None else Path(root)
    canonical = json.dumps(key, sort_keys=True, separators=(",", ":"), allow_nan=False)
    entry = root / f"{kind}-{hashlib.sha256(canonical.encode()).hexdigest()[:16]}"
    if entry.is_dir() and _fault(entry, key) is None:
        return entry
    with _locked(entry):
        if entry.is_dir():  # built by another while this one waited, or broken
            fault = _fault(entry, key)
            if fault is None:
                return entry
            log.warning("cache entry %s is broken (%s): building it again", entry, fault)
            shutil.rmtree(entry)
        _build_entry(entry, key, build)
    return entry


def file_hash(file: Path) -> str:
    """SHA-256 of a file's content, in hex; a large file's is kept in the cache while size and time of change stay."""
    file = file.resolve()
    if re.fullmatch(r"[0-9a-f]{64}", file.name):  # a blob of the hub's cache is called by its hash
        return file.name
    status = file.stat()
    if status.st_size < _LARGE:
        return _sha256(file)
    key = {"file": str(file), "size": status.st_size, "changed": status.st_mtime_ns}

    def write(folder: Path) -> None:
        (folder / "sha256").write_text(_sha256(file))

    entry = cached("sha256", key, write)
    return (entry / "sha256").read_text()


@contextlib.contextmanager
def _locked(entry: Path):
    """The entry's exclusive lock; what an earlier holder left half-built is no one's, and removed."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        lock = take(entry.with_name(entry.name + ".lock"))
    except OSError as error:
        raise UserError(
            f"cannot write the cache {entry.parent}: {error.strerror or error}. "
            f"Make it writable, or set {_CACHE_VARIABLE} to a directory that is"
        ) from error
    try:
        for left_over in entry.parent.glob(f".{entry.name}.*"):
            shutil.rmtree(left_over, ignore_errors=True)
        yield
    finally:
        lock.release()


def _build_entry(entry: Path, key: dict, build: Callable[[Path], None]) -> None:
    aside = entry.with_name(f".{entry.name}.{os.getpid()}")
    aside.mkdir()
    try:
        build(aside)
        files = _files(aside)
        if not files:
            raise ValueError(f"build of cache entry {entry.name} wrote no file into the directory it was given")
        (aside / "key.json").write_text(json.dumps(key, sort_keys=True, indent=2) + "\n")
        checksums = {str(file.relative_to(aside)): _sha256(file) for file in files}
        (aside / _CHECKSUMS).write_text(json.dumps(checksums, sort_keys=True, indent=2) + "\n")
        aside.rename(entry)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _fault(entry: Path, key: dict) -> str | None:
    """What is wrong with the entry, in words, or None when it is intact and really this key's."""
    try:
        checksums = json.loads((entry / _CHECKSUMS).read_text())
        recorded_key = json.loads((entry / "key.json").read_text())
        if recorded_key != json.loads(json.dumps(key)):
            return "key.json is another key's"
        for name, expected in checksums.items():
            if _sha256(entry / name) != expected:
                return f"{name} does not match its checksum"
    except (OSError, ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None
