"""Runs killed at random moments, resumed, and compared with the run that never stopped: ``python -m tests.torture``.

Small digits runs of every sharing, at stage 0 (one process) and 3 (two ranks), with eager and compiled blocks. SIGKILL
goes to all processes of a run at a moment drawn between its start and the time that the uninterrupted run took. The run
then starts again with ``--resume auto``, is killed up to three times in all, and goes on to its end.

In parts: ``--only separate``, ``--only shared_score`` and ``--only shared_all`` are the 40 kills together, each at the
moments that it has in the whole.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from .engine.conftest import SMALL, TRAIN
from .engine.processes import ForkedRun
from .engine.test_resume import FINAL, TWELVE

# torch.compile captures the blocks; its own backend "eager" runs what was captured.
CAPTURED = Path(__file__).parent / "engine" / "train_captured.py"
COMPARED = (FINAL, "cold_start/generator.safetensors")
KILLS_PER_RUN = 3
PHASES = (
    "before the first checkpoint",
    "while a checkpoint was written",
    "between checkpoints",
    "after the final weights",
)


@dataclass(frozen=True)
class Combination:
    sharing: str
    stage: int
    blocks: str

    def __str__(self) -> str:
        return f"{self.sharing} stage-{self.stage} {self.blocks}"

    def start(self, run_dir: Path) -> ForkedRun:
        """A started run; one that was started before goes on."""
        ranks = 2 if self.stage == 3 else 0
        words = ["--sharing", self.sharing, "--deepspeed.stage", str(self.stage), "--compute.blocks", self.blocks]
        if self.sharing == "shared_all":
            words += ["--student.lora.rank", "4"]
        if ranks:
            words += ["--train.micro_batch_size", "4"]
        words = [*SMALL, *TWELVE, *words, "--run_dir", str(run_dir), "--resume", "auto"]
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        return ForkedRun(CAPTURED if self.blocks == "compiled" else TRAIN, words, environment, ranks)


COMBINATIONS = [
    Combination(*c) for c in product(("separate", "shared_score", "shared_all"), (0, 3), ("eager", "compiled"))
]


@dataclass(frozen=True)
class Outcome:
    """Of one run: the seconds and phase of each kill, and what differs from the uninterrupted run."""

    kills: list[tuple[float, str]]
    differs: str


def finish(run: ForkedRun) -> str:
    """Wait for the end of a run; "" where it ends well, else what it said last."""
    try:
        _, err = run.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        return "did not end in 300 s"
    return f"exit code {run.returncode}: {(err.strip().splitlines() or [''])[-1]}" if run.returncode else ""


def kill(run: ForkedRun, at: float) -> bool:
    """SIGKILL the process group of every rank after ``at`` seconds; False where the run has ended before."""
    deadline = time.monotonic() + at
    while time.monotonic() < deadline:
        if run.poll() is not None:
            return False
        time.sleep(max(0.0, min(0.005, deadline - time.monotonic())))
    alive = [process for process in run.processes if process.exitcode is None]
    for process in alive:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has not reached setsid yet, or has just ended
            process.kill()
    for process in run.processes:
        process.join()
    return any(process.exitcode == -signal.SIGKILL for process in alive)


def phase(run_dir: Path, started: float) -> str:
    """Where a kill fell, by what it left; ``started`` (time.time) tells a torn checkpoint from an earlier kill's."""
    if (run_dir / FINAL).is_file():
        return PHASES[3]
    for partial in (run_dir / "checkpoints").glob(".step_*.partial"):
        if max(path.stat().st_mtime for path in (partial, *partial.rglob("*"))) >= started:
            return PHASES[1]
    return PHASES[2] if any((run_dir / "checkpoints").glob("step_*")) else PHASES[0]


def differing(run_dir: Path, whole: Path) -> str:
    """The compared files whose SHA-256 differs, or that are missing."""
    found = []
    for name in COMPARED:
        a, b = (
            hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "-" for p in (run_dir / name, whole / name)
        )
        if a != b or a == "-":
            found.append(f"{name} {a[:12]}, uninterrupted {b[:12]}")
    return "; ".join(found)


def torture(combination: Combination, kills: int, draw: random.Random, folder: Path) -> Iterator[Outcome]:
    """Outcomes of as many runs as ``kills`` kills take. Raises RuntimeError: the uninterrupted run fails."""
    whole, started = folder / "whole", time.monotonic()
    fault = finish(combination.start(whole))
    if fault:
        raise RuntimeError(f"{combination}: uninterrupted: {fault}")
    duration, number = time.monotonic() - started, 0
    while kills:
        run_dir, number = folder / f"killed-{number}", number + 1
        done: list[tuple[float, str]] = []
        for _ in range(min(kills, KILLS_PER_RUN)):
            at, started = draw.uniform(0.0, duration), time.time()
            run = combination.start(run_dir)
            if not kill(run, at):
                if not done:  # it ran from its start to its end: the better measure on a machine that others use too
                    duration = min(duration, time.time() - started)
                break
            done.append((at, phase(run_dir, started)))
        else:
            run = combination.start(run_dir)
        kills -= len(done)
        yield Outcome(done, finish(run) or differing(run_dir, whole))


def shares(kills: int) -> dict[Combination, int]:
    """``kills`` over the combinations, as evenly as it goes: parts that ``--only`` chooses add up to the whole."""
    count = len(COMBINATIONS)
    return {c: kills // count + (i < kills % count) for i, c in enumerate(COMBINATIONS)}


def main() -> int:
    """Print a line per run and the tally. 1 where bytes differ or a run fails, 0 where none does."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("--kills", type=int, default=40, help="Of all twelve combinations together (40).")
    parser.add_argument("--seed", type=int, default=0, help="Of the moments (0).")
    parser.add_argument(
        "--only",
        default="",
        help='A part of the kills: those of the combinations whose name has it ("separate", "stage-3 compiled").',
    )
    options = parser.parse_args()
    chosen = {c: kills for c, kills in shares(options.kills).items() if options.only in str(c)}
    if not chosen:
        parser.error(f"--only {options.only}: expected a part of one of: {', '.join(map(str, COMBINATIONS))}")
    phases: Counter[str] = Counter()
    runs, faults, began = 0, [], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dmdr_fast-torture-") as folder:
        os.environ["DMDR_FAST_CACHE"] = f"{folder}/cache"
        # The first run trains the teacher and starts the server of the runs: no uninterrupted run is timed with that.
        finish(next(iter(chosen)).start(Path(folder) / "first"))
        for i, (combination, kills) in enumerate(chosen.items()):
            draw = random.Random(f"{options.seed} {combination}")
            for outcome in torture(combination, kills, draw, Path(folder) / str(i)):
                runs += 1
                phases.update(where for _, where in outcome.kills)
                where = ", ".join(f"{at:.2f} s {where}" for at, where in outcome.kills) or "ended before its kill"
                print(f"{combination!s:<32}{outcome.differs or 'equal'}  ({where})", flush=True)
                if outcome.differs:
                    faults.append(f"{combination}: {outcome.differs}")
    print(
        f"\n{phases.total()} kills of {runs} runs; {runs - len(faults)} ended with equal bytes, {len(faults)} did not; "
        f"{time.monotonic() - began:.0f} s"
    )
    print("\n".join([f"  {name:<32}{phases[name]:>4}" for name in PHASES] + faults))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
