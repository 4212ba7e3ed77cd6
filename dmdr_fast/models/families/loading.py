"""Pipeline folders and hub ids: their configs, their weights, and clear words where something is missing."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

# Weights of diffusers and transformers: plain, of a variant, in shards.
WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.([A-Za-z]\w*))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)"
)


def is_local(path: str) -> bool:
    """A folder on disk, or something that cannot be a hub id (ORGANISATION/NAME)."""
    return Path(path).expanduser().is_dir() or path.startswith(("/", ".", "~")) or path.count("/") != 1


def read_json(path: str, name: str, revision: str | None = None) -> dict[str, Any]:
    """A JSON file of a pipeline folder or hub id.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it holds no JSON object.
    """
    file = resolve(path, name, revision)
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"pipeline {path}: {name} is no JSON ({error}): copy the pipeline again") from None
    if not isinstance(content, dict):
        raise ValueError(f"pipeline {path}: {name} must hold a JSON object, got {type(content).__name__}")
    return content


def resolve(path: str, name: str, revision: str | None = None) -> Path:
    """A file of a pipeline folder, or of a hub id through the hub's own cache; FileNotFoundError without it."""
    if is_local(path):
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise FileNotFoundError(f"pipeline {path}: no such folder; give a diffusers pipeline folder or a hub id")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"pipeline {path}: no {name}; expected a folder that save_pretrained wrote")
        return folder / name
    from huggingface_hub import hf_hub_download

    subfolder, _, file = name.rpartition("/")
    try:
        return Path(hf_hub_download(path, file, subfolder=subfolder or None, revision=revision))
    except Exception as error:  # the hub's errors have no common base, and all mean the same to the user
        raise FileNotFoundError(
            f"pipeline {path}: {name} could not be fetched ({first_line(error)}); give a local folder, or check the "
            "name, the revision and the access token"
        ) from None


def variant_of(directory: Path) -> str | None:
    """The variant ("fp16") of a component's folder that has weights under its name alone, as diffusers and transformers
    write them; None where there are weights without one, which are then the ones to read."""
    found = {match[1] for file in directory.glob("*") if (match := WEIGHTS.fullmatch(file.name))}
    return None if None in found else min(found, default=None, key=lambda name: (name != "fp16", name))


def load_module(
    path: str, folder: str, kind: str, dtype: torch.dtype, revision: str | None = None, **from_pretrained: Any
) -> nn.Module:
    """A component of a pipeline, of diffusers class ``kind``, with every one of its weights.

    Raises:
        FileNotFoundError: config or a weights file missing, by name.
        ValueError: another class, weights that are not this network's, or unreadable ones.
    """
    import diffusers  # seconds to import

    named = read_json(path, f"{folder}/config.json", revision).get("_class_name", kind)
    if named != kind:
        raise ValueError(f"pipeline {path}: {folder} expected a {kind}, got {named}; give a pipeline of this family")
    if "variant" not in from_pretrained:
        check_weights(path, folder)
        from_pretrained["variant"] = local_variant(path, folder)
    try:
        module, report = getattr(diffusers, kind).from_pretrained(
            path,
            subfolder=folder,
            revision=revision,
            torch_dtype=dtype,
            output_loading_info=True,
            **from_pretrained,
        )
    except OSError as error:
        raise FileNotFoundError(f"pipeline {path}: {folder} cannot be loaded ({first_line(error)})") from error
    except (ValueError, TypeError, RuntimeError, KeyError, SafetensorError) as error:
        raise ValueError(f"pipeline {path}: {folder} is no readable {kind} ({first_line(error)})") from error
    if missing := report["missing_keys"]:
        raise ValueError(
            f"pipeline {path}: {folder} lacks the weights of {len(missing)} tensors, first {sorted(missing)[0]}; "
            f"give the weights that its config.json describes"
        )
    return module


def local_variant(path: str, *folders: str) -> str | None:
    """The variant of the first of a local pipeline's components that has one alone; a hub id's is left to the hub."""
    found = (variant_of(Path(path).expanduser() / folder) for folder in folders) if is_local(path) else ()
    return next((variant for variant in found if variant is not None), None)


def weights_of(path: str, folder: str, revision: str | None = None) -> Path:
    """A component's .safetensors file, or its folder where it is in shards; a hub id's in the hub's own cache.

    Raises:
        FileNotFoundError: the hub does not give it.
    """
    if is_local(path):
        place = Path(path).expanduser() / folder
    else:
        from huggingface_hub import snapshot_download

        wanted = [f"{folder}/*.safetensors", f"{folder}/*.json"]
        try:
            root = snapshot_download(path, revision=revision, allow_patterns=wanted, ignore_patterns=["*.fp16.*"])
        except Exception as error:  # as in resolve
            raise FileNotFoundError(f"pipeline {path}: {folder} could not be fetched ({first_line(error)})") from None
        place = Path(root) / folder
    variant = variant_of(place)
    single = place / f"diffusion_pytorch_model{'' if variant is None else f'.{variant}'}.safetensors"
    return single if single.is_file() else place


def check_weights(path: str, folder: str) -> None:
    """FileNotFoundError that names the first weights file that a local pipeline's ``folder`` should hold and does not.

    A hub id is left to the hub, which fetches whole files.
    """
    if not is_local(path):
        return
    directory = Path(path).expanduser() / folder
    for index in sorted(directory.glob("*.index.json")) or sorted(directory.glob("*.index.*.json")):
        wanted = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        missing = [name for name in wanted if not (directory / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"pipeline {path}: {folder} lacks shard {missing[0]} ({len(missing)} of {len(wanted)} missing); "
                "copy the weights again"
            )
        return
    if not any(directory.glob("*.safetensors")) and not any(directory.glob("*.bin")):
        raise FileNotFoundError(f"pipeline {path}: {folder} holds no weights (no .safetensors file); copy them there")


def scheduler_shift(config: Mapping[str, Any], tokens: int) -> float:
    """The shift of a FlowMatchEulerDiscreteScheduler: its own, or exp(mu), mu linear in the number of tokens."""
    if not config.get("use_dynamic_shifting", False):
        return float(config.get("shift", 1.0))
    base, top = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu = low + (high - low) * (tokens - base) / (top - base)
    return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
