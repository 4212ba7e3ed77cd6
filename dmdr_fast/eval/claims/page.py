"""A task's page: how it was made, the rule, all runs, and claim by claim the table, the picture and the verdict."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from dmdr_fast.eval.claims import figures, table
from dmdr_fast.eval.claims.records import Record, write_json
from dmdr_fast.eval.claims.runs import Task
from dmdr_fast.eval.claims.statistics import MEASURES
from dmdr_fast.eval.claims.verdicts import ERRORS, FD_BOUND, Verdict, claims_of, goals, judge

_INTRODUCTION = """\
# The paper's claims, put to the test

`{make}` trains everything on this page and writes it: what the paper says about distribution matching and
reinforcement learning, measured on {world} with a {student} student. {caution} and three seeds are few: this page tells
what these runs show, and no more."""

_RULE = """\
## How it is judged

A test compares one measure of two kinds of run. Its difference of means counts when it is more than {errors} standard
errors, sqrt(s_a² / n_a + s_b² / n_b) with s the standard deviation over the n seeds. A test that asks for *lower* or
*higher* holds when the difference counts in that direction, does not hold when it counts in the other, and cannot be
told otherwise; one that asks for *not lower* holds unless the difference counts against it. A claim holds when all
of its tests do and does not hold when one does not. {errors} standard errors are a low bar for this many seeds: with
three on each side, of differences that are none about one in nine would count. Runs that diverged are left out of the
means, and named.

Where RL is traded against distance, ends cannot be compared: one run has more reward, the other less FD. *FD at the
same reward* takes the final FD of the first run and that of the second where, on its way since RL started, it first has
the first run's final reward (log FD linear in the reward between evaluations; at its highest reward if it never has
it).

{measured} ± is the standard deviation over seeds. The teacher is one network, evaluated on one noise.

