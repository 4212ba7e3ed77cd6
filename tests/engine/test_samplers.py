"""The student's samplers from the configuration on: the exported pipeline alone draws the trainer's images."""

import pytest
import torch
from safetensors.torch import save_file

from dmdr_fast import cli
from dmdr_fast.export import FINAL, export_run
from dmdr_fast.sample import sample_pipeline, sample_run
from tests.families import PROMPTS, randomised
from tests.tiers import sampled

from .pipeline_runs import config_of, opened


@pytest.mark.parametrize("sampler", sampled(["ode", "cps"]))
def test_a_run_and_its_exported_pipeline_draw_the_same_images(tmp_path, sampler):
    run_dir, images = tmp_path / "run", {}
    (run_dir / FINAL).parent.mkdir(parents=True)
    for name in (sampler, "renoise"):
        config = config_of("sd3", tmp_path, run_dir, student__steps=3, student__shift=3, student__sampler=name)
        (run_dir / "config.yaml").write_text(cli.dump(config))
        if name == sampler:
            family = opened(run_dir).model.family
            network = randomised(family.build_from_config(family.network_config), 9)
            save_file({name: p.detach() for name, p in network.named_parameters()}, run_dir / FINAL)
            called = export_run(run_dir, tmp_path / "out", dtype="fp32")
        images[name] = sample_run(run_dir, list(PROMPTS[:2]), seed=3)
    assert ("trust_remote_code" in called) == (sampler == "cps")
    drawn = sample_pipeline(tmp_path / "out", list(PROMPTS[:2]), seed=3)
    torch.testing.assert_close(drawn, images[sampler], rtol=0, atol=2e-4)  # of [-1, 1]
    assert (images["renoise"] - images[sampler]).abs().max() > 0.1


@pytest.mark.thorough
def test_a_run_in_bf16_draws_the_images_of_its_pipeline_in_fp32(tmp_path):
    run_dir = tmp_path / "run"
    (run_dir / FINAL).parent.mkdir(parents=True)
    config = config_of("sd3", tmp_path, run_dir, student__steps=3, student__shift=3, deepspeed__dtype="bf16")
    (run_dir / "config.yaml").write_text(cli.dump(config))
    family = opened(run_dir).model.family
    network = randomised(family.build_from_config(family.network_config), 9)
    save_file({name: p.detach() for name, p in network.named_parameters()}, run_dir / FINAL)
    export_run(run_dir, tmp_path / "out", dtype="fp32")
    own = sample_run(run_dir, list(PROMPTS[:2]), seed=3)
    alone = sample_pipeline(tmp_path / "out", list(PROMPTS[:2]), seed=3)
    torch.testing.assert_close(alone, own, rtol=0, atol=0.06)  # bf16's; other noise is 1 away
