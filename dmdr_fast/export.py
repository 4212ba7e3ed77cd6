"""A finished run as a diffusers pipeline: ``dmdr-export RUN_DIR OUT``."""

from __future__ import annotations

import sys
from pathlib import Path

from dmdr_fast.cli import Parser, load, run_user_command
from dmdr_fast.errors import UserError

FINAL = Path("final") / "generator.safetensors"


def main(argv: list[str]) -> None:
    """Write the pipeline and say how it is called. Mistakes exit with 2."""
    parser = Parser(prog="dmdr-export", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="A run of a text-to-image family.")
    parser.add_argument("out", type=Path, help="Folder to write; it must not be there yet.")
    parser.add_argument(
        "--weights", type=Path, help=f"Generator to export: a .safetensors of the run (default: RUN_DIR/{FINAL})."
    )
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16", help="Type of the network's files.")
    options = parser.parse_args(argv)
    steps = export_run(options.run_dir, options.out, options.weights, options.dtype)
    print(
        f"{options.out}: DiffusionPipeline.from_pretrained({str(options.out)!r})"
        f"(prompt, num_inference_steps={steps}, guidance_scale=0)"
    )


def run_weights(command: str, run_dir: Path, weights: Path | None) -> Path:
    """The generator's file that ``command`` reads: ``weights``, or the final one of the run.

    Raises:
        UserError: it is not there.
    """
    file = weights or run_dir / FINAL
    if not file.is_file():
        raise UserError(f"{command}: no weights at {file}; let the run finish, or give those of a phase with --weights")
    return file


def export_run(run_dir: Path, out: Path, weights: Path | None = None, dtype: str = "bf16") -> int:
    """Write the generator of a run as a pipeline into ``out`` (``dmdr_fast.models.export``); returns its steps.

    Raises:
        UserError: no such run, one of class labels, no weights yet, or a folder that is there already.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from dmdr_fast.algorithm.schedules import timestep_grid
    from dmdr_fast.engine.engines import DTYPES
    from dmdr_fast.engine.pipeline_model import PipelineModel, is_lora, lora_scale
    from dmdr_fast.models.export import export_pipeline

    config = load(run_dir / "config.yaml")
    if config.model.family == "sit":
        raise UserError(f"export: {run_dir} is a run of SiT, which no diffusers pipeline holds; use {run_dir / FINAL}")
    file = run_weights("export", run_dir, weights)
    model = PipelineModel.open(config)
    try:
        tensors = load_file(file)
        given = {"lora": tensors, "lora_scale": lora_scale(file)} if is_lora(tensors) else {"weights": tensors}
        export_pipeline(
            model.family,
            out,
            grid=timestep_grid(config.student.steps, shift=config.student.shift),
            dtype=DTYPES[dtype],
            resolution=config.model.resolution,
            **given,
        )
    except SafetensorError as error:
        raise UserError(f"export: {file} is damaged ({error}); go back to a checkpoint") from None
    except (FileExistsError, FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from None
    return config.student.steps


def command() -> int:
    """The console script."""
    return run_user_command(main)


if __name__ == "__main__":
    sys.exit(command())
