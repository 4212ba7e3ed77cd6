"""Checkpoints of a real run, spoiled: it goes on from an intact one, says so and ends as ever, or refuses."""

from __future__ import annotations

import json
import pickle
import random
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from safetensors.torch import load_file, save_file

from dmdr_fast.engine.checkpoint import MANIFEST, _sha256

from . import Case, contents
from .runs import FINAL, finished, flipped, go

WEIGHTS, MOMENTS = "generator/weight.00000.safetensors", "fake/exp_avg.00000.safetensors"
FILES = (WEIGHTS, MOMENTS, "generator/ema.00000.safetensors", "fake/parts.00000.json", "trainer.json")
FILES += ("random.00000.json", MANIFEST)
Spoil = Callable[[Path], object]  # of the newest checkpoint, that of step 3


class Code:
    """A pickle that leaves a file behind."""

    def __reduce__(self):
        return open, ("ran", "w")


def start(spoil: Spoil, first: int | None, folder: Path) -> None:
    """A run to its end after ``spoil``, from checkpoint ``first`` (None: any); no file is lost, no pickle runs."""
    run = folder / "run"
    shutil.copytree(finished(), run, ignore=shutil.ignore_patterns("step_00000004", "final"))
    spoil(run / "checkpoints" / "step_00000003")
    before = contents(run / "checkpoints") if (run / "checkpoints").is_dir() else {}
    try:
        said = go(run)
    finally:
        after = contents(run)
        lost = [name for name, digest in before.items() if digest not in after.values()]
        assert not lost, f"lost: {lost}"
        assert not (folder / "ran").exists(), "a pickle was run"
    found = re.search(r"resumed from \S+, step (\d)", said)
    assert found, "it started anew"
    assert int(found[1]) == (first or int(found[1])), f"it went on from step {found[1]}"
    assert int(found[1]) == 3 or " refused: " in said, "it took an older one without a word"
    assert (run / FINAL).read_bytes() == (finished() / FINAL).read_bytes(), "it ended with other weights"


def edited(name: str, change: Callable[[dict], object], *, signed: bool = False) -> Spoil:
    """A JSON file changed; ``signed`` with the manifest made to fit."""

    def spoil(checkpoint: Path) -> None:
        content = json.loads((checkpoint / name).read_text())
        change(content)
        (checkpoint / name).write_text(json.dumps(content))
        if signed:
            sign(checkpoint)

    return spoil


def sign(checkpoint: Path) -> None:
    files = sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != MANIFEST)
    entries = {str(p.relative_to(checkpoint)): [p.stat().st_size, _sha256(p)] for p in files}
    (checkpoint / MANIFEST).write_text(json.dumps(entries))


def written(name: str, content: bytes, *, signed: bool = False) -> Spoil:
    def spoil(checkpoint: Path) -> None:
        (checkpoint / name).write_bytes(content)
        if signed:
            sign(checkpoint)

    return spoil


def without(name: str, *, signed: bool = False) -> Spoil:
    def spoil(checkpoint: Path) -> None:
        (checkpoint / name).unlink()
        if signed:
            sign(checkpoint)

    return spoil


def renamed(name: str) -> Spoil:
    return lambda checkpoint: checkpoint.rename(checkpoint.parent / name)


def turned(name: str, seed: int) -> Spoil:
    """A file with bytes changed."""
    return lambda c: (c / name).write_bytes(flipped((c / name).read_bytes(), random.Random(seed)))


