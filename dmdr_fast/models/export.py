"""A trained generator out of the trainer: a diffusers pipeline folder that needs no word about few steps."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dmdr_fast.models.families import Family
from dmdr_fast.models.families.loading import is_local
from dmdr_fast.models.families.schedulers import student_scheduler
from dmdr_fast.models.lora import add_lora
from dmdr_fast.models.lora_export import export_peft, merge

log = logging.getLogger(__name__)

LORA_FOLDER = "generator_lora"
STUDENT = "student.json"  # the arguments of the pipeline's call


def export_pipeline(
    family: Family,
    out: str | Path,
    *,
    grid: tuple[float, ...],
    weights: Mapping[str, Tensor] | None = None,
    lora: Mapping[str, Tensor] | None = None,
    lora_scale: float = 1.0,
    dtype: torch.dtype = torch.bfloat16,
    resolution: int | None = None,
) -> Path:
    """Write the teacher's pipeline with the student in its place: ``DiffusionPipeline.from_pretrained(out)`` and then
    ``(prompt=..., num_inference_steps=N, guidance_scale=0)`` sample as the student was trained to.

    The scheduler's config holds the grid; a guidance-distilled network (FLUX.1-dev, FLUX.2-dev) is changed so that
    guidance_scale=0 means ``family.guidance``. Text encoders, tokenizers and VAE are copied. The folder is written
    aside and renamed.

    Args:
        family: the teacher's, with the guidance and length that the student was trained at.
        out: a folder that is not there yet.
        grid: 1 = t_0 > ... > t_N = 0.
        weights: every parameter of the network by name ("transformer." in front or not); the teacher's where None.
        lora: "LAYER.lora_A" [in, r] and "LAYER.lora_B" [r, out], merged into the network at ``lora_scale``, and written
            as a PEFT adapter into ``out/generator_lora`` too; that one goes on the teacher's own network, with its
            guidance.
        dtype: of the network's files.
        resolution: edge of the square images the student was trained on: the default size of pipelines that keep it in
            a config (SD3, SDXL). The others make 1024 x 1024 where height= and width= are not given.

    Raises:
        FileExistsError: ``out`` is there.
        ValueError: a grid that no scheduler of diffusers makes, or tensors that do not fit the network.
    """
    out = Path(out).expanduser()
    if out.exists():
        raise FileExistsError(f"export: {out} is there already; give a new folder, or delete it")
    scheduler = student_scheduler(family, grid)
    _warn_of_arguments(family, resolution)
    network = family.load_transformer(dtype)
    if weights is not None:
        load_weights(network, weights)
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        _copy_components(family, aside)
        if lora is not None:
            network = _with_lora(family, network, lora, lora_scale, aside / LORA_FOLDER)
        network = family.fold_guidance(network)
        if family.sized and resolution is not None:
            network.register_to_config(sample_size=resolution // family.factor)
        network.save_pretrained(aside / family.folder)
        scheduler.save_pretrained(aside / "scheduler")
        _write_index(aside, type(scheduler).__name__)
        _write_student(aside, len(grid) - 1, resolution, family)
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return out


def load_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy ``weights`` into every parameter of ``network``, cast to its dtype; ValueError where one does not fit."""
    named = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    own = dict(network.named_parameters())
    if odd := sorted(own.keys() ^ named.keys()):
        raise ValueError(
            f"weights: expected {len(own)} tensors, got {len(named)}; first that differs: {odd[0]}. Give the weights "
            "of a generator trained from this teacher"
        )
    for name, parameter in own.items():
        if parameter.shape != named[name].shape:
            raise ValueError(f"weights: {name} expected {list(parameter.shape)}, got {list(named[name].shape)}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(named[name])


def _with_lora(family: Family, network: nn.Module, lora: Mapping[str, Tensor], scale: float, folder: Path) -> nn.Module:
    """A plain network with the adapter merged in; the adapter itself goes to ``folder``."""
    named = {name.removeprefix("transformer."): tensor for name, tensor in lora.items()}
    layers = sorted({name.rpartition(".")[0] for name in named})
    rank = next((t.shape[1] for n, t in named.items() if n.endswith(".lora_A")), 0)
    adapter = add_lora(network, "generator", rank=rank, targets=layers)
    adapter.load_state_dict(named)
    export_peft(adapter, folder, base_model_name=family.path, scale=scale)
    with torch.device("meta"):
        plain = family.build_from_config(family.network_config)
    plain.load_state_dict(merge(adapter, scale), assign=True)
    return plain


def _copy_components(family: Family, folder: Path) -> None:
    """The teacher's folder without the network and the scheduler."""
    source = Path(family.path).expanduser()
    if not is_local(family.path):
        from diffusers import DiffusionPipeline

        source = Path(DiffusionPipeline.download(family.path, revision=family.revision))
    index = json.loads((source / "model_index.json").read_text())
    folder.mkdir()
    shutil.copy(source / "model_index.json", folder)
    for name in index:
        if name not in (family.folder, "scheduler") and (source / name).is_dir():
            shutil.copytree(source / name, folder / name)


def _write_index(folder: Path, scheduler: str) -> None:
    file = folder / "model_index.json"
    index = json.loads(file.read_text()) | {"scheduler": ["diffusers", scheduler]}
    file.write_text(json.dumps(index, indent=2) + "\n")


def _write_student(folder: Path, steps: int, resolution: int | None, family: Family) -> None:
    """What the pipeline is called with: the student's steps, no guidance, and what was not its default in training."""
    arguments: dict[str, float] = {"num_inference_steps": steps, "guidance_scale": 0}
    if resolution is not None:
        arguments |= {"height": resolution, "width": resolution}
    if family.length != family.default_length and "max_sequence_length" in family.encode_arguments():
        arguments["max_sequence_length"] = family.length
    (folder / STUDENT).write_text(json.dumps(arguments, indent=2) + "\n")


def _warn_of_arguments(family: Family, resolution: int | None) -> None:
    """Say which arguments the exported pipeline cannot do without."""
    if resolution not in (None, 1024) and not family.sized:
        log.warning(
            "export: %s makes 1024 x 1024 images unless told; call it with height=%d, width=%d",
            *(family.pipelines[0], resolution, resolution),
        )
    if family.length != family.default_length and "max_sequence_length" in family.encode_arguments():
        log.warning(
            "export: the student was trained with %d text tokens, %s takes %d unless told; call it with "
            "max_sequence_length=%d",
            *(family.length, family.pipelines[0], family.default_length, family.length),
        )
