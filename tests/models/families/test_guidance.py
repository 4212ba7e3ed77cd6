"""The teacher's guidance is its pipeline's: the guided prediction inside each denoising step, and the DMD gradient."""

from copy import copy
from dataclasses import replace

import pytest
import torch

from dmdr_fast.algorithm.dmd import DMDOptions, dmd_gradient
from dmdr_fast.algorithm.guidance import guide
from dmdr_fast.algorithm.score_pass import Scores
from dmdr_fast.config import Config
from dmdr_fast.engine.evaluation import guided_network
from dmdr_fast.engine.pipeline_model import PipelineModel
from dmdr_fast.engine.recipe import dmd_options
from dmdr_fast.errors import UserError
from dmdr_fast.models.families import Denoiser
from tests.families import PROMPTS

from .test_forward import GUIDANCE, model_input, record

SCALE, NEGATIVE = 4.0, "blue"
# How each pipeline is told to guide. FLUX.2-dev's has no CFG: its guidance is an input.
CALLS = {
    "sd3": {"guidance_scale": SCALE},
    "flux": {"true_cfg_scale": SCALE},
    "flux2_klein": {"guidance_scale": SCALE},
    "z_image": {"guidance_scale": SCALE},
    "qwen_image": {"true_cfg_scale": SCALE},
    "sdxl": {"guidance_scale": SCALE},
}


def config_of(family, **teacher):
    return Config.model_validate(
        {
            "model": {"family": family.name, "resolution": 16},
            "teacher": {"pipeline": family.path, "cfg_scale": SCALE, **teacher},
            "data": {"prompts": "prompts.txt"},
            "rl": {"method": "none"},
        }
    )


@pytest.fixture(scope="module", params=CALLS)
def guided(request, cases):
    """(case, condition, null condition, recorded steps) of a pipeline with CFG on."""
    case = copy(cases(request.param))
    negative = {} if request.param == "flux2_klein" else {"negative_prompt": [NEGATIVE] * 2}  # klein's is always empty
    with pytest.MonkeyPatch.context() as monkeypatch:
        calls, _, _ = record(case, list(PROMPTS[:2]), 3, monkeypatch, **CALLS[request.param], **negative)
    if case.family.guidance is not None:
        case.family = replace(case.family, guidance=GUIDANCE)
    condition = case.family.condition(case.entries[:2])
    null = case.family.condition(case.encoder.encode([NEGATIVE if negative else ""], negative=True))
    return case, condition, case.family.null_condition(condition, null), calls


def test_a_guided_prediction_is_the_pipelines_own(guided):
    case, condition, null, calls = guided
    config, family = config_of(case.family), case.family
    assert config.uses_cfg and len(calls) == 3
    network = guided_network(Denoiser(family, case.network), null, SCALE, config.cfg_mode, family.patch)
    for prediction, t, sample in calls:
        with torch.no_grad():
            ours = network(*model_input(case, sample, t), condition)
        torch.testing.assert_close(ours, prediction, rtol=1e-5, atol=1e-5)


def test_the_dmd_gradient_follows_it(guided):
    """g = (x0_fake - x0_real) / mean|x0 - x0_real| with the pipeline's own prediction as the real one, in fp64."""
    case, condition, null, calls = guided
    family, options = case.family, dmd_options(config_of(case.family), case.family.prediction, case.family.patch)
    for prediction, step, sample in calls:
        x_t, t = model_input(case, sample, step)
        draw = torch.Generator().manual_seed(4)
        x0, fake = (torch.randn(x_t.shape, generator=draw) for _ in range(2))
        with torch.no_grad():
            scores = Scores(fake, *(family.forward(case.network, x_t, t, c) for c in (condition, null)))
        alpha, sigma = family.alpha_sigma(t)
        g = dmd_gradient(x0, x_t, scores, alpha, sigma, options).grad
        a, s = (c.double().view(-1, 1, 1, 1) for c in (alpha, sigma))
        clean = [(x_t - s * p.double()) / (a if family.prediction == "eps" else 1) for p in (fake, prediction)]
        normalizer = (x0 - clean[1]).abs().mean((1, 2, 3), keepdim=True)
        want = (clean[0] - clean[1]) / normalizer
        assert (g - want).norm() < 1e-5 * want.norm()


@pytest.mark.parametrize("mode", ["standard", "offset", "per_token"])
def test_a_weight_of_zero_leaves_the_conditional_prediction(mode):
    """And of one the full guidance, sample by sample: what ``advantage_weighted_dmd`` asks for."""
    fake, cond, uncond, x0, x_t = torch.randn(5, 3, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.2, 0.5, 0.9])
    options = DMDOptions(cfg_scale=3.0, cfg_mode=mode, token=2)

    def gradient(uncond, guidance=None):
        return dmd_gradient(x0, x_t, Scores(fake, cond, uncond), 1 - sigma, sigma, options, guidance).grad

    mixed = gradient(uncond, torch.tensor([0.0, 1.0, 0.0]))
    torch.testing.assert_close(mixed[::2], gradient(None)[::2], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mixed[1], gradient(uncond)[1], rtol=1e-5, atol=1e-6)


def test_a_token_keeps_the_norm_of_its_conditional_prediction():
    cond, uncond = torch.randn(2, 2, 4, 6, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    guided = guide(cond, uncond, 4.0, "per_token", token=2)
    packed = [x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3) for x in (guided, cond)]
    torch.testing.assert_close(*(p.norm(dim=-1) for p in packed))
    plain = guide(cond, uncond, 4.0)
    torch.testing.assert_close(guided / plain, (guided / plain).mean(1, keepdim=True).expand_as(plain))


@pytest.mark.parametrize(
    ("family", "teacher", "mode", "uses"),
    [
        ("sd3", {"cfg_scale": None}, "standard", False),
        ("sd3", {"cfg_scale": 1.0}, "standard", False),
        ("sd3", {"cfg_scale": 0.5}, "standard", False),  # StableDiffusion3Pipeline guides above 1
        ("sd3", {"cfg_scale": 0.5, "cfg_mode": "standard"}, "standard", True),
        ("z_image", {"cfg_scale": None}, "offset", False),
        ("z_image", {"cfg_scale": 1.0}, "offset", True),
        ("z_image", {"cfg_scale": 1.0, "cfg_mode": "standard"}, "standard", False),
        ("qwen_image", {"cfg_scale": 4.0}, "per_token", True),
        ("qwen_image", {"cfg_scale": 4.0, "cfg_mode": "standard"}, "standard", True),
    ],
)
def test_which_guidance_a_configuration_means(cases, family, teacher, mode, uses):
    config = config_of(cases(family).family, **teacher)
    assert (config.cfg_mode, config.uses_cfg) == (mode, uses)
    options = dmd_options(config, "flow", 2)
    assert (options.cfg_mode, options.uses_cfg) == (mode if uses else "standard", uses)


@pytest.mark.parametrize("key", ["cfg_scale", "sample_cfg_scale"])
@pytest.mark.parametrize("name", ["flux", "flux2"])
def test_cfg_beside_a_guidance_input_is_asked_for_by_name(cases, name, key):
    family = cases(name).family
    teacher = {"cfg_scale": None, key: 3.5}
    with pytest.raises(UserError, match=rf"teacher\.{key}: 3\.5 on top of guidance .* teacher\.cfg_mode standard"):
        PipelineModel.open(config_of(family, **teacher))
    PipelineModel.open(config_of(family, **teacher, cfg_mode="standard"))
