"""The tally of killed runs tells equal bytes from others, and where a kill fell."""

import random

import pytest

from tests.torture import COMBINATIONS, COMPARED, FINAL, PHASES, Combination, differing, phase, shares, torture


@pytest.mark.thorough
def test_a_killed_run_ends_with_equal_bytes(tmp_path, environment):
    outcomes = list(torture(Combination("shared_score", 0, "eager"), 1, random.Random(0), tmp_path))
    assert sum(len(outcome.kills) for outcome in outcomes) == 1
    assert [outcome.differs for outcome in outcomes] == [""] * len(outcomes)


def test_parts_add_up_to_the_whole():
    whole = shares(40)
    assert list(whole) == COMBINATIONS and sum(whole.values()) == 40 and set(whole.values()) == {3, 4}
    for parts in (("separate", "shared_score", "shared_all"), ("stage-0", "stage-3"), ("eager", "compiled")):
        assert sum(n for part in parts for c, n in whole.items() if part in str(c)) == 40


def test_bytes_that_differ_and_files_that_are_missing_are_named(tmp_path):
    for name in COMPARED:
        for run, content in (("whole", b"0123"), ("other", b"0124" if name == FINAL else b"0123")):
            (tmp_path / run / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / run / name).write_bytes(content)
    whole, other = tmp_path / "whole", tmp_path / "other"
    assert differing(whole, whole) == ""
    assert differing(other, whole).startswith(f"{FINAL} ") and "cold_start" not in differing(other, whole)
    for name in COMPARED:
        assert f"{name} -" in differing(tmp_path / "nothing", whole)


def test_where_a_kill_fell(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    assert phase(tmp_path, 0.0) == PHASES[0]
    (checkpoints / "step_00000004").mkdir(parents=True)
    assert phase(tmp_path, 0.0) == PHASES[2]
    (checkpoints / ".step_00000006.partial").mkdir()
    assert phase(tmp_path, 0.0) == PHASES[1]
    later = (checkpoints / ".step_00000006.partial").stat().st_mtime + 1
    assert phase(tmp_path, later) == PHASES[2], "an earlier kill's torn checkpoint"
    (tmp_path / FINAL).parent.mkdir()
    (tmp_path / FINAL).touch()
    assert phase(tmp_path, 0.0) == PHASES[3]
