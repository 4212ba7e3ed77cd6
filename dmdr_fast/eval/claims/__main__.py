"""``python -m dmdr_fast.eval.claims``: run what is missing, in parts, then write the task's page and its data."""

from __future__ import annotations

import argparse
import json
import platform
import signal
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dmdr_fast.cli import Parser, run_user_command
from dmdr_fast.commit import commit
from dmdr_fast.errors import UserError
from dmdr_fast.eval.claims import compare
from dmdr_fast.eval.claims.launch import PACKAGE, Job, is_finished, run_jobs, state_of
from dmdr_fast.eval.claims.page import write_page
from dmdr_fast.eval.claims.records import Record, read_evaluations, read_json, read_rows
from dmdr_fast.eval.claims.runs import Budget, Task, chosen, settings_of
from dmdr_fast.eval.claims.tasks import TASKS

DONE, DIFFERS, MORE = 0, 1, 3  # exit codes


def options(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        prog="python -m dmdr_fast.eval.claims",
        description="Put the paper's claims to the test. Runs that are finished are not run again; exit code "
        "3: there is more to do, call again. 1: --compare found a difference.",
    )
    parser.add_argument("--task", choices=TASKS, default="digits", help="what is learnt (default: digits)")
    parser.add_argument("--work", type=Path, help="where the runs go (default: runs/PAGE)")
    parser.add_argument("--out", type=Path, help="where PAGE.md, PAGE.json and PAGE/ go (default: docs)")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds of the page (default: 0 1 2)")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME",
        help="runs to do now (default: all); with --kept the page has these and the kept ones",
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, a core each (default: 2)")
    parser.add_argument("--minutes", type=float, help="after these, start nothing more and stop with checkpoints")
    parser.add_argument("--quick", action="store_true", help="a smoke test on a tiny model, one seed")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--compare", type=Path, metavar="JSON", help="make the chosen runs again and compare them")
    other.add_argument("--kept", type=Path, metavar="JSON", help="the runs of this claims.json stand: make the others")
    chosen_options = parser.parse_args(argv)
    base = Path("runs", TASKS[chosen_options.task].page + "-quick" * chosen_options.quick)
    chosen_options.work = chosen_options.work or base
    chosen_options.out = chosen_options.out or (chosen_options.work / "docs" if chosen_options.quick else Path("docs"))
    chosen_options.seeds = chosen_options.seeds or ([0] if chosen_options.quick else [0, 1, 2])
    return chosen_options


def jobs_of(task: Task, names: Sequence[str], seeds: Sequence[int], budget: Budget, work: Path) -> list[Job]:
    """The runs of the seeds, those that others start from first."""
    jobs: dict[tuple[str, int], Job] = {}
    for variant in chosen(task, names):
        for seed in seeds:
            settings, folder = settings_of(task, variant, seed, budget), work / f"{variant.name}-{seed}"
            after = jobs[variant.after, seed] if variant.after else None
            jobs[variant.name, seed] = Job(variant.name, seed, folder, task.recipe, settings, after)
    return list(jobs.values())


def kept_of(path: Path | None, jobs: Sequence[Job]) -> tuple[dict[str, Any] | None, dict[tuple[str, int], Record]]:
    """(how that page was made, its runs that have the settings of ``jobs``) of ``--kept``; (None, {}) without it."""
    if path is None:
        return None, {}
    before, records = read_json(path)
    older = before.pop("before", {"seconds": 0.0, "parts": 0})
    before |= {name: before[name] + older[name] for name in older.keys() & {"seconds", "parts"}}
    wanted = {(job.name, job.seed): job.settings for job in jobs}
    return before, {(r.name, r.seed): r for r in records if wanted.get((r.name, r.seed)) == r.settings}


def record_of(job: Job) -> Record:
    """What a finished run leaves on the page."""
    state = state_of(job)
    before = read_evaluations(job.after.folder) if job.after else []
    mine = read_evaluations(job.folder)
    seen = {row["step"] for row in mine}
    return Record(
        name=job.name,
        seed=job.seed,
        settings=job.settings,
        rows={} if state["message"] else read_rows(job.folder),
        evaluations=[row for row in before if row["step"] not in seen] + mine,
        seconds=round(state["seconds"], 1),
        commit=" ".join(state["commits"]),
        diverged=state["message"],
    )


