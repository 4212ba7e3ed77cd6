"""A trained generator out of the trainer: a diffusers pipeline folder that samples in few steps by itself."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmdr_fast.models.families import Denoiser, Family
from dmdr_fast.models.families.loading import WEIGHTS, is_local, variant_of
from dmdr_fast.models.families.schedulers import grid_shift, student_scheduler
from dmdr_fast.models.lora import add_lora
from dmdr_fast.models.lora_export import diffusers_lora, merge
from dmdr_fast.models.stored import stored_tensors

RENOISE = Path(__file__).parent / "families" / "renoise_scheduler.py"
STUDENT = "student.json"  # the arguments of the pipeline's call


def export_pipeline(
    family: Family,
    out: str | Path,
    *,
    grid: tuple[float, ...],
    size: tuple[int, int],
    student: Family | None = None,
    eta: float = 1.0,
    weights: Mapping[str, Tensor] | None = None,
    lora: Mapping[str, Tensor] | None = None,
    lora_scale: float = 1.0,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Write the teacher's pipeline with the student in its place, for diffusers to read (``load_arguments``).

    Called with ``call_arguments`` it samples as the student was trained to, and its ``generator`` fixes the image. The
    scheduler's config holds the grid; a guidance-distilled network (FLUX.1-dev, FLUX.2-dev) is changed so that
    guidance_scale=0 means ``family.guidance``. Text encoders, tokenizers and VAE are copied from the teacher's. The
    folder is written aside and renamed.

    Args:
        family: the teacher's, with the guidance and length that the student was trained at.
        out: a folder that is not there yet.
        grid: 1 >= t_0 > ... > t_N = 0.
        size: height and width of the images the student was trained on.
        student: of the student's network where that is another one; None: the teacher's.
        eta: of its sampler, see :func:`dmdr_fast.algorithm.rollout.next_input`.
        weights: every parameter of the network by name ("transformer." in front or not); its pipeline's where None.
        lora: "LAYER.lora_A" [in, r] and "LAYER.lora_B" [r, out], merged into the network at ``lora_scale``, and written
            as ``out/pytorch_lora_weights.safetensors`` too: the network's own pipeline takes it by
            ``load_lora_weights(out)``, with the teacher's guidance.
        dtype: of the network's files.

    Raises:
        FileExistsError: ``out`` is there.
        ValueError: times that do not fall to 0, a sampler that the pipeline has not, or tensors that do not fit the
            network.
    """
    out = Path(out).expanduser()
    if out.exists():
        raise FileExistsError(f"export: {out} is there already; give a new folder, or delete it")
    scheduler, student = student_scheduler(family, grid, eta), student or family
    network = student.load_transformer(dtype)
    if weights is not None:
        load_weights(network, weights)
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        _copy_components(family, aside)
        if lora is not None:
            network = _with_lora(student, network, lora, lora_scale, aside)
        network = student.fold_guidance(network)
        if family.sized:
            network.register_to_config(sample_size=max(size) // family.factor)
        network.save_pretrained(aside / family.folder)
        _write_scheduler(aside, scheduler)
        _write_student(aside, grid, size, family)
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return out


def call_arguments(folder: Path) -> dict[str, Any]:
    """The arguments that the exported pipeline in ``folder`` is called with; FileNotFoundError where it is none."""
    return json.loads((folder / STUDENT).read_bytes())


def load_arguments(folder: Path) -> dict[str, Any]:
    """What ``DiffusionPipeline.from_pretrained`` needs beside a pipeline's folder.

    torch_dtype is that of the network's files: text encoders and VAE may lie there in another, and would be loaded in
    it. An exported pipeline's scheduler of ours is code in the folder.
    """
    files = [file for network in ("transformer", "unet") for file in sorted((folder / network).glob("*.safetensors"))]
    dtype = next(iter(stored_tensors(files[0]).values())).read().dtype if files else torch.float32
    code = {"trust_remote_code": True} if (folder / "scheduler" / RENOISE.name).is_file() else {}
    return {"torch_dtype": dtype} | code


def load_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy ``weights`` into every parameter of ``network``, cast to its dtype; ValueError where one does not fit."""
    named = {name.removeprefix(Denoiser.prefix): tensor for name, tensor in weights.items()}
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
    """A plain network with the adapter merged in; the adapter itself is written into ``folder``, the pipeline's."""
    import diffusers

    named = {name.removeprefix(Denoiser.prefix): tensor for name, tensor in lora.items()}
    layers = sorted({name.rpartition(".")[0] for name in named})
    rank = next((t.shape[1] for n, t in named.items() if n.endswith(".lora_A")), 0)
    adapter = add_lora(network, "generator", rank=rank, targets=layers)
    adapter.load_state_dict(named)
    pipeline = getattr(diffusers, _read_index(folder)["_class_name"])
    pipeline.save_lora_weights(folder, **{f"{family.folder}_lora_layers": diffusers_lora(adapter, scale)})
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
    index = _read_index(source)
    folder.mkdir()
    shutil.copy(source / "model_index.json", folder)
    for name in index:
        if name not in (family.folder, "scheduler") and (source / name).is_dir():
            shutil.copytree(source / name, folder / name)
            _drop_variant(folder / name)


def _drop_variant(component: Path) -> None:
    """Weights that are there under a variant's name alone (fp16) get their plain one: the network has no variant."""
    variant = variant_of(component)
    if variant is None:
        return
    for file in list(component.iterdir()):
        match = WEIGHTS.fullmatch(file.name)
        if match and match[1] == variant:
            file.rename(component / file.name.replace(f".{variant}", "", 1))
        elif file.name.endswith(f".index.{variant}.json"):
            content = json.loads(file.read_bytes())
            content["weight_map"] = {n: f.replace(f".{variant}", "", 1) for n, f in content["weight_map"].items()}
            (component / file.name.replace(f".{variant}.json", ".json")).write_text(
                json.dumps(content, indent=2) + "\n"
            )
            file.unlink()


def _read_index(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "model_index.json").read_bytes())


def _write_scheduler(folder: Path, scheduler: Any) -> None:
    """The scheduler's config, its name in the index, and its code where it is ours."""
    scheduler.save_pretrained(folder / "scheduler")
    ours, kind = not type(scheduler).__module__.startswith("diffusers."), type(scheduler).__name__
    if ours:
        shutil.copy(RENOISE, folder / "scheduler")
    index = _read_index(folder) | {"scheduler": [RENOISE.stem if ours else "diffusers", kind]}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_student(folder: Path, grid: tuple[float, ...], size: tuple[int, int], family: Family) -> None:
    """What the pipeline is called with: the student's steps and size, no guidance, and the text length if its own."""
    arguments: dict[str, Any] = {
        "num_inference_steps": len(grid) - 1,
        **family.unguided,
        "height": size[0],
        "width": size[1],
    }
    if family.prediction == "eps" and grid_shift(grid) != 1.0:  # LCMScheduler spreads its steps evenly by itself
        arguments["timesteps"] = [math.ceil(1000 * t - 1e-3) - 1 for t in grid[:-1]]
    if family.length != family.default_length and "max_sequence_length" in family.encode_arguments():
        arguments["max_sequence_length"] = family.length
    (folder / STUDENT).write_text(json.dumps(arguments, indent=2) + "\n")
