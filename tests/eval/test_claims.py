"""The claims page from records with known numbers: statistics, the rule, the page, the choice of runs, comparison."""

import json
import math
import re
import time
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from dmdr_fast.cli import parse
from dmdr_fast.errors import UserError
from dmdr_fast.eval.claims import __main__ as command
from dmdr_fast.eval.claims import compare, launch, page, records, runs, statistics, verdicts
from dmdr_fast.eval.claims.tasks import TASKS

DIGITS, SCENES = TASKS["digits"], TASKS["scenes"]
DOCS = launch.PACKAGE.parent / "docs"
FINALS = {  # name: (fd, recall, reward, held-out reward); seeds add a spread
    "cold_start": (0.5, 0.5, -0.30, -0.4),
    "cold_no_dyna_dg": (0.9, 0.4, -0.35, -0.5),
    "cold_no_dyna_rs": (0.5, 0.5, -0.30, -0.4),
    "cold_neither": (0.9, 0.4, -0.35, -0.5),
    "dmd_only": (0.3, 0.6, -0.20, -0.3),
    "rl_only": (3.0, 0.1, -0.01, -0.9),
    "rl_kl": (1.0, 0.2, -0.10, -0.3),
    "dmd_then_rl": (0.3, 0.1, -0.01, -0.1),
    "dmd_then_rl_kl": (1.0, 0.2, -0.10, -0.3),
    "dmdr_refl": (0.4, 0.7, -0.05, -0.1),
    "dmdr_grpo": (0.4, 0.7, -0.06, -0.1),
    "dmdr_dpo": (0.9, 0.6, -0.07, -0.1),
    "cold_reuse": (0.6, 0.5, -0.30, -0.4),
    "dmdr_reuse": (0.5, 0.6, -0.06, -0.1),
    "cold_reuse_time": (0.5, 0.5, -0.30, -0.4),
    "dmdr_reuse_time": (0.4, 0.7, -0.05, -0.1),
    "dmdr_nft": (0.4, 0.7, -0.25, -0.1),
    "cold_tilt": (0.4, 0.5, -0.20, -0.4),
    "dmdr_tilt": (0.3, 0.7, -0.05, -0.1),
    "cold_guided": (0.9, 0.3, -0.10, -0.2),
    "cold_decoupled": (0.8, 0.3, -0.10, -0.2),
    "decoupled_only": (0.8, 0.3, -0.10, -0.2),
    "dmdr_advantage": (0.9, 0.3, -0.05, -0.1),
    "cold_four": (0.3, 0.7, -0.20, -0.3),
    "cold_four_ode": (0.2, 0.7, -0.20, -0.3),
    "cold_four_cps": (0.3, 0.7, -0.20, -0.3),
    "cold_four_stops": (0.4, 0.7, -0.20, -0.3),
    "cold_two": (0.5, 0.5, -0.30, -0.4),
    "dmdr_refl_two": (0.6, 0.7, -0.05, -0.1),
    "dmdr_grpo_two": (0.7, 0.7, -0.05, -0.1),
    "dmdr_hybrid_two": (0.4, 0.7, -0.05, -0.1),
    "dmdr_hybrid": (0.3, 0.7, -0.05, -0.1),
    "cold_one": (0.5, 0.5, -0.30, -0.4),
    "dmdr_refl_one": (0.6, 0.7, -0.05, -0.1),
}
TEACHER = {"fd": 0.25, "precision": 0.8, "recall": 0.8, "reward": -0.06, "held_out_reward": -0.2, "diversity": 0.5}
SHIFT = (-0.01, 0.0, 0.01)  # of seeds 0, 1, 2


