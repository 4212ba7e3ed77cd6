"""``python -m benchmarks.gpu_check OUT [--dry]``: run the stages, write what each says and a line with its result.

In OUT: ``results.jsonl`` (a line per stage as it ends), ``output.txt`` (all that they print), ``lines.jsonl`` (a line
per benchmark as it ends) and ``ops.json`` (the ops, as ``--bench-compare`` reads it).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path

from benchmarks.gpu_check.stages import DRY_LIMIT, SITE, STAGES, WHEELS, Stage

ROOT = Path(__file__).resolve().parents[2]
TOTAL = 570  # seconds
GRACE = 5  # of which a stage at its limit has these to tell what it has found, as pytest does when it is interrupted


def main(argv: list[str]) -> int:
    """0 where every stage is ok or skipped, 1 where one failed, 2 where there is no GPU and no ``--dry``."""
    parser = argparse.ArgumentParser(prog="make gpu-check")
    parser.add_argument("out", type=Path)
    parser.add_argument("--dry", action="store_true", help="every stage in small, without a GPU")
    options = parser.parse_args(argv)
    if not options.dry and not _has_gpu():
        print(
            f"gpu-check: {sys.executable} has no PyTorch that sees a CUDA device; name one with PYTHON=/path/to/python,"
            " or run each stage in small without one: make gpu-check DRY=1",
            file=sys.stderr,
        )
        return 2
    results = run(STAGES, options.out.resolve(), options.dry)
    return int(any(result.startswith("failed") for result in results))


def run(stages: Sequence[Stage], out: Path, dry: bool, total: float = TOTAL) -> list[str]:
    """Run ``stages`` one after the other, each as long as its limit and ``total`` seconds allow.

    Returns:
        a result per stage: "ok", "failed: why" or "skipped: why", maybe with what pytest counted.
    """
    out.mkdir(parents=True, exist_ok=True)
    for name in ("results.jsonl", "output.txt", "lines.jsonl", "ops.json"):
        (out / name).unlink(missing_ok=True)
    end, results = time.monotonic() + total - GRACE - 1, []
    for stage in stages:
        start = time.monotonic()
        limit = min(DRY_LIMIT if dry else stage.limit, end - start)
        result = _skip(stage, dry, limit) or _ended(stage, out, dry, limit)
        seconds = round(time.monotonic() - start, 1)
        with (out / "results.jsonl").open("a") as file:
            file.write(json.dumps({"stage": stage.name, "result": result, "seconds": seconds}) + "\n")
        print(f"{stage.name:22} {seconds:6.1f} s  {result}", flush=True)
        results.append(result)
    return results


def _skip(stage: Stage, dry: bool, limit: float) -> str:
    if limit < 1:
        return "skipped: no time is left"
    if stage.name == "wheels" and not list((ROOT / WHEELS).glob("*.whl")):
        return f"skipped: no wheels in {WHEELS}/; make gpu-wheels"
    missing = [
        name for name in (stage.dry_programs if dry else stage.programs) if shutil.which(name, path=_path()) is None
    ]
    importlib.invalidate_caches()  # the wheels were installed in the meantime
    missing += [name for name in stage.modules if not _importable(name)]
    return f"skipped: needs {', '.join(missing)}" if missing else ""


def _path() -> str:
    """Where programs are: last those beside Python, as CMake's and ninja's wheels have them."""
    return os.pathsep.join([os.environ["PATH"], str(Path(sys.executable).parent)])


def _importable(module: str) -> bool:
    return PathFinder.find_spec(module, [str(ROOT / SITE), *sys.path]) is not None


def _ended(stage: Stage, out: Path, dry: bool, limit: float) -> str:
    """Run the stage's command to its end, or to its limit."""
    command = stage.dry if dry else stage.command
    path = out / "output.txt"
    with path.open("a") as file:
        file.write(f"\n=== {stage.name}\n$ {command}\n")
        file.flush()
        start = file.tell()
        process = subprocess.Popen(
            ["bash", "-c", command],
            cwd=ROOT,
            env=_environment(out, dry),
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
            _signal(process, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        finally:
            _signal(process, signal.SIGKILL)  # its children too
            process.wait()
    with path.open(errors="replace") as file:
        file.seek(start)
        lines = [line.strip() for line in file if line.strip()]
    return _result(stage, code, limit, lines[-1] if lines else "it printed nothing")


def _result(stage: Stage, code: int | None, limit: float, last: str) -> str:
    if code is None:
        return f"failed: not done after {limit:.0f} s"
    if code:
        return f"failed: exit code {code}: {last.strip('= ')[:300]}"
    if stage.tests and not re.search(r"\d+ passed", last):
        return f"skipped: {last.strip('= ')}"
    return f"ok: {last.strip('= ')}" if stage.tests else "ok"


def _signal(process: subprocess.Popen, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _environment(out: Path, dry: bool) -> dict[str, str]:
    """This process's, with the wheels importable, and caches inside the checkout."""
    environment = {name: value for name, value in os.environ.items() if name not in ("DMDR_FAST_BACKEND", "DMDR_CUDA")}
    paths = ("" if dry else ROOT / SITE, ROOT, environment.get("PYTHONPATH"))
    environment |= {
        "OUT": str(out),
        "PATH": _path(),
        "PYTHON": sys.executable,
        "PYTHONPATH": os.pathsep.join(str(path) for path in paths if path),
        "PYTHONUNBUFFERED": "1",
        "DMDR_FAST_CACHE": str(ROOT / "build" / "gpu-check" / "cache"),
    }
    if dry:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return environment


def _has_gpu() -> bool:
    try:
        import torch
    except ModuleNotFoundError:
        return False
    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
