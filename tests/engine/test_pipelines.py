"""Every family from its pipeline to a pipeline: prompts, cache, two ZeRO-3 ranks, a kill, a resume, an export."""

import json
import re
import resource
import shutil
import time
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dmdr_fast import check_export, export, sample
from dmdr_fast.cli import run_user_command
from dmdr_fast.data.text_cache import TextCache
from dmdr_fast.engine.checkpoint_weights import checkpoint_weights
from dmdr_fast.engine.engines import DTYPES
from dmdr_fast.engine.pipeline_model import is_lora, lora_scale
from dmdr_fast.export import export_run
from dmdr_fast.models.families import TextEncoder
from tests.families import PROMPTS
from tests.models.families.test_export import assert_same_images
from tests.rewards.conftest import small_clip  # noqa: F401, a fixture
from tests.tiers import sampled

from .pipeline_runs import BRIGHTNESS, SIZE, opened, words

FINAL = "final/generator.safetensors"
FAMILIES = sampled(["qwen_image", "sd3", "flux", "flux2", "sdxl", "z_image"])
LORA = {"student__lora__rank": 2}
# How each family runs: together they see every sharing, whole and LoRA generators, with CFG and without.
RUNS = {
    "sd3": {"sharing": "shared_all", "teacher__cfg_scale": 3, **LORA},
    "flux": {"sharing": "shared_score", "teacher__guidance": 2.5},
    "flux2": {"sharing": "shared_score", **LORA},
    "z_image": {"sharing": "separate", "teacher__cfg_scale": 2, "export__dtype": "bf16"},
    "qwen_image": {"sharing": "shared_all", "teacher__cfg_scale": 4, **LORA},
    "sdxl": {"sharing": "shared_score", "teacher__cfg_scale": 5},
}
ZERO3 = {"deepspeed__stage": 3, "train__micro_batch_size": 2, "checkpoint__every": 1, "checkpoint__keep": 9}


def records(run_dir):
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


def difference(a, b):
    """|a - b| / |a| over all tensors; of adapters over every B, which starts at zero and so is the update itself."""
    names = [name for name in a if not name.endswith("lora_A")]
    one, two = (torch.cat([weights[name].flatten() for name in names]) for weights in (a, b))
    return ((one - two).norm() / one.norm()).item()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The pipelines, the prompts and the text cache of all these runs."""
    return tmp_path_factory.mktemp("pipelines")


@pytest.fixture(scope="session")
def changes(request):
    """changes(family) -> the keys of its runs; SD3's follows CLIP score too."""
    clip = request.getfixturevalue("small_clip").path
    clip_score = [{"kind": "clip_score", "path": str(clip), "weight": 0.1}, {"kind": BRIGHTNESS}]
    return lambda family: RUNS[family] | ({"reward__terms": json.dumps(clip_score)} if family == "sd3" else {})


@pytest.fixture(scope="session")
def finished(launch, run, folder, changes, tmp_path_factory):
    """finished(family) -> run_dir of a run on two ZeRO-3 ranks, killed after its second update and resumed; once."""
    done = {}

    def result(family):
        if family not in done:
            run_dir = done[family] = tmp_path_factory.mktemp(family)
            arguments = words(family, folder, run_dir, **changes(family), **ZERO3)
            process = launch(arguments, ranks=2, small=False)
            while process.poll() is None and not (run_dir / "checkpoints/step_00000002/manifest.json").exists():
                time.sleep(0.005)
            process.kill()
            _, err = process.communicate()
            assert not (run_dir / FINAL).exists(), err
            assert (run_dir / "checkpoints/step_00000002").is_dir(), err
            code, out, err = run(arguments, ranks=2, small=False)
            assert code == 0, err
            assert "resumed from" in out and "step 2" in out and "text embeddings" not in out
        return done[family]

    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_exported_pipeline_draws_the_images_of_the_trainer(finished, tmp_path, family):
    run_dir = finished(family)
    assert [("reward" in record, "dmd_loss" in record) for record in records(run_dir)] == [
        (False, True),
        (True, True),
        (True, True),
    ]
    config, model = vars(opened(run_dir)).values()
    assert is_lora(load_file(run_dir / FINAL)) == (config.student.lora.rank > 0)
    start = load_file(run_dir / "cold_start/generator.safetensors")
    assert difference(start, load_file(run_dir / FINAL)) > 1e-3
    export_run(run_dir, tmp_path / "out", dtype="fp32")
    cpu = torch.device("cpu")
    network = model.load(cpu, run_dir / FINAL, whole=True)
    cache = TextCache(TextEncoder(model.family, dtype=torch.float32), config.data.cache)
    case = SimpleNamespace(
        family=model.family,
        entries=[cache.get(prompt) for prompt in PROMPTS],
        pipeline=SimpleNamespace(vae=model.family.load_vae(torch.float32)),
    )
    assert_same_images(case, tmp_path / "out", network.transformer, (1.0, 0.5, 0.0), model.family.guidance)


