"""The generator of a run as a diffusers pipeline: ``dmdr-export RUN_DIR OUT``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dmdr_fast.cli import Parser, load, run_user_command, user_path
from dmdr_fast.errors import UserError

if TYPE_CHECKING:
    from dmdr_fast.engine.model import Model

FINAL = Path("final") / "generator.safetensors"


def main(argv: list[str]) -> None:
    """Write the pipeline and say how it is called. Mistakes exit with 2."""
    parser = Parser(prog="dmdr-export", description=__doc__)
    parser.add_argument("run_dir", type=user_path, help="A run of a text-to-image family, finished or not.")
    parser.add_argument("out", type=user_path, help="Folder to write; it must not be there yet.")
    add_source(parser)
    parser.add_argument(
        "--dtype", choices=["bf16", "fp32"], help="Type of the network's files (default: the run's export.dtype)."
    )
    options = parser.parse_args(argv)
    call = export_run(options.run_dir, options.out, options.weights, options.dtype, step=options.step)
    print(f"{options.out}: {call}")


def add_source(parser: Parser) -> None:
    """The options that name a generator of a run."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--step", type=int, help="The generator of this checkpoint of the run.")
    source.add_argument(
        "--weights", type=user_path, help=f"Generator: a .safetensors of the run (default: RUN_DIR/{FINAL})."
    )


def is_run(options: argparse.Namespace, command: str) -> bool:
    """Whether the ``source`` of a command is a run, and not a pipeline, which has no checkpoints.

    Raises:
        UserError: it is neither, or a pipeline of which a checkpoint is asked for.
    """
    source = options.source
    if (source / "config.yaml").is_file():
        return True
    if options.step is not None or options.weights is not None:
        raise UserError(f"{command}: {source} is no run (config.yaml), so --step and --weights name nothing")
    if not (source / "model_index.json").is_file():
        raise UserError(f"{command}: {source} is no run (config.yaml) and no pipeline (model_index.json)")
    return False


@contextmanager
def run_weights(model: Model, run_dir: Path, weights: Path | None, step: int | None, beside: Path) -> Iterator[Path]:
    """The generator's file of a run: of the checkpoint of ``step``, ``weights``, or the final one.

    Raises:
        UserError: it is not there, or damaged.
    """
    from dmdr_fast.engine.checkpoint_weights import checkpoint_weights

    if step is None:
        yield weights_file(run_dir, weights, step)
        return
    with checkpoint_weights(run_dir, step, model, beside) as file:
        yield file


def weights_file(run_dir: Path, weights: Path | None, step: int | None) -> Path:
    """The file by which a run's generator is known: the manifest of the checkpoint of ``step``, or its weights.

    Raises:
        UserError: it is not there.
    """
    from dmdr_fast.engine.checkpoint_weights import checkpoint_folder, steps_in_words

    file = weights or run_dir / FINAL
    if step is not None:
        file = checkpoint_folder(run_dir, step) / "manifest.json"
    if not file.is_file():
        raise UserError(
            f"no weights at {file}; let the run finish, take a checkpoint with --step ({steps_in_words(run_dir)}), or "
            "give those of a phase with --weights"
        )
    return file


def export_run(
    run_dir: Path, out: Path, weights: Path | None = None, dtype: str | None = None, *, step: int | None = None
) -> str:
    """Write the generator of a run as a pipeline into ``out`` (``dmdr_fast.models.export``); returns how it is called.

    Raises:
        UserError: no such run, one of class labels, no weights yet, or a folder that is there already.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from dmdr_fast.engine.engines import DTYPES
    from dmdr_fast.engine.pipeline_model import PipelineModel, is_lora, lora_scale
    from dmdr_fast.engine.recipe import student_grid
    from dmdr_fast.models.export import call_arguments, export_pipeline, load_arguments

    config = load(run_dir / "config.yaml")
    if config.model.family == "sit":
        raise UserError(f"export: {run_dir} is a run of SiT, which no diffusers pipeline holds; use {run_dir / FINAL}")
    model = PipelineModel.open(config)
    try:
        with run_weights(model, run_dir, weights, step, out.parent) as file:
            try:
                tensors = load_file(file)
            except SafetensorError as error:
                raise UserError(f"export: {file} is damaged ({error}); go back to a checkpoint with --step") from None
            given = {"lora": tensors, "lora_scale": lora_scale(file)} if is_lora(tensors) else {"weights": tensors}
            export_pipeline(
                model.family,
                out,
                grid=student_grid(config),
                eta=config.student.fresh_noise,
                dtype=DTYPES[dtype or config.export.dtype],
                size=config.model.sizes[0],
                student=model.student.family,
                **given,
            )
    except (FileExistsError, FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from None
    loaded = "".join(f", {name}={value!r}" for name, value in load_arguments(out).items())
    called = "".join(f", {name}={value!r}" for name, value in call_arguments(out).items())
    return f"DiffusionPipeline.from_pretrained({str(out)!r}{loaded})(prompt{called})"


def command() -> int:
    """The console script."""
    return run_user_command(main)


if __name__ == "__main__":
    sys.exit(command())
