"""What the GPU kernels need, found by compiling them ahead of time: tests/resources.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

_PATH = Path(__file__).resolve().parents[1] / "tests" / "resources.json"


def table(path: Path = _PATH) -> list[str]:
    """A line per kernel, a column per number; nothing where the file does not exist."""
    if not path.exists():
        return []
    recorded = json.loads(path.read_text())
    if "triton" in recorded:
        recorded["triton"] = _of_one_version(recorded["triton"])
    kernels = dict(_kernels(recorded))
    fields = list(dict.fromkeys(field for numbers in kernels.values() for field in numbers))
    lines = [["kernel", *(field.replace("_", " ") for field in fields)]]
    for name, numbers in kernels.items():
        lines.append([name, *(_text(numbers.get(field)) for field in fields)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]


def _kernels(tree: Mapping[str, Any], path: tuple[str, ...] = ()):
    """(name, numbers) of every innermost mapping, named by the keys that lead to it."""
    numbers = {key: value for key, value in tree.items() if isinstance(value, (int, float))}
    if numbers:
        yield " ".join(path), numbers
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _kernels(value, path if key == "kernels" else (*path, key))


def _of_one_version(records: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of the records of several versions of Triton that of the installed one, else the newest; under its number."""
    try:
        installed = ".".join(metadata.version("triton").split(".")[:2])
    except metadata.PackageNotFoundError:
        installed = ""
    newest = max(records, key=lambda version: [int(part) for part in version.split(".")])
    version = installed if installed in records else newest
    return {version: records[version]}


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:g}"
