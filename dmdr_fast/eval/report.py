"""The report of a run: one HTML file that needs nothing else, and one picture for a README."""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml
from PIL import Image

from dmdr_fast.disk import write_whole
from dmdr_fast.errors import UserError
from dmdr_fast.eval import figures
from dmdr_fast.eval.sheets import data_uri, image_uri, rows_of, sample_order, sheet

# The generators that are compared, in order. {steps} and {n} come from the run's configuration.
_GENERATORS = {
    "teacher": "Teacher, {steps} steps",
    "teacher_no_cfg": "Teacher, {steps} steps, no CFG",
    "teacher_n": "Teacher, {n}",
    "cold_start": "Cold start, {n}",
    "dmdr": "DMDR, {n}",
}
# metric: (heading, digits after the point, which end is better or None, what it is)
_METRICS = {
    "fd": ("FD", 3, min, "squared Fréchet distance to the real images, lower is better"),
    "precision": ("Precision", 3, max, "share of samples among the real images' neighbours"),
    "recall": ("Recall", 3, max, "share of real images among the samples' neighbours"),
    "reward": ("Reward", 4, max, "mean of what reinforcement learning optimises"),
    "held_out_reward": ("Held-out reward", 4, max, "mean of rewards that are never optimised"),
    "diversity": ("Diversity", 4, None, "mean RMS distance between two samples of one condition"),
    "accuracy": ("Accuracy", 4, max, "share of samples that show the class or prompt asked for"),
    "accuracy_seen": ("Seen", 4, max, "accuracy on combinations that training sets hold"),
    "accuracy_unseen": ("Unseen", 4, max, "accuracy on combinations that they do not hold"),
    "accuracy_relation": ("Relation", 4, max, "accuracy of this part of the prompt alone, as of the next four"),
    "accuracy_first_digit": ("First digit", 4, max, "left or upper"),
    "accuracy_first_colour": ("First colour", 4, max, "left or upper"),
    "accuracy_second_digit": ("Second digit", 4, max, "right or lower"),
    "accuracy_second_colour": ("Second colour", 4, max, "right or lower"),
    "nfe": ("NFE", 0, min, "network evaluations per image"),
}
# Panels of the log: title, unit, pattern of the keys, factor to the unit. Other keys get one panel each.
_PANELS = (
    ("Reward of the generator's samples", "reward", r"reward", 1),
    ("Held-out reward of the generator's samples", "reward", r"held_out_\w+", 1),
    ("Reward weight", "factor of the RL gradient", r"reward_weight", 1),
    ("DMD loss", "1/2 mean g²", r"dmd_loss", 1),
    ("Fake score loss", "flow-matching loss", r"fake_loss", 1),
    ("Learning rates", "learning rate", r"(generator|fake)_lr", 1),
    ("Gradient norms", "L2 norm before clipping", r"(generator|fake)_grad_norm", 1),
    ("DynaDG and DynaRS", "value", r"real_lora_scale|renoise_alpha|renoise_beta", 1),
    ("Throughput", "samples per second", r"samples_per_second", 1),
    ("Memory", "GiB", r"(\w+_)?memory_bytes", 2**-30),
)
_NOT_DRAWN = ("step", "phase", "elapsed_seconds")
_SHEETS = 12  # at most, of those drawn while training; all are in the run's folder
# Facts of summary.json that are told first, in this order.
_FACTS = ("finished", "training_seconds", "command", "dmdr_fast", "commit")
_BATCH = ("ranks", "device", "samples_per_rank", "gradient_accumulation", "batch")  # told in one line
_PHOTO = 256  # pixels: the longer side of a sample beside its prompt


@dataclass(frozen=True)
class Run:
    """What a run directory holds, each part empty where its file is missing."""

    directory: Path
    metrics: dict[str, dict[str, float | None]]
    records: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]  # rows like those of metrics, with their step
    config: dict[str, Any]
    config_text: str
    samples: dict[str, np.ndarray]
    summary: dict[str, Any]

    def title(self, generator: str) -> str:
        """The name a reader knows a key of metrics.json and samples.npz by."""
        steps = self.config.get("eval", {}).get("teacher_steps", 50)
        n = self.config.get("student", {}).get("steps")
        counted = "N steps" if n is None else f"{n} step{'s' * (n != 1)}"
        return _GENERATORS.get(generator, generator).format(steps=steps, n=counted)


