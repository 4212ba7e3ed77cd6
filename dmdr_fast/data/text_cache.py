"""Text embeddings on disk: computed once by the encoders, then read memory-mapped without them.

A cache directory belongs to one encoder (its ``identity``: weights, tokenizer, length, dtype): another encoder has
another directory, so its embeddings never mix. In it lie safetensors shards of some hundred MiB, each written aside
and renamed, each with the encoder's identity and a CRC-32 of every tensor in its header. Several ranks and jobs may
write at once. What is broken or belongs to another encoder is left out of the index, and so computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dmdr_fast.cache import cache_root
from dmdr_fast.errors import UserError
from dmdr_fast.locks import take

log = logging.getLogger(__name__)

SHARD_BYTES = 256 * 2**20
CHUNK = 64  # prompts that are encoded before the shard is looked at

Entry = dict[str, Tensor]


class Encoder(Protocol):
    """What computes the embeddings (``dmdr_fast.models.families.TextEncoder``)."""

    @property
    def identity(self) -> dict[str, Any]: ...
    @property
    def limit(self) -> int: ...

    def count(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt, uncut."""

    def encode(self, prompts: Sequence[str], *, negative: bool) -> list[Entry]:
        """One dictionary of CPU tensors per prompt."""

    def release(self) -> None:
        """Give the encoders' memory back."""


