"""The generator of a checkpoint, read by one process however many ranks wrote it."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from safetensors.torch import save_file
from torch import Tensor, nn

from dmdr_fast.config import Config
from dmdr_fast.engine.checkpoint import NAME
from dmdr_fast.engine.engines import DTYPES
from dmdr_fast.engine.pipeline_model import PipelineModel
from dmdr_fast.errors import UserError
from dmdr_fast.models.families import Denoiser
from dmdr_fast.models.lora import add_lora
from dmdr_fast.models.stored import parameters_on_meta


@contextmanager
def checkpoint_weights(run_dir: Path, step: int, model: PipelineModel, beside: Path) -> Iterator[Path]:
    """A file as ``final/generator.safetensors``, of the checkpoint of ``step``; in a temporary folder in ``beside``.

    Raises:
        UserError: there is no such checkpoint, or it cannot be read.
    """
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    if not folder.is_dir():
        raise UserError(f"--step {step}: no such checkpoint in {run_dir}; {steps_in_words(run_dir)}")
    try:
        weights = generator_weights(folder, model)
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
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


def steps_in_words(run_dir: Path) -> str:
    """Which checkpoints a run has, for an error."""
    names = (NAME.fullmatch(path.name) for path in (run_dir / "checkpoints").glob("step_*"))
    steps = sorted(int(name[1]) for name in names if name)
    return f"it has steps {', '.join(map(str, steps))}" if steps else "it has written none yet"


def generator_weights(folder: Path, model: PipelineModel) -> dict[str, Tensor]:
    """{name: whole fp32 tensor}: the generator's EMA where the run keeps one, else its weights; or its adapter's."""
    trained = _trained_parameters(model.config, model)
    averages = [_load(file)["ema"] for file in sorted(folder.glob("rank_*.pt"))]
    adapter = folder / "generator" / "adapter.pt"  # of sharing shared_all
    if None not in averages:
        found = _joined(averages, trained)
    elif adapter.is_file():
        found = _load(adapter)["adapter"]
    else:
        found = _engine_weights(folder, trained, model.config)
    if missing := sorted(trained.keys() - found.keys()):
        raise ValueError(f"no {missing[0]} in it")
    return {name: found[name].float().view(parameter.shape) for name, parameter in trained.items()}


def _trained_parameters(config: Config, model: PipelineModel) -> dict[str, nn.Parameter]:
    """The generator's trained parameters, without memory, by the names that its role has for them."""
    with parameters_on_meta():
        network = Denoiser(model.family, model.family.build_from_config(model.family.network_config))
    lora = config.student.lora
    if not lora.rank:
        return dict(network.named_parameters())
    return dict(
        add_lora(network, "generator", rank=lora.rank, targets=lora.targets or model.lora_targets).named_parameters()
    )


def _joined(ranks: list[dict[str, Tensor]], trained: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Whole parameters from the ranks' shards, which are in order; ZeRO-3 pads the last, stage 0 has all on each."""
    shards = {name: [shards[name].flatten() for shards in ranks if name in shards] for name in trained}
    return {name: torch.cat(parts)[: trained[name].numel()] for name, parts in shards.items() if parts}


def _engine_weights(folder: Path, trained: dict[str, nn.Parameter], config: Config) -> dict[str, Tensor]:
    """What DeepSpeed's engine saved, in the compute dtype; an adapter's parameters have the role behind their name."""
    replicated, lora = folder / "generator" / "mp_rank_00_model_states.pt", bool(config.student.lora.rank)
    if replicated.is_file():
        state = _load(replicated)["module"]
    else:
        with redirect_stdout(StringIO()):  # it tells its story there
            state = get_fp32_state_dict_from_zero_checkpoint(str(folder), "generator", exclude_frozen_parameters=lora)
    dtype = DTYPES[config.deepspeed.dtype]
    return {name: state[f"{name}_generator" if lora else name].to(dtype) for name in trained}


def _load(file: Path) -> dict:
    return torch.load(file, map_location="cpu", weights_only=False, mmap=True)
