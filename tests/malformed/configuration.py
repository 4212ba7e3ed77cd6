"""YAML files: broken ones, and every key with a value that it does not take."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from hypothesis import strategies as st

from dmdr_fast import cli
from dmdr_fast.preflight import check

from . import Case, contents, drawn, inside

BROKEN = {
    "tabs": "train:\n\tgenerator_steps: 3\n",
    "a list": "- 1\n",
    "a word": "digits\n",
    "a number": "3\n",
    "unclosed": "train: {generator_steps: 3\n",
    "two documents": "seed: 1\n---\nseed: 2\n",
    "a key twice": "train: {fake_updates: 2}\ntrain: {generator_steps: 600}\n",
    "a key twice inside": "train: {fake_updates: 2, fake_updates: 3}\n",
    "a number as key": "1: 2\n",
    "null as key": "null: 2\n",
    "a list as key": "[1, 2]: 3\n",
    "a list as key inside": "train: {[1]: 3}\n",
    "a Python object": "seed: !!python/object/apply:os.getcwd []\n",
    "an unknown tag": "seed: !secret 3\n",
    "binary": "seed: !!binary aGVsbG8=\n",
    "a date": "seed: 2024-01-01\n",
    "an unknown alias": "seed: *nothing\n",
    "an alias of itself": "train: &a {generator_steps: *a}\n",
    "deep": "seed: " + "[" * 3000 + "]" * 3000 + "\n",
    "laughs": "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)),
    "not UTF-8": b"seed: \xff\xfe\n",
    "UTF-16 cut": "seed: 1\n".encode("utf-16")[:-1],
    "a zero byte": b"seed: \0\n",
    "a zero byte in a path": 'run_dir: "a\\0b"\n',
    "a path too long": f"run_dir: {'a' * 5000}\n",
    "a group as a number": "train: 3\n",
    "a group as a list": "train: [3]\n",
    "unknown": "train: {generator_step: 3}\n",
    "unknown at the top": "trian: {}\n",
    "an unknown group": "train: {deeper: {still: 1}}\n",
    "a dotted key": "train.generator_steps: 3\n",
    "a reward of no kind": "reward: {terms: [{knd: digits}]}\n",
    "a reward without": "reward: {terms: [digits]}\n",
    "a reward by a missing file": "reward: {terms: [{kind: 'no/such.py:Name'}]}\n",
    "a reward by a missing module": "reward: {terms: [{kind: 'no.such:Name'}]}\n",
    "true as a number": "train: {generator_steps: true}\n",
    "true as a fraction": "student: {ema: true}\n",
    "nan": "renoise: {mean: .nan}\n",
    "inf": "reward: {terms: [{kind: digits, weight: .inf}]}\n",
    "a teacher's seed beyond 64 bits": f"teacher: {{train: {{seed: {10**30}}}}}\n",
    "betas of three": "optimizer: {generator: {betas: [0.9, 0.99, 0.999]}}\n",
}
RIGHT = {
    "a seed beyond 64 bits": f"seed: {10**30}\n",
    "nothing": "",
    "a comment": "# digits\n",
    "null": "null\n",
    "an empty group": "train: {}\n",
}
RUNS = {"data": "--teacher.train.data=digits", "method": "--rl.method=none"}  # without these no run is whole
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def start(content: str | bytes, folder: Path) -> None:
    """What ``dmdr-train --config FILE`` does before it loads anything; the file survives, the result is read back."""
    file = folder / "mine.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = contents(folder)
    try:
        with inside(folder):
            flags = [flag for name, flag in RUNS.items() if f'"{name}"' not in str(content)]
            config = cli.parse(["--config", str(file), *flags])[0]
            check(config)
            file.with_suffix(".resolved").write_text(cli.dump(config))
            assert cli.load(file.with_suffix(".resolved")) == config
    finally:
        after = contents(folder)
        assert all(after.get(name) == digest for name, digest in before.items())


def cases(count: int) -> Iterator[Case]:
    for name, content in BROKEN.items():
        yield Case(name, partial(start, content))
    for name, content in RIGHT.items():
        yield Case(name, partial(start, content), "accepted")
    keys = [path for path, _ in cli.leaves()]
    for path in keys:
        yield Case(f"{path}: a group", partial(start, nested(path, {"no": 1})))
    for path, value in drawn(st.tuples(st.sampled_from(keys), VALUES), count):
        yield Case(f"{path}: {value!r}", partial(start, nested(path, value)), "either")


def nested(path: str, value: object) -> str:
    """The YAML (which JSON is, but for nan and surrogates) of one dotted key."""
    for name in reversed(path.split(".")):
        value = {name: value}
    return json.dumps(value).replace("NaN", ".nan").replace("-Infinity", "-.inf").replace("Infinity", ".inf")