def record(name, seed, task=DIGITS):
    """On scenes the accuracies are 1 + r and 1 + 2 r, and no reward tells one run from another."""
    fd, recall, reward, held_out = (v * (1 + SHIFT[seed]) for v in FINALS[name])
    final = {"fd": fd, "precision": 0.8, "recall": recall, "reward": reward, "held_out_reward": held_out}
    teacher = TEACHER
    if task is SCENES:
        final |= {"accuracy": 1 + reward, "accuracy_unseen": 1 + 2 * reward, "reward": 7.0}
        teacher = TEACHER | {"accuracy": 0.94, "accuracy_unseen": 0.88, "reward": 7.0}
    rows = {"dmdr": final | {"diversity": 0.4}}
    if name == "cold_start":
        rows |= {"teacher": teacher, "teacher_n": teacher | {"fd": 5.0}}
    variant, budget = next(v for v in task.variants if v.name == name), task.full
    every = budget.cold_start // 10
    steps = range(every, (budget.cold_start if variant.phases == "cold_start" else budget.total) + 1, every)
    evaluations = [final | {"diversity": 0.4, "step": step, "fd": fd * budget.cold_start / step} for step in steps]
    settings = runs.settings_of(task, variant, seed, budget)
    return records.Record(name, seed, settings, rows, evaluations, 60.0, "abc")


ALL = [record(v.name, seed) for v in DIGITS.variants for seed in range(3)]
MADE = {
    "seeds": [0, 1, 2],
    "cold_start_steps": 500,
    "rl_steps": 200,
    "versions": {"torch": "2.13"},
    "processor": "a processor",
    "seconds": 1800.0,
    "parts": 4,
    "jobs": 2,
}


def test_spread_and_difference_are_those_of_scipy():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=5).tolist(), rng.normal(1, 2, size=3).tolist()
    first, second = statistics.spread(a), statistics.spread(b)
    assert (first.mean, first.std, first.count) == pytest.approx((np.mean(a), np.std(a, ddof=1), 5))
    mean, error = statistics.difference(first, second)
    welch = stats.ttest_ind(a, b, equal_var=False)
    assert mean / error == pytest.approx(welch.statistic)
    assert math.isnan(statistics.spread([1.0]).std)
    assert statistics.spread([]) is None


def test_the_cold_start_is_measured_by_its_mean_log_distance():
    mine = record("cold_start", 1)
    expected = np.mean(np.log10([row["fd"] for row in mine.evaluations]))
    assert statistics.value_of(mine, statistics.COLD_START_FD) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("reward", "fd"),
    [(-0.5, 0.5), (-0.4, 0.5), (-0.3, math.sqrt(0.5 * 2.0)), (-0.25, 0.5**0.25 * 2.0**0.75), (-0.2, 2.0), (-0.05, 3.0)],
)
def test_distance_at_a_reward_is_read_between_evaluations(reward, fd):
    """0.5 at its start (-0.4), 2 at -0.2, then less reward, 3 at its highest reward of -0.1; -0.05 it never has."""
    way = [(500, -0.4, 0.5), (550, -0.2, 2.0), (600, -0.3, 1.0), (650, -0.1, 3.0), (700, -0.15, 4.0)]
    before = [{"step": 450, "reward": 0.0, "fd": 9.0}]
    mine = replace(
        record("dmd_then_rl", 0), evaluations=before + [{"step": s, "reward": r, "fd": f} for s, r, f in way]
    )
    assert statistics.fd_at(mine, "reward", reward) == pytest.approx(fd)


def test_an_evaluation_without_a_finite_distance_is_passed_over():
    """The distance of a run that leaves the data for a while is null in its records."""
    way = [(500, -0.4, 0.5), (550, -0.3, None), (600, -0.2, 2.0), (650, None, None)]
    mine = replace(record("dmd_then_rl", 0), evaluations=[{"step": s, "reward": r, "fd": f} for s, r, f in way])
    assert statistics.fd_at(mine, "reward", -0.3) == pytest.approx(math.sqrt(0.5 * 2.0))
    assert statistics.fd_at(mine, "reward", 0.0) == 2.0
    assert statistics.value_of(mine, statistics.COLD_START_FD) == pytest.approx((math.log10(0.5) + math.log10(2.0)) / 2)
    never = replace(mine, evaluations=[{"step": 500, "reward": -0.4, "fd": None}])
    assert statistics.fd_at(never, "reward", -0.4) is statistics.value_of(never, statistics.COLD_START_FD) is None


