"""The report of a run: one HTML file that needs nothing else, and one picture for a README."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml

from dmdr_fast.errors import UserError
from dmdr_fast.eval import figures

# The generators that are compared, in order. {steps} and {n} come from the run's configuration.
_GENERATORS = {
    "teacher": "Teacher, {steps} steps",
    "teacher_n": "Teacher, {n}",
    "cold_start": "Cold start, {n}",
    "dmdr": "DMDR, {n}",
}
# metric: (heading, digits after the point, which end is better)
_METRICS = {
    "fd": ("FD", 3, min),
    "precision": ("Precision", 3, max),
    "recall": ("Recall", 3, max),
    "reward": ("Reward", 4, max),
    "accuracy": ("Accuracy", 4, max),
    "nfe": ("NFE", 0, min),
}
# Panels of the log: title, unit, pattern of the keys, factor to the unit. Other keys get one panel each.
_PANELS = (
    ("Reward of the generator's samples", "reward", r"reward", 1),
    ("DMD loss", "1/2 mean g²", r"dmd_loss", 1),
    ("Fake score loss", "flow-matching loss", r"fake_loss", 1),
    ("Gradient norms", "L2 norm before clipping", r"(generator|fake)_grad_norm", 1),
    ("DynaDG and DynaRS", "value", r"real_lora_scale|renoise_alpha|renoise_beta", 1),
    ("Throughput", "samples per second", r"samples_per_second", 1),
    ("Memory", "GiB", r"(\w+_)?memory_bytes", 2**-30),
)


@dataclass(frozen=True)
class Run:
    """What a run directory holds, each part empty where its file is missing."""

    directory: Path
    metrics: dict[str, dict[str, float | None]]
    records: list[dict[str, Any]]
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
    """Read metrics.json, log.jsonl, config.yaml, samples.npz and summary.json of a run, those that are there.

    Raises:
        UserError: no such directory, none of the files in it, or one that cannot be read.
    """
    directory = Path(run_dir)
    run = Run(
        directory=directory,
        metrics=_read(directory / "metrics.json", _json, {}),
        records=_read(directory / "log.jsonl", _json_lines, []),
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

    It shows the samples of each generator from the same noise, the metrics, the curves of the log with the
    start of RL marked, and the resolved configuration. Pictures are inside the file; nothing is loaded from
    elsewhere.
    """
    run = load_run(run_dir)
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    grids, row_classes = _grids(run)
    html = templates.get_template("report.html.j2").render(
        name=run.directory.resolve().name,
        headlines=_headlines(run),
        grids=[(title, figures.data_uri(figures.image_png(pixels))) for title, _, pixels in grids],
        row_classes=row_classes,
        headings=[heading for heading, _, _ in _METRICS.values()],
        rows=_table(run),
        curves=[(c.title, figures.data_uri(figures.draw_curve(c, boundary=_rl_start(run)))) for c in _curves(run)],
        summary=_facts(run.summary),
        config=run.config_text,
    )
    path = run.directory / "report.html"
    aside = path.with_suffix(".tmp")  # a torn report would pass for one
    try:
        aside.write_text(html, encoding="utf-8")
        aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def write_overview(run_dir: str | Path, path: str | Path) -> Path:
    """Write one PNG to ``path``: each generator's samples, from the same noise, with its FD underneath."""
    run = load_run(run_dir)
    grids, _ = _grids(run)
    if not grids:
        raise UserError(f"overview: no samples in {run.directory}; expected samples.npz of a run")
    Path(path).write_bytes(figures.draw_overview([(t, "" if fd is None else f"FD {fd:.2f}", s) for t, fd, s in grids]))
    return Path(path)


def _grids(run: Run) -> tuple[list[tuple[str, float | None, np.ndarray]], list[int] | None]:
    """((title, FD, sheet) of each generator with samples, the class of each row of the sheets or None)."""
    shown = [name for name in _GENERATORS if name in run.samples]
    if not shown:
        return [], None
    labels = run.samples.get("labels", np.arange(len(run.samples[shown[0]])))
    order, row_classes = figures.sample_order(labels)
    grids = [
        (run.title(name), run.metrics.get(name, {}).get("fd"), figures.sheet(run.samples[name], order))
        for name in shown
    ]
    return grids, row_classes


def _table(run: Run) -> list[tuple[str, list[tuple[str, bool]]]]:
    """(title, one (text, is the column's best) per metric) for each generator in metrics.json."""
    names = [name for name in _GENERATORS if name in run.metrics]
    names += [name for name in run.metrics if name not in _GENERATORS]
    best = {}
    for metric, (_, _, better) in _METRICS.items():
        values = [v for name in names if (v := run.metrics[name].get(metric)) is not None]
        best[metric] = better(values) if len(set(values)) > 1 else None

    def cell(name: str, metric: str) -> tuple[str, bool]:
        value = run.metrics[name].get(metric)
        text = "–" if value is None else f"{value:.{_METRICS[metric][1]}f}"
        return text, value is not None and value == best[metric]

    return [(run.title(name), [cell(name, metric) for metric in _METRICS]) for name in names]


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
    keys = list(dict.fromkeys(k for record in run.records for k in record if k not in ("step", "phase")))
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


def _facts(summary: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """(name, value) lines of summary.json, nested ones flattened, with units a person reads."""
    facts = []
    for key, value in summary.items():
        name = f"{prefix}{_words(key)}"
        if isinstance(value, dict):
            facts += _facts(value, f"{name}: ")
        else:
            facts.append(_fact(name, value))
    return facts


def _fact(name: str, value: Any) -> tuple[str, str]:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return name, str(value)
    if name.endswith("seconds"):
        minutes, seconds = divmod(round(value), 60)
        return name.removesuffix("seconds") + "time", f"{minutes} min {seconds} s" if minutes else f"{value:.1f} s"
    if name.endswith("bytes"):
        return name.removesuffix("bytes").rstrip(), f"{value / 2**20:,.1f} MiB"
    return name, f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
