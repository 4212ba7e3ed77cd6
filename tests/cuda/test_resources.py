"""The machine code for sm_90: no stack, no spills, 16-byte accesses, and the numbers recorded in tests/resources.json.

``DMDR_RECORD_RESOURCES=1 pytest tests/cuda/test_resources.py`` records them anew. Exact numbers are compared for the
toolkit that they are of; with any other one, only what must always hold.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict

import pytest
from filelock import FileLock

from tests.cuda import building
from tests.cuda.resources import Resources, resources

RECORD = building.ROOT / "tests" / "resources.json"
ARCHITECTURE = "sm_90"
WIDTH = {"Float32": 4, "Bfloat16": 8, "Float16": 8}

KERNELS = {
    "dmd_measure_kernel", "dmd_one_pass_kernel", "dmd_write_kernel", "image_backward_kernel", "image_forward_kernel",
    "norm_backward_kernel", "norm_forward_kernel", "norm_gather_kernel", "renoise_draw_kernel", "renoise_mix_kernel",
    "renoise_sum_kernel", "scale_kernel",
}  # fmt: skip

# What must stay under a number of instructions per element, and why: at 3 TB/s an H100 has 9.5 for each byte.
MOST_INSTRUCTIONS = {
    "renoise_draw_kernel<Bfloat16, false>": 40,  # the noise costs 33 of them
    "renoise_mix_kernel<Bfloat16>": 57,
    "scale_kernel<Bfloat16>": 38,
    "dmd_one_pass_kernel<Bfloat16>": 114,
    "norm_forward_kernel<Bfloat16, 32, 64>": 38,
    "norm_backward_kernel<Bfloat16, 128>": 57,
}


@pytest.fixture(scope="module")
def measured(request) -> dict[str, Resources]:
    return resources(building.cuda_library(request.config))


def instructions_per_element(name: str, taken: Resources) -> float | None:
    """None for kernels whose elements no single loop or straight code accounts for."""
    kernel, *arguments = re.findall(r"\w+", name)
    if not arguments or arguments[0] not in WIDTH:
        return None
    width = WIDTH[arguments[0]]
    columns = int(arguments[-1]) if kernel == "norm_forward_kernel" else 0
    instructions, elements = {
        "renoise_draw_kernel": (taken.storing_loop, width),
        "renoise_mix_kernel": (taken.storing_loop, width),
        "scale_kernel": (taken.instructions, 4 * width),
        "dmd_one_pass_kernel": (taken.loading_loop + taken.storing_loop, width),
        "dmd_measure_kernel": (taken.loading_loop, width),
        "dmd_write_kernel": (taken.storing_loop, width),
        "norm_forward_kernel": (taken.instructions, columns),
        "norm_backward_kernel": (taken.storing_loop, 16),
    }.get(kernel, (0, 0))
    return round(instructions / elements, 2) if elements else None


def test_no_kernel_has_a_stack_or_spills(measured):
    assert {name.partition("<")[0] for name in measured} == KERNELS
    for name, taken in measured.items():
        assert taken.stack == 0 and taken.spills == 0, f"{name}: {taken}"


def test_memory_moves_sixteen_bytes_at_a_time(measured):
    loads_nothing_wide = {"norm_gather_kernel"}
    stores_nothing_wide = {"norm_gather_kernel", "dmd_measure_kernel", "renoise_sum_kernel"}
    for name, taken in measured.items():
        kernel = name.partition("<")[0]
        draws_only = name.startswith("renoise_draw_kernel") and name.endswith("true>")
        assert (taken.wide_loads > 0) != (kernel in loads_nothing_wide or draws_only), name
        assert (taken.wide_stores > 0) != (kernel in stores_nothing_wide), name


@pytest.mark.parametrize("name", MOST_INSTRUCTIONS)
def test_instructions_fit_the_time_that_the_bytes_take(measured, name):
    assert instructions_per_element(name, measured[name]) <= MOST_INSTRUCTIONS[name]


def test_numbers_are_the_recorded_ones(measured):
    now = {
        "version": building.nvcc_version(),
        "architecture": ARCHITECTURE,
        "kernels": {name: as_recorded(name, taken) for name, taken in sorted(measured.items())},
    }
    if os.environ.get("DMDR_RECORD_RESOURCES") == "1":
        record(now)
    before = json.loads(RECORD.read_text())["cuda"]
    if before["version"] != now["version"]:
        pytest.skip(f"recorded with nvcc {before['version']}, this is {now['version']}")
    assert now == before


def as_recorded(name: str, taken: Resources) -> dict[str, float]:
    per_element = instructions_per_element(name, taken)
    return asdict(taken) | ({} if per_element is None else {"instructions_per_element": per_element})


def record(now: dict) -> None:
    """Write the key "cuda"; the others are not this file's."""
    with FileLock(RECORD.with_suffix(".lock")):
        everything = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
        everything["cuda"] = now
        RECORD.write_text(json.dumps(everything, indent=2, sort_keys=True) + "\n")
    RECORD.with_suffix(".lock").unlink(missing_ok=True)
