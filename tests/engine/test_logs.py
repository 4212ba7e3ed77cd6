"""The run's log: exact records, no duplicates after a resume, nothing from ranks that do not log."""

import io
import json
import logging
import sys
import time

import numpy as np
import pytest
from PIL import Image
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


@pytest.fixture
def offline(monkeypatch):
    """The real package, which needs neither a key nor a network like this."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    import wandb

    wandb.teardown()  # its settings are the process's
    yield
    wandb.teardown()


def wandb_history(file, seconds=20):
    """(step, values) of every logged line of an offline run: protocol buffers in LevelDB's log format.

    wandb's own process writes them, on a busy machine a little after it said so.
    """
    end = time.monotonic() + seconds
    while not (lines := wandb_lines(file)) and time.monotonic() < end:
        time.sleep(0.1)
    return lines


def wandb_lines(file):
    from wandb.proto.wandb_internal_pb2 import Record

    content, lines, at, record = file.read_bytes(), [], 7, b""  # ":W&B", a magic number, a version
    while at < len(content):
        if 32768 - at % 32768 < 7:  # a block's last bytes, where no header fits
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        record += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            history, record = Record.FromString(record).history, b""
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in history.item}
            lines += [(history.step.num, items)] if items else []
    return lines


def test_wandb_gets_records_evaluations_and_sheets_and_a_resumed_run_goes_on_in_the_same_one(tmp_path, offline):
    sheet = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    for start in (0, 1):
        run_log = RunLog(tmp_path, total_steps=2, start_step=start, wandb="project")
        run_log.log(start, "dmdr", {"reward": 2.0 + start})
        run_log.evaluation(start, {"fd": 1.5, "accuracy": None}, sheet)
        run_log.close()
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert [file.stem for file in files] == [f"run-{(tmp_path / 'wandb_id').read_text()}"] * 2
    for start, lines in enumerate(map(wandb_history, files)):
        assert {step for step, _ in lines} == {start}
        values = {name: value for _, line in lines for name, value in line.items()}
        assert (values["phase"], values["reward"], values["evaluation/fd"]) == ("dmdr", 2.0 + start, 1.5)
        assert "evaluation/accuracy" not in values
    pictures = list(tmp_path.glob("wandb/offline-run-*/files/media/images/samples_*.png"))
    assert len(pictures) == 2 and all((np.asarray(Image.open(p)) == sheet).all() for p in pictures)


def test_wandb_without_a_key_is_an_error_in_words(tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    import wandb

    wandb.teardown()
    with pytest.raises(UserError, match=r"^log\.wandb: No API key configured.*WANDB_MODE=offline") as error:
        RunLog(tmp_path, total_steps=1, start_step=0, wandb="project")
    assert "\n" not in str(error.value) and not (tmp_path / "wandb_id").exists()


def test_tensorboard_has_evaluations_and_sheets(tmp_path):
    sheet = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    run_log = RunLog(tmp_path, total_steps=4, start_step=0)
    run_log.evaluation(1, {"fd": 2.5, "held_out_reward": None}, sheet)
    run_log.evaluation(3, {"fd": 1.25, "held_out_reward": -0.5}, 255 - sheet)
    # on disk before the log is closed
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert scalars(tmp_path, "evaluation/fd") == [(1, 2.5), (3, 1.25)]
    assert scalars(tmp_path, "evaluation/held_out_reward") == [(3, -0.5)]
    drawn = [(i.step, np.asarray(Image.open(io.BytesIO(i.encoded_image_string)))) for i in events.Images("samples")]
    assert [step for step, _ in drawn] == [1, 3]
    assert (drawn[0][1] == sheet).all() and (drawn[1][1] == 255 - sheet).all()
    run_log.close()


def test_a_resumed_log_knows_how_long_the_run_had_trained(tmp_path):
    run_log = RunLog(tmp_path, total_steps=4, start_step=0)
    assert run_log.elapsed_before == 0.0
    for step in range(3):
        run_log.log(step, "dmdr", {"elapsed_seconds": 10.0 * (step + 1)})
    run_log.close()
    run_log = RunLog(tmp_path, total_steps=4, start_step=2)
    assert run_log.elapsed_before == 20.0
    run_log.close()