def load_run(run_dir: str | Path) -> Run:
    """Read metrics.json, log.jsonl, evaluations.jsonl, config.yaml, samples.npz and summary.json, those that are there.

    Raises:
        UserError: no such directory, none of the files in it, or one that cannot be read.
    """
    directory = Path(run_dir)
    run = Run(
        directory=directory,
        metrics=_read(directory / "metrics.json", _json, {}),
        records=_read(directory / "log.jsonl", _json_lines, []),
        evaluations=_read(directory / "evaluations.jsonl", _json_lines, []),
        config=_read(directory / "config.yaml", lambda file: yaml.safe_load(_text(file)), {}),
        config_text=_read(directory / "config.yaml", _text, ""),
        samples=_read(directory / "samples.npz", _arrays, {}),
        summary=_read(directory / "summary.json", _json, {}),
    )
    if not (run.metrics or run.records or run.samples):
        raise UserError(f"report: nothing to show in {directory}; expected metrics.json, log.jsonl or samples.npz")
    return run


def _read(file: Path, parse: Callable[[Path], Any], missing: Any) -> Any:
    if not file.exists():
        return missing
    try:
        return parse(file)
    except (OSError, EOFError, ValueError, yaml.YAMLError, zipfile.BadZipFile) as error:
        raise UserError(f"report: {file} cannot be read: {error}; repair or remove it") from error


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def _json(file: Path) -> Any:
    return json.loads(_text(file))


def _json_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in _text(file).splitlines()]


def _arrays(file: Path) -> dict[str, np.ndarray]:
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def write_report(run_dir: str | Path) -> Path:
    """Write ``run_dir/report.html`` from what the run left there, and return its path.

    It shows the samples of each generator from the same noise with their prompts or classes, the metrics, what
    worsened, the evaluations and sheets made while training, the curves of the log with the start of RL marked, what
    ran, and the resolved configuration. Pictures are inside the file; nothing is loaded from elsewhere.
    """
    run = load_run(run_dir)
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    by_prompt = "prompts" in run.samples
    grids, row_classes = ([], None) if by_prompt else _grids(run)
    metrics = [m for m in _METRICS if any(row.get(m) is not None for row in run.metrics.values())]
    html = templates.get_template("report.html.j2").render(
        name=run.directory.resolve().name,
        headlines=_headlines(run),
        remarks=_remarks(run),
        generators=[run.title(name) for name in _shown(run)],
        prompts=_prompts(run) if by_prompt else [],
        grids=[(title, image_uri(pixels)) for title, _, pixels in grids],
        row_classes=row_classes,
        metrics=[_METRICS[m] for m in metrics],
        rows=_table(run, metrics),
        sheets=_sheets(run),
        sheets_in_all=len(_sheet_files(run)),
        evaluated=_drawn(run, _evaluated(run)),
        curves=_drawn(run, _curves(run)),
        facts=_facts(run),
        config=run.config_text,
    )
    path = run.directory / "report.html"
    write_whole(path, html.encode())  # a torn report would pass for one
    return path


def write_overview(run_dir: str | Path, path: str | Path) -> Path:
    """Write one PNG to ``path``: each generator's samples, from the same noise, with its FD underneath."""
    run = load_run(run_dir)
    grids, _ = _grids(run)
    if not grids:
        raise UserError(f"overview: no samples in {run.directory}; expected samples.npz of a run")
    Path(path).write_bytes(figures.draw_overview([(t, "" if fd is None else f"FD {fd:.2f}", s) for t, fd, s in grids]))
    return Path(path)


def _shown(run: Run) -> list[str]:
    return [name for name in _GENERATORS if name in run.samples]


def _labels(run: Run) -> np.ndarray:
    return run.samples.get("labels", np.arange(len(run.samples[_shown(run)[0]])))


