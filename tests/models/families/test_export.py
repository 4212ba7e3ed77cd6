"""Exported pipelines draw the student's images: diffusers' own call against our rollout, with the same noise."""

import ast
import itertools
import json
from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

from dmdr_fast.algorithm.rollout import sample
from dmdr_fast.algorithm.schedules import timestep_grid
from dmdr_fast.models.export import call_arguments, export_pipeline, load_arguments, load_weights
from dmdr_fast.models.families import Denoiser
from dmdr_fast.models.families.renoise_scheduler import generator_of
from dmdr_fast.models.families.schedulers import student_scheduler
from dmdr_fast.models.lora import add_lora
from tests.families import PROMPTS, randomised
from tests.tiers import sampled

SIZE = 16
LORA = "pytorch_lora_weights.safetensors"


def trained_weights(case):
    network = randomised(case.family.build_from_config(case.family.network_config), 9)
    return network, {f"transformer.{name}": p.detach() for name, p in network.named_parameters()}


def trained_lora(case):
    network = case.family.load_transformer(torch.float32)
    adapter = add_lora(network, "generator", rank=2, targets=case.family.lora_targets)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    adapter.set_scale(0.7)
    return network, adapter.state_dict()


def rollout(case, network, condition, grid, noises, eta):
    """Our own sampler; SDXL's path is the variance-preserving one."""
    if case.family.prediction == "flow":
        return sample(network, lambda i: noises[i], condition, grid, eta=eta)
    x = noises[0]
    for i, t in enumerate(grid[:-1]):
        alpha, sigma = case.family.alpha_sigma(torch.tensor([t]))
        x0 = (x - sigma * network(x, torch.full((len(x),), t), condition)) / alpha
        if grid[i + 1] > 0:
            alpha, sigma = case.family.alpha_sigma(torch.tensor([grid[i + 1]]))
            x = alpha * x0 + sigma * noises[i + 1]
    return x0


def draws(scheduler, first):
    """The noise of each step after the first, from the first: a renoise scheduler's own rule."""
    generators = [generator_of(one) for one in first]
    for _ in scheduler.timesteps[1:]:
        yield torch.stack([torch.randn(first.shape[1:], generator=g) for g in generators])


