"""A generator that is another network than its teacher's: trained, resumed, exported, sampled; what does not fit."""

import json
import re
import shutil
import time

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dmdr_fast.cli import parse
from dmdr_fast.engine.pipeline_model import PipelineModel
from dmdr_fast.engine.sit_model import build_network
from dmdr_fast.errors import UserError
from dmdr_fast.evaluate import main as evaluate
from dmdr_fast.export import FINAL, export_run
from dmdr_fast.sample import sample_pipeline, sample_run
from tests.families import PROMPTS, randomised, saved
from tests.tiers import sampled

from .conftest import SMALL
from .pipeline_runs import config_of, opened, words
from .test_errors import refused

SIZE = {"hidden_size": 16, "depth": 1, "num_heads": 2}
OWN = json.dumps({"weights": "x", **SIZE})
SHARED = {"sharing": "shared_all", "student__lora__rank": 2}
SHORT = {"train__generator_steps": 2, "checkpoint__every": 1, "checkpoint__keep": 9}


def flags(changes):
    return [word for name, value in changes.items() for word in (f"--{name.replace('__', '.')}", str(value))]


def tensors(file):
    with safe_open(file, framework="pt") as content:
        return {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118, it is no dictionary


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def distance(a, b):
    """|a - b| / |a| over all tensors."""
    one, two = (torch.cat([weights[name].flatten() for name in sorted(a)]) for weights in (a, b))
    return ((one - two).norm() / one.norm()).item()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The pipelines, the prompts and the text cache; of the student's pipeline only what a run reads."""
    place = tmp_path_factory.mktemp("students")
    student = saved("sd3_small", place)
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"):
        shutil.rmtree(student / part)
    (student / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    return place


def sd3_words(folder, run_dir, **changes):
    own = {"student__pipeline": folder / "sd3_small", "teacher__cfg_scale": 3, "student__shift": 3}
    return words("sd3", folder, run_dir, **own, **(SHORT | changes))


def sit_words(folder, run_dir, **changes):
    """A run on digits whose generator is a random SiT of a file."""
    file = folder / "sit.safetensors"
    if not file.is_file():
        sizes = flags({f"model.{name}": value for name, value in SIZE.items()})
        network = randomised(build_network(parse([*SMALL, *sizes])[0]), 0)
        save_file({name: p.detach() for name, p in network.named_parameters()}, file)
    own = {
        "run_dir": run_dir,
        "train__cold_start_steps": 1,
        "student__model": json.dumps({"weights": str(file), **SIZE}),
    }
    return flags(own | SHORT | changes)


@pytest.fixture(scope="module")
def finished(run, folder, tmp_path_factory):
    """A run of the small SD3 under the larger one, its words and what it said."""
    run_dir = tmp_path_factory.mktemp("sd3")
    code, out, err = run(sd3_words(folder, run_dir), small=False)
    assert code == 0, err
    return run_dir, out


def test_a_smaller_sd3_is_trained_exported_and_draws_the_trainers_images(finished, folder, tmp_path):
    run_dir, out = finished
    assert f"generator  {folder / 'sd3_small'}, a network of its own" in out
    model = opened(run_dir).model
    start, final = (tensors(f) for f in (model.student.weight_files()[0], run_dir / FINAL))
    learnt = {name: tensor.shape for name, tensor in model.student.skeleton().named_parameters()}
    assert {name: tensor.shape for name, tensor in final.items()} == learnt
    moved = distance({name: start[name] for name in final}, final)
    assert 1e-4 < moved < 0.1  # from its own pretrained weights
    counted = sum(shape.numel() for shape in learnt.values())
    base = sum(p.numel() for p in model.skeleton().parameters())
    said = re.search(r"generator ([\d,]+) / ([\d,]+), fake ([\d,]+) / ([\d,]+)", out)
    assert [int(n.replace(",", "")) for n in said.groups()][:2] == [counted] * 2
    assert int(said[4].replace(",", "")) == base + int(said[3].replace(",", ""))
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["generator_network"] == str(folder / "sd3_small")

    export_run(run_dir, tmp_path / "out", dtype="fp32")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert (
        pipeline.transformer.config.num_attention_heads == 1 and model.family.network_config["num_attention_heads"] == 2
    )
    exported = dict(pipeline.transformer.named_parameters())
    assert same({name: p.detach() for name, p in exported.items()}, final)
    images = sample_run(run_dir, list(PROMPTS[:2]), seed=3)
    torch.testing.assert_close(sample_pipeline(tmp_path / "out", list(PROMPTS[:2]), seed=3), images, rtol=0, atol=2e-4)


@pytest.mark.thorough
def test_a_lora_on_its_own_weights_is_exported(run, folder, tmp_path):
    code, _, err = run(sd3_words(folder, tmp_path / "run", student__lora__rank=2, sharing="separate"), small=False)
    assert code == 0, err
    export_run(tmp_path / "run", tmp_path / "out", dtype="fp32")
    images = sample_run(tmp_path / "run", list(PROMPTS[:2]), seed=3)
    torch.testing.assert_close(sample_pipeline(tmp_path / "out", list(PROMPTS[:2]), seed=3), images, rtol=0, atol=2e-4)
    start = tensors(folder / "sd3_small/transformer/diffusion_pytorch_model.safetensors")
    merged = tensors(tmp_path / "out/transformer/diffusion_pytorch_model.safetensors")
    moved = {name.rpartition(".")[0] for name in start if not torch.equal(start[name], merged[name])}
    adapted = {name.rpartition(".")[0] for name in tensors(tmp_path / "run" / FINAL)}
    assert adapted - moved == {
        "transformer_blocks.1.attn.add_q_proj"
    }  # what the last block asks of the text is not read


@pytest.mark.thorough
def test_evaluation_compares_it_with_its_teacher(finished, tmp_path):
    run_dir, _ = finished
    evaluate([str(run_dir), "--prompts", *PROMPTS[:2], "--out", str(tmp_path), "--rewards"])
    table = json.loads((tmp_path / "metrics.json").read_text())
    assert {name: row["NFE"] for name, row in table.items()} == {"teacher": 50, "student": 2}


def killed_and_resumed(launch, run, arguments, run_dir, ranks=0, small=True):
    process = launch(arguments, ranks=ranks, small=small)
    while process.poll() is None and not (run_dir / "checkpoints/step_00000001/manifest.json").exists():
        time.sleep(0.005)
    process.kill()
    _, err = process.communicate()
    assert (run_dir / "checkpoints/step_00000001").is_dir() and not (run_dir / FINAL).exists(), err
    code, out, err = run(arguments, ranks=ranks, small=small)
    assert code == 0 and "resumed from" in out, err


@pytest.mark.thorough
def test_killed_and_resumed_it_is_the_same_to_the_byte(finished, launch, run, folder, tmp_path):
    arguments = sd3_words(folder, tmp_path)
    killed_and_resumed(launch, run, arguments, tmp_path, small=False)
    assert (tmp_path / FINAL).read_bytes() == (finished[0] / FINAL).read_bytes()


@pytest.mark.thorough
def test_two_zero3_ranks_equal_one(finished, launch, run, folder, tmp_path):
    """The two killed after their first update; the KL is to the student as RL starts."""
    held = {"rl__regularizer": "kl", "rl__kl_weight": 1, "student__ema": "null", "train__generator_steps": 3}
    one, two = tmp_path / "one", tmp_path / "two"
    code, _, err = run(sd3_words(folder, one, **held), small=False)
    assert code == 0, err
    zero3 = {"deepspeed__stage": 3, "train__micro_batch_size": 2, **held}
    killed_and_resumed(launch, run, sd3_words(folder, two, **zero3), two, ranks=2, small=False)
    assert distance(*(tensors(place / FINAL) for place in (one, two))) < 1e-4
    kl = [json.loads(line).get("kl") for line in (one / "log.jsonl").read_text().splitlines()]
    assert kl[1] == pytest.approx(0, abs=1e-12) and kl[2] > 0


@pytest.mark.parametrize("lora", sampled([0, 2]))
def test_a_smaller_sit(launch, run, tmp_path, lora):
    """Whole and as a LoRA on its own weights, by ``separate`` and ``shared_score``; killed and resumed to the byte."""
    changes = {"student__lora__rank": lora, "sharing": "separate" if lora else "shared_score"}
    code, _, err = run(sit_words(tmp_path, tmp_path / "run", **changes))
    assert code == 0, err
    start, final = tensors(tmp_path / "sit.safetensors"), tensors(tmp_path / "run" / FINAL)
    assert {n: t.shape for n, t in final.items()} == {n: t.shape for n, t in start.items()}
    moved = {name for name in final if not torch.equal(start[name], final[name])}
    assert moved == ({"blocks.0.attn.qkv.weight"} if lora else moved) and moved
    if not lora:
        return
    killed_and_resumed(launch, run, sit_words(tmp_path, tmp_path / "again", **changes), tmp_path / "again")
    assert (tmp_path / "again" / FINAL).read_bytes() == (tmp_path / "run" / FINAL).read_bytes()


@pytest.mark.thorough
def test_its_weights_belong_to_the_run(run, folder, tmp_path):
    """By content: a file that moves is the same, another one is another run."""
    run_dir = tmp_path / "run"
    arguments = sit_words(tmp_path, run_dir, train__generator_steps=1)
    code, _, err = run(arguments)
    assert code == 0, err
    moved = tmp_path / "moved.safetensors"
    shutil.move(tmp_path / "sit.safetensors", moved)
    go_on = [*arguments, "--student.model", json.dumps({"weights": str(moved), **SIZE})]
    code, out, err = run(go_on)
    assert code == 0 and "nothing to do" in out, err
    save_file({name: t + 0.01 for name, t in tensors(moved).items()}, tmp_path / "other.safetensors")
    line = refused(
        *run([*arguments, "--student.model", json.dumps({"weights": str(tmp_path / "other.safetensors"), **SIZE})])[::2]
    )
    assert "student.network '" in line and "other.safetensors (sha256 " in line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"joint_attention_dim": 48}, "conditions: prompt_embeds expected [333, 32], as the teacher's, got [333, 48]"),
        ({"pooled_projection_dim": 16}, "conditions: pooled_embeds expected [32], as the teacher's, got [16]"),
        ({"in_channels": 8, "out_channels": 8}, "latents of 16 x 16 pixels: channels expected 4"),
        ({"pos_embed_max_size": 2}, "positions are 2 tokens of 4 pixels along a side, got 16 x 16"),
        ({"vae": {"scaling_factor": 0.5}}, "VAE: scaling_factor expected 1.5, as the teacher's, got 0.5"),
        ({"vae": {"latent_channels": 8}}, "VAE: latent_channels expected 4"),
        ({"model_index": {"_class_name": "FluxPipeline"}}, "transformer expected a FluxTransformer2DModel"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_network_that_the_teacher_cannot_teach_is_refused(folder, tmp_path, changes, message):
    student = shutil.copytree(folder / "sd3_small", tmp_path / "student")
    places = {"vae": student / "vae/config.json", "model_index": student / "model_index.json"}
    part = next(iter(changes))
    file = places.get(part, student / "transformer/config.json")
    file.write_text(
        json.dumps(
            json.loads(file.read_text()) | changes.get(part, {})
            if part in places
            else json.loads(file.read_text()) | changes
        )
    )
    config = config_of("sd3", folder, tmp_path / "run", student__pipeline=student)
    with pytest.raises(UserError) as found:
        PipelineModel.open(config)
    assert str(found.value).startswith(f"student.pipeline: {student}: ") and message in str(found.value)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("sd3", {"student__model": OWN}, "student.model: it is SiT's"),
        ("sd3", SHARED | {"student__pipeline": "x"}, "set sharing to shared_score or separate, or leave student.pipe"),
        ("sit", SHARED | {"student__model": OWN}, "set sharing to shared_score or separate, or leave student.model"),
        ("sit", {"student__pipeline": "x"}, "student.pipeline: set beside model.family sit"),
        ("sit", {"student__model": OWN.replace("16", "18")}, "student.model.hidden_size: 18 must be a multiple"),
        ("sit", {"student__model": "{hidden_size: 16}"}, "student.model.weights: expected text"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(folder, tmp_path, family, changes, message):
    with pytest.raises(UserError) as found:
        if family == "sit":
            parse([*SMALL, *flags(changes)])
        else:
            config_of(family, folder, tmp_path, **changes)
    assert message in str(found.value)


@pytest.mark.thorough
def test_weights_of_another_size_than_the_keys_say(run, tmp_path):
    arguments = sit_words(tmp_path, tmp_path / "run")
    other = {"weights": str(tmp_path / "sit.safetensors"), **SIZE, "depth": 2}
    line = refused(*run([*arguments, "--student.model", json.dumps(other)])[::2])
    assert "student.model.weights: " in line and "set student.model.depth" in line
