"""The evaluation's table: teacher at many steps and at N, cold start and end of the generator, from the same noise.

While training, the generator's row alone, with a sheet of its samples: no forward is made for the sheet.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dmdr_fast.algorithm.guidance import Mode, guide
from dmdr_fast.algorithm.monitors import diversity
from dmdr_fast.algorithm.recipe import Batch, Decode, Recipe
from dmdr_fast.algorithm.rollout import Network, ode_sample, sample
from dmdr_fast.algorithm.score_pass import join
from dmdr_fast.algorithm.streams import Shard, Streams
from dmdr_fast.config import Config
from dmdr_fast.disk import write_whole
from dmdr_fast.engine.compute import uncompiled
from dmdr_fast.engine.conditions import Conditions
from dmdr_fast.engine.inputs import EvaluationData
from dmdr_fast.engine.model import Model
from dmdr_fast.engine.networks import frozen_role
from dmdr_fast.engine.rewards import RewardError, RewardSet
from dmdr_fast.engine.runtime import Runtime
from dmdr_fast.eval.metrics import MEASURED, evaluate
from dmdr_fast.eval.sheets import COLUMNS, captioned_sheet, image_png

GRID_SAMPLES, GRID_SIDE = 80, 256  # samples per row kept for pictures, and their largest side in pixels
SHEET = "step_{:08d}.png"  # in run_dir/samples, of the generator after so many updates
Draw = Callable[[Tensor, Batch, int], Tensor]  # (noise, conditions, number of the first sample) -> latents


class _Left(Exception):
    """An evaluation that was asked to stop."""


@dataclass(frozen=True)
class Shown:
    """What an evaluation of the generator has to show: its row, and the sheet of its first samples, uint8 [H, W, 3]."""

    row: dict[str, float | None]
    sheet: np.ndarray


@dataclass(frozen=True)
class Evaluator:
    """Draws ``eval.samples`` images per row, spread over the ranks, and measures them on rank 0."""

    config: Config
    runtime: Runtime
    model: Model
    conditions: Conditions
    decoder: Decode
    rewards: RewardSet | None
    data: EvaluationData | None  # None: there are no real images to compare with
    recipe: Recipe

    def run(
        self, teacher: Network, generators: dict[str, Path], step: int
    ) -> tuple[dict[str, dict[str, float | None]], Shown | None]:
        """(the table, what the last generator has to show), also written: metrics.json, samples.npz and the sheet.

        ``generators`` maps a row's name (cold_start, dmdr) to its weights; the last one has made ``step`` updates. All
        ranks must call; there is nothing but on rank 0.

        Raises:
            RewardError: a reward failed, on all ranks.
        """
        many, student_steps = self.config.eval.teacher_steps, self.config.student.steps
        rows = {"teacher": (self._teacher(teacher, many), teacher_nfe(self.config, many))}
        if self.config.guides(self.config.teacher.sample_cfg_scale):
            rows["teacher_no_cfg"] = (self._teacher(teacher, many, guided=False), many)
        rows["teacher_n"] = (self._teacher(teacher, student_steps), teacher_nfe(self.config, student_steps))
        for name, weights in generators.items():
            rows[name] = (self._generator(weights), student_steps)
        table: dict[str, dict[str, float | None]] = {}
        shown: Shown | None = None
        pictures: dict[str, Any] = {"labels": self._rows()[: self._kept]}
        if self.model.num_classes is None:
            pictures["prompts"] = np.array(self.conditions.captions(pictures["labels"]))
        for name, (draw, nfe) in rows.items():
            images = self._images(draw)
            row = self._measure(images, nfe)
            if row is not None:
                table[name] = row
                pictures[name] = _reduced(images[: self._kept]).cpu().numpy()
        if self.runtime.is_main:
            shown = Shown(table[name], self._write_sheet(pictures[name], step))
            write_whole(self.config.run_dir / "metrics.json", json.dumps(table, indent=1).encode())
            np.savez_compressed(self.config.run_dir / "samples.npz", **pictures)
        self.runtime.barrier()
        return table, shown

    def has_row(self, step: int) -> bool:
        """Whether evaluations.jsonl has the row of the generator after ``step`` updates. All ranks must call."""
        path = self.config.run_dir / "evaluations.jsonl"
        found = self.runtime.is_main and path.is_file()
        return self.runtime.any(found and any(json.loads(r)["step"] == step for r in path.read_text().splitlines()))

    def append(self, weights: Path, step: int, asked: Callable[[], bool]) -> Shown | None:
        """Add the row of the generator after ``step`` updates to evaluations.jsonl, and write its sheet.

        All ranks must call. ``asked`` has the same answer on all ranks: whether to leave, before the next forward,
        without the row. None then, and on other ranks than 0. Raises as :meth:`run`.
        """
        try:
            images = self._images(self._generator(weights, asked))
        except _Left:
            return None
        shown, row = None, self._measure(images, self.config.student.steps)
        if row is not None:
            path = self.config.run_dir / "evaluations.jsonl"
            before = path.read_text() if path.is_file() else ""
            shown = Shown(row, self._write_sheet(_reduced(images[: self._kept]).cpu().numpy(), step))
            write_whole(path, f"{before}{json.dumps({'step': step} | row)}\n".encode())
        self.runtime.barrier()
        return shown

    @property
    def _kept(self) -> int:
        """How many of the samples are kept for pictures: whole rows of few conditions."""
        return min(GRID_SAMPLES, COLUMNS * self.conditions.count, self.config.eval.samples)

    def _write_sheet(self, images: np.ndarray, step: int) -> np.ndarray:
        """The sheet of the generator after ``step`` updates, which is written as samples/step_*.png."""
        folder, rows = self.config.run_dir / "samples", self._rows()[: len(images)]
        sheet = captioned_sheet(images, rows, self.conditions.captions(rows))
        folder.mkdir(exist_ok=True)
        write_whole(folder / SHEET.format(step), image_png(sheet))
        return sheet

    def _teacher(self, network: Network, steps: int, *, guided: bool = True) -> Draw:
        return lambda noise, batch, start: teacher_sample(
            network, noise, batch, steps, config=self.config, model=self.model, guided=guided
        )

    def _generator(self, weights: Path, asked: Callable[[], bool] = lambda: False) -> Draw:
        role = frozen_role(self.model, self.config, self.runtime.device, weights)

        def network(x: Tensor, t: Tensor, condition: Any) -> Tensor:
            if asked():
                raise _Left
            return role(x, t, condition)

        return lambda noise, batch, start: sample(
            network,
            lambda i: noise if i == 0 else self._noise(i, start),
            batch.condition,
            self.recipe.grid,
            eta=self.recipe.eta,
            kind=self.recipe.prediction,
            path=self.recipe.path,
        )

    def _rows(self) -> np.ndarray:
        """Every condition equally often, in turn."""
        return np.arange(self._total()) % self.conditions.count

    def _total(self) -> int:
        """``eval.samples`` rounded up so that every rank does whole forwards."""
        unit = self.config.eval.batch_size * self.runtime.world_size
        return -(-self.config.eval.samples // unit) * unit

    def _noise(self, index: int, start: int) -> Tensor:
        shard = Shard(start, start + self.config.eval.batch_size, self._total())
        return Streams(0).noise(
            "evaluation", index, shape=self.recipe.latent_shape, shard=shard, device=self.runtime.device
        )

    @torch.no_grad()
    def _images(self, draw: Draw) -> Tensor:
        rows, parts = self._rows(), []
        unit = self.config.eval.batch_size * self.runtime.world_size
        for base in range(0, self._total(), unit):
            start = base + self.runtime.rank * self.config.eval.batch_size
            batch = self.conditions.batch(rows[start : start + self.config.eval.batch_size])
            with uncompiled():  # a graph for this batch size takes longer than these few samples
                drawn = draw(self._noise(0, start), batch, start)
            image = self.decoder(drawn).float().clamp(-1, 1)
            parts.append(self.runtime.concatenate(image))
        return torch.cat(parts)[: self.config.eval.samples]

    def _measure(self, images: Tensor, nfe: int) -> dict[str, float | None] | None:
        """The row of the images on rank 0; None on others. All ranks must call: a reward's failure is everyone's."""
        row, fault = None, None
        if self.runtime.is_main:
            try:
                row = self._row(images, nfe)
            except RewardError as error:
                fault = str(error)
        if fault := self.runtime.gather(fault)[0]:
            raise RewardError(fault)
        return row

    def _row(self, images: Tensor, nfe: int) -> dict[str, float | None]:
        broken = int((~images.flatten(1).isfinite().all(1)).sum())
        if broken:
            self.runtime.say(
                f"evaluation: {broken} of {len(images)} images are not finite; nothing is measured of them"
            )
            return {**dict.fromkeys(MEASURED), "nfe": float(nfe)}
        (classes, known), rewards = self.conditions.known(self._rows()[: len(images)]), {}
        if self.rewards is not None:
            rewards = self.rewards.mean_scores(images, known, chunk=self.config.eval.batch_size)
        if self.data is not None:
            return evaluate(images, classes, known, self.data.real_images, self.data.features, rewards, nfe)
        spread = diversity(images, classes).item()
        return {
            "reward": rewards.get("reward"),
            "held_out_reward": rewards.get("held_out_reward"),
            "diversity": spread if np.isfinite(spread) else None,  # no prompt has two images
            "nfe": float(nfe),
        }


def drop_evaluations_after(run_dir: Path, step: int) -> None:
    """Remove the rows and sheets of later updates, which a run that starts after ``step`` of them does again."""
    path = run_dir / "evaluations.jsonl"
    if path.is_file():
        rows = [row for row in path.read_text().splitlines() if json.loads(row)["step"] <= step]
        write_whole(path, "".join(f"{row}\n" for row in rows).encode())
    for sheet in (run_dir / "samples").glob("step_*.png"):
        if sheet.name > SHEET.format(step):
            sheet.unlink()


def teacher_nfe(config: Config, steps: int) -> int:
    """Network evaluations of one of the teacher's own samples."""
    return 2 * steps if config.guides(config.teacher.sample_cfg_scale) else steps