def test_the_first_noise_seeds_the_later_one_alike_in_every_dtype():
    first = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(3))
    first[0, 0, 0] = -1e-9  # 0 in fp16
    seeds = {generator_of(first.to(dtype)).initial_seed() for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    assert len(seeds) == 1
    first[0, 0, 0] = 1e-9
    assert generator_of(first).initial_seed() not in seeds


@torch.no_grad()
def drawn(pipeline, prompts=PROMPTS[:2], seeds=(3, 4), **arguments):
    """Images of a pipeline, one generator each."""
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipeline(prompt=list(prompts), generator=generators, output_type="pt", **arguments).images


@torch.no_grad()
def assert_same_images(case, out, network, grid, guidance, size=(SIZE, SIZE), eta=1.0):
    family = replace(case.family, guidance=guidance)
    pipeline = DiffusionPipeline.from_pretrained(out, **load_arguments(out))
    torch.manual_seed(5)
    images = drawn(pipeline, **call_arguments(out))
    torch.manual_seed(6)
    assert torch.equal(drawn(pipeline, **call_arguments(out)), images)  # the global state plays no part
    shape = family.latent_shape(*size)
    seeds = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    noises = [torch.stack([torch.randn(shape, generator=g) for g in seeds])]
    if family.prediction == "eps":  # SDXL's pipeline hands its scheduler the generators
        noises += [torch.stack([torch.randn(shape, generator=g) for g in seeds]) for _ in grid[2:]]
    else:
        packed = family.to_pipeline(noises[0])
        noises += [family.from_pipeline(noise, *shape[1:]) for noise in draws(pipeline.scheduler, packed)]
    x0 = rollout(case, Denoiser(family, network), family.condition(case.entries[:2]), grid, noises, eta)
    ours = (family.decode(case.pipeline.vae, x0) / 2 + 0.5).clamp(0, 1)
    assert images.std() > 0.05 and images.shape[-2:] == size
    torch.testing.assert_close(images, ours, rtol=0, atol=1e-4)
    if len(grid) > 2:  # and an image is the same in another batch
        alone = drawn(pipeline, prompts=PROMPTS[1:2], seeds=(4,), **call_arguments(out))
        torch.testing.assert_close(alone, images[1:], rtol=0, atol=1e-4)


def test_two_steps_of_trained_weights(case, tmp_path):
    guidance = 2.5 if case.family.guidance is not None else None
    grid = timestep_grid(2, shift=1.0 if case.name == "sdxl" else 3.0)
    network, weights = trained_weights(case)
    out = export_pipeline(
        replace(case.family, guidance=guidance),
        tmp_path / "out",
        grid=grid,
        weights=weights,
        dtype=torch.float32,
        size=(SIZE, SIZE),
    )
    unguided = {"true_cfg_scale": 1} if case.name == "qwen_image" else {"guidance_scale": 0}
    assert call_arguments(out) == {"num_inference_steps": 2, **unguided, "height": SIZE, "width": SIZE}
    assert_same_images(case, out, network, grid, guidance)
    assert not (out / LORA).exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_given_times_of_an_image_that_is_no_square(case, tmp_path):
    """A start below 1 takes the noise as it is; no shift makes these times."""
    grid, size = (0.95, 0.4, 0.15, 0.0), (SIZE, 2 * SIZE)
    network, weights = trained_weights(case)
    out = export_pipeline(case.family, tmp_path / "out", grid=grid, weights=weights, dtype=torch.float32, size=size)
    call = call_arguments(out)
    assert (call["height"], call["width"], call["num_inference_steps"]) == (*size, 3)
    assert call.get("timesteps") == ([949, 399, 149] if case.name == "sdxl" else None)
    assert_same_images(case, out, network, grid, case.family.guidance, size)


GRIDS = (timestep_grid(3, shift=3.0), (0.95, 0.4, 0.15, 0.0))


@pytest.mark.parametrize("eta", [0.0, 0.4])
@pytest.mark.parametrize(("name", "grid"), sampled(itertools.product(("sd3", "flux"), GRIDS)))
def test_the_ode_and_cps(cases, tmp_path, name, grid, eta):
    """``ode`` by diffusers' own scheduler, deterministic, without code of ours where a shift makes the grid."""
    case = cases(name)
    network, weights = trained_weights(case)
    settings = {"grid": grid, "eta": eta, "weights": weights, "dtype": torch.float32, "size": (SIZE, SIZE)}
    out = export_pipeline(case.family, tmp_path / "out", **settings)
    assert_same_images(case, out, network, grid, case.family.guidance, eta=eta)
    scheduler = json.loads((out / "scheduler/scheduler_config.json").read_text())
    assert scheduler["stochastic_sampling"] is (eta > 0)
    if eta == 0.0 and grid[0] == 1.0:
        assert (
            load_arguments(out) == {"torch_dtype": torch.float32}
            and scheduler["_class_name"] == "FlowMatchEulerDiscreteScheduler"
        )


def test_sdxl_has_the_renoising_sampler_alone(cases, tmp_path):
    with pytest.raises(ValueError, match="SDXL's pipeline draws fresh noise, expected eta 1, got 0"):
        export_pipeline(cases("sdxl").family, tmp_path / "out", grid=(1.0, 0.5, 0.0), size=(SIZE, SIZE), eta=0.0)


def test_a_lora_alone_gives_the_merged_pipelines_images(case, tmp_path):
    """On the teacher's own pipeline, by diffusers' ``load_lora_weights``."""
    network, lora = trained_lora(case)
    grid = timestep_grid(2)
    out = export_pipeline(
        case.family, tmp_path / "out", grid=grid, size=(SIZE, SIZE), lora=lora, lora_scale=0.7, dtype=torch.float32
    )
    assert_same_images(case, out, network, grid, case.family.guidance)
    merged = DiffusionPipeline.from_pretrained(out, **load_arguments(out))
    images = drawn(merged, **call_arguments(out))
    teacher = DiffusionPipeline.from_pretrained(case.folder)
    without = {case.family.folder: None}
    teacher.scheduler = DiffusionPipeline.from_pretrained(out, **load_arguments(out), **without).scheduler
    guidance = case.family.guidance
    call = call_arguments(out) | ({} if guidance is None else {"guidance_scale": guidance})
    plain = drawn(teacher, **call)
    teacher.load_lora_weights(out)
    torch.testing.assert_close(drawn(teacher, **call), images, rtol=0, atol=1e-4)
    assert (plain - images).abs().max() > 0.01
    names = {name.rpartition(".lora_")[0] for name in load_file(out / LORA)}
    assert names == {f"{case.family.folder}.{name.rpartition('.')[0]}" for name in lora}


def test_the_scheduler_needs_diffusers_alone(cases, tmp_path):
    """Its code lies in the folder; where that may not run, diffusers' own class reads the same grid."""
    case, grid = cases("sd3"), timestep_grid(3, shift=3.0)
    out = export_pipeline(case.family, tmp_path / "out", grid=grid, size=(SIZE, SIZE))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(out)
    pipeline = DiffusionPipeline.from_pretrained(out, scheduler=None)
    tree = ast.parse((out / "scheduler/renoise_scheduler.py").read_text())
    imported = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    imported |= {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    assert {name.split(".")[0] for name in imported} == {"__future__", "hashlib", "math", "torch", "diffusers"}
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(out, subfolder="scheduler")
    assert pipeline.scheduler.config.stochastic_sampling
    drawn(pipeline, **call_arguments(out))
    torch.testing.assert_close(pipeline.scheduler.sigmas, torch.tensor(grid), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["flux", "flux2"])
def test_guidance_is_folded_as_a_bfloat16_network_rounds_it(cases, name):
    """1000 x 3.5 is 3504 to it, and the embedding of 3500 is another."""
    case = cases(name)
    family, none = (replace(case.family, guidance=g) for g in (3.5, 0.0))
    condition = family.condition(case.entries[:2])
    x_t = torch.randn(2, *family.latent_shape(SIZE, SIZE), generator=torch.Generator().manual_seed(1)).bfloat16()
    t = torch.tensor([0.25, 0.5])
    network = family.load_transformer(torch.bfloat16)
    with torch.no_grad():
        before, unguided = (f.forward(network, x_t, t, condition).float() for f in (family, none))
        network = family.fold_guidance(network)
        after = replace(none, network_config=network.config).forward(network, x_t, t, condition).float()
    assert (after - before).norm() < 0.03 * before.norm()
    assert (unguided - before).norm() > 0.1 * before.norm()


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 6.0])
def test_the_saved_config_makes_the_grid(cases, tmp_path, steps, shift):
    """At the sizes of a teacher, called as its pipeline calls it, from the config on disk."""
    grid = timestep_grid(steps, shift=shift)
    for name in ("sd3", "flux"):
        student_scheduler(cases(name).family, grid).save_pretrained(tmp_path / name)
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / name)
        if name == "flux":
            scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)], mu=1.15)
        elif scheduler.config.use_dynamic_shifting:  # SD3 asks the config, and gives the line's value at its size
            assert scheduler.config.base_shift == scheduler.config.max_shift
            scheduler.set_timesteps(steps, mu=scheduler.config.base_shift)
        else:
            scheduler.set_timesteps(steps)
        torch.testing.assert_close(scheduler.sigmas, torch.tensor(grid), rtol=0, atol=1e-6)
        torch.testing.assert_close(scheduler.timesteps, 1000 * torch.tensor(grid[:-1]), rtol=0, atol=1e-3)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 8, 10])
