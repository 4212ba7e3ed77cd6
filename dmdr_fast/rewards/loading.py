"""Loading what a reward is made of: models and tokenizers of transformers, and checkpoints in formats of their own."""

from __future__ import annotations

import contextlib
import logging
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REMEDY = "set {key} of its reward.terms entry to {expected}"
LOADABLE = "a folder with config.json and weights, or a hub id that can be reached"
PUBLISHED = "the published checkpoint"


class FrozenReward(nn.Module):
    """A reward that is a frozen network: differentiable in the images, always in evaluation mode."""

    differentiable = True

    def train(self, mode: bool = True) -> FrozenReward:
        """It stays in evaluation mode (no dropout), whatever is around it."""
        return super().train(False)


def load_pretrained(
    model_class: type[PreTrainedModel],
    path: str | Path | None,
    *,
    dtype: torch.dtype,
    where: str,
    key: str = "path",
    expected: str = LOADABLE,
    **given: Any,
) -> PreTrainedModel:
    """``model_class.from_pretrained(path, **given)``, complete, frozen, in evaluation mode.

    Args:
        path: folder or hub id; None where ``given`` has ``config`` and ``state_dict``.
        where: which reward, for the errors: "reward 'hps'".
        key: which key of the reward's entry names it, and
        expected: what that should be, for the errors.

    Raises:
        FileNotFoundError: nothing that loads at ``path``.
        ValueError: it is broken, or lacks weights, or has some of another shape.
    """
    remedy = REMEDY.format(key=key, expected=expected)
    _check_folder(path, where, remedy)
    try:
        with _quiet():
            model, report = model_class.from_pretrained(
                path and str(path), dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **given
            )
    except Exception as error:  # of a broken file each format has its own
        kind = FileNotFoundError if isinstance(error, OSError) else ValueError
        raise kind(f"{where}: cannot load {path} ({_reason(error)}): {remedy}") from error
    if report["missing_keys"]:  # transformers fills them with random values and goes on
        raise ValueError(
            f"{where}: {path or 'its checkpoint'} lacks {sorted(report['missing_keys'])[0]} (and "
            f"{len(report['missing_keys']) - 1} more): expected all weights of a {model_class.__name__}: {remedy}"
        )
    if report["mismatched_keys"]:
        name, got, wanted = sorted(report["mismatched_keys"])[0]
        raise ValueError(
            f"{where}: {path or 'its checkpoint'}: {name}: expected shape {list(wanted)}, got {list(got)}: {remedy}"
        )
    return model.requires_grad_(False).eval()


def load_tokenizer(path: str | Path, *, vocabulary: int, where: str) -> Any:
    """The tokenizer at ``path`` (folder or hub id), all of whose tokens a model of ``vocabulary`` tokens knows.

    Raises:
        FileNotFoundError, ValueError: there is none, or one of another model.
    """
    remedy = REMEDY.format(key="options.tokenizer", expected="the folder or hub id of the model's tokenizer")
    _check_folder(path, where, remedy)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path))
    except Exception as error:
        kind = FileNotFoundError if isinstance(error, OSError) else ValueError
        raise kind(f"{where}: no tokenizer in {path} ({_reason(error)}): {remedy}") from error
    if len(tokenizer) > vocabulary:
        raise ValueError(
            f"{where}: the tokenizer in {path} has {len(tokenizer)} tokens, its model {vocabulary}: {remedy}"
        )
    return tokenizer


def load_state(path: str | Path, file: str, *, where: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint on the CPU; what lies under ``state_dict`` or ``model`` where it has such a part.

    Args:
        path: the file itself, a folder with ``file`` in it, or a hub id whose repository has it.
        file: a .safetensors file, or one that ``torch.load(weights_only=True)`` reads.

    Raises:
        FileNotFoundError, ValueError: it is not there, or not readable.
    """
    remedy = REMEDY.format(key="path", expected=f"the checkpoint, a folder with {file}, or a hub id that has it")
    location = _locate(path, file, where, remedy)
    try:
        if location.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(location)
        else:
            state = torch.load(location, map_location="cpu", weights_only=True)
    except Exception as error:
        hint = "; it holds more than tensors" if isinstance(error, pickle.UnpicklingError) else ""
        raise ValueError(f"{where}: cannot read {location} ({_reason(error)}){hint}: {remedy}") from error
    for part in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(part), dict):
            state = state[part]
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{where}: {location}: expected named tensors, got {type(state).__name__}: {remedy}")
    return state


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers' page-long report of a load is left out: what matters of it becomes an error."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _locate(path: str | Path, file: str, where: str, remedy: str) -> Path:
    local = Path(path).expanduser()
    if local.is_file():
        return local
    if local.is_dir():
        if (local / file).is_file():
            return local / file
        raise FileNotFoundError(f"{where}: no {file} in {path}: {remedy}")
    _check_folder(path, where, remedy)
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(str(path), file))
    except Exception as error:
        raise FileNotFoundError(f"{where}: no {file} at {path} ({_reason(error)}): {remedy}") from error


def _check_folder(path: str | Path | None, where: str, remedy: str) -> None:
    """What can only be a local path must exist: the hub is not asked for it."""
    if path is None or Path(path).expanduser().exists():
        return
    if str(path).startswith(("/", ".", "~")) or str(path).count("/") > 1:
        raise FileNotFoundError(f"{where}: no folder {path}: {remedy}")


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
