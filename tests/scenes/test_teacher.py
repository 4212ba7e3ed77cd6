"""Training the teacher of scenes: resumable to the bit, followed by its log, and one of the SD3 family's pipelines."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dmdr_fast import cli
from dmdr_fast.data.text_cache import TextCache
from dmdr_fast.models.families import TextEncoder, open_family
from dmdr_fast.scenes import teacher
from dmdr_fast.scenes.captions import WORDINGS, Attributes, caption
from dmdr_fast.scenes.pipeline import TOKENS, VOCABULARY, build_tokenizer

SMALL = {"seed": 5, "vae_steps": 4, "steps": 3}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A teacher of a few steps on batches of four, saved."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher, "BATCH", 4)
        patch.setattr(teacher, "STATISTICS", 16)
        out = tmp_path_factory.mktemp("teacher") / "whole"
        teacher.train_teacher(out, **SMALL)
        yield out


def follows(losses, recorded, tolerance):
    """Whether the losses of each stage equal the first recorded ones, relatively."""
    pairs = ((stage, i, value) for stage, values in losses.items() for i, value in enumerate(values))
    return all(abs(value / recorded[stage][i] - 1) <= tolerance for stage, i, value in pairs)


def test_killed_and_resumed_ends_with_the_same_bytes(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher, "SAVE_EVERY", 2)
    out, losses, killed_at = tmp_path / "resumed", torch.nn.functional.mse_loss, iter([3, 8])
    seen, at = 0, next(killed_at)

    def dying(*arguments, **keywords):
        nonlocal seen, at
        seen += 1
        if seen == at:
            at = next(killed_at, None)
            raise KeyboardInterrupt
        return losses(*arguments, **keywords)

    monkeypatch.setattr(teacher.F, "mse_loss", dying)
    for _ in range(2):  # in the VAE's third step, of which the second was saved; then in the transformer's last
        with pytest.raises(KeyboardInterrupt):
            teacher.train_teacher(out, **SMALL)
    teacher.train_teacher(out, **SMALL)
    files = sorted(file.relative_to(trained) for file in trained.rglob("*") if file.is_file())
    assert files == sorted(file.relative_to(out) for file in out.rglob("*") if file.is_file())
    for file in files:
        if file.name != "training.json":
            assert (out / file).read_bytes() == (trained / file).read_bytes(), file
    whole, resumed = (json.loads((folder / "training.json").read_text()) for folder in (trained, out))
    assert whole["sha256"] == resumed["sha256"] and len(whole["sha256"]) == 5


def test_a_short_training_follows_the_recorded_losses(trained, tmp_path):
    """From the start for the VAE, and from the stored VAE for the rest: neither needs the whole training."""
    recorded = teacher.read_losses(trained)
    assert {stage: len(values) for stage, values in recorded.items()} == {"vae": 4, "pipeline": 3}
    teacher.train_vae(tmp_path, seed=5, steps=4, stop=2)
    vae = open_family(trained).load_vae(torch.float32)
    teacher.train_pipeline(tmp_path, vae, seed=5, steps=3, stop=2)
    losses = teacher.read_losses(tmp_path)
    assert {stage: len(values) for stage, values in losses.items()} == {"vae": 2, "pipeline": 2}
    assert follows(losses, recorded, 1e-4)
    losses["vae"][1] *= 1.001
    assert not follows(losses, recorded, 1e-4)


def test_the_saved_pipeline_is_the_sd3_family_s(trained, tmp_path):
    """The project's text cache and forward against diffusers' own pipeline, one step of CFG from the same noise."""
    from diffusers import StableDiffusion3Pipeline

    family = open_family(trained, length=TOKENS)
    assert family.name == "sd3" and family.latent_shape(16, 16) == (8, 8, 8) and family.tokens(16, 16) == 64
    prompt = "a red seven to the left of a green two"
    cache = TextCache(TextEncoder(family, dtype=torch.float32), tmp_path)
    cache.fill([prompt], [""])
    condition, empty = (family.condition([cache.get(p, negative=not p)]) for p in (prompt, ""))
    noise = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        network, vae = family.load_transformer(torch.float32), family.load_vae(torch.float32)
        v, u = (family.forward(network, noise, torch.ones(1), c) for c in (condition, empty))
        expected = family.decode(vae, noise - (u + 2.0 * (v - u)))
    pipeline = StableDiffusion3Pipeline.from_pretrained(trained, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        prompt,
        num_inference_steps=1,
        guidance_scale=2.0,
        latents=noise,
        height=16,
        width=16,
        max_sequence_length=TOKENS,
        output_type="pt",
    ).images
    torch.testing.assert_close(image, (expected / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)
    assert not torch.equal(condition["prompt_embeds"], empty["prompt_embeds"])


def test_it_is_stored_small_in_fp16(trained):
    files = list(trained.rglob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) < 12e6
    assert {t.dtype for file in files for t in load_file(file).values() if t.is_floating_point()} == {torch.float16}


def test_words_are_tokens():
    tokenizer = build_tokenizer()
    ids = tokenizer(["below a BLUE three: a white nine", "a cat"], padding="max_length", max_length=TOKENS).input_ids
    words = [[VOCABULARY[i] for i in row] for row in ids]
    assert words[0] == ["<bos>", "below", "a", "blue", "three", ":", "a", "white", "nine", "<eos>", *["<pad>"] * 3]
    assert words[1][:4] == ["<bos>", "a", "<unk>", "<eos>"]


def test_the_longest_caption_fills_the_tokens():
    scene = Attributes(0, 7, 0, 2, 1)
    captions = [caption(scene._replace(relation=r), wording) for r in range(2) for wording in range(len(WORDINGS[r]))]
    ids = build_tokenizer()(captions).input_ids
    assert max(map(len, ids)) == TOKENS and not any(VOCABULARY.index("<unk>") in row for row in ids)


def test_mistakes_are_one_line(trained, capsys):
    def said(*flags):
        assert cli.run_user_command(teacher.main, [*flags]) == 2
        return capsys.readouterr().err

    assert "holds a finished teacher; give another folder" in said("--out", str(trained))
    assert "--vae-steps: expected at least 1, got 0" in said("--out", str(trained), "--vae-steps", "0")
    assert "--out" in said()
    begun = trained.with_name("begun")
    Path(begun).mkdir()
    (begun / "training.json").write_text('{"seed": 1}')
    assert "began with {'seed': 1}, not {'seed': 0" in said("--out", str(begun))
