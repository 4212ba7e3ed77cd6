"""The student's samplers from the configuration on: the exported pipeline alone draws the trainer's images."""

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

from dmdr_fast import cli
from dmdr_fast.algorithm.streams import Shard, Streams
from dmdr_fast.export import FINAL, export_run
from dmdr_fast.models.export import call_arguments, load_arguments
from dmdr_fast.sample import sample_run
from tests.families import PROMPTS, randomised

from .pipeline_runs import config_of, opened


def test_dmdr_sample_and_the_exported_pipeline_draw_the_same_images(tmp_path):
    run_dir = tmp_path / "run"
    (run_dir / FINAL).parent.mkdir(parents=True)
    config = config_of("sd3", tmp_path, run_dir, student__steps=3, student__shift=3, student__sampler="ode")
    (run_dir / "config.yaml").write_text(cli.dump(config))
    model = opened(run_dir).model
    network = randomised(model.family.build_from_config(model.family.network_config), 9)
    save_file({name: p.detach() for name, p in network.named_parameters()}, run_dir / FINAL)
    images = sample_run(run_dir, list(PROMPTS[:2]))
    called = export_run(run_dir, tmp_path / "out", dtype="fp32")
    assert "trust_remote_code" not in called
    shard, device = Shard(0, 2, 2), torch.device("cpu")
    first = Streams(0).noise("sample", 0, shape=model.latent_shape, shard=shard, device=device)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out", **load_arguments(tmp_path / "out"))
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"prompt": list(PROMPTS[:2]), "latents": first, "output_type": "pt"}
    drawn = pipeline(**arguments, **call_arguments(tmp_path / "out")).images
    assert drawn.std() > 0.05
    torch.testing.assert_close(2 * drawn - 1, images, rtol=0, atol=1e-4)