def teacher_sample(
    network: Network, noise: Tensor, batch: Batch, steps: int, *, config: Config, model: Model, guided: bool = True
) -> Tensor:
    """The teacher's own samples: its ODE under ``teacher.sample_cfg_scale``, at the shift of its pipeline."""
    scale = config.teacher.sample_cfg_scale
    if guided and scale is not None and config.guides(scale):
        network = guided_network(network, batch.uncond, scale, config.cfg_mode, model.token)
    return ode_sample(
        network,
        noise,
        batch.condition,
        steps,
        shift=model.teacher_shift,
        kind=model.prediction,
        path=model.path,
    )


def guided_network(network: Network, uncond: Any, scale: float, mode: Mode, token: int) -> Network:
    """The teacher under CFG, conditional and unconditional prediction in one batch; see ``guide``."""

    def guided(x: Tensor, t: Tensor, condition: Any) -> Tensor:
        cond, plain = network(torch.cat([x, x]), torch.cat([t, t]), join(condition, uncond)).chunk(2)
        return guide(cond, plain, scale, mode, token)

    return guided


def _reduced(images: Tensor) -> Tensor:
    """Images whose longer side is at most ``GRID_SIDE`` pixels."""
    factor = max(images.shape[-2:]) / GRID_SIDE
    if factor <= 1.0:
        return images
    size = [max(1, round(side / factor)) for side in images.shape[-2:]]
    return F.interpolate(images, size, mode="area")