def test_a_run_without_a_cold_start_starts_as_the_teacher_in_one_step():
    mine = record("rl_only", 0)
    mine = replace(mine, rows=mine.rows | {"cold_start": {"fd": 6.0, "reward": -0.9}})
    assert mine.since_rl[0] == {"step": 0, "fd": 6.0, "reward": -0.9}
    assert [row["step"] for row in record("dmdr_refl", 0).since_rl] == [500, 550, 600, 650, 700]


@pytest.mark.parametrize(
    ("gain", "guard", "says"),
    [
        (2.1, False, "holds"),
        (1.9, False, "cannot be told here"),
        (-1.9, False, "cannot be told here"),
        (-2.1, False, "does not hold"),
        (0.1, True, "holds"),
        (-1.9, True, "holds"),
        (-2.1, True, "does not hold"),
    ],
)
@pytest.mark.parametrize("measure", ["recall", "fd"])
def test_a_difference_counts_from_two_standard_errors(gain, guard, says, measure):
    better = 1 if measure == "recall" else -1
    values = [-1.0, 0.0, 1.0]  # standard deviation 1, so that the standard error of the difference is sqrt(2 / 3)
    shift = better * gain * math.sqrt(2 / 3)

    def runs_of(name, offset):
        return [replace(record(name, s), rows={"dmdr": {measure: v + offset}}) for s, v in enumerate(values)]

    test = verdicts.Test("dmdr_refl", "dmd_only", measure, guard)
    found = verdicts.outcome(test, runs_of("dmdr_refl", shift) + runs_of("dmd_only", 0.0), "reward")
    assert (found.difference, found.error) == pytest.approx((shift, math.sqrt(2 / 3)))
    assert found.says == says


@pytest.mark.parametrize("kept", [[r for r in ALL if r.seed == 0], [r for r in ALL if r.name != "dmd_only"], []])
def test_one_seed_or_a_missing_run_tells_nothing(kept):
    claim = next(c for c in verdicts.claims_of(DIGITS) if c.key == "modes")
    assert verdicts.judge(claim, kept, "reward").says == "cannot be told here"


def test_the_verdicts_follow_from_the_numbers():
    assert {v.claim.key: v.says for v in (verdicts.judge(c, ALL, "reward") for c in verdicts.claims_of(DIGITS))} == {
        "regularizer": "holds",
        "modes": "cannot be told here",  # DPO's recall is that of DMD alone
        "dyna_dg": "holds",
        "dyna_rs": "cannot be told here",
        "both": "holds",
        "joint": "does not hold",
        "teacher_reward": "holds",
        "teacher_fd": "does not hold",
        "any_method": "holds",
        "reuse": "cannot be told here",
        "tilt": "holds",
        "nft": "does not hold",
        "decoupled": "holds",
        "advantage": "holds",
        "ode": "holds",
        "cps": "cannot be told here",
        "stops": "does not hold",
        "hybrid": "holds",
    }


SCENES_ALL = [record(v.name, seed, SCENES) for v in SCENES.variants for seed in range(3)]


def test_on_scenes_the_same_rules_take_the_prompt_accuracy_for_the_reward():
    assert {c.key: verdicts.judge(c, SCENES_ALL, "accuracy").says for c in verdicts.claims_of(SCENES)} == {
        "regularizer": "holds",
        "modes": "cannot be told here",
        "dyna_dg": "holds",
        "dyna_rs": "cannot be told here",
        "both": "holds",
        "joint": "does not hold",
        "teacher_reward": "holds",
        "teacher_unseen": "holds",
        "teacher_fd": "does not hold",
        "any_method": "holds",
        "tilt": "holds",
        "nft": "does not hold",
        "hybrid": "holds",
    }