def test_sdxls_steps_are_those_of_the_grid(cases, steps):
    family = cases("sdxl").family
    scheduler = student_scheduler(family, timestep_grid(steps))
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == family.steps(torch.tensor(timestep_grid(steps)[:-1])).tolist()


def test_grids_that_no_scheduler_makes(cases):
    for grid in ((1.0, 0.3, 0.9, 0.0), (1.1, 0.0), (1.0, 0.5), (0.0,)):
        with pytest.raises(ValueError, match=r"student grid: expected 1 >= t_0 > \.\.\. > t_N = 0, got "):
            student_scheduler(cases("flux").family, grid)


def test_what_does_not_fit_is_refused_and_leaves_nothing(cases, tmp_path):
    case = cases("z_image")
    _, weights = trained_weights(case)
    some = dict(list(weights.items())[1:])
    with pytest.raises(ValueError, match=rf"expected {len(weights)} tensors, got {len(some)}; first that differs: "):
        export_pipeline(case.family, tmp_path / "out", grid=(1.0, 0.0), size=(SIZE, SIZE), weights=some)
    wrong = weights | {"transformer.x_pad_token": torch.zeros(1, 3)}
    with pytest.raises(ValueError, match=r"x_pad_token expected \[1, 16\], got \[1, 3\]"):
        load_weights(case.family.load_transformer(torch.float32), wrong)
    with pytest.raises(ValueError, match="matches no nn"):
        lora = {"absent.lora_A": torch.zeros(3, 2), "absent.lora_B": torch.zeros(2, 3)}
        export_pipeline(case.family, tmp_path / "out", grid=(1.0, 0.0), size=(SIZE, SIZE), lora=lora)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="is there already"):
        export_pipeline(case.family, tmp_path / "out", grid=(1.0, 0.0), size=(SIZE, SIZE))


def test_the_call_has_every_argument(cases, tmp_path):
    family = replace(cases("flux").family, length=64)
    out = export_pipeline(family, tmp_path / "out", grid=(1.0, 0.0), size=(512, 512))
    assert call_arguments(out) == {
        "num_inference_steps": 1,
        "guidance_scale": 0,
        "height": 512,
        "width": 512,
        "max_sequence_length": 64,
    }
    assert load_arguments(out) == {"torch_dtype": torch.bfloat16}  # one step has no later noise
    config = json.loads((out / "transformer/config.json").read_text())
    assert config["guidance_embeds"] is False