All runs have the recipe and the budget of `configs/{name}.yaml`: {cold} generator updates of cold start, {rest} more,
fewer only for the cold starts that end there. {runs} Runs that begin with the same cold start begin with the same
process's: it is trained once per seed, and they go on from its checkpoint, which gives the bytes that a run from
scratch gives. *DMD only* keeps the learning rates of the others and leaves the reward out. The settings of each kind of
run are in the last table. {trials}"""


def write_page(
    task: Task, out: Path, made: dict[str, Any], records: Sequence[Record], *, smoke: bool = False
) -> list[Verdict]:
    """Write the task's page into ``out``, its data and its pictures beside it; the verdicts are handed back.

    A claim is judged where each of its runs is there for a seed at least; the page names the others. ``smoke`` marks a
    page whose numbers mean nothing.
    """
    order = list(task.titles)
    records = sorted(records, key=lambda r: (order.index(r.name), r.seed))
    ran = {"teacher", *(r.name for r in records)}
    claims = (claim for claim in claims_of(task) if all({test.first, test.second} <= ran for test in claim.tests))
    verdicts = [judge(claim, records, task.reward) for claim in claims]
    figures.draw_all(task, [v.claim for v in verdicts], records, out / task.page)
    write_json(out / f"{task.page}.json", made, records, [v.as_json() for v in verdicts])
    (out / f"{task.page}.md").write_text(_page(task, made, records, verdicts, smoke=smoke), encoding="utf-8")
    return verdicts


def _page(
    task: Task, made: dict[str, Any], records: Sequence[Record], verdicts: Sequence[Verdict], *, smoke: bool
) -> str:
    ran = [v.name for v in task.variants if any(r.name == v.name for r in records)]
    judged = {v.claim.key for v in verdicts}
    waiting = [claim.title for claim in claims_of(task) if claim.key not in judged]
    shown: set[str] = set()  # pictures
    words = {**task.words, "name": task.name, "errors": f"{ERRORS:g}"}
    parts = [
        _filled(_INTRODUCTION, words),
        "!!! warning\n    A smoke test on a model of no use: the numbers mean nothing." if smoke else "",
        _made(task, made, records),
        "## In short\n\n" + table.markdown(["claim", "verdict"], [[_link(v), f"**{v.says}**"] for v in verdicts]),
        f"Not put to the test yet, for want of runs: {'; '.join(waiting)}." if waiting else "",
        _filled(_RULE, words | {"cold": made["cold_start_steps"], "rest": made["rl_steps"]}),
        "## All runs\n\n" + table.results(task, records, ["teacher", "teacher_n", *ran]),
        "## DMDR with each method, beside the 50-step teacher\n\n"
        f"The goal: a mean {MEASURES[task.reward][0]} above the teacher's at an FD under {FD_BOUND:g} times its.\n\n"
        + table.goals(task, goals(records, task.reward)),
        *(_claim(task, v, records, shown) for v in verdicts),
        _settings(task, records),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _filled(text: str, words: dict[str, Any]) -> str:
    """The text with its words, in lines of 120 characters."""
    paragraphs = text.format(**words).split("\n\n")
    return "\n\n".join(fill(" ".join(p.split()), 120, break_on_hyphens=False) for p in paragraphs)


def _made(task: Task, made: dict[str, Any], records: Sequence[Record]) -> str:
    commits = ", ".join(f"`{c}`" for c in sorted({r.commit for r in records}))
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    hours = sum(r.seconds for r in records) / 3600
    minutes = (made["seconds"] + made.get("before", {}).get("seconds", 0.0)) / 60
    parts = made["parts"] + made.get("before", {}).get("parts", 0)
    jobs = max(made["jobs"], made.get("before", made)["jobs"])
    lines = [
        f"- Commit {commits}; seeds {', '.join(map(str, made['seeds']))}; {versions}; {made['processor']}.",
        f"- {len(records)} runs, {hours:.2f} hours of one core each added up; {minutes:.0f} minutes on the clock, in "
        f"{parts} part{'s' * (parts != 1)}, at most {jobs} side by side.",
        f"- Data: [{task.page}.json]({task.page}.json). One row again, and whether it is the same to the last digit "
        "(on the same kind of processor): "
        f"`{task.words['command']} --seeds 0 --only dmdr_refl --compare docs/{task.page}.json`.",
    ]
    if made.get("kept"):
        before = made["before"]
        versions = ", ".join(f"{name} {version}" for name, version in before["versions"].items())
        lines.insert(2, f"- {made['kept']} of the runs stand from the page before: {versions}; {before['processor']}.")
    return "\n".join(lines)


def _link(verdict: Verdict) -> str:
    """To the claim's heading, by the fragment that mkdocs gives it."""
    words = re.sub(r"[^\w\s-]", "", verdict.claim.title).lower()
    fragment = re.sub(r"[-\s]+", "-", words)
    return f"[{verdict.claim.title}](#{fragment})"


def _claim(task: Task, verdict: Verdict, records: Sequence[Record], shown: set[str]) -> str:
    claim = verdict.claim
    picture = (
        "The picture is the one above."
        if claim.figure in shown
        else f"![{claim.title}]({task.page}/{claim.figure}.png)"
    )
    shown.add(claim.figure)
    return "\n\n".join(
        [
            f"## {claim.title}",
            f"**Verdict: {verdict.says}.** {claim.how}",
            table.outcomes(task, verdict.outcomes),
            table.results(task, records, claim.rows, cold_start=claim.figure == "cold_start"),
            picture,
        ]
    )


def _settings(task: Task, records: Sequence[Record]) -> str:
    """What each kind of run sets on top of the recipe, the seed left out."""
    ran = {r.name: {k: v for k, v in r.settings.items() if k != "seed"} for r in records}
    common = {k: v for s in ran.values() for k, v in s.items() if all(k in t and t[k] == v for t in ran.values())}
    rows = []
    for variant in task.variants:
        if variant.name in ran:
            start = f"`{variant.after}`" if variant.after else "the teacher"
            words = _words({k: v for k, v in ran[variant.name].items() if k not in common})
            rows.append([f"`{variant.name}`", variant.title, start, words])
    return (
        f"## Settings\n\nOn top of `configs/{task.name}.yaml`, all runs: {_words(common)}; each besides:\n\n"
        + table.markdown(["run", "", "starts from", "settings"], rows)
    )


def _words(settings: dict[str, Any]) -> str:
    return ", ".join(f"`{key}: {json.dumps(value)}`" for key, value in settings.items())