def main(argv: list[str]) -> int:
    """Run, and write the page when every run of its seeds is finished; the exit code."""
    given = options(argv)
    task = TASKS[given.task]
    budget = task.quick if given.quick else task.full
    committed = read_json(given.compare)[1] if given.compare else None
    work = given.work / "compare" if given.compare else given.work  # never what the committed rows were made from
    work.mkdir(parents=True, exist_ok=True)
    deadline = None if given.minutes is None else time.monotonic() + 60 * given.minutes
    every = jobs_of(task, budget.only, given.seeds, budget, work)
    before, kept = kept_of(given.kept, every)
    lacking = {job.name for job in every if (job.name, job.seed) not in kept}
    names = [
        job.name for job in jobs_of(task, given.only or budget.only, given.seeds, budget, work) if job.name in lacking
    ]
    todo = jobs_of(task, names, given.seeds, budget, work) if names else []
    if not all(map(is_finished, todo)):
        run_part(todo, given, work, deadline)
    if not all(map(is_finished, todo)):
        print("there is more to do: call again", flush=True)
        return MORE
    if committed is not None:
        wanted = [job for job in todo if not given.only or job.name in given.only]
        return DONE if compare.report(committed, [record_of(job) for job in wanted]) else DIFFERS
    if given.only and given.kept:
        added = {job.name for job in todo}
        every = [job for job in every if (job.name, job.seed) in kept or job.name in added]
    found = [kept.get((j.name, j.seed)) or (record_of(j) if is_finished(j) else None) for j in every]
    records = [record for record in found if record is not None]
    missing = len(every) - len(records)
    if missing:
        print(f"{missing} of {len(every)} runs are not finished: the page is written when all are", flush=True)
        return MORE
    how = made(given, budget, work) | ({"kept": len(kept), "before": before} if kept else {})
    verdicts = write_page(task, given.out, how, records, smoke=given.quick)
    for verdict in verdicts:
        print(f"{verdict.claim.title}: {verdict.says}")
    print(f"page: {given.out / task.page}.md", flush=True)
    return DONE


def run_part(todo: Sequence[Job], given: argparse.Namespace, work: Path, deadline: float | None) -> None:
    """Run what is missing; how long that took joins the parts before it.

    Raises:
        UserError: a run failed, or another process runs in this folder.
    """
    started = time.monotonic()
    try:
        with FileLock(work / ".lock", timeout=0):
            try:
                run_jobs(todo, slots=given.jobs, commit=commit_in_words(), deadline=deadline)
            finally:
                with (work / "parts.jsonl").open("a") as parts:
                    parts.write(json.dumps({"seconds": time.monotonic() - started, "jobs": given.jobs}) + "\n")
    except Timeout:
        raise UserError(f"claims: another process runs in {work}; wait for it, or name another --work") from None


def made(given: argparse.Namespace, budget: Budget, work: Path) -> dict[str, Any]:
    """How the page was made."""
    path = work / "parts.jsonl"  # absent where every run was kept
    parts = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return {
        "seeds": given.seeds,
        "cold_start_steps": budget.cold_start,
        "rl_steps": budget.total - budget.cold_start,
        "versions": {"Python": platform.python_version()} | {n: version(n) for n in ("torch", "deepspeed", "numpy")},
        "processor": processor(),
        "seconds": round(sum(part["seconds"] for part in parts), 1),
        "parts": len(parts),
        "jobs": max((part["jobs"] for part in parts), default=0),
    }


def processor() -> str:
    """The processor's own name; numbers are the same to the last digit on the same kind only."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def commit_in_words() -> str:
    """Short hash of the checkout's commit, ``+`` where files differ from it; the version outside of a checkout."""
    return commit(PACKAGE, PACKAGE, PACKAGE.parent / "configs", mark="+") or version("dmdr_fast")


def _leave(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _leave)  # runs under way write their checkpoints
    sys.exit(run_user_command(main))