@pytest.mark.thorough
def test_the_page_of_scenes_is_in_its_own_words(tmp_path):
    page.write_page(SCENES, tmp_path, MADE, SCENES_ALL)
    text = (tmp_path / "claims-scenes.md").read_text()
    assert "`make claims TASK=scenes` trains everything" in text
    assert "## The four-step student beats the 50-step teacher: on what no training set shows" in text
    assert "| Teacher, 4 steps | 5.000 | 0.800 | 0.800 | 0.940 | 0.880 | −0.2000 | 0.5000 |" in text
    assert "| DMDR, ReFL | +0.010 | 1.60 x | met |" in text
    assert "DMDR (ReFL): the prompt accuracy and the held-out reward must both be higher than the teacher's." in text
    pictures = {f"claims-scenes/{p.name}" for p in (tmp_path / "claims-scenes").glob("*.png")}
    assert pictures == set(re.findall(r"\((.*?\.png)\)", text))
    assert not re.search(r"[{}]", re.sub(r"`[^`]*`", "", text))  # no word of the task is missing


@pytest.mark.parametrize(
    "task", [t for t in TASKS.values() if (DOCS / f"{t.page}.json").is_file()], ids=lambda t: t.name
)
def test_every_committed_run_has_the_settings_of_today(task, tmp_path):
    """So ``--kept`` lets it stand."""
    committed = DOCS / f"{task.page}.json"
    made, read = records.read_json(committed)
    _, kept = command.kept_of(committed, command.jobs_of(task, [], made["seeds"], task.full, tmp_path))
    assert list(kept.values()) == read
    assert len(committed.read_text().splitlines()) == 5 + len(read) + len(json.loads(committed.read_text())["claims"])


def test_the_goal_of_each_method_is_measured_against_the_teacher():
    found = {g.name: g for g in verdicts.goals(ALL, "reward")}
    assert found["dmdr_refl"].met
    assert found["dmdr_refl"].fd_ratio == pytest.approx(0.4 / 0.25)
    assert found["dmdr_dpo"].reward_gain == pytest.approx(-0.07 + 0.06)
    assert not found["dmdr_dpo"].met
    assert not found["dmdr_grpo"].met  # the same reward is not above it


def test_the_page_holds_every_number_and_its_pictures(tmp_path):
    found = page.write_page(DIGITS, tmp_path, MADE, ALL[::-1])
    text = (tmp_path / "claims.md").read_text()
    for verdict in found:
        assert re.search(rf"\| \[{verdict.claim.title}\]\(#[a-z0-9-]+\) \| \*\*{verdict.says}\*\* \|", text)
        assert (tmp_path / "claims" / f"{verdict.claim.figure}.png").read_bytes().startswith(b"\x89PNG")
    assert "| DMDR, ReFL | 0.400 ± 0.004 | 0.800 ± 0.000 | 0.700 ± 0.007 | −0.0500 ± 0.0005 |" in text
    assert "| DMDR, DPO | −0.0100 | 3.60 x | missed: reward by 0.0100, FD by 1.10 x the teacher's |" in text
    assert "93 runs, 1.55 hours of one core each added up; 30 minutes on the clock, in 4 parts" in text
    assert "smoke" not in text
    made, read = records.read_json(tmp_path / "claims.json")
    assert made == MADE
    assert sorted(read, key=lambda r: (r.name, r.seed)) == sorted(ALL, key=lambda r: (r.name, r.seed))


