"""Several image sizes and given times: any number of ranks, a kill, and the pipeline that comes out."""

import json
import time

import numpy as np
import pytest
from safetensors.torch import load_file

from dmdr_fast import cli
from dmdr_fast.algorithm.streams import Streams
from dmdr_fast.engine.identity import other_run
from dmdr_fast.engine.recipe import recipe_of
from dmdr_fast.errors import UserError
from dmdr_fast.export import export_run
from dmdr_fast.models.export import call_arguments

from .pipeline_runs import config_of, opened, words

FINAL = "final/generator.safetensors"
SIZES = {
    "model__resolution": "[[16, 24], [16, 8], [16, 16]]",
    "student__times": "[0.9, 0.5]",
    "sharing": "shared_score",
    "train__gradient_accumulation": 2,
    "eval__samples": 4,
    "eval__batch_size": 2,
    "eval__teacher_steps": 1,
}
TWO = {"deepspeed__stage": 3, "train__micro_batch_size": 2, "checkpoint__every": 1, "checkpoint__keep": 9}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pipelines")


def arguments(folder, run_dir, **changes):
    given = words("flux", folder, run_dir, **(SIZES | changes))
    at = given.index("--student.steps")
    return given[:at] + given[at + 2 :]


def difference(a, b):
    one, two = (np.concatenate([weights[name].numpy().ravel() for name in a]) for weights in (a, b))
    return np.linalg.norm(one - two) / np.linalg.norm(one)


@pytest.mark.thorough
def test_two_ranks_equal_one_and_a_killed_run_ends_with_the_same_bytes(run, launch, folder, tmp_path):
    one, two, killed = (tmp_path / name for name in ("one", "two", "killed"))
    code, out, err = run(arguments(folder, one), small=False)
    assert code == 0, err
    assert "16 x 24, 16 x 8, 16 x 16 pixels, one drawn for each micro-step" in out
    assert "student    2 step(s) at t = 0.9, 0.5" in out
    code, _, err = run(arguments(folder, two, **TWO), ranks=2, small=False)
    assert code == 0, err
    assert difference(load_file(one / FINAL), load_file(two / FINAL)) < 1e-4
    process = launch(arguments(folder, killed, **TWO), ranks=2, small=False)
    while process.poll() is None and not (killed / "checkpoints/step_00000001/manifest.json").exists():
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert not (killed / FINAL).exists()
    code, out, err = run(arguments(folder, killed, **TWO), ranks=2, small=False)
    assert code == 0 and "resumed from" in out, err
    assert (killed / FINAL).read_bytes() == (two / FINAL).read_bytes()
    assert np.load(two / "samples.npz")["dmdr"].shape == (4, 3, 16, 24)  # of the first size
    export_run(two, tmp_path / "out", dtype="fp32")
    call = call_arguments(tmp_path / "out")
    assert (call["height"], call["width"], call["num_inference_steps"]) == (16, 24, 2)
    assert json.loads((tmp_path / "out/scheduler/scheduler_config.json").read_text())["times"] == [0.9, 0.5]


def test_a_micro_step_has_one_size_and_groups_are_of_one(folder, tmp_path):
    config = config_of("flux", folder, tmp_path, **{k: v for k, v in SIZES.items() if not k.startswith("student")})
    (tmp_path / "config.yaml").write_text(cli.dump(config))
    recipe, streams = recipe_of(config, opened(tmp_path).model), Streams(0)
    assert recipe.shapes == ((4, 8, 12), (4, 8, 4), (4, 8, 8))
    drawn = [recipe.sizes(streams, (step, 0), 4) for step in range(50)]
    assert drawn == [recipe.sizes(Streams(0), (step, 0), 4) for step in range(50)]
    counts = np.bincount(np.concatenate(drawn), minlength=3)
    assert (np.abs(counts - 200 / 3) < 30).all()
    assert [sizes[:1] * 4 for sizes in drawn] == [recipe.sizes(streams, (step, 0), 4, group=2) for step in range(50)]


