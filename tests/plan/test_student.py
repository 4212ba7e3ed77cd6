"""A generator that is another network than its teacher's: each role is counted by its own."""

import json
from dataclasses import replace

import diffusers
import pytest

from dmdr_fast.cli import CONFIGS, parse
from dmdr_fast.errors import UserError
from dmdr_fast.plan.__main__ import main
from dmdr_fast.plan.advice import changes
from dmdr_fast.plan.cost import costs, forward_flops
from dmdr_fast.plan.disk import checkpoint_bytes
from dmdr_fast.plan.from_config import workload
from dmdr_fast.plan.shapes import Shape, find_shape
from dmdr_fast.plan.sweep import sweep
from dmdr_fast.plan.trace import update_peaks
from dmdr_fast.plan.workload import Adapter, Hardware, Workload, Zero
from dmdr_fast.plan.zero import engines, resident, trained_by

from . import measured
from .test_measured import biggest

TEACHER = measured.SHAPES["sd3"]
SMALLER = {"num_layers": 2, "num_attention_heads": 2, "caption_projection_dim": 48, "dual_attention_layers": []}
STUDENT = Shape("smaller", "sd3", json.dumps(measured.SD3 | SMALLER), TEACHER.vae, TEACHER.length)
LORA = Adapter(4, TEACHER.opened().lora_targets)
LARGE = ["--config", str(CONFIGS / "sd35_large.yaml")]
MEDIUM = ["--student.pipeline", "stabilityai/stable-diffusion-3.5-medium"]


def small(**settings):
    return measured.workload("sd3", student=STUDENT, fake_lora=LORA, **settings)


def parameters(config):
    made = diffusers.SD3Transformer2DModel(**{name: value for name, value in config.items() if name[0] != "_"})
    return sum(p.numel() for p in made.parameters()), sum(b.numel() for b in made.buffers())


def test_state_is_that_of_the_real_networks():
    """Of 4 GPUs under stage 3 in bf16: 20 bytes a parameter of the generator, 2 of the base, 16 of its LoRA."""
    (own, own_tables), (base, tables) = parameters(measured.SD3 | SMALLER), parameters(measured.SD3)
    work = small(dtype="bf16", zero=Zero(stage=3, reduce_bucket=0))
    adapter = trained_by(work, "fake")
    assert own < 0.3 * base
    assert engines(work)["generator"].weights == trained_by(work, "generator") == own
    assert engines(work)["fake"].weights == base + adapter
    state = (20 * own + 2 * base + 16 * adapter) / 4 + 2 * (own_tables + tables)
    assert sum(resident(work, 4).values()) == pytest.approx(state)
    frozen = resident(replace(work, reference="frozen"), 4)  # a KL's: a copy of the generator as RL starts
    assert frozen["parameters"] - resident(work, 4)["parameters"] == pytest.approx(2 * own / 4)
    assert checkpoint_bytes(work) == 12 * (own + adapter) + 4 * own


def test_time_is_that_of_each_phases_network():
    work, gpu = small(student_steps=4), Hardware(gpus=1)
    taught, own = (costs(replace(work, shape=shape, student=None), gpu) for shape in (TEACHER, STUDENT))
    assert forward_flops(work).sum() > 3 * forward_flops(work, "generator").sum()
    for phase, cost in costs(work, gpu).items():
        if phase != "optimizer step":
            assert cost == (own if phase in ("rollout", "generator update") else taught)[phase]


@pytest.mark.thorough
@pytest.mark.parametrize("depths", [(4, 1), (9, 1)])
def test_activations_are_those_of_each_phases_network(depths):
    """Few blocks traced and the rest extrapolated, in two networks at once."""
    work = small(activation="none", zero=Zero(stage=2))
    work = replace(work, shape=TEACHER.with_depths(depths), student=STUDENT.with_depths((7, 0)))
    taught, own = (update_peaks(replace(work, shape=shape, student=None)) for shape in (work.shape, work.student))
    for key, kinds in update_peaks(work).items():
        assert kinds == (own if key[0] in ("rollout", "generator update") else taught)[key]


@pytest.mark.thorough
@pytest.mark.parametrize("sharing", ["shared_score", "separate"])
def test_predicted_peak(sharing):
    work = small(sharing=sharing, activation="none")
    work = work if sharing == "shared_score" else replace(work, fake_lora=None)
    assert biggest(work)[1] == pytest.approx(measured.measured_peak(work), rel=0.05)


@pytest.mark.thorough
def test_no_sharing_with_the_teacher_is_proposed():
    work = small(sharing="separate", activation="none", zero=Zero(stage=2))
    assert not any("shared_all" in change.keys for change in changes(work))
    plans = sweep(work, Hardware(), activations=["full"], batches=[1])
    assert [plan.work.sharing for plan in plans] == ["separate", "shared_score"]


def test_the_configuration_reaches_the_workload():
    work = workload(parse([*LARGE, *MEDIUM])[0])
    assert (work.shape.name, work.student.name) == ("sd3.5-large", "sd3.5-medium")
    lora = workload(parse([*LARGE, *MEDIUM, "--student.lora.rank", "8"])[0])
    assert lora.student_lora == Adapter(8, find_shape("sd3.5-medium").opened().lora_targets)
    sizes = {"weights": "x", "hidden_size": 16, "depth": 1, "num_heads": 2}
    digits = workload(parse(["--config", str(CONFIGS / "digits.yaml"), "--student.model", json.dumps(sizes)])[0])
    assert digits.student.config == digits.shape.config | {"hidden_size": 16, "depth": 1, "num_heads": 2}
    assert trained_by(digits, "generator") < trained_by(Workload(digits.shape), "generator")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*LARGE, *MEDIUM, "--sharing", "shared_all"], "--sharing: shared_all has one network, and the generator is"),
        ([*LARGE, "--student.pipeline", "nowhere"], "student.pipeline: no shape is known for 'nowhere'"),
        ([*LARGE, "--student.pipeline", "flux.1-dev"], "it is of model.family flux, and the teacher of sd3"),
        ([*LARGE, *MEDIUM, "--model", "flux.1-dev"], "--model: flux.1-dev is a flux, and the generator's own network"),
    ],
)
def test_what_does_not_fit_is_one_line(arguments, message):
    with pytest.raises(UserError) as found:
        main(arguments)
    assert message in str(found.value)


@pytest.mark.thorough
def test_the_answer_for_a_smaller_student(capsys):
    assert main([*LARGE, *MEDIUM]) == 0
    said = capsys.readouterr().out
    assert "sd3.5-large to sd3.5-medium at 1024 px" in said and "generator trains all weights (2.2" in said
