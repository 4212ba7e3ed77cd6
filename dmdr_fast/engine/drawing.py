"""Images of a run's teacher and student, and of a pipeline, each fixed by the number of its condition and a seed.

A run's images come from the noise that diffusers' pipelines draw, so a run and its exported pipeline give the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dmdr_fast.algorithm.recipe import Batch
from dmdr_fast.algorithm.rollout import Noise, sample
from dmdr_fast.algorithm.streams import Streams
from dmdr_fast.config import Config, DeepSpeed
from dmdr_fast.data.prompts import Prompt
from dmdr_fast.engine.conditions import Conditions, Labels, cached_prompts
from dmdr_fast.engine.evaluation import teacher_sample
from dmdr_fast.engine.model import Model, open_model
from dmdr_fast.engine.networks import frozen_role
from dmdr_fast.engine.pipeline_model import PipelineModel
from dmdr_fast.engine.recipe import student_grid
from dmdr_fast.engine.runtime import Runtime
from dmdr_fast.errors import UserError
from dmdr_fast.models.export import call_arguments, load_arguments

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# (numbers of conditions, seed) -> fp32 [B, C, H, W] in [-1, 1]; a UserError where they are not finite.
Draw = Callable[[Sequence[int], int], Tensor]
Latents = Callable[[Noise, Batch], Tensor]


@dataclass(frozen=True)
class RunImages:
    """A run on class labels or on ``prompts``; its networks are whole on every rank, whatever the run's ZeRO stage."""

    config: Config
    model: Model
    conditions: Conditions
    device: torch.device

    @classmethod
    def open(cls, config: Config, prompts: Sequence[str], ranks: Runtime) -> RunImages:
        """Look for the run's model and embed the prompts, which a run on class labels does not read.

        All ranks must call.

        Raises:
            UserError: the teacher cannot be had, or a prompt is too long.
        """
        config = config.model_copy(update={"deepspeed": DeepSpeed(dtype=config.deepspeed.dtype)})
        model = open_model(config)
        conditions: Conditions
        if isinstance(model, PipelineModel):
            given = [Prompt(text, f"prompt {number}") for number, text in enumerate(prompts, 1)]
            (conditions,) = cached_prompts(config, model, ranks, {"--prompts": given}).values()
        else:
            assert model.num_classes is not None  # which reads no prompts
            conditions = Labels(model.num_classes, ranks.device)
        return cls(config, model, conditions, ranks.device)

    def student(self, weights: Path) -> Draw:
        """The generator of a file, by the rollout that it was trained with."""
        role, grid = frozen_role(self.model, self.config, self.device, weights), student_grid(self.config)
        eta, kind, path = self.config.student.fresh_noise, self.model.prediction, self.model.path
        return self._decoded(
            lambda noise, batch: sample(role, noise, batch.condition, grid, eta=eta, kind=kind, path=path)
        )

    def teacher(self) -> Draw:
        """The teacher at ``eval.teacher_steps`` and ``teacher.sample_cfg_scale``."""
        role, steps = frozen_role(self.model, self.config, self.device), self.config.eval.teacher_steps
        return self._decoded(
            lambda noise, batch: teacher_sample(role, noise(0), batch, steps, config=self.config, model=self.model)
        )

    def _decoded(self, latents: Latents) -> Draw:
        decode = self.model.decoder(self.device)

        @torch.no_grad()
        def draw(rows: Sequence[int], seed: int) -> Tensor:
            noise = _noise(self.model, image_seeds(rows, seed), self.device)
            images = decode(latents(noise, self.conditions.batch(np.array(rows)))).float()
            return _finite(images, rows).clamp(-1, 1)

        return draw


def pipeline_images(folder: Path, prompts: Sequence[str], device: torch.device) -> Draw:
    """A pipeline of diffusers: an exported one as it is to be called, any other with its own defaults.

    Raises:
        UserError: it cannot be loaded.
    """
    pipeline, arguments = _load_pipeline(folder, device).to(device), pipeline_arguments(folder)
    pipeline.set_progress_bar_config(disable=True)

    def draw(rows: Sequence[int], seed: int) -> Tensor:
        images = pipeline(
            prompt=[prompts[row] for row in rows],
            generator=[torch.Generator().manual_seed(s) for s in image_seeds(rows, seed)],
            output_type="pt",
            **arguments,
        ).images
        return _finite(2.0 * images.float() - 1.0, rows)

    return draw


def _finite(images: Tensor, rows: Sequence[int]) -> Tensor:
    """``images``, which are shown and scored: one that holds no numbers would pass for a black one."""
    good = images.flatten(1).isfinite().all(1).tolist()
    if not all(good):
        raise UserError(
            f"image {rows[good.index(False)] + 1}: its pixels are not finite: the weights have diverged, or their "
            "dtype is too narrow; take an earlier checkpoint (--step, --weights), or a pipeline of a wider dtype"
        )
    return images


def pipeline_arguments(folder: Path) -> dict[str, Any]:
    """What a pipeline is called with beside prompts and generators: none where the export did not write it."""
    try:
        return call_arguments(folder)
    except FileNotFoundError:
        return {}


def image_seeds(rows: Sequence[int], seed: int) -> list[int]:
    """The seed of each image's generator, a function of (``seed``, number of the condition)."""
    return [int(Streams(seed).rng("sample", row).integers(2**63)) for row in rows]


def _load_pipeline(folder: Path, device: torch.device) -> DiffusionPipeline:
    from diffusers import DiffusionPipeline

    try:
        on_cpu = {"torch_dtype": torch.float32} if device.type == "cpu" else {}  # which has few half-precision kernels
        return DiffusionPipeline.from_pretrained(folder, **load_arguments(folder) | on_cpu)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"pipeline {folder}: it cannot be loaded ({reason}); copy or export it again") from None


def _noise(model: Model, seeds: Sequence[int], device: torch.device) -> Noise:
    """noise(0), noise(1), ..., each asked for once: what the exported pipeline draws with generators of ``seeds``.

    A flow pipeline's scheduler draws the later noise from generators that the first seeds.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    first = torch.stack([torch.randn(model.latent_shape, generator=g) for g in generators])
    shape, back = first.shape[1:], lambda noise: noise
    if isinstance(model, PipelineModel) and model.prediction == "flow":
        from dmdr_fast.models.families.renoise_scheduler import generator_of  # diffusers, seconds to import

        family, size = model.family, model.latent_shape[1:]
        packed = family.to_pipeline(first)
        generators, shape = [generator_of(one) for one in packed], packed.shape[1:]
        back = lambda noise: family.from_pipeline(noise, *size)  # noqa: E731

    def noise(i: int) -> Tensor:
        if i == 0:
            return first.to(device)
        return back(torch.stack([torch.randn(shape, generator=g) for g in generators])).to(device)

    return noise
