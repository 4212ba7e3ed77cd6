"""The generator of a checkpoint, read by one process however many ranks wrote it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dmdr_fast.config import Config
from dmdr_fast.engine.checkpoint import NAME, fault, stored_role
from dmdr_fast.engine.engines import DTYPES
from dmdr_fast.engine.model import Model
from dmdr_fast.errors import UserError
from dmdr_fast.models.families import Denoiser


@contextmanager
def checkpoint_weights(run_dir: Path, step: int, model: Model, beside: Path) -> Iterator[Path]:
    """A file as ``final/generator.safetensors``, of the checkpoint of ``step``; in a temporary folder in ``beside``.

    Raises:
        UserError: there is no such checkpoint, or it is damaged.
    """
    folder = checkpoint_folder(run_dir, step)
    try:
        weights = generator_weights(folder, model.config)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, UserError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--step {step}: {folder} cannot be read ({reason}); {steps_in_words(run_dir)}") from None
    lora = model.config.student.lora
    metadata = {"lora_scale": repr(lora.scale)} if lora.rank else None
    try:
        beside.mkdir(parents=True, exist_ok=True)
        aside = TemporaryDirectory(prefix=".dmdr_fast-", dir=beside)
    except OSError as error:
        raise UserError(f"--step {step}: {beside} cannot be written ({error.strerror})") from None
    with aside:
        file = Path(aside.name) / f"step_{step:08d}.safetensors"
        save_file({n.removeprefix(Denoiser.prefix): t.contiguous() for n, t in weights.items()}, file, metadata)
        yield file


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """The checkpoint of ``step``; a UserError where there is none."""
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    if not folder.is_dir():
        raise UserError(f"--step {step}: no such checkpoint in {run_dir}; {steps_in_words(run_dir)}")
    return folder


def steps_in_words(run_dir: Path) -> str:
    """Which checkpoints a run has, for an error."""
    names = (NAME.fullmatch(path.name) for path in (run_dir / "checkpoints").glob("step_*"))
    steps = sorted(int(name[1]) for name in names if name)
    return f"it has steps {', '.join(map(str, steps))}" if steps else "it has written none yet"


def generator_weights(folder: Path, config: Config) -> dict[str, Tensor]:
    """{name: whole fp32 tensor}: the generator's EMA where the run keeps one, else its weights; or its adapter's.

    Raises:
        UserError: a file that is read for it does not match its checksum, or has none.
    """
    _check(folder, "trainer.json", "generator/parts.")
    stored = stored_role(folder, "generator")
    _check(folder, "generator/ema." if stored.has_ema else "generator/weight.")
    # Without an average, what the networks compute with: the master weights in the compute type.
    dtype = torch.float32 if stored.has_ema else DTYPES[config.deepspeed.dtype]
    return {name: tensor.to(dtype).float() for name, tensor in stored.whole().items()}


def _check(folder: Path, *prefixes: str) -> None:
    if found := fault(folder, prefixes=prefixes):
        raise UserError(found)
