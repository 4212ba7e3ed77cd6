"""What the table says."""

import json
from dataclasses import replace

from benchmarks import plot, report, resources
from benchmarks.timing import Spread

from .test_records import MACHINE, ROW


def test_line_of_the_table():
    head, line = report.table([ROW])
    cells = dict(zip(head.split("  "), line.split("  "), strict=False))
    assert line.split()[:6] == ["gelu_mul", "4x8", "fp32", "forward", "cpu", "1000"]
    # 100 bytes in a second, the copy had 1e9 a second: none worth a digit. Ratios are eager's and compile's times.
    assert line.split()[6:] == ["900..1100", "0.0", "0", "2.00", "1.50", "9.54e-06"]
    assert "launches" not in head and len(cells) > 5


def test_a_cpus_kernels_are_held_against_the_copy_too():
    head, line = report.table([replace(ROW, traffic=10**9, kernels=2.0)])
    assert "% copy  kernels %" in head
    assert line.split()[7:10] == ["1.0", "100", "50"]  # GB/s, then 1e9 bytes in one second and in two, of 1e9 a second


def test_gpu_lines_have_launches():
    head, line = report.table([replace(ROW, launches={"fused": 1, "eager": 20, "compile": 3})])
    assert head.endswith("launches") and line.endswith("1 / 20 / 3")


def test_the_hosts_share_stands_before_the_launches():
    row = replace(ROW, launches={"fused": 1}, host=12.3)
    head, line = report.table([row])
    assert head.split()[-2:] == ["host", "launches"] and line.split()[-2:] == ["12", "1"]


def test_what_is_slower_is_said_with_its_reason():
    row = replace(ROW, compile_ratio=Spread(0.8, 0.7, 0.9), note="one core computes")
    assert report.slower([ROW]) == []
    assert report.slower([row]) == [
        "slower than torch.compile (0.80x): gelu_mul, 4x8, float32, cpu, forward: one core computes"
    ]


def test_alternative_that_cannot_run_leaves_its_cell_empty():
    row = replace(ROW, compile_ratio=None, missing="torch.compile: no compiler")
    assert report.missing([row, row]) == ["torch.compile: no compiler"]
    assert report.slower([row]) == []
    assert len(report.table([row])) == 2


def test_plot_is_an_image(tmp_path):
    machine = {**MACHINE, "versions": {"torch": "2"}}
    plot.save(
        tmp_path / "deep" / "p.png",
        [ROW, replace(ROW, what="forward + backward", compile_ratio=None)],
        machine,
    )
    assert (tmp_path / "deep" / "p.png").read_bytes().startswith(b"\x89PNG")


def test_resources_lists_every_kernel_with_its_numbers(tmp_path):
    path = tmp_path / "resources.json"
    versions = {
        version: {"kernels": {"renoise": {"registers": registers, "note": "x"}}}
        for version, registers in (("0.9", 30), ("0.10", 32))
    }
    path.write_text(json.dumps({"triton": versions, "cuda": {"version": "13.0", "kernels": {"renoise": {"stack": 0}}}}))
    head, triton, cuda = resources.table(path)
    assert head.split() == ["kernel", "registers", "stack"]
    assert triton.split() == ["triton", "0.10", "renoise", "32"]  # the newest: none is of the installed version
    assert cuda.split() == ["cuda", "renoise", "0"]
    assert resources.table(tmp_path / "none.json") == []
