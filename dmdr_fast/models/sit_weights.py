"""Reading SiT and REPA checkpoints."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dmdr_fast.models.partitioned import whole_parameters, whole_shape
from dmdr_fast.models.stored import Stored, parameter_value, stored_tensors

if TYPE_CHECKING:
    from dmdr_fast.models.sit import SiT

# In this order: the averaged weights are the published ones; "module" is DeepSpeed's.
CONTAINERS = ("ema", "model", "state_dict", "module")
# What training alone needs: REPA's head, the norm of REPA-E's latents (``latent_statistics``).
DROPPED = ("projectors.", "bn.")
BLOCK = re.compile(r"blocks\.(\d+)\.")
LATER_BLOCK = re.compile(r"decoder_blocks\.(\d+)\.")  # REPA's early files: the blocks behind its head


def load_sit_weights(model: SiT, path: str | Path | Mapping[str, Stored]) -> None:
    """Copy the weights of a ``.safetensors`` or ``.pt`` checkpoint into ``model``, every one of them.

    Reads a plain state dict or one under "ema", "model", "state_dict" or "module", with or without DDP's "module."
    prefix; what only training needs is dropped (REPA's head, REPA-E's norm of the latents), and REPA's
    "decoder_blocks" follow on "blocks". Values are cast to the model's dtype. Load
    before adding LoRA adapters. Under ZeRO-3 rank 0's values are used and all ranks must call together.

    Raises:
        FileNotFoundError: no file at ``path``.
        ValueError: the file is unreadable, or a key is missing, unexpected or of another shape (``model`` is
            unchanged then), or a value is no finite floating-point number.
    """
    stored = stored_sit_tensors(model, path)
    for prefix, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        with whole_parameters(own.values(), write=True), torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(parameter_value(stored, f"{prefix}.{name}" if prefix else name))


def stored_sit_tensors(model: SiT, path: str | Path | Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors of a checkpoint by ``model``'s names, checked against it; raises as ``load_sit_weights``.

    Those of a .safetensors file are read when asked for; a .pt file is read here.
    """
    stored, where = (path, "these weights") if isinstance(path, Mapping) else (read_checkpoint(Path(path)), path)
    kept = {name: tensor for name, tensor in stored.items() if not name.startswith(DROPPED)}
    kept = _blocks_in_a_row(kept)
    _check_fit(model, kept, where)
    return kept


def latent_statistics(path: Path) -> tuple[Tensor, Tensor] | None:
    """(mean [C], standard deviation [C]) by which a REPA-E model's latents are normalised; None in other files."""
    stored = read_checkpoint(path)
    if "bn.running_mean" not in stored:
        return None
    return stored["bn.running_mean"].read().float(), stored["bn.running_var"].read().float().sqrt()


def _blocks_in_a_row(stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """ "decoder_blocks.0" is "blocks.8" where "blocks" ends with 7."""
    numbers = {int(match[1]) for name in stored if (match := BLOCK.match(name))}
    first = max(numbers, default=-1) + 1
    return {LATER_BLOCK.sub(lambda m: f"blocks.{first + int(m[1])}.", name): t for name, t in stored.items()}


def read_checkpoint(path: Path) -> dict[str, Stored]:
    """The tensors of a .safetensors or .pt file by name, of its averaged weights where it has such.

    Nothing in a .pt file is run. Raises as ``load_sit_weights``.
    """
    return _named(_read(path), path)


def _read(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"SiT weights: no file {path}: set the path to a .safetensors or .pt checkpoint")
    try:
        if path.suffix == ".safetensors":
            return stored_tensors(path)
        # REPA and SiT store their command line beside the weights; a Namespace holds plain values only.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises what its bytes happen to ask for
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"SiT weights: {path} is not a readable checkpoint ({reason}): give a .safetensors file or a .pt "
            "file that torch.load(weights_only=True) accepts"
        ) from error


def _named(content: Any, path: Path) -> dict[str, Stored]:
    for container in CONTAINERS:
        if isinstance(content, dict) and isinstance(content.get(container), dict):
            content = content[container]
            break
    tensors = isinstance(content, dict) and all(
        isinstance(key, str) and isinstance(value, (Tensor, Stored)) for key, value in content.items()
    )
    if not tensors:
        raise ValueError(
            f"SiT weights: {path} holds no state dict: expected names to tensors, plain or under one of "
            f"{', '.join(CONTAINERS)}"
        )
    return {key.removeprefix("module."): _as_stored(value) for key, value in content.items()}


def _as_stored(value: Tensor | Stored) -> Stored:
    return value if isinstance(value, Stored) else Stored(value.shape, lambda: value)


def _check_fit(model: SiT, state: Mapping[str, Stored], path: str | Path) -> None:
    expected = {name: whole_shape(parameter) for name, parameter in model.named_parameters()}
    for name, shape in expected.items():
        if name in state and state[name].shape != shape:
            raise ValueError(
                f"SiT weights: {path}: {name} expected {list(shape)}, got {list(state[name].shape)}: "
                + _remedy(name, shape, state[name].shape)
            )
    missing, extra = expected.keys() - state.keys(), state.keys() - expected.keys()
    for problem, keys in (("lacks", missing), ("also has", extra)):
        if keys:
            listed = ", ".join(sorted(keys)[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise ValueError(
                f"SiT weights: {path} {problem} {listed}: the model expects {len(expected)} tensors, "
                f"got {len(state)}: set model.depth, or give a checkpoint of this model"
            )


def _remedy(name: str, expected: torch.Size, got: torch.Size) -> str:
    if name == "y_embedder.embedding_table.weight" and expected[1:] == got[1:] and got[0] == expected[0] - 1:
        return (
            f"if all {got[0]} rows are classes, it was trained without the null class (no label dropout) and has no "
            "unconditional prediction: append a row of zeros and keep teacher.cfg_scale at 1; if the last row is the "
            f"null class, set model.num_classes to {got[0] - 1}"
        )
    if name == "y_embedder.embedding_table.weight" and expected[1:] == got[1:]:
        return f"set model.num_classes to {got[0] - 1}"
    if name == "pos_embed" and expected[2:] == got[2:]:
        return f"set model.resolution and model.patch_size to give {got[1]} patches"
    if name.startswith("final_layer.linear.") and expected[1:] == got[1:]:
        return "set model.learn_sigma (published SiT checkpoints have twice the channels) or model.patch_size"
    return "set model.hidden_size, model.patch_size and model.channels as the checkpoint has them"