def test_a_run_that_diverged_is_named_and_left_out(tmp_path):
    ended = replace(record("rl_only", 2), rows={}, evaluations=[], diverged="10 updates in a row were skipped")
    page.write_page(
        DIGITS, tmp_path, MADE, [r for r in ALL if (r.name, r.seed) != ("rl_only", 2)] + [ended], smoke=True
    )
    text = (tmp_path / "claims.md").read_text()
    assert "RL only (ReFL) (1 diverged) | 2.985 ± 0.021" in text
    assert "smoke test" in text


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_run_is_a_valid_configuration(task, quick, tmp_path):
    budget = task.quick if quick else task.full
    for job in command.jobs_of(task, [], [7], budget, tmp_path):
        words = [w for k, v in job.settings.items() for w in (f"--{k}", json.dumps(v))]
        config, _ = parse(["--config", str(job.recipe), *words])
        assert config.seed == 7
        longer = 7 / 6 if job.name.endswith("_time") else 1  # 12 F-units an update in the place of 14
        steps = budget.cold_start if job.name.startswith("cold") else budget.total
        assert config.train.generator_steps == round(longer * steps)
        assert config.train.rollout_reuse == (3 if "reuse" in job.name else 1)
        counts = [n for word, n in {"one": 1, "two": 2, "four": 4}.items() if word in job.name.split("_")]
        assert config.student.steps == (counts or [task.steps])[0]
        batch = config.train.micro_batch_size * config.train.gradient_accumulation
        assert quick or batch == {"digits": 64, "scenes": 32}[task.name]
        assert quick or longer > 1 or budget.cold_start % config.eval.every == 0  # what RL starts from is measured


def test_runs_come_after_those_they_start_from():
    assert [v.name for v in runs.chosen(DIGITS, ["dmdr_dpo"])] == ["cold_start", "dmdr_dpo"]
    assert runs.chosen(DIGITS, []) == DIGITS.variants
    with pytest.raises(UserError, match=r"--only dmdr: no such run; expected one of cold_start, "):
        runs.chosen(DIGITS, ["dmdr"])


def test_a_page_of_some_runs_leaves_out_the_others(tmp_path):
    page.write_page(DIGITS, tmp_path, MADE, [r for r in ALL if r.name in DIGITS.quick.only])
    text = (tmp_path / "claims.md").read_text()
    assert "| `dmdr_refl` |" in text
    assert "| `dmd_only` |" not in text
    assert "| RL only (ReFL) | – | – |" not in text
    assert "Not put to the test yet, for want of runs: DMD regularises RL better than a KL to a reference does;" in text
    assert "## DMD regularises RL better" not in text
    assert "| Cold start without DynaDG | – | – |" not in text
    assert "## DynaDG and DynaRS together speed the cold start" in text


def test_a_comparison_names_what_is_not_the_same(capsys):
    old = record("dmdr_refl", 0)
    again = replace(old, seconds=3.0, commit="def")
    assert compare.report([old], [again])
    assert capsys.readouterr().out == "dmdr_refl, seed 0: every number is the committed one\n"
    fd = old.rows["dmdr"]["fd"]
    again = replace(again, rows={"dmdr": old.rows["dmdr"] | {"fd": math.nextafter(fd, 1)}})
    assert not compare.report([old], [again])
    said = capsys.readouterr().out
    assert f"dmdr, fd: {fd!r} committed, {math.nextafter(fd, 1)!r} now" in said
    assert "committed by abc, made again by def" in said
    assert not compare.report([], [old])


def test_comparing_with_another_file_is_an_error(tmp_path):
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match=r"expected a claims\.json that this command wrote"):
        records.read_json(tmp_path / "other.json")