def _grids(run: Run) -> tuple[list[tuple[str, float | None, np.ndarray]], list[int] | None]:
    """((title, FD, sheet) of each generator with samples, the class of each row of the sheets or None)."""
    shown = _shown(run)
    if not shown:
        return [], None
    order, row_classes = sample_order(_labels(run))
    grids = [(run.title(name), run.metrics.get(name, {}).get("fd"), sheet(run.samples[name], order)) for name in shown]
    return grids, row_classes


def _prompts(run: Run) -> list[tuple[str, list[str]]]:
    """(prompt, one picture per generator: its samples of that prompt) for each prompt, in order."""
    labels, found = _labels(run), []
    for label in dict.fromkeys(labels.tolist()):
        samples = np.flatnonzero(labels == label)
        order = rows_of(len(samples), math.ceil(len(samples) ** 0.5))
        order = np.where(order < 0, -1, samples[order])
        pictures = [image_uri(sheet(run.samples[n], order, least=_PHOTO, most=_PHOTO)) for n in _shown(run)]
        found.append((str(run.samples["prompts"][samples[0]]), pictures))
    return found


def _table(run: Run, metrics: list[str]) -> list[tuple[str, list[tuple[str, bool]]]]:
    """(title, one (text, is the column's best) per metric) for each generator in metrics.json."""
    names = [name for name in _GENERATORS if name in run.metrics]
    names += [name for name in run.metrics if name not in _GENERATORS]
    best = {}
    for metric in metrics:
        values = [v for name in names if (v := run.metrics[name].get(metric)) is not None]
        better = _METRICS[metric][2]
        best[metric] = better(values) if better is not None and len(set(values)) > 1 else None

    def cell(name: str, metric: str) -> tuple[str, bool]:
        value = run.metrics[name].get(metric)
        return _text_of(metric, value), value is not None and value == best[metric]

    return [(run.title(name), [cell(name, metric) for metric in metrics]) for name in names]


def _text_of(metric: str, value: float | None) -> str:
    return "–" if value is None else f"{value:.{_METRICS[metric][1]}f}"


def _remarks(run: Run) -> list[str]:
    """What worsened: of the generator in reinforcement learning, and since its best evaluation."""
    remarks = []
    for metric in ("fd", "held_out_reward"):
        heading, _, better, _ = _METRICS[metric]
        start, end = (run.metrics.get(name, {}).get(metric) for name in ("cold_start", "dmdr"))
        assert better is not None  # of these two one end is
        if start is not None and end is not None and start != end and better(start, end) == start:
            remarks.append(
                f"{heading} worsened in reinforcement learning: {_text_of(metric, start)} after the cold start, "
                f"{_text_of(metric, end)} at the end."
            )
        rows = [(row[metric], row["step"]) for row in run.evaluations if row.get(metric) is not None]
        if not rows:
            continue
        best, step = better(rows, key=lambda row: row[0])
        last, last_step = rows[-1]
        if best != last:
            remarks.append(
                f"{heading} was best after {step:,} updates, {_text_of(metric, best)}, and is {_text_of(metric, last)} "
                f"after {last_step:,}."
            )
    return remarks


def _sheet_files(run: Run) -> list[tuple[int, Path]]:
    """(update, file) of the sheets drawn while training."""
    return [(int(file.stem.removeprefix("step_")), file) for file in sorted(run.directory.glob("samples/step_*.png"))]


def _sheets(run: Run) -> list[tuple[int, str]]:
    """(update, picture) of at most ``_SHEETS`` of them, evenly spread, with the first and the last."""
    files = _sheet_files(run)
    chosen = sorted({round(i) for i in np.linspace(0, len(files) - 1, min(_SHEETS, len(files)))})
    return [(files[i][0], image_uri(_read(files[i][1], _pixels, None))) for i in chosen]


def _pixels(file: Path) -> np.ndarray:
    with Image.open(file) as picture:
        return np.asarray(picture.convert("RGB"))


def _evaluated(run: Run) -> list[figures.Curve]:
    """A panel per metric of the evaluations made while training, with the teacher's level."""
    curves = []
    for metric, (heading, _, _, _) in _METRICS.items():
        points = [(row["step"], row[metric]) for row in run.evaluations if row.get(metric) is not None]
        if not points or metric == "nfe":
            continue
        level = run.metrics.get("teacher", {}).get(metric)
        reference = None if level is None else (run.title("teacher").lower(), level)
        steps, values = map(np.array, zip(*points, strict=True))
        curves.append(figures.Curve(heading, "", {"generator": (steps, values)}, reference))
    return curves