def emptied(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def replaced(checkpoint: Path) -> None:
    """A file in place of the folder."""
    shutil.rmtree(checkpoint)
    checkpoint.write_text("moved")


def linked(checkpoint: Path) -> None:
    """A link in place of the folder, to one that is no checkpoint."""
    checkpoint.rename(checkpoint.parent.parent / "elsewhere")
    (checkpoint.parent.parent / "elsewhere" / MANIFEST).unlink()
    checkpoint.symlink_to("../elsewhere")


def partial_beside(checkpoint: Path) -> None:
    """What a write that was killed leaves."""
    shutil.copytree(checkpoint, checkpoint.parent / ".step_00000009.partial")
    (checkpoint.parent / ".step_00000009.partial" / MANIFEST).unlink()


def partly_renamed(checkpoint: Path) -> None:
    """A copy without its manifest, under the name of a finished one."""
    (checkpoint / MANIFEST).unlink()


def all_of(spoil: Spoil) -> Spoil:
    return lambda checkpoint: [spoil(path) for path in sorted(checkpoint.parent.glob("step_*"))]


def no_folder(checkpoint: Path) -> None:
    checkpoint.parent.rename(checkpoint.parent.parent / "kept")
    checkpoint.parent.write_text("on tape")


def configuration(checkpoint: Path) -> None:
    """An edit of what a run wrote of itself: the words of the start count."""
    (checkpoint.parent.parent / "config.yaml").write_text("seed: 7\ntrain: [")


def unnamed(checkpoint: Path) -> None:
    """A tensor under another name, in a file that fits its checksum."""
    tensors = load_file(checkpoint / WEIGHTS)
    save_file({f"another.{name}": tensor for name, tensor in tensors.items()}, checkpoint / WEIGHTS)
    sign(checkpoint)


def cut(name: str) -> Spoil:
    return lambda c: (c / name).write_bytes((c / name).read_bytes()[:-7])


TRAINER, RANDOM = partial(edited, "trainer.json", signed=True), partial(edited, "random.00000.json", signed=True)
OLDER: dict[str, Spoil] = {  # goes on from step 2
    **{f"{name} cut": cut(name) for name in FILES},
    **{f"{name} empty": written(name, b"") for name in FILES},
    **{f"{name} missing": without(name) for name in FILES},
    "manifest: a list": written(MANIFEST, b"[]"),
    "manifest: a list of names": written(MANIFEST, b'["trainer.json"]'),
    "manifest: nothing in it": written(MANIFEST, b"{}"),
    "manifest: deep": written(MANIFEST, b"[" * 100_000),
    "manifest: not UTF-8": written(MANIFEST, b"\xff\xfe"),
    "manifest: a checksum wrong": edited(MANIFEST, lambda m: m.update({WEIGHTS: [m[WEIGHTS][0], "0" * 64]})),
    "manifest: a size wrong": edited(MANIFEST, lambda m: m.update({WEIGHTS: [0, m[WEIGHTS][1]]})),
    "manifest: an entry of null": edited(MANIFEST, lambda m: m.update({WEIGHTS: None})),
    "manifest: weights not listed": edited(MANIFEST, lambda m: m.pop(WEIGHTS)),
    "manifest: moments not listed": edited(MANIFEST, lambda m: m.pop(MOMENTS)),
    "manifest: a name too long": edited(MANIFEST, lambda m: m.update({"a" * 5000: [0, ""]})),
    "manifest: a zero byte in a name": edited(MANIFEST, lambda m: m.update({"a\0": [0, ""]})),
    "manifest: a folder as a file": edited(MANIFEST, lambda m: m.update({"generator": [0, ""]})),
    "manifest: outside": edited(MANIFEST, lambda m: m.update({"../../../nothing": [0, ""]})),
    "signed: weights gone": without(WEIGHTS, signed=True),
    "signed: random states gone": without("random.00000.json", signed=True),
    "signed: trainer.json broken": written("trainer.json", b"{", signed=True),
    "signed: trainer.json a list": written("trainer.json", b"[]", signed=True),
    "signed: no settings": TRAINER(lambda t: t.pop("settings")),
    "signed: empty settings": TRAINER(lambda t: t["settings"].clear()),
    "signed: step as text": TRAINER(lambda t: t.update(step="3")),
    "signed: step negative": TRAINER(lambda t: t.update(step=-3)),
    "signed: another step": TRAINER(lambda t: t.update(step=1)),
    "signed: counters of a newer version": TRAINER(lambda t: t["counters"].update(new=1)),
    "signed: counters as text": TRAINER(lambda t: t["counters"].update(skipped="no")),
    "signed: intervals as text": TRAINER(lambda t: t["counters"].update(beyond="no")),
    "signed: rewards as text": TRAINER(lambda t: t.update(rewards="no")),
    "signed: ranks as text": TRAINER(lambda t: t["settings"].update(ranks="two")),
    "of an older version": edited(MANIFEST, lambda m: m.update({"rank_00000.pt": [0, ""]})),
    "under another step's name": renamed("step_00000007"),
    "an empty folder": emptied,
    "a file as folder": replaced,
    "a link as folder": linked,
    "no manifest yet": partly_renamed,
}
AS_EVER: dict[str, Spoil] = {  # goes on from step 3
    "untouched": lambda checkpoint: None,
    "a partial one beside": partial_beside,
    "a planted pickle": written("generator/blocks.00000.pt", pickle.dumps(Code())),
    "a planted pickle of older versions": written("rank_00000.pt", pickle.dumps(Code())),
    "other folders beside": lambda c: (c.parent / "step_best").mkdir(),
    "config.yaml edited": configuration,
}
REFUSED: dict[str, Spoil] = {
    "all without a manifest": all_of(partly_renamed),
    "all cut": all_of(cut(WEIGHTS)),
    "all empty": all_of(emptied),
    "a file as checkpoints": no_folder,
    "signed: of another run": TRAINER(lambda t: t["settings"].update(seed=5)),
    "signed: of another teacher": TRAINER(lambda t: t["settings"].update(teacher="x (sha256 0123)")),
    "signed: random states broken": RANDOM(lambda r: r.update(torch="!")),
    "signed: random states cut": RANDOM(lambda r: r.update(torch=r["torch"][:8])),
    "signed: random states without NumPy": RANDOM(lambda r: r.pop("numpy")),
    "signed: Python's random states as text": RANDOM(lambda r: r.update(python="no")),
    "signed: random states as a list": written("random.00000.json", b"[]", signed=True),
    "signed: weights no safetensors": written(WEIGHTS, b"no", signed=True),
    "signed: a pickle as weights": written(WEIGHTS, pickle.dumps(Code()), signed=True),
    "signed: weights by other names": unnamed,
    "signed: average gone": without("generator/ema.00000.safetensors", signed=True),
    "signed: parts of nothing": edited("generator/parts.00000.json", lambda p: p["parts"].clear(), signed=True),
    "signed: parts as text": written("generator/parts.00000.json", b'"no"', signed=True),
}


def cases(count: int) -> Iterator[Case]:
    for name, spoil in AS_EVER.items():
        yield Case(name, partial(start, spoil, 3), "accepted")
    # A small count is a sample for the test suite: every twelfth by hand, too.
    every = 1 if count >= 40 else 12
    for name, spoil in list(OLDER.items())[::every]:
        yield Case(name, partial(start, spoil, 2), "accepted")
    for name, spoil in list(REFUSED.items())[::every]:
        yield Case(name, partial(start, spoil, None))
    for seed in range(count // 4):
        name = FILES[seed % len(FILES)]
        yield Case(f"{name}: bytes turned by {seed}", partial(start, turned(name, seed), None), "either")
