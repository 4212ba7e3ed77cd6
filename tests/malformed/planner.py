"""What the planner is asked about: shapes in JSON, numbers of a machine; a plan, or a line of what is wrong."""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from hypothesis import strategies as st

from dmdr_fast.plan import __main__ as planner

from ..families import saved
from . import Case, contents, drawn, inside

SMALL = ["--resolution", "16", "--gpus", "2", "--batch", "1"]
NETWORK, VAE, INDEX = "transformer/config.json", "vae/config.json", "model_index.json"
NUMBERS = ("--gpus", "--gpu-memory", "--flops", "--utilisation", "--convolutions", "--network", "--latency")
NUMBERS += ("--gpus-per-node", "--nvlink", "--reserve", "--resolution", "--batch", "--student-lora")
WRONG = ("0", "-1", "nan", "inf", "x", "", "1e400", "-0.5", "10000000000000000000000", "true", "١")


@functools.cache
def _folder() -> TemporaryDirectory:
    return TemporaryDirectory(prefix="dmdr_fast-malformed-")


@functools.cache
def pipeline() -> Path:
    """The JSON files of a small SD3 pipeline."""
    whole, light = saved("sd3", Path(_folder().name)), Path(_folder().name) / "json"
    for file in whole.rglob("*.json"):
        place = light / file.relative_to(whole)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)
    return light


def plan(words: list[str], folder: Path) -> None:
    with inside(folder), open(os.devnull, "w") as nowhere, patch.object(sys, "stdout", nowhere):
        assert planner.main(words) in (0, 1)


def shaped(name: str, change: Callable[[Any], Any], folder: Path) -> None:
    """A plan of the pipeline with one JSON file changed: another value, text or bytes; None removes it."""
    shutil.copytree(pipeline(), folder / "p")
    file = folder / "p" / name
    content = change(json.loads(file.read_text()))
    file.unlink()
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    before = contents(folder)
    try:
        plan(["--model", str(folder / "p"), *SMALL], folder)
    finally:
        assert contents(folder) == before


def with_key(key: str, value: Any) -> Callable[[Any], Any]:
    return lambda config: config | {key: value}


def without_key(key: str) -> Callable[[Any], Any]:
    return lambda config: {name: value for name, value in config.items() if name != key}


BROKEN: dict[str, Callable[[Any], Any]] = {
    "missing": lambda config: None,
    "empty": lambda config: b"",
    "no JSON": lambda config: b"{",
    "not UTF-8": lambda config: b'{"a": "\xff"}',
    "a list": lambda config: [],
    "a number": lambda config: 3,
    "null": lambda config: b"null",
    "deep": lambda config: b"[" * 100_000,
    "nothing in it": lambda config: {},
    "of another class": with_key("_class_name", "NoSuchThing"),
    "a class as a number": with_key("_class_name", 3),
}
KEYS: dict[str, tuple[Any, ...]] = {
    "num_layers": (0, -1, "two", None, 2.5, [2], True),
    "num_attention_heads": (0, -1, "two", None, 2.5),
    "attention_head_dim": (0, -8, "wide", None),
    "joint_attention_dim": (0, -1, "wide", None),
    "patch_size": (0, -2, "2", None, 3),
    "in_channels": (0, -4, "4", None),
    "caption_projection_dim": (0, "x", 7),
    "pooled_projection_dim": (0, None, "x"),
    "pos_embed_max_size": (0, -1, None),
    "dual_attention_layers": ("x", [9], 3, None),
}
VAE_KEYS: dict[str, tuple[Any, ...]] = {
    "block_out_channels": ([], [0], "x", None, 3),
    "latent_channels": (0, "x", None),
    "norm_num_groups": (0, 7, None),
}


def cases(count: int) -> Iterator[Case]:
    yield Case("untouched", partial(shaped, NETWORK, lambda config: config), "accepted")
    for name in (NETWORK, VAE, INDEX):
        for what, change in BROKEN.items():
            yield Case(f"{name}: {what}", partial(shaped, name, change))
    # A small count is a sample for the test suite: every 24th of what may be right.
    every = 1 if count >= 40 else 24
    keys = [(NETWORK, key, value) for key, values in KEYS.items() for value in values]
    keys += [(VAE, key, value) for key, values in VAE_KEYS.items() for value in values]
    for name, key, value in keys[::every]:
        yield Case(f"{name}: {key}: {value!r}", partial(shaped, name, with_key(key, value)), "either")
    for name in (NETWORK, VAE):
        for key in sorted(json.loads((pipeline() / name).read_text()))[::every]:
            yield Case(f"{name}: no {key}", partial(shaped, name, without_key(key)), "either")
    words = ["--model", str(pipeline()), *SMALL]
    for flag in NUMBERS:
        for value in WRONG[::every]:
            yield Case(f"{flag} {value!r}", partial(plan, [*words, f"{flag}={value}"]), "either")
    for flags in (
        ["--sharing", "x"],
        ["--activation", "x"],
        ["--model", "no/such"],
        ["--model", "/"],
        ["--model", "a" * 5000],
    ):
        yield Case(" ".join(flags)[:40], partial(plan, [*words, *flags]))
    for resolution in ("17", "1", "1000003"):
        yield Case(f"--resolution {resolution}", partial(plan, [*words, "--resolution", resolution]))
    yield Case("a SiT at another resolution", partial(plan, ["--model", "sit-xl-2", "--resolution", "1024"]))
    flags = st.tuples(st.sampled_from(NUMBERS), st.floats() | st.integers() | st.text(max_size=4))
    for flag, value in drawn(flags, count // 4):
        yield Case(f"{flag}={value!r}", partial(plan, [*words, f"{flag}={value}"]), "either")
