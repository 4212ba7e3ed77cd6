"""The run's log: JSON lines, TensorBoard, a progress bar and, when asked for, Weights & Biases."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dmdr_fast.disk import write_whole
from dmdr_fast.errors import UserError

log = logging.getLogger(__name__)

# What the progress bar shows of the metrics, in this order, and the name it shows it by.
_SHOWN = {
    "samples_per_second": "samples/s",
    "fake_loss": "fake",
    "dmd_loss": "dmd",
    "reward": "reward",
}
_BYTES_PER_GIB = 2**30


class RunLog:
    """Writes each flush of metrics everywhere it is wanted.

    A resumed run goes on as if it had never stopped: records of steps that it will do again (``step >=
    start_step``) are removed from ``log.jsonl`` and hidden in TensorBoard.

    Args:
        run_dir: gets ``log.jsonl`` and ``tensorboard/``; exists.
        total_steps: generator steps of the whole run, for the progress bar.
        start_step: the step this process starts at, counted from 0.
        wandb: the Weights & Biases project to log to, or None.
        enabled: False on every rank but one: then nothing is written or shown.

    Attributes:
        elapsed_before: seconds that the run had trained before ``start_step``, as its log says.

    Raises:
        UserError: ``wandb`` is asked for and not installed, or refuses the run.
    """

    elapsed_before = 0.0

    def __init__(
        self,
        run_dir: str | Path,
        *,
        total_steps: int,
        start_step: int,
        wandb: str | None = None,
        enabled: bool = True,
    ) -> None:
        self._enabled = enabled
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        run_dir = Path(run_dir)
        self._wandb = None if wandb is None else _open_wandb(run_dir, wandb)
        last = _drop_records_from(run_dir / "log.jsonl", start_step)
        self.elapsed_before = last.get("elapsed_seconds", 0.0)
        self._lines = (run_dir / "log.jsonl").open("a")
        self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step)
        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            file=sys.stderr,
            dynamic_ncols=True,
            unit="step",
            # A file or a CI log keeps every line that is drawn over on a terminal.
            mininterval=0.1 if sys.stderr.isatty() else 10.0,
        )

    def log(self, step: int, phase: str, metrics: dict[str, float]) -> None:
        """Record the metrics of generator step ``step`` (from 0), the last one they cover, in ``phase``.

        ``log.jsonl`` gets one object {"step", "phase", **metrics}, on disk when this returns; nan and inf,
        which JSON does not have, as null.
        """
        if not self._enabled:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._lines.write(json.dumps({"step": step, "phase": phase, **finite}, allow_nan=False) + "\n")
        self._lines.flush()
        for name, value in metrics.items():
            self._tensorboard.add_scalar(name, value, step)
        self._tensorboard.flush()  # a checkpoint comes after its step's record, and a resumed run goes on from there
        if self._wandb is not None:
            self._wandb.log({"phase": phase, **metrics}, step=step)
        self._bar.set_description(phase, refresh=False)
        self._bar.set_postfix_str(_postfix(metrics), refresh=False)
        self._bar.update(step + 1 - self._bar.n)

    def evaluation(self, step: int, row: Mapping[str, float | None], sheet: np.ndarray) -> None:
        """Record an evaluation after generator step ``step`` (from 0) in TensorBoard and Weights & Biases.

        Args:
            row: as in evaluations.jsonl; a value is ``evaluation/NAME``, and None is left out.
            sheet: samples with their captions, uint8 [H, W, 3]: ``samples``.
        """
        if not self._enabled:
            return
        values = {f"evaluation/{name}": value for name, value in row.items() if value is not None}
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)
        self._tensorboard.add_image("samples", sheet, step, dataformats="HWC")
        self._tensorboard.flush()
        if self._wandb is not None:
            import wandb

            self._wandb.log({**values, "samples": wandb.Image(sheet)}, step=step)

    def close(self) -> None:
        """Flush and close everything; the log is complete on disk when this returns."""
        if not self._enabled:
            return
        self._bar.close()
        self._lines.close()
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _postfix(metrics: dict[str, float]) -> str:
    shown = [f"{short} {metrics[name]:.4g}" for name, short in _SHOWN.items() if name in metrics]
    memory = next((metrics[n] for n in ("gpu_memory_bytes", "host_memory_bytes") if n in metrics), None)
    if memory is not None:
        shown.append(f"mem {memory / _BYTES_PER_GIB:.2f} GiB")
    return " · ".join(shown)


def _drop_records_from(path: Path, start_step: int) -> dict:
    """Rewrite ``path`` (aside, renamed) without the records of ``start_step`` on and without torn lines.

    Returns the last record that is left, {} without one.
    """
    kept: list[str] = []
    last: dict[str, Any] = {}
    torn = 0
    if not path.exists():
        return last
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
            if record["step"] < start_step:
                kept.append(line + "\n")
                last = record
        except (ValueError, KeyError, TypeError):
            torn += 1
    if torn:
        log.warning("%s: %d unreadable line(s) dropped, left by a write that was cut off", path, torn)
    write_whole(path, "".join(kept).encode())
    return last


def _open_wandb(run_dir: Path, project: str):
    """The W&B run of this run directory: its id, kept in ``wandb_id``, lets a resumed run go on in it."""
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            f"log.wandb asks for Weights & Biases (project {project!r}), which is not installed: "
            "pip install wandb, or leave log.wandb out"
        ) from error
    id_file = run_dir / "wandb_id"
    known = id_file.read_text() if id_file.exists() else None
    try:
        run = wandb.init(project=project, dir=str(run_dir), id=known, name=run_dir.name, resume="allow")
    except wandb.Error as error:
        raise UserError(
            f"log.wandb: {' '.join(str(error).split())} WANDB_MODE=offline needs neither a key nor a network; or leave "
            "log.wandb out"
        ) from error
    id_file.write_text(run.id)
    return run
