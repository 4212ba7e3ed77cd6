"""Whether diffusers alone draws a run's images from its exported pipeline: ``python -m dmdr_fast.check_export``.

Another process, which loads nothing of this package, calls the pipeline with the seeds that the run's own images are
drawn with. Exit code 1 where the two differ.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from dmdr_fast.cli import Parser, load, run_user_command, user_path
from dmdr_fast.data.prompts import load_prompts
from dmdr_fast.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

TOLERANCE = 2 / 255  # of pixels in [-1, 1]: less than a step of 8 bits
DIFFUSERS = """
import json, sys
import torch
from diffusers import DiffusionPipeline

folder, given, out = sys.argv[1:]
with open(given) as file:
    given = json.load(file)
device = "cuda" if torch.cuda.is_available() else "cpu"
pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, **given["code"]).to(device)
pipeline.set_progress_bar_config(disable=True)
images = []
for i in range(0, len(given["prompts"]), 64):
    generators = [torch.Generator().manual_seed(seed) for seed in given["seeds"][i : i + 64]]
    prompts = given["prompts"][i : i + 64]
    images.append(pipeline(prompts, generator=generators, output_type="pt", **given["call"]).images.cpu())
assert not any(name.partition(".")[0] == "dmdr_fast" for name in sys.modules)
torch.save(2 * torch.cat(images) - 1, out)
"""


def main(argv: list[str]) -> int:
    """Draw the prompts both ways and compare. 0 where they agree, 1 where they do not; mistakes exit with 2."""
    parser = Parser(prog="python -m dmdr_fast.check_export", description=__doc__)
    parser.add_argument("run_dir", type=user_path, help="A finished run of a text-to-image family, in fp32.")
    parser.add_argument("pipeline", type=user_path, help="What dmdr-export --dtype fp32 wrote of it.")
    parser.add_argument("--prompts", type=user_path, required=True, help="A file of prompts, as data.prompts.")
    options = parser.parse_args(argv)
    config = load(options.run_dir / "config.yaml")
    if config.deepspeed.dtype != "fp32":
        raise UserError(
            f"deepspeed.dtype: {config.deepspeed.dtype} rounds by more than the check allows; run it on a run in fp32"
        )
    from dmdr_fast.sample import sample_run

    prompts = [prompt.text for prompt in load_prompts(options.prompts)]
    own, alone = sample_run(options.run_dir, prompts), _by_diffusers(options.pipeline, prompts)
    difference = (own - alone).abs().max().item()
    print(f"{len(prompts)} images; the largest difference of a pixel in [-1, 1] is {difference:.1e}")
    if config.eval.features == "scenes":
        from dmdr_fast.eval.features import ScenesFeatures

        verifier = ScenesFeatures()
        for name, images in (("the run", own), ("diffusers alone", alone)):
            found = verifier.accuracy(images, {"prompts": prompts})
            print(f"{name}: {', '.join(f'{key} {value:.4f}' for key, value in found.items())}")
    return int(difference > TOLERANCE)


def _by_diffusers(folder: Path, prompts: list[str]) -> Tensor:
    """Images fp32 [N, 3, H, W] in [-1, 1]."""
    import torch

    from dmdr_fast.engine.drawing import image_seeds
    from dmdr_fast.models.export import call_arguments, load_arguments

    try:
        code = {name: value for name, value in load_arguments(folder).items() if name != "torch_dtype"}
        arguments = {"code": code, "call": call_arguments(folder)}
    except FileNotFoundError as error:
        raise UserError(f"{folder}: no exported pipeline ({error}); write one with dmdr-export") from None
    given = {**arguments, "prompts": prompts, "seeds": image_seeds(range(len(prompts)), 0)}
    with TemporaryDirectory() as scratch:
        words, out = Path(scratch) / "given.json", Path(scratch) / "images.pt"
        words.write_text(json.dumps(given))
        done = subprocess.run([sys.executable, "-c", DIFFUSERS, str(folder), str(words), str(out)])
        if done.returncode:
            raise UserError(f"{folder}: diffusers alone cannot draw from it; its own words are above")
        return torch.load(out)


if __name__ == "__main__":
    sys.exit(run_user_command(main))