def _drawn(run: Run, curves: list[figures.Curve]) -> list[tuple[str, str]]:
    boundary = _rl_start(run)
    return [(curve.title, data_uri(figures.draw_curve(curve, boundary=boundary))) for curve in curves]


def _headlines(run: Run) -> list[tuple[str, str, str]]:
    """(value, what it is, compared with what) of the last generator that was evaluated."""
    last = next((name for name in ("dmdr", "cold_start") if name in run.metrics), None)
    if last is None:
        return []
    mine, teacher = run.metrics[last], run.metrics.get("teacher", {})
    tiles = []
    for metric, what, digits in (
        ("fd", "Fréchet distance", 2),
        ("reward", "mean reward", 3),
        ("held_out_reward", "mean held-out reward", 3),
        ("accuracy", "accuracy", 4),
        ("nfe", "network evaluations per image", 0),
    ):
        if mine.get(metric) is None:
            continue
        reference = teacher.get(metric)
        beside = "" if reference is None else f"{run.title('teacher').lower()}: {reference:.{digits}f}"
        tiles.append((f"{mine[metric]:.{digits}f}", what, beside))
    return tiles


def _rl_start(run: Run) -> int | None:
    """The first logged step of the phase with RL, when a cold start came before it."""
    phases = {record["phase"] for record in run.records}
    if phases != {"cold_start", "dmdr"}:
        return None
    return min(record["step"] for record in run.records if record["phase"] == "dmdr")


def _curves(run: Run) -> list[figures.Curve]:
    keys = list(dict.fromkeys(k for record in run.records for k in record if k not in _NOT_DRAWN))
    curves = []
    for title, unit, pattern, factor in _PANELS:
        matched = [key for key in keys if re.fullmatch(pattern, key)]
        keys = [key for key in keys if key not in matched]
        level = run.metrics.get("teacher", {}).get("reward") if pattern == "reward" else None
        reference = None if level is None else (run.title("teacher").lower(), level)
        if series := _series(run, matched, factor):
            curves.append(figures.Curve(title, unit, series, reference))
    for key in keys:
        if series := _series(run, [key], 1):
            curves.append(figures.Curve(_words(key).capitalize(), "", series))
    return curves


def _series(run: Run, keys: list[str], factor: float) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(steps, values) by readable name of each key with a finite value; null (was nan or inf) is a gap."""
    series = {}
    for key in keys:
        points = [(record["step"], record[key]) for record in run.records if key in record]
        values = np.array([np.nan if value is None else value * factor for _, value in points], dtype=np.float64)
        if np.isfinite(values).any():
            series[_words(key.removesuffix("_bytes"))] = (np.array([step for step, _ in points]), values)
    return series


def _words(key: str) -> str:
    return key.replace("_", " ")


def _facts(run: Run) -> list[tuple[str, str]]:
    """(name, value) lines of summary.json, nested ones flattened, with units a person reads."""
    summary = dict(run.summary)
    parts = [summary.pop(name, None) for name in _BATCH]
    facts = [_fact(name, summary.pop(name)) for name in _FACTS if summary.get(name) is not None]
    if None not in parts:
        ranks, device, samples, accumulation, batch = parts
        micro = f" × {accumulation} micro-steps" if accumulation != 1 else ""
        facts.append(("batch", f"{ranks} × {device} × {samples} samples{micro} = {batch} samples an update"))
    for name, value in summary.items():
        if isinstance(value, dict):
            facts += [_fact(f"{name}: {key}", nested) for key, nested in value.items()]
        elif value is not None:
            facts.append(_fact(name, value))
    return facts


def _fact(key: str, value: Any) -> tuple[str, str]:
    name = _words(key)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return name, str(value)
    if name.endswith("seconds"):
        minutes, seconds = divmod(round(value), 60)
        hours, minutes = divmod(minutes, 60)
        spelled = f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{value:.1f} s"
        return name.removesuffix("seconds") + "time", spelled
    return name, f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