class TextCache:
    """The embeddings of one encoder. ``fill`` computes what is missing; ``get`` reads.

    Args:
        encoder: asked for its identity at once, for embeddings only where some are missing.
        root: the directory of all caches; :func:`dmdr_fast.cache.cache_root` by default.

    Raises:
        UserError: the directory is another encoder's (its key.json says so), or cannot be written.
    """

    def __init__(self, encoder: Encoder, root: Path | None = None):
        self.encoder = encoder
        canonical = json.dumps(encoder.identity, sort_keys=True, separators=(",", ":"))
        self.key = hashlib.sha256(canonical.encode()).hexdigest()[:16]
        self.directory = (cache_root() if root is None else Path(root)) / f"text-{self.key}"
        self._places: dict[str, tuple[Path, tuple[str, ...]]] = {}  # entry -> its shard and its tensors' names
        self._shards: dict[Path, Any] = {}  # opened, memory-mapped
        self._claim()

    def fill(self, prompts: Iterable[str], negatives: Iterable[str] = (), *, part: int = 0, parts: int = 1) -> int:
        """Compute what is missing of this part of the prompts (every ``parts``-th, from ``part``) and of all
        ``negatives``; the encoders are loaded only where something is, and released after.

        Ranks give their rank and world size, and wait for each other before they read. Jobs that fill the same part
        take turns, so nothing is computed twice.

        Returns:
            How many embeddings were computed.

        Raises:
            UserError: encoders that cannot be loaded, or nothing can be written.
        """
        wanted = [(p, False) for p in list(dict.fromkeys(prompts))[part::parts]]
        wanted += [(n, True) for n in (dict.fromkeys(negatives) if part == 0 else ())]
        self._index()
        if not self._missing(wanted):
            return 0
        name = f"fill-{part}-of-{parts}"
        with self._locked(name):
            self._index()  # another job may have been here while this one waited
            missing = self._missing(wanted)
            for left_over in self.directory.glob(f".{name}.*"):
                left_over.unlink(missing_ok=True)
            if missing:
                self._compute(missing, f".{name}.{os.getpid()}")
        self._index()
        return len(missing)

    def lacks(self, prompts: Iterable[str], *, negative: bool = False) -> list[str]:
        """Those of the prompts that it has no embedding of, each once."""
        self._index()
        return [prompt for prompt, _ in self._missing((p, negative) for p in dict.fromkeys(prompts))]

    def get(self, prompt: str, *, negative: bool = False) -> Entry:
        """The embedding's tensors, memory-mapped: read-only by convention, on the CPU.

        Raises:
            UserError: it is not there; ``fill`` comes first.
        """
        entry = _digest(prompt, negative)
        if entry not in self._places:
            self._index()
        if entry not in self._places:
            shown = prompt if len(prompt) <= 80 else prompt[:77] + "..."
            raise UserError(f"text cache {self.directory}: no embedding of {shown!r}; fill the cache with it first")
        file, names = self._places[entry]
        return {name: self._open(file).get_tensor(f"{entry}.{name}") for name in names}

    def longest(self, prompts: Iterable[str], negatives: Iterable[str] = (), name: str = "prompt_embeds") -> int:
        """Rows of the longest ``name`` among filled prompts: what ``Family.condition`` has to pad to."""
        entries = [_digest(p, False) for p in prompts] + [_digest(n, True) for n in negatives]
        return max(self._open(self._places[e][0]).get_slice(f"{e}.{name}").get_shape()[0] for e in entries)

    def _claim(self) -> None:
        """Make the directory, or see that it is this encoder's."""
        key_file = self.directory / "key.json"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if not key_file.is_file():
                aside = self.directory / f".key.{os.getpid()}"
                aside.write_text(json.dumps(self.encoder.identity, sort_keys=True, indent=2) + "\n")
                aside.rename(key_file)
        except OSError as error:
            raise self._not_written(error) from None
        try:
            same = json.loads(key_file.read_text()) == json.loads(json.dumps(self.encoder.identity))
        except ValueError:
            same = False
        if not same:
            raise UserError(f"text cache {self.directory}: its key.json is another encoder's; delete the directory")

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        try:
            lock = take(self.directory / f"{name}.lock")
        except OSError as error:
            raise self._not_written(error) from None
        try:
            yield
        finally:
            lock.release()

    def _not_written(self, error: OSError) -> UserError:
        return UserError(
            f"text cache {self.directory}: cannot be written ({error.strerror or error}); make it writable, or set "
            "DMDR_FAST_CACHE to a directory that is"
        )

    def _missing(self, wanted: Iterable[tuple[str, bool]]) -> list[tuple[str, bool]]:
        return [(prompt, negative) for prompt, negative in wanted if _digest(prompt, negative) not in self._places]

    def _compute(self, missing: list[tuple[str, bool]], aside: str) -> None:
        try:
            held: dict[str, Entry] = {}
            for negative in (False, True):
                prompts = [p for p, n in missing if n == negative]
                for start in range(0, len(prompts), CHUNK):
                    part = prompts[start : start + CHUNK]
                    entries = self.encoder.encode(part, negative=negative)
                    held |= {_digest(p, negative): e for p, e in zip(part, entries, strict=True)}
                    if sum(t.nbytes for e in held.values() for t in e.values()) >= SHARD_BYTES:
                        held = self._write(held, aside)
                    log.info("text embeddings: %d of %d", start + len(part), len(prompts))
            self._write(held, aside)
        except (ValueError, FileNotFoundError) as error:
            raise UserError(f"text embeddings: {error}") from error
        finally:
            self.encoder.release()

    def _write(self, entries: dict[str, Entry], aside: str) -> dict[str, Entry]:
        """Write a shard and return the empty dictionary that comes next."""
        if entries:
            tensors = {f"{e}.{n}": t.contiguous() for e, entry in entries.items() for n, t in entry.items()}
            sums = {e: {n: _crc(t) for n, t in entry.items()} for e, entry in entries.items()}
            metadata = {"format": "pt", "key": self.key, "entries": json.dumps(sums, sort_keys=True)}
            name = hashlib.sha256(metadata["entries"].encode()).hexdigest()[:16]
            try:
                save_file(tensors, self.directory / aside, metadata=metadata)
                (self.directory / aside).rename(self.directory / f"{name}.safetensors")
            except (OSError, SafetensorError) as error:
                (self.directory / aside).unlink(missing_ok=True)
                raise UserError(
                    f"text cache {self.directory}: cannot write a shard ({error}); free some space"
                ) from None
            _note_intact(self.directory / f"{name}.safetensors")
        return {}

    def _index(self) -> None:
        """Look at the shards that have come or gone since the last look."""
        found = set(self.directory.glob("*.safetensors"))
        for gone in self._shards.keys() - found:
            del self._shards[gone]
        self._places = {entry: place for entry, place in self._places.items() if place[0] in found}
        for file in sorted(found - self._shards.keys()):
            try:
                shard = self._open(file)
                fault = self._fault(file, shard)
            except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
                fault = str(error)
            if fault is None:
                entries = json.loads(shard.metadata()["entries"])
                self._places |= {entry: (file, tuple(names)) for entry, names in entries.items()}
            else:
                log.warning("text cache %s is broken or stale (%s): its embeddings are computed again", file, fault)
                self._shards.pop(file, None)
                with contextlib.suppress(OSError):  # on a read-only disk it stays, and is passed over each time
                    file.unlink()

    def _open(self, file: Path) -> Any:
        if file not in self._shards:
            self._shards[file] = safe_open(file, framework="pt")
        return self._shards[file]

    def _fault(self, file: Path, shard: Any) -> str | None:
        """What is wrong with a shard; its tensors are read only where they were not since it was written."""
        metadata = shard.metadata() or {}
        if metadata.get("key") != self.key:
            return "it is another encoder's"
        sums = json.loads(metadata["entries"])
        if set(shard.keys()) != {f"{entry}.{name}" for entry, names in sums.items() for name in names}:
            return "its tensors are not those of its list"
        if _known_intact(file):
            return None
        for entry, names in sums.items():
            for name, crc in names.items():
                if _crc(shard.get_tensor(f"{entry}.{name}")) != crc:
                    return f"{entry}.{name} does not match its checksum"
        _note_intact(file)
        return None


def _digest(prompt: str, negative: bool) -> str:
    return hashlib.sha256(f"{'negative' if negative else 'prompt'}\0{prompt}".encode()).hexdigest()[:32]


def _crc(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().data)


def _stamp(file: Path) -> str:
    status = file.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def _known_intact(file: Path) -> bool:
    """Whether the file is, by size and time, the one whose checksums were last found right."""
    note = file.with_suffix(".intact")
    return note.is_file() and note.read_text() == _stamp(file)


def _note_intact(file: Path) -> None:
    aside = file.with_name(f".{file.stem}.intact.{os.getpid()}")
    try:
        aside.write_text(_stamp(file))
        aside.rename(file.with_suffix(".intact"))
    except OSError:  # a cache on a read-only disk is read again in full each time
        return
