"""Files behind ``student.weights``, ``fake.weights`` and ``teacher.weights``: the run starts from them, or refuses."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from . import Case, contents
from .checkpoints import WEIGHTS, Code, without
from .runs import FINAL, finished, flipped, go

Weights = dict[str, Tensor]
LAYER = "blocks.0.attn.qkv"
STILL = ["--train.generator_steps", "1", "--optimizer.generator.lr", "1e-30", "--optimizer.fake.lr", "1e-30"]
KEYS = {"student": [], "teacher": ["--teacher.train.data", "null"], "fake": ["--sharing", "separate"]}
KEYS["adapter"] = ["--student.lora.rank", "2"]


@cache
def plain() -> Weights:
    return load_file(finished() / FINAL)


def lora(rank: int = 2, layers: tuple[str, ...] = (LAYER, "blocks.1.attn.qkv")) -> Weights:
    """An adapter under our names."""
    names = {f"{layer}.lora_{f}": s for layer in layers for f, s in (("A", (32, rank)), ("B", (rank, 96)))}
    return {name: torch.full(shape, 0.01) for name, shape in names.items()}


def start(role: str, name: str, make: Callable[[Path], object], folder: Path) -> None:
    """One update that moves nothing, from what ``make`` puts at ``name``; it stays as it is, no pickle runs."""
    place = folder / name
    make(place)
    before = contents(folder)
    key = "student" if role == "adapter" else role
    try:
        go(folder / "run", *STILL, f"--{key}.weights", str(place), *KEYS[role])
    finally:
        after = contents(folder)
        assert all(after.get(file) == digest for file, digest in before.items()), "the input was changed"
        assert not (folder / "ran").exists(), "a pickle was run"
    if role == "student":
        now = load_file(folder / "run" / FINAL)
        assert all(tensor.isfinite().all() for tensor in now.values()), "it started from what is not finite"


def raw(content: bytes) -> Callable[[Path], object]:
    return lambda place: place.write_bytes(content)


def tensors(change: Callable[[Weights], object], **metadata: str) -> Callable[[Path], object]:
    """The run's weights with a change, which is made in place or returned."""

    def make(place: Path) -> None:
        content = dict(plain())
        changed = change(content)
        save_file(changed if isinstance(changed, dict) else content, place, metadata or None)

    return make


def pickled(content: object) -> Callable[[Path], object]:
    return lambda place: torch.save(content() if callable(content) else content, place)


def first(change: Callable[[Tensor], Tensor]) -> Callable[[Path], object]:
    """One tensor changed."""
    return tensors(lambda w: w.update({f"{LAYER}.weight": change(w[f"{LAYER}.weight"])}))


def each(change: Callable[[Tensor], Tensor]) -> Callable[[Path], object]:
    return tensors(lambda w: {name: change(tensor) for name, tensor in w.items()})


