"""What is wrong with a pipeline, its prompts or a reward is one line and exit code 2, before training begins."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from dmdr_fast.cli import run_user_command
from dmdr_fast.train import main
from tests.families import saved

from .pipeline_runs import words


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of the FLUX.1 pipeline to harm, and its cache."""
    return tmp_path_factory.mktemp("harmed")


@pytest.fixture
def refused(folder, tmp_path, capfd):
    """refused(**changes) -> the error line of a run that ends with 2 and has trained nothing."""

    def line(family="flux", **changes):
        code = run_user_command(main, words(family, folder, tmp_path / "run", **changes))
        err = capfd.readouterr().err
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert code == 2 and len(lines) == 1 and "Traceback" not in err, err
        assert not (tmp_path / "run" / "log.jsonl").exists()
        return lines[0]

    return line


def copied(folder, tmp_path):
    return shutil.copytree(saved("flux", folder), tmp_path / "flux")


def test_prompts(refused, tmp_path):
    assert "data.prompts: missing; model.family flux needs" in refused(data__prompts="null")
    assert "data.prompts: prompts" in (line := refused(data__prompts=tmp_path / "none.txt")) and "no such file" in line
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a cat"}\n{"caption": "a dog"}\n')
    assert "line 2 has no key 'prompt'; it has 'caption'" in refused(data__prompts=tmp_path / "bad.jsonl")
    (tmp_path / "long.txt").write_text("a cat\n" + "very " * 40 + "long\n\nsea\n" + "very " * 50)
    line = refused(data__prompts=tmp_path / "long.txt", data__max_length=32)
    assert "data.prompts: the text encoder takes 32 tokens, but line 2 has " in line and ", line 5 has " in line
    assert "data.too_long" in line
    (tmp_path / "longer.txt").write_text("very " * 40)
    line = refused(data__prompts=tmp_path / "longer.txt", data__max_length=32, data__too_long="skip")
    assert "data.prompts: every prompt has more than the 32 tokens" in line
    line = refused(data__max_length=32, data__negative_prompt="very " * 40)
    assert "data.negative_prompt: the text encoder takes 32 tokens, but it has " in line


def test_scenes_that_are_cut_off(refused, tmp_path):
    (tmp_path / "scenes.txt").write_text("a red seven to the left of a green two")
    options = {"data__max_length": 5, "data__too_long": "truncate", "reward__terms": '[{"kind": "scenes"}]'}
    line = refused(data__prompts=tmp_path / "scenes.txt", **options)
    assert "data.too_long: data.prompts as truncate leaves them, raise data.max_length" in line
    assert "which the reward scenes reads" in line


def test_pipelines(refused, folder, tmp_path):
    assert "teacher.pipeline: no such folder: /nowhere/flux" in refused(teacher__pipeline="/nowhere/flux")
    assert "model.family flux" in refused("sd3", teacher__pipeline=saved("flux", folder))
    assert "model.resolution: flux: height and width must be multiples of 4" in refused(model__resolution=18)
    pipeline = copied(folder, tmp_path)
    index = json.loads((pipeline / "model_index.json").read_text())
    (pipeline / "model_index.json").write_text(json.dumps(index | {"_class_name": "KandinskyPipeline"}))
    line = refused(teacher__pipeline=pipeline)
    assert "KandinskyPipeline is of no family" in line and "FluxPipeline" in line


def test_weights(refused, folder, tmp_path):
    pipeline = copied(folder, tmp_path)
    weights = pipeline / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    weights.unlink()
    assert "transformer holds no weights" in refused(teacher__pipeline=pipeline)
    names = sorted(tensors)
    places = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    save_file({n: tensors[n] for n in names[::2]}, pipeline / "transformer" / "part-0.safetensors")
    index = {"metadata": {}, "weight_map": places}
    (pipeline / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert "transformer lacks shard part-1.safetensors (1 of 2 missing)" in refused(teacher__pipeline=pipeline)
    (pipeline / "text_encoder_2" / "model.safetensors").unlink()
    shutil.copy(saved("flux", folder) / "transformer" / "diffusion_pytorch_model.safetensors", weights)
    (weights.parent / "diffusion_pytorch_model.safetensors.index.json").unlink()
    assert "text_encoder_2 holds no weights" in refused(teacher__pipeline=pipeline)


def test_a_cache_of_another_encoder(refused, folder, tmp_path):
    cache = tmp_path / "cache"
    (tmp_path / "empty").mkdir()
    terms = json.dumps([{"kind": "clip_score", "path": str(tmp_path / "empty")}])
    assert "unreadable" not in refused(data__cache=cache, reward__terms=terms)
    (key,) = cache.glob("text-*/key.json")
    key.write_text(json.dumps({"pipeline": "OtherPipeline"}))
    assert "its key.json is another encoder's" in refused(data__cache=cache)


def test_rewards(refused, tmp_path):
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text("{broken")
    line = refused(reward__terms=json.dumps([{"kind": "clip_score", "path": str(tmp_path / "clip")}]))
    assert "reward" in line and "clip" in line
    assert "digits are 8x8x1 images" in refused(reward__terms="[{kind: digits}]")


def test_shared_all(refused):
    assert "student.lora.rank: 0; with sharing shared_all" in refused(sharing="shared_all")