@pytest.mark.parametrize("method", ["grpo", "dpo"])
def test_groups_of_several_sizes(run, folder, tmp_path, method):
    rl = {"rl__method": method, f"rl__{method}__group_size": 2, "eval__samples": 0}
    code, _, err = run(arguments(folder, tmp_path, **rl), small=False)
    assert code == 0, err


@pytest.mark.parametrize(
    ("written", "sizes"),
    [
        ("16", ((16, 16),)),
        ("[16, 16]", ((16, 16),)),
        ("[768, 1280]", ((768, 1280),)),
        ("[[768, 1280]]", ((768, 1280),)),
        ("[[1024, 1024], [768, 1280]]", ((1024, 1024), (768, 1280))),
    ],
)
def test_how_a_size_is_written(folder, tmp_path, written, sizes):
    config = config_of("flux", folder, tmp_path, model__resolution=written)
    assert config.model.sizes == sizes
    (tmp_path / "again.yaml").write_text(cli.dump(config))
    assert cli.load(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__resolution": "[]"}, "model.resolution: expected"),
        ({"model__resolution": "[16, 24, 32]"}, "model.resolution: expected"),
        ({"model__resolution": "[[16, 16], [16, 16]]"}, "model.resolution: expected"),
        ({"model__resolution": "[16, -8]"}, "model.resolution: expected"),
        ({"model__resolution": "[[16, 16], 24]"}, "model.resolution: expected"),
        ({"student__times": "[1.0, 0.5, 0.25]"}, "student.steps: 2, but student.times names 3"),
        ({"student__times": "[0.5, 1.0]"}, "expected falling times"),
        ({"student__times": "[1.5, 1.0]"}, "student.times: expected"),
        ({"student__times": "[0.5, 0.0]"}, "student.times: expected"),
        ({"student__times": "[0.9, 0.5]", "student__shift": 3}, "student.shift: 3 beside student.times"),
        ({"student__sampler": "euler"}, "student.sampler: expected renoise | ode | cps; got 'euler'"),
        ({"student__sampler": "cps", "student__eta": 1.5}, "student.eta: expected"),
        ({"student__sampler": "ode", "student__rollout": "same_step"}, "student.rollout: same_step trains on fresh"),
    ],
)
def test_what_cannot_be_is_one_line(folder, tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        config_of("flux", folder, tmp_path, **changes)


def test_sdxl_has_no_sampler_of_flow_matching(folder, tmp_path):
    with pytest.raises(UserError, match="cps is a step of flow matching and SDXL predicts eps"):
        config_of("sdxl", folder, tmp_path, student__sampler="cps")


def test_sit_is_square():
    for written in ("[8, 16]", "[[8, 8], [16, 16]]"):
        with pytest.raises(UserError, match="SiT's positions are a table of one square size"):
            cli.parse(["--model.resolution", written])


def test_a_run_is_of_its_sizes_and_times():
    before = {"sharing": "separate", "student.lora.rank": 0, "model.resolution": 16, "student.times": None}
    before |= {"student.sampler": "renoise", "student.eta": 0.5}
    now = before | {"model.resolution": [[16, 16], [16, 24]], "student.times": [0.9, 0.5]}
    assert [line.split()[0] for line in other_run(before, now)] == ["model.resolution", "student.times"]


def test_a_run_is_of_its_sampler():
    before = {"sharing": "separate", "student.lora.rank": 0, "student.sampler": "ode", "student.eta": 0.5}
    assert other_run(before, before | {"student.eta": 0.3}) == []
    now = before | {"student.sampler": "cps"}
    assert other_run(before, now) == ["student.sampler 'ode', this run has 'cps'"]
    assert other_run(now, now | {"student.eta": 0.3}) == ["student.eta 0.5, this run has 0.3"]
