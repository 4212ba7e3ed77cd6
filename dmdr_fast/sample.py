"""A grid of images: ``dmdr-sample RUN_DIR|PIPELINE --prompts FILE|TEXT... --out grid.png``."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dmdr_fast.cli import Parser, load, run_user_command, user_path
from dmdr_fast.data.prompts import Prompt, is_prompt_file, load_prompts
from dmdr_fast.errors import UserError
from dmdr_fast.export import add_source, run_weights

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 4


def main(argv: list[str]) -> None:
    """Draw one image per prompt and write them as one PNG. Mistakes exit with 2."""
    parser = Parser(prog="dmdr-sample", description=__doc__)
    parser.add_argument(
        "source",
        type=user_path,
        help="A run of a text-to-image family, finished or not, or an exported pipeline.",
    )
    parser.add_argument("--prompts", nargs="+", required=True, help="Prompts, or one file of them, as data.prompts.")
    parser.add_argument("--out", type=user_path, default=Path("grid.png"), help="PNG to write.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the noise.")
    add_source(parser)
    options = parser.parse_args(argv)
    given = options.prompts
    prompts = [p.text for p in load_prompts(given[0])] if len(given) == 1 and is_prompt_file(given[0]) else given
    if (options.source / "config.yaml").is_file():
        source = {"weights": options.weights, "step": options.step}
        images = sample_run(options.source, prompts, seed=options.seed, **source)
    elif options.step is not None or options.weights is not None:
        raise UserError(f"sample: {options.source} is no run (config.yaml), so --step and --weights name nothing")
    elif (options.source / "model_index.json").is_file():
        images = sample_pipeline(options.source, prompts, seed=options.seed)
    else:
        raise UserError(f"sample: {options.source} is no run (config.yaml) and no pipeline (model_index.json)")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_bytes(grid_png(images))
    print(f"{options.out}: {len(images)} images")


def sample_run(
    run_dir: Path, prompts: list[str], *, seed: int = 0, weights: Path | None = None, step: int | None = None
) -> Tensor:
    """Images fp32 [N, 3, H, W] in [-1, 1] of a run's generator, by the rollout it was trained with.

    Noise is a function of (seed, number of the prompt), as in training: one prompt more changes no other image.

    Raises:
        UserError: no such run or weights, or a prompt that is too long.
    """
    import torch

    from dmdr_fast.algorithm.rollout import sample
    from dmdr_fast.algorithm.streams import Shard, Streams
    from dmdr_fast.engine import runtime
    from dmdr_fast.engine.conditions import cached_prompts
    from dmdr_fast.engine.networks import frozen_role
    from dmdr_fast.engine.pipeline_model import PipelineModel
    from dmdr_fast.engine.recipe import recipe_of

    config = load(run_dir / "config.yaml")
    if config.model.family == "sit":
        raise UserError(f"sample: {run_dir} is a run on class labels; its samples are in report.html")
    ranks, model = runtime.start(), PipelineModel.open(config)
    given = [Prompt(text, f"prompt {number}") for number, text in enumerate(prompts, 1)]
    (conditions,) = cached_prompts(config, model, ranks, {"--prompts": given}).values()
    recipe, streams, images = recipe_of(config, model), Streams(seed), []
    with run_weights(model, run_dir, weights, step, run_dir) as file:
        generator = frozen_role(model, config, ranks.device, file)
    decode = model.decoder(ranks.device)
    for start in range(0, len(prompts), BATCH):
        shard = Shard(start, min(start + BATCH, len(prompts)), len(prompts))

        def noise(i: int, shard: Shard = shard) -> Tensor:
            return streams.noise("sample", i, shape=recipe.latent_shape, shard=shard, device=ranks.device)

        condition = conditions.batch(torch.arange(shard.start, shard.stop).numpy()).condition
        x0 = sample(
            generator,
            noise,
            condition,
            recipe.grid,
            eta=recipe.eta,
            kind=recipe.prediction,
            path=recipe.path,
        )
        with torch.no_grad():
            images.append(decode(x0).float().clamp(-1, 1).cpu())
    return torch.cat(images)


def sample_pipeline(folder: Path, prompts: list[str], *, seed: int = 0) -> Tensor:
    """Images fp32 [N, 3, H, W] in [-1, 1] of a pipeline that ``dmdr_fast.export`` wrote.

    Noise is a function of (seed, number of the prompt): one prompt more changes no other image.

    Raises:
        UserError: the folder was not written by the export.
    """
    import torch
    from diffusers import DiffusionPipeline

    from dmdr_fast.algorithm.streams import Streams
    from dmdr_fast.models.export import call_arguments, load_arguments

    try:
        arguments = call_arguments(folder)
    except FileNotFoundError as error:
        raise UserError(f"sample: no {error.filename}; give a folder that dmdr_fast.export wrote") from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype="auto", **load_arguments(folder)).to(device)
    seeds = [int(Streams(seed).rng("sample", i).integers(2**63)) for i in range(len(prompts))]
    parts = [
        pipeline(
            prompt=prompts[start : start + BATCH],
            generator=[torch.Generator().manual_seed(s) for s in seeds[start : start + BATCH]],
            output_type="pt",
            **arguments,
        ).images
        for start in range(0, len(prompts), BATCH)
    ]
    return 2.0 * torch.cat(parts).float().cpu() - 1.0


def grid_png(images: Tensor) -> bytes:
    """Images [N, 3, H, W] in [-1, 1] side by side in a grid as square as it can be, in their order, on white."""
    import torch

    from dmdr_fast.eval.sheets import image_png

    columns = math.ceil(math.sqrt(len(images)))
    rows = -(-len(images) // columns)
    page = torch.ones(rows * columns, *images.shape[1:])
    page[: len(images)] = images
    page = page.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    return image_png(((page.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy())


def command() -> int:
    """The console script."""
    return run_user_command(main)


if __name__ == "__main__":
    sys.exit(command())
