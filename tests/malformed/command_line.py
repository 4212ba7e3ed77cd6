"""Words behind the commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest.mock import patch

from hypothesis import strategies as st

from dmdr_fast import cli, evaluate, export, launch, sample
from dmdr_fast.plan import __main__ as planner

from . import Case, drawn, inside

TRAIN = [
    ["--seed"],
    ["--seed", ""],
    ["--seed", "-1"],
    ["--seed=x"],
    ["--see", "1"],
    ["--train", "3"],
    ["--train.generator_steps", "3", "4"],
    ["digits"],
    ["--"],
    ["--", "--seed", "1"],
    ["-x"],
    ["--config"],
    ["--config", ""],
    ["--config", "/"],
    ["--config", "no/where.yaml"],
    ["--config", "digit"],
    ["--config", "a" * 5000],
    ["--config", "\udcff"],
    ["--local_rank", "x"],
    ["--print_config"],
    ["--no_such", "1"],
    ["--ünïcode", "1"],
    ["--deepspeed.config", "/"],
    ["--deepspeed.config", "\udcff"],
    ["--resume=auto", "--rseume=never"],
    ["--reward.terms", "[{kind: digits"],
    ["--reward.terms", "{kind: nothing}"],
    ["--optimizer.generator.betas", "0.9"],
    ["--train.generator_steps", "{}"],
    ["--deepspeed.stage", "[" * 2000],
    ["--data.prompts", "no/where.txt", "--config", "sd35_large"],
]
LAUNCH = [["--num_gpus", "0"], ["--num_gpus", "x"], ["--num_gpus"], ["--num_gpus", "-2"], ["--master_port", "x"]]
PLAN = [["--gpus", "0"], ["--gpus", "x"], ["--config", "nothing"], [], ["--model", "no/such"], ["--seed", "1"]]
OTHER = [
    (export.main, words) for words in ([], ["no"], ["no", "out", "--dtype", "int3"], ["no", "out", "--wieghts", "x"])
]
OTHER += [(sample.main, words) for words in ([], ["no", "--prompts", "x"], ["no", "--prompts"], ["no", "--seed", "x"])]

OTHER += [
    (evaluate.main, [*words, "--out", "out"])
    for words in (["no"], ["no", "--prompts"], ["no", "--prompts", "x", "--seeds", "x"], ["no", "--rewards", "{", "]"])
]


def start(main: Callable[[list[str]], object], words: list[str], folder: Path) -> None:
    """``main(words)`` in ``folder``, with nothing of a launcher around it, and nothing printed."""
    with inside(folder), open(os.devnull, "w") as nowhere, patch.object(sys, "stdout", nowhere):
        main(words)


def parse(words: list[str]) -> None:
    """As train does before it loads anything, but for the digits that it would go on with."""
    from dmdr_fast.preflight import check

    config, _ = cli.parse(words)
    check(config)


def cases(count: int) -> Iterator[Case]:
    for words in TRAIN:
        yield Case(shown(words), partial(start, parse, words))
    for words in LAUNCH:
        yield Case(f"dmdr-train {shown(words)}", partial(start, launch.main, words))
    for words in PLAN:
        yield Case(f"dmdr-plan {shown(words)}", partial(start, planner.main, words))
    for main, words in OTHER:
        yield Case(f"{main.__module__} {shown(words)}", partial(start, main, words))
    yield Case("--print-config", partial(start, launch.main, ["--print-config"]), "accepted")
    flags = st.sampled_from([f"--{path}" for path, _ in cli.leaves()]) | st.text(max_size=8)
    for words in drawn(st.lists(flags | st.text(max_size=8) | st.integers().map(str), min_size=1, max_size=4), count):
        if not {"-h", "--help"} & set(words):
            yield Case(shown(words), partial(start, cli.parse, words), "either")


def shown(words: list[str]) -> str:
    return " ".join(ascii(word)[1:-1][:40] for word in words) or "(nothing)"
