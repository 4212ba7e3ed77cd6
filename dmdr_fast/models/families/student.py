"""Whether a pipeline's network can be the generator that another one teaches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from dmdr_fast.models.families.backbone import Backbone
from dmdr_fast.models.families.base import Family

# What of a VAE's configuration its latents depend on, in any family.
LATENTS = ("_class_name", "latent_channels", "z_dim", "scaling_factor", "shift_factor", "latents_mean", "latents_std")


def check_student(teacher: Backbone, student: Backbone, sizes: Iterable[tuple[int, int]]) -> None:
    """Look whether both read the same conditions and the same noisy latents of images of ``sizes``, (height, width).

    The student's depth, widths, patch and positions are its own; its text encoders are not read.

    Raises:
        ValueError: they do not, or the student cannot make such images.
    """
    if student.name != teacher.name:
        raise ValueError(f"it is of model.family {student.name}, and the teacher of {teacher.name}; take one of that")
    assert isinstance(teacher, Family) and isinstance(student, Family)  # SiT has no pipeline
    both = teacher, student
    _same("VAE", *({key: family.vae_config.get(key) for key in LATENTS} for family in both))
    for size in sizes:
        shapes = (
            dict(zip(("channels", "height", "width"), family.latent_shape(*size), strict=True)) for family in both
        )
        _same(f"latents of {size[0]} x {size[1]} pixels", *shapes)
    conditions = (family.empty_condition(1, torch.float32).items() for family in both)
    _same("conditions", *({key: list(value.shape[1:]) for key, value in named} for named in conditions))
    half = torch.full((1,), 0.5)
    _same("noise path", *({"alpha at t = 0.5": family.alpha_sigma(half)[0].item()} for family in both))


def _same(what: str, taught: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    for key in {**taught, **own}:
        if taught.get(key) != own.get(key):
            raise ValueError(
                f"its {what}: {key} expected {taught.get(key)}, as the teacher's, got {own.get(key)}; take a pipeline "
                "that shares the teacher's VAE, text encoders and noise"
            )
