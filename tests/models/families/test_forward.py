"""Every family against its diffusers pipeline: the prediction inside the denoising step, the latents, the image."""

from dataclasses import replace

import pytest
import torch

from dmdr_fast.models.families import Denoiser
from tests.families import PROMPTS

SIZE = (24, 16)  # not square: a swapped axis shows
GUIDANCE = 2.5


def unpacked(case, tokens):
    """The pipeline's latents as [B, C, H, W], by its own functions."""
    pipe = case.pipeline
    if case.name == "flux":
        return pipe._unpack_latents(tokens, *SIZE, pipe.vae_scale_factor)
    if case.name == "qwen_image":
        return pipe._unpack_latents(tokens, *SIZE, pipe.vae_scale_factor)[:, :, 0]
    if case.name == "flux2":
        shape = case.family.latent_shape(*SIZE)
        ids = pipe._prepare_latent_ids(torch.empty(tokens.shape[0], *shape))
        return pipe._unpack_latents_with_ids(tokens, ids)
    return tokens


def record(case, prompts, steps, monkeypatch, **arguments):
    """Run the pipeline; keep the (prediction, time, input) of each step, the last latents and the images.

    Without CFG, unless ``arguments`` turn it on.
    """
    pipe, calls, last = case.pipeline, [], []
    step = pipe.scheduler.step

    def spy(prediction, t, sample, *args, **kwargs):
        calls.append((unpacked(case, prediction), t, unpacked(case, sample)))
        result = step(prediction, t, sample, *args, **kwargs)
        last.append(unpacked(case, result[0]))
        return result

    monkeypatch.setattr(pipe.scheduler, "step", spy)
    guidance = GUIDANCE if case.family.guidance is not None else 0.0
    images = pipe(
        prompt=list(prompts),  # Z-Image writes over the list it is given
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=steps,
        **({"guidance_scale": guidance} | arguments),
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
    ).images
    return calls, last[-1], images


@pytest.fixture(scope="module")
def recorded():
    return {}


@pytest.fixture
def run(case, recorded, monkeypatch):
    if case not in recorded:
        prompts = list(PROMPTS[:2])  # of two lengths
        calls, last, images = record(case, prompts, 3, monkeypatch)
        family = replace(case.family, guidance=case.family.guidance and GUIDANCE)
        recorded[case] = case, family, family.condition(case.entries[:2]), calls, last, images
    return recorded[case]


def model_input(case, sample, t):
    """x_t and t of our convention from the scheduler's: Euler's scheduler keeps SDXL's x_t times 1 / alpha."""
    if case.name != "sdxl":
        return sample, (t / 1000.0).float().expand(len(sample))
    time = ((t + 1.0) / 1000.0).float().expand(len(sample))
    alpha, _ = case.family.alpha_sigma(time)
    return alpha.view(-1, 1, 1, 1) * sample, time


def test_a_prediction_is_the_pipelines_own(run):
    case, family, condition, calls, _, _ = run
    network = Denoiser(family, case.network)
    assert len(calls) == 3
    for prediction, t, sample in calls:
        with torch.no_grad():
            ours = network(*model_input(case, sample, t), condition)
        torch.testing.assert_close(ours, prediction, rtol=1e-5, atol=1e-5)


def test_decoding_is_the_pipelines_own(run):
    case, family, _, _, last, images = run
    with torch.no_grad():
        decoded = family.decode(case.pipeline.vae, last)
    torch.testing.assert_close((decoded / 2 + 0.5).clamp(0, 1), images, rtol=1e-5, atol=1e-5)


def test_the_latent_shape_is_the_pipelines_own(run):
    _, family, _, calls, _, _ = run
    assert calls[0][2].shape[1:] == family.latent_shape(*SIZE)


def test_conditions_join_slice_and_pad(case):
    """One prompt's row of a joined batch is the prompt alone; padding beyond the longest prompt changes nothing."""
    family, entries = case.family, case.entries
    alone = family.condition(entries[:1])
    negative = family.condition(case.encoder.encode([""], negative=True))
    batch = family.condition(entries)
    null = family.null_condition(batch, negative)
    joined = {key: torch.cat([batch[key], null[key]]) for key in batch}
    x_t = torch.randn(6, *family.latent_shape(*SIZE), generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0.2, 1.0, 6)
    with torch.no_grad():
        together = family.forward(case.network, x_t, t, joined)
        single = family.forward(case.network, x_t[:1], t[:1], alone)
        unconditional = family.forward(case.network, x_t[5:], t[5:], negative)
    torch.testing.assert_close(together[:1], single, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together[5:], unconditional, rtol=1e-5, atol=1e-5)
    if case.name in ("z_image", "qwen_image"):
        longest = max(e["prompt_embeds"].shape[0] for e in entries)
        longer, shorter = family.condition(entries, longest + 40), family.condition(entries, longest)
        assert longer["prompt_embeds"].shape[1] == longest + 40
        with torch.no_grad():
            outputs = [family.forward(case.network, x_t[:3], t[:3], c) for c in (longer, shorter)]
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


def test_a_gradient_reaches_the_input(case):
    family = case.family
    condition = family.condition(case.entries[:1])
    x_t = torch.randn(1, *family.latent_shape(*SIZE), generator=torch.Generator().manual_seed(0)).requires_grad_()
    prediction = family.forward(case.network, x_t, torch.tensor([0.7]), condition)
    (gradient,) = torch.autograd.grad(prediction.square().sum(), x_t)
    assert gradient.abs().min() > 0