def headed(
    length: int | None = None, header: bytes = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + b"\0\0\0\0"


def beside(settings: str) -> Callable[[Path], object]:
    """A folder with an adapter and PEFT's settings."""

    def make(place: Path) -> None:
        place.mkdir()
        save_file(lora(), place / "adapter_model.safetensors")
        (place / "adapter_config.json").write_text(settings)

    return make


def sharded(index: str) -> Callable[[Path], object]:
    def make(place: Path) -> None:
        place.mkdir()
        (place / "model.safetensors.index.json").write_text(index)

    return make


def run_folder(spoil: Callable[[Path], object], part: str = "") -> Callable[[Path], object]:
    """The run, without its final weights, with something done to its newest checkpoint."""

    def make(place: Path) -> None:
        shutil.copytree(finished(), place, ignore=shutil.ignore_patterns("final"))
        spoil(place / "checkpoints" / "step_00000004")

    return make


def turned(seed: int) -> Callable[[Path], object]:
    return lambda place: place.write_bytes(flipped(save(plain()), random.Random(seed)))


def turned_pickle(seed: int) -> Callable[[Path], object]:
    def make(place: Path) -> None:
        torch.save({"ema": dict(list(plain().items()))}, place)
        place.write_bytes(flipped(place.read_bytes(), random.Random(seed)))

    return make


NAN = float("nan")
FILES: dict[str, Callable[[Path], object]] = {  # .safetensors
    "empty": raw(b""),
    "a text": raw(b"these are weights\n"),
    "JSON": raw(b"{}"),
    "an HTML page": raw(b"<!DOCTYPE html><html>404</html>"),
    "a pickle renamed": raw(pickle.dumps({"a": 1})),
    "a pickle with code renamed": raw(pickle.dumps(Code())),
    "a header length only": raw((8).to_bytes(8, "little")),
    "a header too long": raw(headed(2**62)),
    "a header one longer": raw(headed(55)),
    "a header one shorter": raw(headed(53)),
    "a header of no JSON": raw(headed(header=b"{" * 40)),
    "a header not UTF-8": raw(headed(header=b"\xff" * 40)),
    "data beyond the end": raw(headed(header=b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}')),
    "an unknown dtype": raw(headed(header=b'{"a":{"dtype":"F33","shape":[1],"data_offsets":[0,4]}}')),
    "no tensors": lambda place: save_file({}, place),
    "cut in the header": lambda place: place.write_bytes(save(plain())[:100]),
    "cut in the data": lambda place: place.write_bytes(save(plain())[:-100]),
    "longer than it says": lambda place: place.write_bytes(save(plain()) + b"more"),
    "a folder": lambda place: place.mkdir(),
    "a missing name": tensors(lambda w: w.pop(f"{LAYER}.weight") is None),
    "an extra name": tensors(lambda w: w.update(extra=torch.zeros(1))),
    "a block without a number": tensors(lambda w: w.update({"blocks.x.weight": torch.zeros(1)})),
    "a block of nothing": tensors(lambda w: w.update({"blocks.": torch.zeros(1)})),
    "names of another network": tensors(lambda w: {f"down_blocks.{n}": t for n, t in w.items()}),
    "a shape turned": first(lambda t: t.T.contiguous()),
    "a shape of none": first(lambda t: t.sum()),
    "a shape with an empty dimension": first(lambda t: t[:0]),
    "a wider network": each(lambda t: torch.cat([t, t]) if t.ndim else t),
    "whole numbers": each(lambda t: t.to(torch.int32)),
    "whole numbers in one tensor": first(lambda t: t.to(torch.int8)),
    "truth values": first(lambda t: t > 0),
    "complex numbers": first(lambda t: t.to(torch.complex64)),
    "NaN only": each(lambda t: torch.full_like(t, NAN)),
    "one NaN": first(lambda t: t.index_fill(0, torch.tensor([3]), NAN)),
    "one infinity": first(lambda t: t.index_fill(0, torch.tensor([3]), -float("inf"))),
    "an adapter beside weights": tensors(lambda w: w.update(lora())),
    "an adapter without its B": tensors(lambda w: {f"{LAYER}.lora_A": torch.ones(32, 2)}),
    "an adapter of two ranks": tensors(
        lambda w: {f"{LAYER}.lora_A": torch.ones(32, 2), f"{LAYER}.lora_B": torch.ones(3, 96)}
    ),
    "an adapter of vectors": tensors(lambda w: {f"{LAYER}.lora_A": torch.ones(32), f"{LAYER}.lora_B": torch.ones(96)}),
    "an adapter of another family": tensors(lambda w: lora(layers=("transformer_blocks.0.attn.to_q",))),
}
ADAPTERS: dict[str, Callable[[Path], object]] = {  # for a generator that is a LoRA of rank 2
    "weights without an adapter": tensors(lambda w: None),
    "another rank": tensors(lambda w: lora(3)),
    "another family's": tensors(lambda w: lora(layers=("transformer_blocks.0.attn.to_q",))),
    "one layer of two": tensors(lambda w: lora(layers=(LAYER,))),
    "without its B": tensors(lambda w: {n: t for n, t in lora().items() if n.endswith("A")}),
    "NaN": tensors(lambda w: {n: t * NAN for n, t in lora().items()}),
    "whole numbers": tensors(lambda w: {n: t.int() for n, t in lora().items()}),
    "a scale of NaN": tensors(lambda w: lora(), lora_scale="nan"),
    "a scale in words": tensors(lambda w: lora(), lora_scale="much"),
    "diffusers' settings broken": tensors(lambda w: lora(), lora_adapter_metadata="{"),
    "diffusers' settings a list": tensors(lambda w: lora(), lora_adapter_metadata="[]"),
    "PEFT's settings broken": beside("{"),
    "PEFT's settings without a rank": beside('{"lora_alpha": 2}'),
    "PEFT's settings of rank 0": beside('{"r": 0, "lora_alpha": 2}'),
    "PEFT's settings in words": beside('{"r": "two", "lora_alpha": 2}'),
    "PEFT's settings a list": beside("[]"),
    "an alpha of three": tensors(
        lambda w: (
            {f"{LAYER}.lora_A.weight": torch.ones(2, 32), f"{LAYER}.lora_B.weight": torch.ones(96, 2)}
            | {f"{LAYER}.alpha": torch.ones(3)}
        )
    ),
}
PICKLES: dict[str, Callable[[Path], object]] = {  # .pt
    "empty": raw(b""),
    "a text": raw(b"these are weights\n"),
    "safetensors renamed": lambda place: place.write_bytes(save(plain())),
    "a pickle with code": raw(pickle.dumps(Code())),
    "a zip with code": pickled(Code),
    "a list": pickled([1, 2]),
    "numbers as names": pickled({0: torch.zeros(1)}),
    "no tensors": pickled({"model": {"depth": 2}}),
    "sparse": pickled(lambda: {n: t.to_sparse() if t.ndim > 1 else t for n, t in plain().items()}),
    "on meta": pickled(lambda: {n: t.to("meta") for n, t in plain().items()}),
    "cut": lambda place: (torch.save(plain(), place), place.write_bytes(place.read_bytes()[:-500])),
}
FOLDERS: dict[str, Callable[[Path], object]] = {
    "no such": lambda place: None,
    "empty": lambda place: place.mkdir(),
    "a run without checkpoints": lambda place: (place / "checkpoints").mkdir(parents=True),
    "a run whose newest checkpoint lacks weights": run_folder(without(WEIGHTS)),
    "a run whose newest checkpoint has no manifest": run_folder(without("manifest.json")),
    "a run whose newest checkpoint was cut": run_folder(
        lambda c: (c / WEIGHTS).write_bytes((c / WEIGHTS).read_bytes()[:-4])
    ),
    "a run whose newest checkpoint has other numbers": run_folder(
        lambda c: (c / WEIGHTS).write_bytes((c / WEIGHTS).read_bytes()[:-4] + b"\0\0\0\1")
    ),
    "an index of no JSON": sharded("{"),
    "an index without a map": sharded("{}"),
    "an index that is a list": sharded("[]"),
    "an index of a missing shard": sharded(json.dumps({"weight_map": {"a": "x.safetensors"}})),
    "an index of numbers": sharded(json.dumps({"weight_map": {"a": 3}})),
}
RIGHT: dict[str, tuple[str, str, Callable[[Path], object]]] = {
    "untouched": ("student", "w.safetensors", tensors(lambda w: None)),
    "bf16": ("student", "w.safetensors", each(lambda t: t.bfloat16())),
    "fp64": ("student", "w.safetensors", each(lambda t: t.double())),
    "float8": ("student", "w.safetensors", each(lambda t: t.to(torch.float8_e4m3fn))),
    "DDP's names": ("student", "w.safetensors", tensors(lambda w: {f"module.{n}": t for n, t in w.items()})),
    "a .pt file": ("student", "w.pt", pickled(lambda: {"ema": plain()})),
    "a run": ("student", "other", run_folder(lambda checkpoint: None)),
    "an adapter": ("adapter", "w.safetensors", tensors(lambda w: lora(), lora_scale="0.5")),
    "an adapter for whole weights": ("student", "w.safetensors", tensors(lambda w: lora())),
    "a teacher": ("teacher", "w.safetensors", tensors(lambda w: None)),
    "a fake score": ("fake", "w.safetensors", tensors(lambda w: None)),
}


def cases(count: int) -> Iterator[Case]:
    # A small count is a sample for the test suite: every twelfth by hand, too.
    every = 1 if count >= 40 else 12
    for name, (role, file, make) in list(RIGHT.items())[::every]:
        yield Case(name, partial(start, role, file, make), "accepted")
    for role, file, kind in (
        ("student", "w.safetensors", FILES),
        ("teacher", "w.safetensors", FILES),
        ("adapter", "w.safetensors", ADAPTERS),
        ("student", "w.pt", PICKLES),
        ("student", "w", FOLDERS),
        ("fake", "w", FOLDERS),
    ):
        for name, make in list(kind.items())[::every]:
            yield Case(f"{role}: {file}: {name}", partial(start, role, file, make))
    for seed in range(count // 4):
        file, make = (("w.safetensors", turned), ("w.pt", turned_pickle))[seed % 2]
        yield Case(f"{file}: bytes turned by {seed}", partial(start, "student", file, make(seed)), "either")
