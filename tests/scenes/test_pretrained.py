"""The teacher in the package: its files are those that the record names, and its record can be made again."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from dmdr_fast import built_in
from dmdr_fast.data.prompts import load_prompts
from dmdr_fast.eval.features import ScenesFeatures
from dmdr_fast.hub import is_hub_id
from dmdr_fast.models.families import open_family
from dmdr_fast.scenes import teacher
from dmdr_fast.scenes.captions import combinations, is_held_out, parse
from dmdr_fast.scenes.pipeline import TOKENS
from dmdr_fast.scenes.prompts import evaluation_prompts, training_prompts
from tests.scenes.test_teacher import follows
from tests.tiers import sampled

FOLDER = Path(built_in.pipeline("scenes"))
RECORD = json.loads((FOLDER / teacher.RECORD).read_text())


def test_the_files_are_those_of_the_record():
    found = {str(file.relative_to(FOLDER)): file.read_bytes() for file in FOLDER.rglob("*.safetensors")}
    assert {name: hashlib.sha256(content).hexdigest() for name, content in found.items()} == RECORD["sha256"]
    assert sum(map(len, found.values())) < 12e6
    assert RECORD["seed"] == 0 and RECORD["command"].startswith("python -m dmdr_fast.scenes.teacher --seed 0")
    losses = teacher.read_losses(FOLDER)
    assert {stage: len(values) for stage, values in losses.items()} == {
        "vae": RECORD["vae_steps"],
        "pipeline": RECORD["steps"],
    }


@pytest.fixture
def recorded_threads():
    """Sums are split by threads, and what that rounds differently grows to 1e-4 within 200 steps."""
    before = torch.get_num_threads()
    torch.set_num_threads(RECORD["seconds"]["threads"])
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("steps", sampled([3, 200]))
def test_a_training_from_the_seed_follows_the_record(steps, tmp_path, recorded_threads):
    """The VAE's from scratch, the transformer's around the stored VAE."""
    teacher.train_vae(tmp_path, seed=0, steps=RECORD["vae_steps"], stop=steps)
    vae = open_family("scenes").load_vae(torch.float32).requires_grad_(False).eval()
    teacher.train_pipeline(tmp_path, vae, seed=0, steps=RECORD["steps"], stop=steps)
    losses = teacher.read_losses(tmp_path)
    assert {stage: len(values) for stage, values in losses.items()} == {"vae": steps, "pipeline": steps}
    assert follows(losses, teacher.read_losses(FOLDER), 1e-4)


@pytest.mark.thorough
def test_the_weights_give_the_recorded_accuracy():
    """By diffusers' own pipeline: 50 steps, CFG 2, the first prompts of the evaluation."""
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    prompts = evaluation_prompts()[:64]
    images = pipeline(
        prompts,
        num_inference_steps=50,
        guidance_scale=2.0,
        generator=[torch.Generator().manual_seed(seed) for seed in range(len(prompts))],
        height=16,
        width=16,
        max_sequence_length=TOKENS,
        output_type="pt",
    ).images
    found = ScenesFeatures().accuracy(2 * images - 1, {"prompts": prompts})
    assert found == pytest.approx(json.loads((FOLDER / "metrics.json").read_text()), abs=0.01)


def test_its_name_needs_no_path():
    assert open_family("scenes").name == "sd3" and not is_hub_id("scenes")
    assert [p.text for p in load_prompts("scenes")] == training_prompts()
    assert [p.text for p in load_prompts("scenes_eval")] == evaluation_prompts()


def test_prompts_of_training_are_all_that_are_not_held_out_and_those_of_evaluation_both():
    shown = [parse(prompt) for prompt in training_prompts()]
    assert sorted(shown) == combinations(held_out=False)
    assert [is_held_out(parse(prompt)) for prompt in evaluation_prompts()] == [False, True] * 128
