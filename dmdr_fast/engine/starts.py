"""What ``student.weights`` and ``fake.weights`` name: where a role begins instead of at the teacher."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dmdr_fast.config import Config
from dmdr_fast.engine.checkpoint import MANIFEST, NAME, UNREADABLE, shared_fault, stored_role
from dmdr_fast.engine.finished import FINAL
from dmdr_fast.engine.model import PREFIXES, Start
from dmdr_fast.engine.runtime import Runtime
from dmdr_fast.engine.sit_model import resolve_weights
from dmdr_fast.errors import UserError
from dmdr_fast.models.lora import PAIRS
from dmdr_fast.models.sit_weights import read_checkpoint
from dmdr_fast.models.stored import Stored, stored_tensors

OURS = tuple(f".{name}" for form in PAIRS.values() for pair in form for name in pair)
# The DMDR reference's pairs, on the outputs q and v of an attention's qkv; PEFT's and diffusers', whose A is [r, in].
REFERENCE = re.compile(r"(.+)\.lora\.lora_([QV])([AB])")
PEFT = re.compile(r"(.+)\.lora_([AB])(?:\.\w+)?\.weight")


def read_starts(config: Config, ranks: Runtime) -> dict[str, Start]:
    """Role to start, for the roles that the configuration gives one; tensors are read when they are asked for.

    All ranks must call.

    A start is a run's folder (its final generator, the fake score of its newest checkpoint), a checkpoint, a folder or
    file of weights or of an adapter (.safetensors, .pt; DeepSpeed's ``mp_rank_00_model_states.pt``), or on the hub.

    Raises:
        UserError: nothing there that could be read, or a damaged checkpoint.
    """
    named = {"generator": ("student.weights", config.student.weights), "fake": ("fake.weights", config.fake.weights)}
    return {role: _read_start(key, text, role, ranks) for role, (key, text) in named.items() if text is not None}


def _read_start(key: str, text: str, role: str, ranks: Runtime) -> Start:
    place = _place(key, resolve_weights(text, key), role)
    fault = shared_fault(place, ranks) if (place / MANIFEST).is_file() else None
    if fault:
        raise UserError(f"{key}: {place} cannot be used: {fault}; name another checkpoint")
    try:
        if (place / MANIFEST).is_file():
            stored, scale = stored_role(place, role), 1.0
            kind = "ema" if stored.has_ema else "weight"
            found = {n: Stored(torch.Size(s), partial(stored.read_whole, kind, n)) for n, s in stored.shapes.items()}
            if role == "generator":
                scale = float(json.loads((place / "trainer.json").read_text())["settings"]["student.lora.scale"])
        else:
            found, scale = (stored_tensors(place) if place.is_dir() else read_checkpoint(place)), _noted_scale(place)
        if not math.isfinite(scale):
            raise ValueError(f"its adapter's scale is {scale}")
        weights, lora = _split(found)
    except UNREADABLE as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        if type(error) in (FileNotFoundError, ValueError):  # ours, which name the file and the remedy
            reason = str(error)
        raise UserError(f"{key}: {text}: {reason}; name a run, a checkpoint, or a file of weights") from None
    if role == "fake":
        scale = 1.0  # dyna_dg.fake_scale is the run's own
    return Start(key, text, weights, lora, scale, is_partial=(place / MANIFEST).is_file())


def _place(key: str, path: Path, role: str) -> Path:
    """The checkpoint, folder of weights or file that ``path`` stands for."""
    if not path.exists():
        raise UserError(f"{key}: no such file or folder: {path}; name a run, a checkpoint, or a file of weights")
    final = path / FINAL
    if role == "generator" and final.is_file():
        return final
    if (path / "checkpoints").is_dir():
        kept = sorted(p for p in (path / "checkpoints").iterdir() if NAME.fullmatch(p.name))
        if not kept:
            raise UserError(f"{key}: the run {path} has no checkpoint yet; name another run")
        return kept[-1]
    for network in ("transformer", "unet"):
        if (path / "model_index.json").is_file() and (path / network).is_dir():
            return path / network
    return path


def _noted_scale(place: Path) -> float:
    """The scale of a file's adapter: ours is noted in the file, PEFT's beside it, diffusers' in it in PEFT's words."""
    settings = (place if place.is_dir() else place.parent) / "adapter_config.json"
    if settings.is_file():
        return _peft_scale(json.loads(settings.read_bytes()))
    if place.suffix != ".safetensors":
        return 1.0
    with safe_open(place, framework="pt") as file:
        noted = file.metadata() or {}
    if "lora_adapter_metadata" in noted:
        values = json.loads(noted["lora_adapter_metadata"])
        return _peft_scale({name.rpartition(".")[2]: value for name, value in values.items()})
    return float(noted.get("lora_scale", "1.0"))


def _peft_scale(settings: Mapping[str, Any]) -> float:
    rank = settings["r"]
    return settings["lora_alpha"] / (rank**0.5 if settings.get("use_rslora") else rank)


def _split(found: Mapping[str, Stored]) -> tuple[dict[str, Stored], dict[str, Stored]]:
    """(weights, adapter) under our names, of ours, the DMDR reference's, PEFT's or diffusers'."""
    weights: dict[str, Stored] = {}
    lora: dict[str, Stored] = {}
    alpha = {n.removesuffix(".alpha"): t for n, t in found.items() if n.endswith(".alpha")}
    for layer, tensor in alpha.items():
        if tensor.shape.numel() != 1:
            raise ValueError(f"{layer}.alpha expected one number, got {list(tensor.shape)}")
    for long_name, tensor in found.items():
        name = PREFIXES.sub("", long_name)
        if name.endswith(OURS):
            lora[name] = tensor
        elif match := REFERENCE.fullmatch(name):
            layer, part, factor = match.groups()
            lora[f"{layer}.qkv.lora_{factor}_{part.lower()}"] = tensor
        elif match := PEFT.fullmatch(name):
            layer, factor = match.groups()
            full = PEFT.fullmatch(long_name)
            whole = alpha.get(full[1]) if full is not None and factor == "B" else None
            shape = torch.Size(reversed(tensor.shape))
            lora[f"{layer}.lora_{factor}"] = Stored(shape, partial(_transposed, tensor, whole))
        elif not long_name.endswith(".alpha"):
            weights[name] = tensor
    return weights, lora


def _transposed(tensor: Stored, alpha: Stored | None) -> Tensor:
    """The factor as ours; B [out, r] times alpha / r where the file has an alpha."""
    value = tensor.read().float().T.contiguous()
    return value if alpha is None else value * (alpha.read().float() / tensor.shape[1])