@pytest.mark.parametrize("family", FAMILIES)
def test_final_weights_have_the_networks_names_and_the_asked_dtype(finished, family):
    run_dir = finished(family)
    config, model = vars(opened(run_dir)).values()
    with torch.device("meta"):
        own = {
            name: p.shape for name, p in model.family.build_from_config(model.family.network_config).named_parameters()
        }
    for file, dtype in ((FINAL, config.export.dtype), ("cold_start/generator.safetensors", "fp32")):
        weights = load_file(run_dir / file)
        assert {t.dtype for t in weights.values()} == {DTYPES[dtype]}
        if config.student.lora.rank:
            assert {f"{name.rpartition('.')[0]}.weight" for name in weights} < own.keys()
        else:
            assert {name: t.shape for name, t in weights.items()} == own


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_of_two_ranks_is_the_generator(finished, tmp_path, family):
    """The last one is the final file, to the bit; an earlier one is another."""
    run_dir = finished(family)
    config, model = vars(opened(run_dir)).values()
    final = load_file(run_dir / FINAL)
    with checkpoint_weights(run_dir, 3, model, tmp_path) as file:
        weights = {name: t.to(DTYPES[config.export.dtype]) for name, t in load_file(file).items()}
        assert lora_scale(file) == lora_scale(run_dir / FINAL)
    assert weights.keys() == final.keys() and all(torch.equal(weights[name], final[name]) for name in final)
    with checkpoint_weights(run_dir, 1, model, tmp_path) as file:
        first = load_file(file)
    start = load_file(run_dir / "cold_start/generator.safetensors")
    assert all(torch.equal(first[name], start[name]) for name in start)
    assert not list(tmp_path.iterdir())