# A trainer of a few lines: every update takes a moment and is a checkpoint; SIGTERM stops it, as the real one.
TRAINER = """
import json, pathlib, signal, sys, time
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = pathlib.Path(words["--run_dir"])
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
def last(checkpoints):
    return max((int(p.name[5:]) for p in checkpoints.glob("step_*")), default=0)
step = last(folder / "checkpoints") if words["--resume"] == "auto" else int(words["--resume"][-8:])
total = int(words["--train.generator_steps"])
if words["--seed"] == "9":
    sys.exit("error: reward.weight: not today")
if words["--seed"] == "8":
    print("error: 10 updates in a row were skipped (train.max_skipped): generator", file=sys.stderr)
    sys.exit(1)
while step < total:
    time.sleep(0.02)
    step += 1
    with (folder / "evaluations.jsonl").open("a") as log:
        log.write(json.dumps({"step": step, "fd": 1 / step}) + "\\n")
    (folder / "checkpoints" / f"step_{step:08d}").mkdir(parents=True, exist_ok=True)
    if asked:
        sys.exit(0)
row = {"fd": step / int(words["--seed"] or 1)}
(folder / "metrics.json").write_text(json.dumps({"dmdr": row, "teacher": row}))
"""


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    file = tmp_path / "trainer.py"
    file.write_text(TRAINER)
    monkeypatch.setattr(launch, "TRAIN", file)
    monkeypatch.setattr(launch, "POLL", 0.01)
    return file


SHORT = runs.Budget(20, 30, 1)


def some_jobs(work, seed, budget=SHORT):
    return command.jobs_of(DIGITS, ["dmdr_refl", "rl_only"], [seed], budget, work)


def test_runs_stop_at_the_deadline_go_on_from_their_checkpoints_and_are_not_run_again(trainer, tmp_path, capsys):
    jobs = some_jobs(tmp_path, 3)
    launch.run_jobs(jobs, slots=2, commit="abc", deadline=time.monotonic() + 0.25)
    assert not launch.is_finished(next(j for j in jobs if j.name == "dmdr_refl"))
    launch.run_jobs(jobs, slots=2, commit="def", deadline=None)
    refl = command.record_of(next(j for j in jobs if j.name == "dmdr_refl"))
    assert [row["step"] for row in refl.evaluations] == list(range(1, 31))  # those of the cold start included
    assert refl.final == {"fd": 10.0}
    assert json.loads((tmp_path / "dmdr_refl-3" / "evaluations.jsonl").read_text().splitlines()[0])["step"] == 21
    only = command.record_of(next(j for j in jobs if j.name == "rl_only"))
    assert [row["step"] for row in only.evaluations] == list(range(1, 31))  # none twice: it was resumed
    assert only.commit == "abc def"
    capsys.readouterr()
    launch.run_jobs(jobs, slots=2, commit="def", deadline=None)
    assert capsys.readouterr().out == ""
    other = some_jobs(tmp_path, 3, runs.Budget(20, 31, 1))
    finished = {j.name: launch.is_finished(j) for j in other}
    assert finished == {"cold_start": True, "rl_only": False, "dmdr_refl": False}


def test_a_diverged_run_is_a_result_and_a_failed_one_an_error(trainer, tmp_path):
    jobs = some_jobs(tmp_path, 8)[:1]
    launch.run_jobs(jobs, slots=1, commit="abc", deadline=None)
    assert command.record_of(jobs[0]).diverged.startswith("10 updates in a row were skipped")
    with pytest.raises(
        UserError, match=r", seed 9 ended with exit code 1: error: reward.weight: not today \(all of it: .*claims.log\)"
    ):
        launch.run_jobs(some_jobs(tmp_path, 9), slots=2, commit="abc", deadline=None)


def test_the_command_says_when_there_is_more_to_do_and_writes_the_page_at_the_end(trainer, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "digits", replace(DIGITS, full=runs.Budget(2, 3, 1)))
    words = ["--work", str(tmp_path / "work"), "--out", str(tmp_path), "--seeds", "1", "--jobs", "4"]
    assert command.main([*words, "--only", "cold_start"]) == command.MORE
    assert command.main([*words, "--minutes", "0"]) == command.MORE
    assert not (tmp_path / "claims.md").exists()
    assert command.main(words) == command.DONE
    committed = tmp_path / "claims.json"
    made, read = records.read_json(committed)
    assert (len(read), made["parts"], made["seeds"]) == (len(DIGITS.variants), 3, [1])
    assert command.main(words) == command.DONE  # written again, without a run
    assert records.read_json(committed) == (made, read)
    again = [*words, "--only", "dmdr_grpo", "--compare", str(committed)]
    assert command.main(again) == command.DONE
    trainer.write_text(TRAINER.replace("1 / step", "2 / step"))
    assert command.main(again) == command.DONE  # not run again in the folder of comparisons
    assert not any(re.search("compare", str(p)) for p in (tmp_path / "work").glob("*-1"))


