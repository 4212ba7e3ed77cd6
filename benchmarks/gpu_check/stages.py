"""The stages of ``make gpu-check`` in the order of their value, as data."""

from __future__ import annotations

from dataclasses import dataclass

SITE = "build/gpu-check/site"  # where the wheels are installed
WHEELS = "gpu-wheels"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "linux_x86_64")
DRY_LIMIT = 180  # seconds of a stage in small; on two quiet cores none takes a third of it


@dataclass(frozen=True)
class Stage:
    """One command under a limit of its own.

    Attributes:
        limit: seconds on the GPU.
        command: for ``bash -c`` in the repository's root; ``$OUT`` is the folder of results, ``$PYTHON`` this Python.
        dry: the same in small without a GPU.
        programs, modules: what ``command`` cannot do without; without them the stage is skipped.
        dry_programs: the same of ``dry``.
        tests: pytest runs; where every test skips, so does the stage.
    """

    name: str
    limit: int
    command: str
    dry: str
    programs: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    dry_programs: tuple[str, ...] = ()
    tests: bool = False


_PYTEST = "$PYTHON -m pytest -q -p no:cacheprovider"
_GPU = "$PYTHON -m pytest -v -m gpu"  # -v: what was run is told where the limit comes first
_OPS = "tests/kernels tests/cuda tests/ops"
_STEP = f'{_PYTEST} benchmarks/bench_step.py --bench-lines "$OUT/lines.jsonl"'
_BLOCKS = f'{_PYTEST} benchmarks/bench_blocks.py --bench-lines "$OUT/lines.jsonl"'
_OPS_FILES = '--bench-no-compile --bench-lines "$OUT/lines.jsonl" --bench-json "$OUT/ops.json"'
_ONCE = "$PYTHON -m benchmarks.gpu_check.once"
_BUILD = "cmake -S . -G Ninja -DCMAKE_BUILD_TYPE=Release"
_INSTALL = f"$PYTHON -m pip install -q --no-index --no-deps --no-compile --upgrade --target {SITE}"
_SANITIZE = "compute-sanitizer --error-exitcode 9 --target-processes all"
_ROWS = "regex:(norm|gated|modulate|rope|activation)"  # Triton's and the CUDA library's names alike
_DIGITS = (
    "rm -rf build/gpu-check/digits && $PYTHON dmdr_fast/train.py --config digits --run_dir build/gpu-check/digits"
    " --train.cold_start_steps 10 --train.generator_steps 20 --log.report false --teacher.train.steps"
)


def _step(name: str, limit: int, chosen: str, modules: tuple[str, ...] = (), options: str = "") -> Stage:
    command = f"{_STEP} {options}"
    dry = f"{command} --bench-small -k '{chosen} and not CFG'"
    return Stage(f"step: {name}", limit, f"{command} -k '{chosen}'", dry, modules=modules, tests=True)


STAGES = (
    Stage(
        "wheels",
        30,
        f"{_INSTALL} {WHEELS}/*.whl",
        f"{_INSTALL}-dry --only-binary=:all: --python-version 3.12 --implementation cp "
        f"{' '.join(f'--platform {each}' for each in PLATFORMS)} {WHEELS}/*.whl",
    ),
    # Into dmdr_fast/lib, where an uninstalled checkout looks.
    Stage(
        "libraries",
        90,
        f"{_BUILD} -B build/gpu-check/native -DDMDR_CUDA=AUTO -DDMDR_CUDA_ARCHITECTURES=90"
        " && cmake --build build/gpu-check/native",
        # `make install` has built them: what is left to fail is CMake's part, with ninja, and nvcc where there is one.
        f"{_BUILD} -B build/gpu-check/native-dry -DDMDR_CUDA=AUTO -DDMDR_CUDA_ARCHITECTURES=90",
        programs=("cmake", "ninja", "g++"),
        dry_programs=("cmake", "ninja", "g++"),
    ),
    Stage("ceilings", 25, "$PYTHON -m benchmarks.gpu_check.ceilings", "$PYTHON -m benchmarks.gpu_check.ceilings"),
    Stage(
        "ops against fp64",
        120,
        f"{_GPU} -n 12 --dist worksteal {_OPS}",  # most of it is Triton's compilation
        f"TRITON_INTERPRET=1 {_PYTEST} -n 2 --dist worksteal tests/ops/test_sweep.py -k 'silu_mul or dmd_loss'",
        tests=True,
    ),
    Stage(
        "other gpu tests",
        60,
        f"{_GPU} tests {' '.join(f'--ignore {folder}' for folder in _OPS.split())}",
        f"{_GPU} tests",  # collects all; without a GPU each test skips
        tests=True,
    ),
    Stage(
        "host time",
        30,
        "$PYTHON -m benchmarks.gpu_check.host",
        "$PYTHON -m tests.kernels.host.measure silu_mul dmd_loss && $PYTHON -m benchmarks.gpu_check.host silu_mul",
        modules=("triton",),
        dry_programs=("gcc",),
    ),
    _step("eager", 40, "eager and 16"),
    _step("fused", 40, "fused and 16"),
    _step("compiled", 90, "compiled and 16", ("pydantic",)),
    _step("CUDA graphs", 90, "compiled and 16", ("pydantic",), "--bench-graphs"),
    _step("cuDNN", 40, "eager and 16", options="--bench-attention cudnn"),
    _step("everything on", 90, "everything", ("pydantic",)),
    _step("FlashAttention 2", 40, "eager and 16", ("flash_attn",), "--bench-attention flash_attn"),
    _step("FlashAttention 3", 40, "eager and 16", ("flash_attn_interface",), "--bench-attention flash_attn_3"),
    Stage(
        "ops",
        100,
        f"{_PYTEST} benchmarks --ignore benchmarks/bench_step.py --ignore benchmarks/bench_blocks.py {_OPS_FILES}",
        f"{_PYTEST} benchmarks/bench_renoise.py -k 'given_noise and float32' {_OPS_FILES}",
        tests=True,
    ),
    Stage(
        "blocks",
        90,  # half of it is their compilation
        _BLOCKS,
        f"{_BLOCKS} -k 'sit and 256'",
        modules=("pydantic",),
        tests=True,
    ),
    _step("micro-batch 64", 120, "64", ("pydantic",)),
    Stage("memcheck", 50, f"{_SANITIZE} --tool memcheck {_ONCE}", _ONCE, programs=("compute-sanitizer",)),
    Stage(
        "racecheck", 50, f"{_SANITIZE} --tool racecheck {_ONCE}", f"{_ONCE} silu_mul", programs=("compute-sanitizer",)
    ),
    Stage(
        "row kernels under ncu",
        40,
        f"ncu --target-processes all --clock-control none --kernel-name '{_ROWS}' --launch-count 40"
        f" --section SpeedOfLight --section Occupancy --section LaunchStats {_ONCE} --large",
        f"{_ONCE} --large silu_mul",
        programs=("ncu",),
    ),
    Stage(
        "digits",
        90,  # most of it is the compilation of the blocks
        f"{_DIGITS} 300 --eval.samples 500",
        f"{_DIGITS} 30 --eval.samples 0 --train.micro_batch_size 8",
        modules=("deepspeed", "pydantic", "diffusers"),
    ),
)
