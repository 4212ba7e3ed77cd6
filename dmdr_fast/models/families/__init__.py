"""Families of large text-to-image teachers, opened by pipeline folder or hub id: ``open_family``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmdr_fast import built_in
from dmdr_fast.models.families.backbone import Backbone
from dmdr_fast.models.families.base import Condition, Denoiser, Family, to_device
from dmdr_fast.models.families.encoding import TextEncoder
from dmdr_fast.models.families.flux import Flux
from dmdr_fast.models.families.flux2 import Flux2
from dmdr_fast.models.families.loading import read_json
from dmdr_fast.models.families.qwen_image import QwenImage
from dmdr_fast.models.families.sd3 import SD3
from dmdr_fast.models.families.sdxl import SDXL
from dmdr_fast.models.families.sit import SiTBackbone
from dmdr_fast.models.families.z_image import ZImage

__all__ = [
    "BACKBONES",
    "FAMILIES",
    "SD3",
    "SDXL",
    "Backbone",
    "Condition",
    "Denoiser",
    "Family",
    "Flux",
    "Flux2",
    "QwenImage",
    "TextEncoder",
    "ZImage",
    "open_family",
    "to_device",
]

FAMILIES: dict[str, type[Family]] = {family.name: family for family in (SD3, Flux, Flux2, ZImage, QwenImage, SDXL)}
BACKBONES: dict[str, type[Backbone]] = {**FAMILIES, "sit": SiTBackbone}


def open_family(
    path: str | Path, *, length: int | None = None, guidance: float | None = None, revision: str | None = None
) -> Family:
    """The family of a diffusers pipeline: a folder that ``save_pretrained`` wrote, or a hub id. Reads configs only.

    Args:
        path: the folder, hub id ("black-forest-labs/FLUX.1-dev"), or a name of ``dmdr_fast.built_in``.
        length: the longest prompt in tokens; the pipeline's own default where None.
        guidance: what a guidance-distilled network (FLUX.1-dev, FLUX.2-dev) is told; its default where None.
        revision: branch, tag or commit of a hub id.

    Raises:
        FileNotFoundError: no pipeline there.
        ValueError: a pipeline class of no family, or a family's with a part that does not belong to it.
    """
    path = built_in.pipeline(path)

    def read(name: str) -> dict[str, Any]:
        return read_json(path, name, revision)

    index = read("model_index.json")
    family = _of_class(path, index.get("_class_name"))
    _check_component(path, index, family.folder, family.network)
    _check_component(path, index, "vae", family.vae)
    network = read(f"{family.folder}/config.json")
    scheduler = read("scheduler/scheduler_config.json")
    if family.prediction == "eps" and (kind := scheduler.get("prediction_type", "epsilon")) != "epsilon":
        raise ValueError(f"pipeline {path}: {family.name} expected prediction_type epsilon, got {kind}")
    if family.name == "qwen_image" and network.get("guidance_embeds"):
        raise ValueError(f"pipeline {path}: diffusers' Qwen-Image runs no guidance embedding; use one without")
    if guidance is None:
        guidance = family.default_guidance
    return family(
        path=path,
        network_config=network,
        vae_config=read("vae/config.json"),
        scheduler_config=scheduler,
        length=family.default_length if length is None else length,
        guidance=guidance if network.get("guidance_embeds") else None,
        revision=revision,
    )


def _of_class(path: str, named: str | None) -> type[Family]:
    for family in FAMILIES.values():
        if named in family.pipelines:
            return family
    known = ", ".join(sorted(p for f in FAMILIES.values() for p in f.pipelines))
    raise ValueError(f"pipeline {path}: {named} is of no family that is known; expected one of {known}")


def _check_component(path: str, index: Mapping[str, Any], folder: str, expected: str) -> None:
    got = (index.get(folder) or [None, None])[1]
    if got != expected:
        raise ValueError(f"pipeline {path}: {folder} expected a {expected}, got {got}; give a pipeline of this family")
