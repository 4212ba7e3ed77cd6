"""The run's log: exact records, no duplicates after a resume, nothing from ranks that do not log."""

import json
import logging
import sys
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dmdr_fast.engine.logs import RunLog
from dmdr_fast.errors import UserError


def records(run_dir):
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


def scalars(run_dir, name):
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(e.step, e.value) for e in events.Scalars(name)]


def test_records_are_on_disk_at_once_and_tensorboard_has_them_after_close(tmp_path):
    run_log = RunLog(tmp_path, total_steps=4, start_step=0)
    run_log.log(1, "cold_start", {"fake_loss": 0.5, "reward": -0.25})
    assert records(tmp_path) == [{"step": 1, "phase": "cold_start", "fake_loss": 0.5, "reward": -0.25}]
    run_log.log(3, "dmdr", {"fake_loss": 0.125})
    run_log.close()
    assert records(tmp_path)[1] == {"step": 3, "phase": "dmdr", "fake_loss": 0.125}
    assert scalars(tmp_path, "fake_loss") == [(1, 0.5), (3, 0.125)]


def test_nan_and_inf_are_null_in_the_strictest_json(tmp_path):
    run_log = RunLog(tmp_path, total_steps=1, start_step=0)
    run_log.log(0, "cold_start", {"a": float("nan"), "b": float("-inf"), "c": 1.0})
    run_log.close()

    def refuse(constant):
        raise AssertionError(constant)

    line = (tmp_path / "log.jsonl").read_text()
    assert json.loads(line, parse_constant=refuse) == {
        "step": 0,
        "phase": "cold_start",
        "a": None,
        "b": None,
        "c": 1.0,
    }


def test_a_resumed_log_is_that_of_a_run_that_never_stopped(tmp_path, caplog):
    def run(directory, start, stop):
        directory.mkdir(exist_ok=True)
        run_log = RunLog(directory, total_steps=6, start_step=start)
        for step in range(start, stop):
            run_log.log(step, "cold_start" if step < 3 else "dmdr", {"reward": step / 8})
        run_log.close()

    run(tmp_path / "whole", 0, 6)
    run(tmp_path / "killed", 0, 5)
    with (tmp_path / "killed" / "log.jsonl").open("a") as stream:
        stream.write('{"step": 5, "phase": "dm')  # the write that SIGKILL cut off
    with caplog.at_level(logging.WARNING):
        run(tmp_path / "killed", 4, 6)  # its last checkpoint was after 4 steps
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert (killed / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()
    assert scalars(killed, "reward") == scalars(whole, "reward") == [(step, step / 8) for step in range(6)]
    assert "1 unreadable line(s)" in caplog.text
    run(whole, 0, 1)
    assert [r["step"] for r in records(whole)] == [0]


def test_the_progress_bar_shows_step_rate_losses_reward_and_memory(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run_log = RunLog(tmp_path, total_steps=200, start_step=50)
    metrics = {
        "samples_per_second": 1234.0,
        "fake_loss": 0.4321,
        "dmd_loss": 0.111,
        "reward": -0.05,
        "gpu_memory_bytes": 3.5 * 2**30,
        "host_memory_bytes": 2.0**30,
    }
    run_log.log(99, "dmdr", metrics)
    run_log.close()
    shown = capsys.readouterr().err
    assert "dmdr" in shown and "100/200" in shown
    assert "samples/s 1234 · fake 0.4321 · dmd 0.111 · reward -0.05 · mem 3.50 GiB" in shown


def test_a_rank_that_does_not_log_writes_and_shows_nothing(tmp_path, capsys):
    run_log = RunLog(tmp_path, total_steps=4, start_step=0, wandb="project", enabled=False)
    run_log.log(0, "cold_start", {"reward": 1.0})
    run_log.close()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr() == ("", "")


def test_wandb_that_is_asked_for_and_missing_is_an_error_in_words(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"log\.wandb .*'my-project'.*not installed: pip install wandb"):
        RunLog(tmp_path, total_steps=1, start_step=0, wandb="my-project")


def test_wandb_gets_every_record_and_a_resumed_run_goes_on_in_the_same_one(tmp_path, monkeypatch):
    calls = []

    def init(**kwargs):
        calls.append(kwargs)
        return SimpleNamespace(
            log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("finished")
        )

    ids = iter(["first", "second"])
    fake = SimpleNamespace(init=init, util=SimpleNamespace(generate_id=lambda: next(ids)))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for start in (0, 1):
        run_log = RunLog(tmp_path, total_steps=2, start_step=start, wandb="project")
        run_log.log(start, "dmdr", {"reward": 2.0})
        run_log.close()
    assert [call["id"] for call in calls if isinstance(call, dict)] == ["first", "first"]
    assert calls[0]["project"] == "project" and calls[0]["resume"] == "allow"
    assert [call for call in calls if not isinstance(call, dict)] == [
        (0, {"phase": "dmdr", "reward": 2.0}),
        "finished",
        (1, {"phase": "dmdr", "reward": 2.0}),
        "finished",
    ]
