"""Compiled blocks: each phase compiles its graphs in its first update, and none after that."""

from __future__ import annotations

import json

import pytest
import torch

from dmdr_fast import cli
from dmdr_fast.engine import compute, trainer
from tests.tiers import sampled

from .conftest import SMALL

THREE = ["--train.cold_start_steps", "1", "--train.generator_steps", "3", "--train.fake_updates", "1"]
# Graphs that RL adds in its first update. grpo: the frozen reference's own; dpo: batches of half the size, of winners
# and losers, with and without grad, and with the LoRA off for the reference.
METHODS = {
    "grpo": ("--rl.method grpo --rl.grpo.group_size 4 --student.steps 2 --rl.kl_weight 0.1", 1),
    "dpo": ("--rl.method dpo --rl.dpo.group_size 4 --student.lora.rank 4", 3),
}


@pytest.mark.parametrize("method", sampled(METHODS))
def test_nothing_is_compiled_after_a_phase_s_first_update(monkeypatch, tmp_path, method):
    monkeypatch.setattr(compute, "BACKEND", "eager")  # captured whole, run as they are
    monkeypatch.setattr(torch._logging._internal.trace_log, "propagate", False)  # pytest would keep megabytes of it
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options, more = METHODS[method]
    words = [*SMALL, *THREE, *options.split(), "--compute.blocks", "compiled", "--run_dir", str(tmp_path)]
    try:
        trainer.train(cli.parse(words)[0])
        log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        first = log[0]["compilations"]
        assert [line["compilations"] for line in log] == [first, first + more, first + more]
        assert compute.compiled_graphs() == first + more
    finally:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
