"""DeepSpeed JSON files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from hypothesis import strategies as st

from dmdr_fast import cli
from dmdr_fast.config.deepspeed_json import DeepSpeedJSON, DeepSpeedOptimizer
from dmdr_fast.deepspeed_json import REFUSED
from dmdr_fast.engine.engines import engine_config

from . import Case, drawn
from .configuration import VALUES

BROKEN = {
    "empty": "",
    "a list": "[1]",
    "a list of keys": '[{"bf16": {"enabled": true}}]',
    "null": "null",
    "a word": '"auto"',
    "a number": "3",
    "unclosed": '{"zero_optimization": {"stage": 3}',
    "a comma too many": '{"zero_optimization": {"stage": 0},}',
    "a comment": '{"aio": {} // none\n}',
    "a key twice": '{"aio": {"queue_depth": 8}, "aio": {}}',
    "deep": "[" * 100_000,
    "deep groups": '{"aio":' * 50_000,
    "not UTF-8": b'{"\xff": 1}',
    "nan": '{"gradient_predivide_factor": NaN}',
    "nan where we own": '{"gradient_clipping": NaN}',
    "an endless number": '{"steps_per_print": 1e999}',
    "many digits": '{"steps_per_print": ' + "9" * 5000 + "}",
    "a scheduler": '{"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.5}}}',
    "another stage": '{"zero_optimization": {"stage": 2}}',
    "bf16 over fp32": '{"bf16": {"enabled": true}}',
    "a misspelt group": '{"zero_optimisation": {"stage": 3}}',
    "an optimizer without a type": '{"optimizer": {"params": {}}}',
    "an optimizer of null": '{"optimizer": {"type": null}}',
    "a group of null": '{"zero_optimization": null}',
    "a lone surrogate": '{"\\ud800": 1}',
}
RIGHT = {
    "a byte order mark": b"\xef\xbb\xbf{}",
    "nothing": "{}",
    "auto": '{"bf16": {"enabled": "auto"}, "gradient_clipping": "auto", "zero_optimization": {"stage": "auto"}}',
    "a DeepSpeed AdamW": '{"optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": true}}}',
    "the same again": '{"zero_optimization": {"stage": 0}, "bf16": {"enabled": false}, "gradient_clipping": 1.0}',
}
KEYS = [path for path, _ in cli.leaves(DeepSpeedJSON) if path != "optimizer"]
KEYS += [f"optimizer.{path}" for path, _ in cli.leaves(DeepSpeedOptimizer)]


def start(content: str | bytes, folder: Path) -> None:
    """The settings of an engine with this file on top."""
    file = folder / "ds.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    config = cli.parse(["--deepspeed.config", str(file)])[0]
    json.dumps(engine_config(config, trained=True))


def cases(count: int) -> Iterator[Case]:
    for name, content in BROKEN.items():
        yield Case(name, partial(start, content))
    for name, content in RIGHT.items():
        yield Case(name, partial(start, content), "accepted")
    for name in REFUSED:
        yield Case(name, partial(start, json.dumps({name: {}})))
    for path in KEYS:
        yield Case(f"{path}: a group", partial(start, nested(path, {"no": 1})))
        yield Case(f"{path} misspelt", partial(start, nested(path[:-2] + path[-1], 1)))
    for value in drawn(VALUES, count // 2):
        yield Case(f"{value!r}", partial(start, json.dumps(value)), "either")
    for path, value in drawn(st.tuples(st.sampled_from(KEYS), VALUES), count - count // 2):
        yield Case(f"{path}: {value!r}", partial(start, nested(path, value)), "either")


def nested(path: str, value: object) -> str:
    for name in reversed(path.split(".")):
        value = {name: value}
    return json.dumps(value)
