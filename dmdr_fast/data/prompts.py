"""Prompts from a file: text, JSON Lines, JSON, CSV or Parquet, or a folder of Parquet files."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmdr_fast import built_in
from dmdr_fast.errors import UserError

SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".parquet")
KINDS = f"a {', '.join(SUFFIXES)} file, a folder of .parquet files, or one of {', '.join(built_in.PROMPTS)}"
# The longer ones first: UTF-32's mark begins with UTF-16's.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# Around copied text there are characters without a width, too: str.strip knows spaces alone.
BLANK = "".join(c for c in map(chr, range(0x3001)) if c.isspace()) + "\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\ufeff"


@dataclass(frozen=True)
class Prompt:
    """A prompt and where it stands: "line 3", "item 3", "row 3", with the file of a folder in front."""

    text: str
    place: str


def load_prompts(path: str | Path, key: str = "prompt") -> list[Prompt]:
    """The prompts of a file in its order, repeated ones included.

    ``.txt``: one prompt a line, blank lines left out. ``.jsonl``: one object a line, its ``key``. ``.json``: a list of
    such objects, or of texts. ``.csv``: the column ``key`` of a table with a header. ``.parquet``, or a folder with
    such files at any depth, in the order of their names: the column ``key`` (needs pyarrow). A name of
    ``dmdr_fast.built_in``: the prompts that come with the package. Text is UTF-8, or what the
    byte order mark at its start says. Space and characters without a width around a prompt are taken off; a line of
    nothing else is blank.

    Raises:
        UserError: the file is missing, unreadable, of another kind, without the key or without prompts, or a prompt is
            no text, empty, or has a character that is none; the message names the line where there is one.
    """
    source = built_in.prompts(path).expanduser()
    prompts = [prompt for file in prompt_files(source) for prompt in _read(file, source, key)]
    if not prompts:
        raise UserError(f"prompts {source}: no prompt in it; expected at least one")
    return prompts


def is_prompt_file(word: str) -> bool:
    """Whether a word of the command line is a file of prompts, and no prompt."""
    try:
        file = built_in.prompts(word)
        return file.suffix.lower() in SUFFIXES or file.expanduser().is_file()
    except (OSError, ValueError):  # too long, or with a zero byte
        return False


def prompt_files(source: Path) -> list[Path]:
    """The files that :func:`load_prompts` reads."""
    source = built_in.prompts(source)
    try:
        if source.is_file():
            return [source]
        found = sorted(p for p in source.rglob("*.parquet") if p.is_file()) if source.is_dir() else None
    except (OSError, ValueError) as error:  # a name that is too long, or that has a zero byte
        raise UserError(f"prompts {str(source)[:80]!r}: {error}; give {KINDS}") from None
    if found is None:
        raise UserError(f"prompts {source}: no such file; give {KINDS}")
    if not found:
        raise UserError(f"prompts {source}: a folder without .parquet files; give {KINDS}")
    return found


def _read(file: Path, source: Path, key: str) -> Iterator[Prompt]:
    front = "" if file == source else f"{file.relative_to(source)}, "
    readers = {".txt": _lines, ".jsonl": _objects, ".json": _list, ".csv": _table, ".parquet": _column}
    if file.suffix.lower() not in readers:
        raise UserError(f"prompts {file}: got {file.suffix or 'no ending'}; give {KINDS}")
    for place, value in readers[file.suffix.lower()](file, key):
        text = value.strip(BLANK) if isinstance(value, str) else None
        fault = f"got {'nothing' if value is None else type(value).__name__}" if text is None else _fault(text)
        if text is None or fault is not None:
            what = "a text" if file.suffix.lower() == ".txt" else f"a text in {key!r}"
            raise UserError(f"prompts {file}: {place} expected {what}, {fault}; correct it or drop it")
        yield Prompt(text, front + place)


def _fault(text: str) -> str | None:
    """Why no tokenizer reads a text."""
    if not text:
        return "got an empty one"
    if "\0" in text:
        return "got one with a zero byte"
    lone = next((c for c in text if "\ud800" <= c <= "\udfff"), None)
    return None if lone is None else f"got one with half of a character, \\u{ord(lone):04x}"


def _text(file: Path) -> str:
    try:
        content = file.read_bytes()
        encoding = next((name for mark, name in MARKS.items() if content.startswith(mark)), "utf-8")
        text = content.decode(encoding)
    except OSError as error:
        raise UserError(f"prompts {file}: {error.strerror}; give {KINDS}") from None
    except UnicodeDecodeError as error:
        name = encoding.upper().removesuffix("-SIG")
        raise UserError(
            f"prompts {file}: not {name} text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _lines(file: Path, _: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_text(file).split("\n"), 1):
        if line.strip(BLANK):
            yield f"line {number}", line


def _objects(file: Path, key: str) -> Iterator[tuple[str, Any]]:
    for place, line in _lines(file, key):
        row = _json(file, f"{place} is", line.strip(BLANK), "one object a line")
        if not isinstance(row, dict):
            raise UserError(f"prompts {file}: {place} expected an object, got {type(row).__name__}")
        yield place, _value(file, place, row, key)


def _list(file: Path, key: str) -> Iterator[tuple[str, Any]]:
    rows = _json(file, "it is", _text(file), "a list of texts or objects")
    if not isinstance(rows, list):
        raise UserError(f"prompts {file}: expected a list of texts or objects, got {type(rows).__name__}")
    for number, row in enumerate(rows, 1):
        yield f"item {number}", _value(file, f"item {number}", row, key) if isinstance(row, dict) else row


def _json(file: Path, subject: str, text: str, expected: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"prompts {file}: {subject} no JSON ({error}); expected {expected}") from None


def _value(file: Path, place: str, row: dict[str, Any], key: str) -> Any:
    if key not in row:
        raise UserError(f"prompts {file}: {place} has no key {key!r}; it has {_names(row)}")
    return row[key]


def _table(file: Path, key: str) -> Iterator[tuple[str, Any]]:
    rows = csv.reader(io.StringIO(_text(file), newline=""), strict=True)
    line = 1
    try:
        header = [name.strip(BLANK) for name in next(rows, [])]
        if header.count(key) != 1:
            many = "no column" if key not in header else f"{header.count(key)} columns"
            raise UserError(f"prompts {file}: {many} {key!r}; its first line has {_names(header)}")
        column, line = header.index(key), rows.line_num + 1
        for row in rows:
            if row:  # a blank line has no column at all
                yield f"line {line}", row[column] if column < len(row) else None
            line = rows.line_num + 1
    except csv.Error as error:
        raise UserError(f"prompts {file}: line {line} is no row of a table ({error}); correct its quotes") from None


def _column(file: Path, key: str) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(
            f"prompts {file}: Parquet needs pyarrow; pip install 'dmdr_fast[parquet]', or give a .jsonl file"
        ) from None
    try:
        with file.open("rb") as opened:  # a path would make it look for a partitioned data set
            table = parquet.ParquetFile(opened)
            names = table.schema_arrow.names
            if names.count(key) != 1:
                many = "no column" if key not in names else f"{names.count(key)} columns"
                raise UserError(f"prompts {file}: {many} {key!r}; it has {_names(names)}")
            values = table.read(columns=[key]).column(key).to_pylist()
    except (OSError, ValueError, NotImplementedError) as error:  # pyarrow's own errors are among them
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"prompts {file}: not readable as Parquet ({reason})") from None
    for number, value in enumerate(values, 1):
        yield f"row {number}", value


def _names(names: Any) -> str:
    shown = [repr(name[:40]) for name in names][:20]
    return ", ".join(shown) or "none"
