"""The honest table: teacher at many steps and at N, generator after the cold start and at the end, same noise."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dmdr_fast.algorithm.recipe import Recipe
from dmdr_fast.algorithm.rollout import Network, ode_sample, sample
from dmdr_fast.algorithm.score_pass import join
from dmdr_fast.algorithm.streams import Shard, Streams
from dmdr_fast.config import Config
from dmdr_fast.engine.engines import DTYPES, Role
from dmdr_fast.engine.inputs import EvaluationData
from dmdr_fast.engine.networks import load_network
from dmdr_fast.engine.rewards import RewardSet
from dmdr_fast.engine.runtime import Runtime
from dmdr_fast.eval.metrics import evaluate

GRID_SAMPLES = 80  # samples per row kept for the report's picture


@dataclass(frozen=True)
class Evaluator:
    """Draws ``eval.samples`` images per row, spread over the ranks, and measures them on rank 0."""

    config: Config
    runtime: Runtime
    decoder: Callable[[Tensor], Tensor]
    rewards: RewardSet | None
    data: EvaluationData
    recipe: Recipe

    def run(self, teacher: Network, generators: dict[str, Path]) -> dict[str, dict[str, float]]:
        """The table, also written as metrics.json with samples.npz beside it.

        ``generators`` maps a row's name (cold_start, dmdr) to its weights. All ranks must call.
        """
        many, student_steps = self.config.eval.teacher_steps, self.config.student.steps
        rows = {
            "teacher_50": (self._teacher(teacher, many), self._teacher_nfe(many)),
            "teacher_n": (self._teacher(teacher, student_steps), self._teacher_nfe(student_steps)),
        }
        for name, weights in generators.items():
            rows[name] = (self._generator(weights), student_steps)
        table, pictures = {}, {"labels": self._labels()[:GRID_SAMPLES].cpu().numpy()}
        for name, (draw, nfe) in rows.items():
            images = self._images(draw)
            if self.runtime.is_main:
                table[name] = self._measure(images, nfe)
                pictures[name] = images[:GRID_SAMPLES].cpu().numpy()
        if self.runtime.is_main:
            _write(self.config.run_dir / "metrics.json", json.dumps(table, indent=1).encode())
            np.savez_compressed(self.config.run_dir / "samples.npz", **pictures)
        self.runtime.barrier()
        return table

    def append(self, weights: Path, step: int) -> None:
        """Add the row of the generator after ``step`` updates to evaluations.jsonl. All ranks must call."""
        images = self._images(self._generator(weights))
        if self.runtime.is_main:
            path = self.config.run_dir / "evaluations.jsonl"
            rows = path.read_text().splitlines() if path.is_file() else []
            kept = [row for row in rows if json.loads(row)["step"] < step]  # a resumed run does some again
            row = {"step": step} | self._measure(images, self.config.student.steps)
            _write(path, "".join(f"{r}\n" for r in [*kept, json.dumps(row)]).encode())
        self.runtime.barrier()

    def _teacher_nfe(self, steps: int) -> int:
        return steps if self.config.teacher.sample_cfg_scale == 1.0 else 2 * steps

    def _teacher(self, network: Network, steps: int) -> Callable[[Tensor, Tensor, int], Tensor]:
        guided = guided_network(network, self.config.teacher.sample_cfg_scale, self.config.model.num_classes)
        shift = self.config.student.shift
        return lambda noise, labels, start: ode_sample(
            guided, noise, labels, steps, shift=shift, kind=self.recipe.prediction, path=self.recipe.path
        )

    def _generator(self, weights: Path) -> Callable[[Tensor, Tensor, int], Tensor]:
        dtype = DTYPES[self.config.deepspeed.dtype]
        network = load_network(self.config, weights).to(self.runtime.device, dtype).requires_grad_(False)
        role = Role(network, dtype)
        return lambda noise, labels, start: sample(
            role,
            lambda i: noise if i == 0 else self._noise(i, start),
            labels,
            self.recipe.grid,
            kind=self.recipe.prediction,
            path=self.recipe.path,
        )

    def _labels(self) -> Tensor:
        """Every class equally often, in turn."""
        return torch.arange(self._total()) % self.config.model.num_classes

    def _total(self) -> int:
        """``eval.samples`` rounded up so that every rank does whole forwards."""
        unit = self.config.eval.batch_size * self.runtime.world_size
        return -(-self.config.eval.samples // unit) * unit

    def _noise(self, index: int, start: int) -> Tensor:
        shape = (self.config.model.channels, self.config.latent_size, self.config.latent_size)
        shard = Shard(start, start + self.config.eval.batch_size, self._total())
        return Streams(0).noise("evaluation", index, shape=shape, shard=shard, device=self.runtime.device)

    @torch.no_grad()
    def _images(self, draw: Callable[[Tensor, Tensor, int], Tensor]) -> Tensor:
        labels, parts = self._labels(), []
        unit = self.config.eval.batch_size * self.runtime.world_size
        for base in range(0, self._total(), unit):
            start = base + self.runtime.rank * self.config.eval.batch_size
            y = labels[start : start + self.config.eval.batch_size].to(self.runtime.device)
            image = self.decoder(draw(self._noise(0, start), y, start)).float().clamp(-1, 1)
            parts.append(self.runtime.concatenate(image))
        return torch.cat(parts)[: self.config.eval.samples]

    def _measure(self, images: Tensor, nfe: int) -> dict[str, float]:
        labels = self._labels()[: len(images)].to(images.device)
        rewards = {} if self.rewards is None else self.rewards.mean_scores(images, {"labels": labels})
        return evaluate(images, labels, self.data.real_images, self.data.features, rewards, nfe)


def guided_network(network: Network, scale: float, num_classes: int) -> Network:
    """The teacher under standard CFG, u + w (c - u), in one batch; the plain network at w = 1."""
    if scale == 1.0:
        return network

    def guided(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        both = network(torch.cat([x, x]), torch.cat([t, t]), join(labels, torch.full_like(labels, num_classes)))
        cond, uncond = both.chunk(2)
        return uncond + scale * (cond - uncond)

    return guided


def _write(path: Path, content: bytes) -> None:
    aside = path.with_suffix(".tmp")
    aside.write_bytes(content)
    aside.rename(path)
