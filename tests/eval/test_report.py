"""The report: self-contained, complete, and robust to what a run did not do."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from dmdr_fast.errors import UserError
from dmdr_fast.eval import report
from dmdr_fast.eval.report import load_run, write_overview, write_report

METRICS = {
    "teacher": {
        "fd": 1.47,
        "precision": 0.97,
        "recall": 0.95,
        "reward": -0.052,
        "accuracy": 0.99,
        "nfe": 50.0,
    },
    "teacher_n": {"fd": 43.6, "precision": 0.1, "recall": 0.01, "reward": -1.5, "accuracy": 0.6, "nfe": 1.0},
    "cold_start": {
        "fd": 2.26,
        "precision": 0.96,
        "recall": 0.9,
        "reward": -0.06,
        "accuracy": 0.98,
        "nfe": 1.0,
    },
    "dmdr": {"fd": 2.3, "precision": 0.98, "recall": 0.88, "reward": -0.004, "accuracy": 0.995, "nfe": 1.0},
}


HELD_OUT = {
    "teacher": {"held_out_reward": -0.1, "diversity": 0.5},
    "teacher_n": {"held_out_reward": -1.6, "diversity": 0.9},
    "cold_start": {"held_out_reward": -0.2, "diversity": 0.4},
    "dmdr": {"held_out_reward": -0.15, "diversity": 0.3},
}


def make_run(directory, generators=tuple(METRICS), phases=("cold_start", "dmdr"), metrics=METRICS):
    directory.mkdir(exist_ok=True)
    (directory / "metrics.json").write_text(json.dumps({name: metrics[name] for name in generators}))
    rng = np.random.default_rng(0)
    samples = {name: rng.uniform(-1, 1, (40, 1, 8, 8)).astype(np.float32) for name in generators}
    np.savez(directory / "samples.npz", labels=np.arange(40) % 10, **samples)
    with (directory / "log.jsonl").open("w") as log:
        for step in range(20):
            phase = phases[step * len(phases) // 20]
            record = {
                "step": step,
                "phase": phase,
                "dmd_loss": 0.9**step,
                "reward": -1 / (step + 1),
                "odd_key": step,
            }
            log.write(json.dumps(record | {"memory_bytes": None if step == 3 else 2.0**30}) + "\n")
    (directory / "config.yaml").write_text("seed: 3\nstudent:\n  steps: 1\neval:\n  teacher_steps: 40\nnote: a < b\n")
    summary = {
        "finished": "2031-05-06T07:08:09+00:00",
        "training_seconds": 254.4,
        "command": "dmdr-train --config 'a & b'",
        "commit": "0123456789ab",
        "device": "Some GPU",
        "ranks": 8,
        "samples_per_rank": 4,
        "gradient_accumulation": 2,
        "batch": 64,
        "parameters": {"generator": 703456},
    }
    (directory / "summary.json").write_text(json.dumps(summary))
    return directory


class Page(HTMLParser):
    """Text, images and outside references of a page, and whether its tags close in order."""

    def __init__(self, path):
        super().__init__()
        self.text, self.images, self.alts, self.links, self.open, self.cells = "", [], [], [], [], []
        self.headings = []
        self.feed(path.read_text())
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "img":
            self.alts.append(attrs["alt"])
            self.images.append(Image.open(io.BytesIO(base64.b64decode(attrs["src"].split("base64,")[1]))))
        self.links += [value for name, value in attrs.items() if name in ("src", "href")]
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)
        if tag == "th":
            self.headings.append("")
        if tag == "td":
            self.cells.append(["", attrs.get("class")])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] == "td":
            self.cells[-1][0] += data
        if self.open and self.open[-1] == "th":
            self.headings[-1] += data


def test_the_report_holds_everything_and_needs_nothing(tmp_path):
    path = write_report(make_run(tmp_path / "run"))
    assert path == tmp_path / "run" / "report.html"
    page = Page(path)
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not re.search(r"https?://|@import|url\(", path.read_text())
    assert len(page.images) == 4 + 4  # grids; reward, dmd loss, memory, odd key
    assert all(image.size == (4 * 52 - 4, 10 * 52 - 4) for image in page.images[:4])
    for title in ("Teacher, 40 steps", "Teacher, 1 step", "Cold start, 1 step", "DMDR, 1 step"):
        assert page.text.count(title) >= 2, title
    facts = (
        "2031-05-06T07:08:09",
        "4 min 14 s",
        "dmdr-train --config 'a & b'",
        "0123456789ab",
        "703,456",
        "note: a < b",
    )
    for fact in (*facts, "8 × Some GPU × 4 samples × 2 micro-steps = 64 samples an update"):
        assert fact in page.text, fact
    assert "0, 1, 2, 3, 4, 5, 6, 7, 8, 9" in page.text


def test_the_table_has_every_number_and_marks_the_best_of_each_column(tmp_path):
    cells = Page(write_report(make_run(tmp_path / "run"))).cells[:28]
    rows = [cells[i : i + 7] for i in range(0, 28, 7)]
    assert [text for text, _ in rows[0]] == [
        "Teacher, 40 steps",
        "1.470",
        "0.970",
        "0.950",
        "-0.0520",
        "0.9900",
        "50",
    ]
    best = {(i, j) for i, row in enumerate(rows) for j, (_, marked) in enumerate(row) if marked == "best"}
    assert best == {(0, 1), (3, 2), (0, 3), (3, 4), (3, 5), (1, 6), (2, 6), (3, 6)}


@pytest.mark.parametrize("missing", list(METRICS))
def test_any_generator_may_be_missing(tmp_path, missing):
    run = make_run(tmp_path / "run", [name for name in METRICS if name != missing])
    page = Page(write_report(run))
    assert len(page.images) == 3 + 4
    assert write_overview(run, tmp_path / "overview.png").exists()


def test_a_run_without_rl_or_reward_has_no_boundary_and_dashes(tmp_path):
    without_reward = {name: row | {"reward": None} for name, row in METRICS.items()}
    run = make_run(tmp_path / "run", ["teacher", "cold_start"], ["cold_start"], without_reward)
    page = Page(write_report(run))
    assert "–" not in [text for text, _ in page.cells] and "Reward" not in page.text
    assert "mean reward" not in page.text and "Fréchet distance" in page.text


@pytest.mark.parametrize("left", ["metrics.json", "log.jsonl", "samples.npz"])
def test_any_one_file_is_enough(tmp_path, left):
    run = make_run(tmp_path / "run")
    for file in run.iterdir():
        if file.name != left:
            file.unlink()
    page = Page(write_report(run))
    assert len(page.images) == {"metrics.json": 0, "log.jsonl": 4, "samples.npz": 4}[left]


def test_every_metric_that_some_row_has_is_a_column(tmp_path):
    """Held-out reward and diversity among them; a column that no row fills is not there."""
    rows = {name: {**METRICS[name], **HELD_OUT[name], "accuracy": None} for name in METRICS}
    rows["teacher_n"]["reward"] = None
    page = Page(write_report(make_run(tmp_path / "run", metrics=rows)))
    assert page.headings == ["", "FD", "Precision", "Recall", "Reward", "Held-out reward", "Diversity", "NFE"]
    cells = [page.cells[i : i + 8] for i in range(0, 32, 8)]
    assert [text for text, _ in cells[1]][4:7] == ["–", "-1.6000", "0.9000"]
    assert [row[5][1] for row in cells] == ["best", None, None, None]
    assert {row[6][1] for row in cells} == {None}  # the most diverse are not the best: noise is
    assert "mean held-out reward" in page.text and "Accuracy" not in page.text


def evaluated(run, *rows):
    (run / "evaluations.jsonl").write_text("".join(json.dumps({"step": s, **row}) + "\n" for s, row in rows))


def test_it_says_when_fd_worsened(tmp_path):
    run = make_run(tmp_path / "run")
    worsened = "FD worsened in reinforcement learning: 2.260 after the cold start, 2.300 at the end."
    assert report._remarks(load_run(run)) == [worsened]
    evaluated(run, (5, {"fd": 2.5}), (10, {"fd": 2.1}), (15, {"fd": 2.2}), (20, {"fd": 2.3}))
    best = "FD was best after 10 updates, 2.100, and is 2.300 after 20."
    assert report._remarks(load_run(run)) == [worsened, best]
    text = Page(write_report(run)).text
    assert worsened in text and best in text
    better = {name: METRICS[name] | {"fd": 3.0 - i} for i, name in enumerate(METRICS)}
    run = make_run(tmp_path / "better", metrics=better)
    evaluated(run, (5, {"fd": 2.5}), (10, {"fd": 2.1}))
    assert report._remarks(load_run(run)) == []


def test_evaluations_and_sheets_made_while_training_are_shown(tmp_path):
    run = make_run(tmp_path / "run")
    evaluated(run, (5, {"fd": 2.5, "reward": None, "nfe": 1.0}), (10, {"fd": 2.1, "reward": None, "nfe": 1.0}))
    (run / "samples").mkdir()
    for step in range(1, 31):
        Image.new("RGB", (step, 7)).save(run / "samples" / f"step_{step:08d}.png")
    page = Page(write_report(run))
    assert [image.size for image in page.images[5:17]] == [(s, 7) for s in (1, 4, 6, 9, 12, 14, 17, 19, 22, 25, 27, 30)]
    assert "After 1 updates" in page.text and "12 of 30 sheets" in page.text
    assert page.alts[4] == "Evaluation over generator steps: FD" and len(page.images) == 4 + 1 + 12 + 4


def test_prompts_stand_beside_their_pictures_and_every_sample_is_shown(tmp_path):
    """Markup in a prompt is text."""
    prompts = ["a <script>alert('1')</script> & b", '"quoted" fox', "狐狸", *(f"number {i}" for i in range(20))]
    labels = np.arange(46) % 23
    run = make_run(tmp_path / "run")
    samples = {n: np.stack([np.full((3, 8, 8), v) for v in np.linspace(-1, 1, 46)]) for n in ("teacher", "dmdr")}
    np.savez(run / "samples.npz", labels=labels, prompts=np.array([prompts[i] for i in labels]), **samples)
    path = write_report(run)
    assert "<script>" not in path.read_text()
    page = Page(path)
    assert page.headings[:3] == ["Prompt", "Teacher, 40 steps", "DMDR, 1 step"]
    shown = page.images[:46]
    for i, prompt in enumerate(prompts):
        assert page.alts[2 * i : 2 * i + 2] == [f"Teacher, 40 steps: {prompt}", f"DMDR, 1 step: {prompt}"]
        pixels = np.asarray(shown[2 * i].convert("L"))
        values = [round((np.linspace(-1, 1, 46)[n] + 1) * 127.5) for n in (i, i + 23)]
        assert pixels.shape == (256, 516) and [pixels[9, 9], pixels[9, 500]] == pytest.approx(values, abs=1)
    assert prompts[0] in page.text and prompts[2] in page.text


def test_the_overview_shows_the_grids_side_by_side(tmp_path):
    four = Image.open(write_overview(make_run(tmp_path / "four"), tmp_path / "four.png"))
    one = Image.open(write_overview(make_run(tmp_path / "one", ["dmdr"]), tmp_path / "one.png"))
    assert four.format == "PNG" and abs(four.width - 4 * one.width) <= 4 and four.height == one.height


def test_what_cannot_be_reported_is_said(tmp_path):
    with pytest.raises(UserError, match=r"nothing to show in .*; expected metrics\.json, log\.jsonl or samples\.npz"):
        write_report(tmp_path)
    run = make_run(tmp_path / "run")
    (run / "samples.npz").write_bytes((run / "samples.npz").read_bytes()[:500])
    with pytest.raises(UserError, match=r"samples\.npz cannot be read"):
        load_run(run)
    (run / "samples.npz").unlink()
    with pytest.raises(UserError, match=r"overview: no samples"):
        write_overview(run, tmp_path / "overview.png")
    (run / "metrics.json").write_text('{"dmdr": ')
    with pytest.raises(UserError, match=r"metrics\.json cannot be read"):
        write_report(run)
