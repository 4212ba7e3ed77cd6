"""`pytest benchmarks`: collects bench_*.py, gathers their rows, prints, saves and compares them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import host, machine, plot, records, report, resources
from benchmarks.case import Case
from benchmarks.measure import Row, run_case

ROWS = pytest.StashKey[list[Row]]()
MACHINE = pytest.StashKey[dict]()
BEFORE = pytest.StashKey[list[Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks")
    group.addoption("--bench-json", type=Path, metavar="FILE", help="write the results to FILE")
    group.addoption(
        "--bench-compare",
        type=Path,
        metavar="FILE",
        help="fail where a line is more than 5 %% slower than in FILE, twice",
    )
    group.addoption("--bench-plot", type=Path, metavar="FILE", help="draw the speed-ups to FILE (.png, .svg, .pdf)")
    group.addoption("--bench-lines", type=Path, metavar="FILE", help="add each row to FILE at once, as a JSON line")
    group.addoption("--bench-no-compile", action="store_true", help="time the ops without torch.compile beside them")
    group.addoption("--bench-resources", action="store_true", help="print what the kernels need, compiled for sm_90")
    group.addoption("--bench-small", action="store_true", help="bench_step: networks so small that they show no speed")
    group.addoption("--bench-large", action="store_true", help="bench_step: SiT-B/2 on a CPU too, which takes minutes")
    group.addoption("--bench-graphs", action="store_true", help="bench_step: rollouts and score pass as CUDA graphs")
    group.addoption(
        "--bench-attention",
        choices=("sdpa", "cudnn", "flash_attn", "flash_attn_3"),
        default="sdpa",
        help="bench_step's",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    # torch.compile imports what it deprecates itself.
    config.addinivalue_line("filterwarnings", "ignore:.*torch.jit:DeprecationWarning")
    config.stash[ROWS], config.stash[MACHINE] = [], machine.description()
    before = config.getoption("bench_compare")
    if before is not None:
        try:
            config.stash[BEFORE], then = records.load(before)
            records.check_same_device(before, then, config.stash[MACHINE])
        except records.RecordError as error:
            raise pytest.UsageError(f"--bench-compare: {error}") from None


@pytest.fixture
def device():
    """The GPU where there is one, else the CPU."""
    return machine.device()


@pytest.fixture
def record(request) -> Callable[[Callable[[], list[Row]]], None]:
    """Add the rows that a measurement returns to the table; it is repeated where a line got slower."""
    stash, lines = request.config.stash, request.config.getoption("bench_lines")

    def add(measure: Callable[[], list[Row]]) -> None:
        rows = records.settled(measure, stash.get(BEFORE, []))
        stash[ROWS].extend(rows)
        if lines is not None:
            records.append(lines, rows)

    return add


@pytest.fixture
def bench(record, device, request) -> Callable[[Case], None]:
    """Gate, time and record a case. A gate that fails is a failed test, and nothing is timed."""
    compiled = not request.config.getoption("bench_no_compile")
    return lambda case: record(lambda: run_case(case, device, compiled))


def pytest_sessionfinish(session: pytest.Session) -> None:
    stash, option = session.config.stash, session.config.getoption
    rows = stash[ROWS]
    if not rows:
        return
    if stash[MACHINE]["device"]["kind"] == "cpu":  # a GPU's own is measured there: benchmarks/gpu_check/host.py
        rows = stash[ROWS] = host.added(rows)
    if option("bench_json") is not None:
        records.save(option("bench_json"), rows, stash[MACHINE])
    if option("bench_plot") is not None:
        plot.save(option("bench_plot"), rows, stash[MACHINE])
    before = stash.get(BEFORE, None)
    if before is not None and records.regressions(rows, before)[0]:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if not rows:
        return
    terminalreporter.section("benchmarks")
    lines = [*report.heading(config.stash[MACHINE]), "", *report.table(rows), "", *report.legend()]
    for line in [*lines, *report.slower(rows), *report.missing(rows)]:
        terminalreporter.write_line(line)
    if config.getoption("bench_resources"):
        terminalreporter.section("kernels compiled ahead of time for sm_90")
        for line in resources.table():
            terminalreporter.write_line(line)
    if BEFORE in config.stash:
        _summarise_comparison(terminalreporter, config)


def _summarise_comparison(terminalreporter, config: pytest.Config) -> None:
    rows, before = config.stash[ROWS], config.stash[BEFORE]
    slower, notes = records.regressions(rows, before)
    terminalreporter.section(f"compared with {config.getoption('bench_compare')}")
    for line in slower:
        terminalreporter.write_line(f"FAILED {line}", red=True)
    for line in notes:
        terminalreporter.write_line(line)
    if not slower:
        terminalreporter.write_line("no line is more than 5 % slower", green=True)
