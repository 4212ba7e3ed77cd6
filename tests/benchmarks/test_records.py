"""Files of results: they come back as they were, and the comparison fails past 5 % and not on noise."""

import json
from dataclasses import replace

import pytest

from benchmarks import records
from benchmarks.gate import GateError
from benchmarks.measure import Row
from benchmarks.timing import Spread

MACHINE = {"device": {"kind": "cpu", "name": "x", "threads": 2}, "versions": {}, "commit": "", "date": ""}
ROW = Row(
    op="gelu_mul",
    size="4x8",
    dtype="float32",
    backend="cpu",
    what="forward",
    times={"fused": Spread(1.0, 0.9, 1.1), "eager": Spread(2.0, 1.9, 2.1), "copy": Spread(0.5, 0.4, 0.6)},
    eager_ratio=Spread(2.0, 1.95, 2.05),
    compile_ratio=Spread(1.5, 1.4, 1.6),
    traffic=100,
    copy_rate=1e9,
    peak={"fused": 10},
    errors={"out": GateError(1e-7, None, 1e-5)},
)


def with_ratio(median, p20, p80):
    return replace(ROW, eager_ratio=Spread(median, p20, p80))


def test_rows_come_back_as_they_were(tmp_path):
    rows = [ROW, replace(ROW, what="forward + backward", compile_ratio=None, errors={})]
    records.save(tmp_path / "deep" / "r.json", rows, MACHINE)
    loaded, machine = records.load(tmp_path / "deep" / "r.json")
    assert loaded == rows
    assert machine == {"format": records.FORMAT, **MACHINE}


@pytest.mark.parametrize(
    ("now", "fails"),
    [
        (with_ratio(1.80, 1.75, 1.85), True),  # 11 % slower, apart from 1.95..2.05
        (with_ratio(1.80, 1.60, 2.00), False),  # 11 % slower by the median, but the rounds overlap
        (with_ratio(1.92, 1.91, 1.93), False),  # apart, but 4 %
        (with_ratio(3.00, 2.90, 3.10), False),  # faster
    ],
)
def test_what_counts_as_slower(now, fails):
    slower, _ = records.regressions([now], [ROW])
    assert bool(slower) == fails
    if fails:
        assert slower == ["gelu_mul, 4x8, float32, cpu, forward: 1.80x eager, was 2.00x: 11 % slower"]


def test_lines_on_one_side_only_are_noted():
    other = replace(ROW, op="silu_mul")
    slower, notes = records.regressions([ROW], [other])
    assert not slower
    assert [note.rpartition(": ")[2] for note in notes] == ["not in the file", "in the file, not in this run"]


def test_another_device_is_refused(tmp_path):
    other = {**MACHINE, "device": {**MACHINE["device"], "threads": 4}}
    with pytest.raises(records.RecordError, match=r"measured on .*'threads': 4.* this is .*'threads': 2"):
        records.check_same_device(tmp_path, other, MACHINE)


@pytest.mark.parametrize("text", ["", "[]", json.dumps({"format": 0, "rows": []})])
def test_files_that_are_no_results_are_refused(tmp_path, text):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(records.RecordError, match=r"r\.json"):
        records.load(path)
    with pytest.raises(records.RecordError, match="not a file of results"):
        records.load(tmp_path / "none.json")


@pytest.mark.parametrize(("second", "fails"), [(2.0, False), (1.5, True)])
def test_a_line_that_got_slower_is_measured_again(second, fails):
    ratios = iter([1.5, second])

    def measure():
        ratio = next(ratios)
        return [with_ratio(ratio, ratio - 0.01, ratio + 0.01)]

    rows = records.settled(measure, [ROW])
    assert rows[0].eager_ratio.median == second
    assert bool(records.regressions(rows, [ROW])[0]) is fails


def test_a_line_as_fast_as_before_is_measured_once():
    runs = []
    records.settled(lambda: runs.append(0) or [ROW], [ROW])
    assert runs == [0]