@pytest.mark.thorough
def test_diffusers_alone_draws_the_images_of_the_run(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(check_export, "TOLERANCE", 1e-4)  # two updates move an image by 1e-3
    run_dir, out, prompts = finished("sd3"), tmp_path / "out", tmp_path / "prompts.txt"
    prompts.write_text("sea\na red cat\n")
    arguments = [str(run_dir), str(out), "--prompts", str(prompts)]
    assert run_user_command(check_export.main, arguments) == 2
    assert "no exported pipeline" in capsys.readouterr().err
    export_run(run_dir, out, dtype="fp32")
    assert run_user_command(check_export.main, arguments) == 0
    assert "2 images; the largest difference of a pixel in [-1, 1] is " in capsys.readouterr().out
    shutil.rmtree(out)
    export_run(run_dir, out, dtype="fp32", step=1)  # not what the run ended with
    assert run_user_command(check_export.main, arguments) == 1
    (tmp_path / "config.yaml").write_text((run_dir / "config.yaml").read_text().replace("dtype: fp32", "dtype: bf16"))
    assert run_user_command(check_export.main, [str(tmp_path), *arguments[1:]]) == 2
    assert "deepspeed.dtype: bf16 rounds by more than the check allows" in capsys.readouterr().err


@contextmanager
def full_disk():
    """Inside, no file grows beyond 4 KB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_exporting_and_sampling_a_checkpoint(finished, tmp_path, capsys):
    """``--step``, of a run that has no final weights (yet)."""
    run_dir, prompts = tmp_path / "run", ["sea", "a red cat"]
    shutil.copytree(finished("qwen_image"), run_dir, ignore=shutil.ignore_patterns("final"))
    arguments = [str(run_dir), str(tmp_path / "out"), "--dtype", "fp32"]
    assert run_user_command(export.main, arguments) == 2
    assert re.search(
        r"no weights at .*; let the run finish, .* --step \(it has steps 1, 2, 3\)", capsys.readouterr().err
    )
    assert run_user_command(export.main, [*arguments, "--step", "7"]) == 2
    assert "--step 7: no such checkpoint" in capsys.readouterr().err
    assert not run_user_command(export.main, [*arguments, "--step", "2"])
    call = f"(prompt, num_inference_steps=2, true_cfg_scale=1, height={SIZE}, width={SIZE})"
    loaded = f"from_pretrained('{tmp_path / 'out'}', torch_dtype=torch.float32, trust_remote_code=True)"
    assert capsys.readouterr().out.endswith(f"{loaded}{call}\n")
    images = sample.sample_pipeline(tmp_path / "out", prompts)
    assert torch.equal(sample.sample_pipeline(tmp_path / "out", prompts), images)
    image = sample.sample_pipeline(tmp_path / "out", prompts[:1])
    torch.testing.assert_close(image, images[:1], rtol=0, atol=1e-5)
    steps = [sample.sample_run(run_dir, prompts, step=step) for step in (1, 2)]
    assert (steps[0] - steps[1]).abs().max() > 1e-4
    for chosen in (["--step", "2"], ["--weights", str(run_dir / "cold_start/generator.safetensors")]):
        with full_disk():
            assert run_user_command(export.main, [arguments[0], str(tmp_path / "full"), *chosen]) == 2
        assert re.search(r"^error: .* cannot be written \(.*\); free some space", capsys.readouterr().err, re.MULTILINE)
        assert not [path.name for path in tmp_path.iterdir() if "full" in path.name or "dmdr_fast" in path.name]
    shards = run_dir / "checkpoints/step_00000002/generator"
    for name, spoil in (
        ("ema.00000.safetensors", lambda content: content[:-4] + b"\0\0\0\1"),  # still a safetensors file
        ("ema.00000.safetensors", lambda content: b"torn"),
        ("parts.00000.json", lambda content: content.replace(b"1", b"2", 1)),
    ):
        content = (shards / name).read_bytes()
        (shards / name).write_bytes(spoil(content))
        for command, more in ((sample.main, ["--prompts", "sea"]), (export.main, [str(tmp_path / "x")])):
            assert run_user_command(command, [str(run_dir), *more, "--step", "2"]) == 2
            error = capsys.readouterr().err.splitlines()[-1]
            assert error.startswith("error: --step 2: ") and f"{name} does not match its checksum" in error
            assert "it has steps 1, 2, 3" in error
        (shards / name).write_bytes(content)
    (shards / "weight.00000.safetensors").write_bytes(b"torn")  # which is not read
    assert not run_user_command(export.main, [arguments[0], str(tmp_path / "again"), "--step", "2"])
    manifest = shards.parent / "manifest.json"
    entries = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({n: e for n, e in entries.items() if n != "generator/ema.00000.safetensors"}))
    assert run_user_command(sample.main, [str(run_dir), "--prompts", "sea", "--step", "2"]) == 2
    assert "ema.00000.safetensors is not in its manifest.json" in capsys.readouterr().err


@pytest.mark.parametrize(("family", "stage"), sampled([("flux", 3), ("flux2", 2)]))
def test_a_checkpoint_without_an_average(run, folder, changes, tmp_path, family, stage):
    """A whole generator and a LoRA, out of the optimizers of two ranks."""
    settings = {"deepspeed__stage": stage, "student__ema": "null", "train__generator_steps": 1}
    words_ = words(family, folder, tmp_path, **changes(family), **(ZERO3 | settings))
    code, _, err = run(words_, ranks=2, small=False)
    assert code == 0, err
    final = load_file(tmp_path / FINAL)
    with checkpoint_weights(tmp_path, 1, opened(tmp_path).model, tmp_path) as file:
        weights = load_file(file)
    assert weights.keys() == final.keys() and all(torch.equal(weights[name], final[name]) for name in final)


def test_sampling_a_run_and_its_pipeline(finished, tmp_path):
    run_dir, prompts = finished("sd3"), list(PROMPTS)
    assert not run_user_command(sample.main, [str(run_dir), "--prompts", *prompts, "--out", str(tmp_path / "run.png")])
    images = sample.sample_run(run_dir, prompts)
    alone = sample.sample_run(run_dir, prompts[:1])
    torch.testing.assert_close(alone[0], images[0], rtol=0, atol=1e-5)  # an image does not depend on its company
    grid = torch.from_numpy(np.array(Image.open(tmp_path / "run.png"))).permute(2, 0, 1)
    assert grid.shape == (3, 2 * SIZE, 2 * SIZE)
    for i, image in enumerate(images):
        top, left = SIZE * (i // 2), SIZE * (i % 2)
        cell = grid[:, top : top + SIZE, left : left + SIZE]
        assert (cell / 127.5 - 1 - image).abs().max() < 0.51 / 127.5
    assert (grid[:, SIZE:, SIZE:] == 255).all()
    export_run(run_dir, tmp_path / "out", dtype="fp32")
    arguments = [str(tmp_path / "out"), "--prompts", *prompts, "--out", str(tmp_path / "pipeline.png")]
    assert not run_user_command(sample.main, arguments)
    assert Image.open(tmp_path / "pipeline.png").size == (2 * SIZE, 2 * SIZE)
    assert run_user_command(sample.main, [str(tmp_path), "--prompts", "sea"]) == 2
    assert run_user_command(sample.main, [*arguments, "--step", "2"]) == 2  # a pipeline has one generator


@pytest.mark.thorough
@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_two_zero3_ranks_equal_one_rank(finished, run, folder, changes, tmp_path, family):
    """shared_score (FLUX.1) and shared_all (SD3), with a kill in between on the two ranks."""
    code, _, err = run(words(family, folder, tmp_path, **changes(family)), small=False)
    assert code == 0, err
    assert difference(*(load_file(f / FINAL) for f in (tmp_path, finished(family)))) < 1e-4
    with checkpoint_weights(tmp_path, 3, opened(tmp_path).model, tmp_path) as file:
        assert difference(load_file(file), load_file(tmp_path / FINAL)) == 0
    for a, b in zip(records(tmp_path), records(finished(family)), strict=True):
        for name in ("dmd_loss", "fake_loss", "reward", "generator_grad_norm", "fake_grad_norm"):
            if name in a:
                # abs: without CFG the first DMD losses, 3e-4, are squares of differences of nearly equal scores
                assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-6), (a["step"], name)
