"""Prompts from a file: text, JSON Lines or Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dmdr_fast.errors import UserError

SUFFIXES = (".txt", ".jsonl", ".parquet")


def load_prompts(path: str | Path, key: str = "prompt") -> list[str]:
    """The prompts of a file in its order, repeated ones included.

    ``.txt``: one prompt a line, blank lines left out. ``.jsonl``: one object a line, its ``key``. ``.parquet``: the
    column ``key`` (needs pyarrow). Space around a prompt is taken off.

    Raises:
        UserError: the file is missing, unreadable, of another kind, without the key or without prompts; the message
            names the line where there is one.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"prompts {file}: no such file; give a {', '.join(SUFFIXES)} file")
    readers = {".txt": _lines, ".jsonl": _objects, ".parquet": _column}
    if file.suffix.lower() not in readers:
        raise UserError(f"prompts {file}: expected a file ending in {', '.join(SUFFIXES)}, got {file.suffix or 'none'}")
    prompts = []
    for place, value in readers[file.suffix.lower()](file, key):
        if not isinstance(value, str) or not value.strip():
            got = "an empty one" if isinstance(value, str) else type(value).__name__
            raise UserError(
                f"prompts {file}: {place} expected a text in {key!r}, got {got}; fill it in or drop the row"
            )
        prompts.append(value.strip())
    if not prompts:
        raise UserError(f"prompts {file}: no prompt in it; expected at least one")
    return prompts


def _lines(file: Path, _: str) -> Iterator[tuple[str, Any]]:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"prompts {file}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from None
    return ((f"line {n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip())


def _objects(file: Path, key: str) -> Iterator[tuple[str, Any]]:
    for place, line in _lines(file, key):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"prompts {file}: {place} is no JSON ({error}); expected one object a line") from None
        if not isinstance(row, dict):
            raise UserError(f"prompts {file}: {place} expected an object, got {type(row).__name__}")
        if key not in row:
            raise UserError(f"prompts {file}: {place} has no key {key!r}; it has {', '.join(map(repr, row)) or 'none'}")
        yield place, row[key]


def _column(file: Path, key: str) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(
            f"prompts {file}: Parquet needs pyarrow; pip install 'dmdr_fast[parquet]', or give a .jsonl file"
        ) from None
    try:
        names = parquet.read_schema(file).names
        if key not in names:
            raise UserError(f"prompts {file}: no column {key!r}; it has {', '.join(map(repr, names)) or 'none'}")
        values = parquet.read_table(file, columns=[key]).column(key).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise UserError(f"prompts {file}: not readable as Parquet ({str(error).splitlines()[0]})") from None
    return ((f"row {n}", value) for n, value in enumerate(values, 1))
