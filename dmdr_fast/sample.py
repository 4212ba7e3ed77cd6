"""A grid of images: ``dmdr-sample RUN_DIR|PIPELINE --prompts FILE|TEXT... --out grid.png``."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dmdr_fast.cli import Parser, load, run_user_command, user_path
from dmdr_fast.data.prompts import is_prompt_file, load_prompts
from dmdr_fast.errors import UserError
from dmdr_fast.export import add_source, is_run, run_weights

if TYPE_CHECKING:
    from torch import Tensor

    from dmdr_fast.engine.drawing import Draw

BATCH = 4


def main(argv: list[str]) -> None:
    """Draw one image per prompt and write them as one PNG. Mistakes exit with 2."""
    parser = Parser(prog="dmdr-sample", description=__doc__)
    parser.add_argument(
        "source",
        type=user_path,
        help="A run of a text-to-image family, finished or not, or a pipeline of diffusers.",
    )
    parser.add_argument("--prompts", nargs="+", required=True, help="Prompts, or one file of them, as data.prompts.")
    parser.add_argument("--out", type=user_path, default=Path("grid.png"), help="PNG to write.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the noise.")
    add_source(parser)
    options = parser.parse_args(argv)
    prompts = prompts_of(options.prompts)
    if is_run(options, "sample"):
        source = {"weights": options.weights, "step": options.step}
        images = sample_run(options.source, prompts, seed=options.seed, **source)
    else:
        images = sample_pipeline(options.source, prompts, seed=options.seed)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_bytes(grid_png(images))
    print(f"{options.out}: {len(images)} images")


def prompts_of(words: list[str]) -> list[str]:
    """Prompts of the command line: the words themselves, or those of a file where the only one names it."""
    if len(words) == 1 and is_prompt_file(words[0]):
        return [prompt.text for prompt in load_prompts(words[0])]
    return words


def sample_run(
    run_dir: Path, prompts: list[str], *, seed: int = 0, weights: Path | None = None, step: int | None = None
) -> Tensor:
    """Images fp32 [N, 3, H, W] in [-1, 1] of a run's generator, by the rollout it was trained with.

    Noise is a function of (seed, number of the prompt): one prompt more changes no other image, and the exported
    pipeline has the same.

    Raises:
        UserError: no such run or weights, or a prompt that is too long.
    """
    from dmdr_fast.engine import runtime
    from dmdr_fast.engine.drawing import RunImages

    config = load(run_dir / "config.yaml")
    if config.model.family == "sit":
        raise UserError(f"sample: {run_dir} is a run on class labels; draw its images with dmdr-evaluate")
    run = RunImages.open(config, prompts, runtime.start())
    with run_weights(run.model, run_dir, weights, step, run_dir) as file:
        draw = run.student(file)
    return _all_of(draw, len(prompts), seed)


def sample_pipeline(folder: Path, prompts: list[str], *, seed: int = 0) -> Tensor:
    """Images fp32 [N, 3, H, W] in [-1, 1] of a pipeline that ``dmdr_fast.export`` wrote, or of any other's defaults.

    Noise is a function of (seed, number of the prompt): one prompt more changes no other image.

    Raises:
        UserError: it cannot be loaded.
    """
    import torch

    from dmdr_fast.engine.drawing import pipeline_images

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return _all_of(pipeline_images(folder, prompts, device), len(prompts), seed)


def _all_of(draw: Draw, count: int, seed: int) -> Tensor:
    import torch

    return torch.cat([draw(range(i, min(i + BATCH, count)), seed).cpu() for i in range(0, count, BATCH)])


def grid_png(images: Tensor) -> bytes:
    """Images [N, 3, H, W] in [-1, 1] side by side in a grid as square as it can be, in their order, on white."""
    import torch

    from dmdr_fast.eval.sheets import image_png, in_8_bits

    columns = math.ceil(math.sqrt(len(images)))
    rows = -(-len(images) // columns)
    page = torch.ones(rows * columns, *images.shape[1:])
    page[: len(images)] = images
    page = page.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(1, 2).flatten(2, 3)
    return image_png(in_8_bits(page.numpy()))


def command() -> int:
    """The console script."""
    return run_user_command(main)


if __name__ == "__main__":
    sys.exit(command())
