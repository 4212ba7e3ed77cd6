"""Opening a pipeline: what a family says about its network, and one clear error for whatever is wrong."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dmdr_fast.models.families import SDXL, Flux, open_family
from dmdr_fast.models.lora import add_lora


def test_blocks_hold_the_repeated_layers_and_lora_finds_its_targets(case):
    network = case.family.build_from_config(case.family.network_config)
    attention = {n for n, m in network.named_modules() if isinstance(m, nn.Linear) and ".to_" in n}
    blocks = dict(case.family.blocks(network))
    assert len(set(map(id, blocks.values()))) == len(blocks)
    assert all(sum(layer.startswith(f"{block}.") for block in blocks) == 1 for layer in attention)
    assert all(network.get_submodule(name) is block for name, block in blocks.items())
    adapter = add_lora(network, "generator", rank=1, targets=case.family.lora_targets)
    assert attention <= adapter.layers.keys()


def test_weights_come_in_the_dtype_that_is_asked_for(case):
    network = case.family.load_transformer(torch.bfloat16)
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    vae = case.family.load_vae(torch.float32)
    assert not vae.training and not any(p.requires_grad for p in vae.parameters())
    for mine, theirs in zip(network.parameters(), case.network.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs.bfloat16(), rtol=0, atol=0)


def test_a_bfloat16_network_takes_float32_times_and_conditions(case):
    network = case.family.load_transformer(torch.bfloat16)
    condition = case.family.condition(case.entries[:2])
    family = replace(case.family, guidance=case.family.guidance and 2.0)
    x_t = torch.randn(2, *case.family.latent_shape(16, 16), generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.25, 0.5])  # 1000 t exact in bfloat16, to which FLUX and Qwen-Image round it (and guidance)
    with torch.no_grad():
        low = family.forward(network, x_t.bfloat16(), t, condition)
        high = family.forward(case.network, x_t, t, condition)
    assert low.dtype == torch.bfloat16
    assert (low.float() - high).norm() < 0.05 * high.norm()


def test_sizes_that_do_not_fit_are_refused(case):
    unit = case.family.factor * case.family.patch
    assert case.family.latent_shape(2 * unit, unit)[1:] == (2 * case.family.patch, case.family.patch)
    with pytest.raises(ValueError, match=rf"multiples of {unit} pixels .* got {unit + 1} x {unit}"):
        case.family.latent_shape(unit + 1, unit)
    with pytest.raises(ValueError, match=rf"the nearest is {3 * unit} x {2 * unit}$"):
        case.family.latent_shape(3 * unit + 1, 2 * unit - 1)


def test_positions_end_somewhere(cases):
    """SD3's table is cropped in its middle; Z-Image's rotary tables have a length per axis."""
    for name, most in (("sd3", 12 * 4), ("z_image", 64 * 4)):
        assert cases(name).family.latent_shape(most, 4)[1] == most // 2
        with pytest.raises(ValueError, match=rf"give at most {most} a side"):
            cases(name).family.latent_shape(most + 4, 4)


def test_the_shift_is_the_schedulers(cases):
    assert cases("sd3").family.default_shift(16, 16) == 3.0
    flux, scheduler = cases("flux").family, cases("flux").pipeline.scheduler
    rows = 256  # pixels: 64 x 64 tokens, the top of the scheduler's line
    scheduler.set_timesteps(sigmas=[0.5], mu=scheduler.config.max_shift)
    shift = flux.default_shift(rows, rows)
    assert shift * 0.5 / (1 + (shift - 1) * 0.5) == pytest.approx(scheduler.sigmas[0].item(), rel=1e-6)


def test_the_path_of_sdxl_is_its_schedulers(cases):
    case = cases("sdxl")
    t = torch.tensor([1.0, 0.5, 0.001, 0.0])
    assert case.family.steps(t).tolist() == [999, 499, 0, 0]
    alpha, sigma = case.family.alpha_sigma(t)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(4))
    torch.testing.assert_close(alpha**2, case.pipeline.scheduler.alphas_cumprod[[999, 499, 0, 0]])
    assert cases("flux").family.alpha_sigma(t)[1] is t


@pytest.fixture
def copy(cases, tmp_path):
    """A pipeline folder of one's own to break."""
    return lambda name: shutil.copytree(cases(name).folder, tmp_path / name)


def rewrite(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_no_pipeline(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder; give a diffusers pipeline folder or a hub id"):
        open_family(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"no model_index\.json"):
        open_family(tmp_path)


def test_a_pipeline_of_no_family(copy):
    folder = copy("flux")
    rewrite(folder / "model_index.json", _class_name="PixArtSigmaPipeline")
    with pytest.raises(ValueError, match=r"PixArtSigmaPipeline is of no family .* one of .*FluxPipeline"):
        open_family(folder)


def test_a_pipeline_with_another_network(copy):
    folder = copy("flux")
    rewrite(folder / "model_index.json", transformer=["diffusers", "SD3Transformer2DModel"])
    with pytest.raises(ValueError, match="transformer expected a FluxTransformer2DModel, got SD3Transformer2DModel"):
        open_family(folder)
    folder = copy("sdxl")
    rewrite(folder / "scheduler/scheduler_config.json", prediction_type="v_prediction")
    with pytest.raises(ValueError, match="expected prediction_type epsilon, got v_prediction"):
        open_family(folder)


def test_a_missing_shard(copy, cases):
    folder = copy("flux")
    shutil.rmtree(folder / "transformer")
    cases("flux").network.save_pretrained(folder / "transformer", max_shard_size="20KB")
    family = open_family(folder)
    family.load_transformer(torch.float32)
    lost = sorted((folder / "transformer").glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=rf"transformer lacks shard {lost.name} \(1 of"):
        family.load_transformer(torch.float32)


def test_no_weights_or_too_few(copy):
    folder = copy("sd3")
    weights = folder / "transformer/diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    save_file({k: v for k, v in state.items() if "blocks.1.ff." not in k}, weights, metadata={"format": "pt"})
    family = open_family(folder)
    with pytest.raises(ValueError, match=r"lacks the weights of 4 tensors, first transformer_blocks\.1\.ff\."):
        family.load_transformer(torch.float32)
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises((FileNotFoundError, ValueError), match="transformer"):
        family.load_transformer(torch.float32)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="transformer holds no weights"):
        family.load_transformer(torch.float32)


def test_the_length_of_a_prompt(case):
    few, many = case.encoder.count(["a cat", "word " * 300])
    assert few < case.encoder.limit == case.family.length < many


def test_a_prompt_of_exactly_the_limit_is_taken_whole(cases):
    """The count is the encoder's own: one token less than the limit leaves no room for another letter."""
    encoder = cases("sdxl").encoder
    assert encoder.count(["abc"]) == [5] and encoder.limit == 77
    assert encoder.count(["a" * 75, "a" * 76]) == [77, 78]


def test_guidance_and_length_are_the_pipelines_unless_asked(cases):
    folder = cases("flux").folder
    assert open_family(folder).guidance == Flux.default_guidance == 3.5
    assert open_family(folder, guidance=2.0, length=64).length == 64
    assert open_family(cases("sdxl").folder).length == SDXL.default_length
    assert cases("qwen_image").family.guidance is None
