"""The machine code for sm_90, compiled without a GPU: no stack, no spills, 16-byte accesses, and recorded numbers.

``DMDR_RECORD_RESOURCES=1 pytest tests/kernels/test_resources.py`` records them anew in tests/resources.json, under
the version of Triton that is installed: each has a compiler of its own. Another version is recorded with
``pip install --target FOLDER --no-deps triton==3.6.*`` and ``PYTHONPATH=FOLDER`` before the same command. For a version
without a record only what must always hold is checked, and the comparison is skipped.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from filelock import FileLock

from tests.kernels.conftest import INTERPRETED

triton = pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from dmdr_fast.backends.triton import BACKEND  # noqa: E402
from tests.cases import RAW, Compiled  # noqa: E402
from tests.kernels import ahead_of_time  # noqa: E402
from tests.raw import RawFunctions  # noqa: E402

RECORD = Path(__file__).parents[1] / "resources.json"
VERSION = ".".join(triton.__version__.split(".")[:2])
CASES = {label: case for raw in RAW for label, case in raw.compiled().items()}
MOST_INSTRUCTIONS = {name: most for raw in RAW for name, most in raw.instructions.items()}
KERNELS = RawFunctions(BACKEND)

# What reads or writes latents, tokens or pixels in other pieces than 16 bytes, and why.
_BY_COLUMN = {"resize_columns_kernel", "resize_columns_bwd_kernel"}  # neighbouring threads take neighbouring outputs
_WRITES_ONLY = {"normal_noise_kernel"}
_SUMS_ONLY = {"product_sums_kernel", "dmd_distance_kernel"}
LOADS_NOTHING_WIDE = _BY_COLUMN | _WRITES_ONLY
STORES_NOTHING_WIDE = _BY_COLUMN | _SUMS_ONLY


def run(case: Compiled) -> None:
    case.before()
    KERNELS(case.name, *case.args)


def measured(case: Compiled) -> dict[str, dict[str, float]]:
    """Kernel to numbers."""
    kernels = {}
    for name, taken in ahead_of_time.kernels_of(lambda: run(case)).items():
        kernels[name] = taken.as_dict()
        if name in case.elements:
            per_element = taken.instructions * taken.threads / case.elements[name]
            kernels[name]["instructions_per_element"] = round(per_element, 2)
    return kernels


@pytest.mark.parametrize("case", CASES)
def test_machine_code(case):
    elements, kernels = CASES[case].elements, measured(CASES[case])
    assert kernels.keys() >= elements.keys()
    for name, taken in kernels.items():
        assert taken["stack"] == 0 and taken["spills"] == 0, f"{name}: {taken}"
        if name in elements:
            assert (taken["wide_loads"] > 0) != (name in LOADS_NOTHING_WIDE), f"{name}: {taken}"
            assert (taken["wide_stores"] > 0) != (name in STORES_NOTHING_WIDE), f"{name}: {taken}"
        if name in MOST_INSTRUCTIONS:
            assert taken["instructions_per_element"] <= MOST_INSTRUCTIONS[name], f"{name}: {taken}"
    if os.environ.get("DMDR_RECORD_RESOURCES") == "1":
        record(case, kernels)
    recorded = json.loads(RECORD.read_text())["triton"]
    if VERSION not in recorded:
        pytest.skip(f"numbers are recorded for Triton {', '.join(recorded)}, this is {triton.__version__}")
    assert kernels == recorded[VERSION]["kernels"][case]


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case].launches is not None])
def test_launches(case):
    ahead_of_time.compiled_by(lambda: run(CASES["preprocess_reward_fwd"]))
    assert len(ahead_of_time.compiled_by(lambda: run(CASES[case]))) == CASES[case].launches


def test_the_record_has_these_cases():
    recorded = json.loads(RECORD.read_text())["triton"]
    for version in recorded.values():
        assert version["kernels"].keys() == CASES.keys()


def test_the_decoder_agrees_with_cuobjdump():
    compiled = ahead_of_time.compiled_by(lambda: run(CASES["multi_lora_fwd"]))
    cubin = compiled[-1].asm["cubin"]
    ours, theirs = ahead_of_time.instructions(cubin), ahead_of_time.disassembled(cubin)
    accesses = {name for name, _ in ours} - {"", "NOP"}
    assert accesses >= {"LDG", "LDGSTS", "STG"}
    assert [name for name, _ in ours] == [name for name, _ in theirs]
    assert [wide for name, wide in ours if name in accesses] == [wide for name, wide in theirs if name in accesses]


def record(case: str, kernels: dict) -> None:
    """Write one case of this version of Triton; the rest is not this function's."""
    with FileLock(RECORD.with_suffix(".lock")):
        everything = json.loads(RECORD.read_text())
        version = everything.setdefault("triton", {}).setdefault(VERSION, {"architecture": "sm_90", "kernels": {}})
        version["kernels"] = {name: kept for name, kept in version["kernels"].items() if name in CASES}
        version["kernels"][case] = kernels
        RECORD.write_text(json.dumps(everything, indent=2, sort_keys=True) + "\n")
    RECORD.with_suffix(".lock").unlink(missing_ok=True)