@pytest.mark.thorough
def test_runs_of_an_earlier_page_stand_where_their_settings_do(trainer, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "digits", replace(DIGITS, full=runs.Budget(2, 3, 1)))
    words = ["--seeds", "1", "--out", str(tmp_path), "--work"]
    assert command.main([*words, str(tmp_path / "first")]) == command.DONE
    page = tmp_path / "claims.json"
    made, read = records.read_json(page)
    changed = [
        replace(r, settings=r.settings | {"rl.dpo.beta": 1.0}) if r.name == "dmdr_dpo" else replace(r, commit="earlier")
        for r in read
        if r.name != "dmdr_reuse"
    ]
    records.write_json(page, made, changed, [])
    second = tmp_path / "second"
    assert command.main([*words, str(second), "--kept", str(page)]) == command.DONE
    assert {p.name for p in second.glob("*-1")} == {"cold_start-1", "dmdr_dpo-1", "cold_reuse-1", "dmdr_reuse-1"}
    records.write_json(page, made, [r for r in read if r.name not in ("dmdr_dpo", "dmdr_nft", "cold_tilt")], [])
    part = [*words, str(tmp_path / "third"), "--kept", str(page), "--only", "dmdr_nft"]
    assert command.main(part) == command.DONE
    there = [v.name for v in DIGITS.variants if v.name not in ("dmdr_dpo", "cold_tilt")]
    assert [r.name for r in records.read_json(page)[1]] == there
    records.write_json(page, made, changed, [])
    assert command.main([*words, str(second), "--kept", str(page)]) == command.DONE
    now, rows = records.read_json(page)
    assert [r.name for r in rows] == [v.name for v in DIGITS.variants]
    assert {r.name for r in rows if r.commit != "earlier"} == {"dmdr_dpo", "dmdr_reuse"}
    count = len(DIGITS.variants)
    assert (now["kept"], now["before"]) == (count - 2, made)
    assert f"- {count - 2} of the runs stand from the page before: " in (tmp_path / "claims.md").read_text()
    assert len(page.read_text().splitlines()) == 2 + count + 2 + len(verdicts.claims_of(DIGITS)) + 1  # a run a line


@pytest.mark.thorough
@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_a_smoke_run_with_the_real_trainer(task, tmp_path):
    words = ["--task", task.name, "--quick", "--work", str(tmp_path), "--only"]
    assert command.main([*words, "dmdr_grpo"]) == command.MORE  # the page waits for all runs
    cold, grpo = (command.record_of(job) for job in command.jobs_of(task, ["dmdr_grpo"], [0], task.quick, tmp_path))
    assert [row["step"] for row in cold.evaluations] == [2, 4]
    assert [row["step"] for row in grpo.evaluations] == [2, 4, 6]
    other = {"reward"} if task is SCENES else set()  # GRPO's is another there
    for name in cold.final.keys() - other:
        value = cold.final[name]
        assert cold.evaluations[-1][name] == value  # the last evaluation is of the same generator on the same noise
        assert grpo.rows["cold_start"][name] == value  # and so is that of the run that goes on from it
    finite = {measure for measure in task.columns if grpo.final[measure] is not None}
    assert set(task.columns) - finite == ({"diversity"} if task is SCENES else set())  # no prompt has two images
    assert all(math.isfinite(grpo.final[measure]) for measure in finite)
