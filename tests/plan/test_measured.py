"""The planner against real updates: the predicted peak is within 5 % of the tracked one."""

import json
from dataclasses import replace

import pytest

from dmdr_fast.models.families import FAMILIES
from dmdr_fast.plan.plan import phase_bytes
from dmdr_fast.plan.workload import Adapter, Hardware
from tests.tiers import sampled

from .measured import COMPILED, compiled_workload, measured_peak, workload

ONE = Hardware(gpus=1, reserve=0.0)
CASES = [
    ("sd3", "shared_score", "full", True),
    ("flux", "separate", "selective", False),
    ("sd3", "shared_all", "none", True),
    ("sd3", "separate", "none", False),
    ("sd3", "shared_score", "selective", False),
    ("flux", "shared_score", "none", False),
    ("flux", "shared_score", "full", False),
    ("flux", "shared_all", "selective", True),
]


def biggest(work):
    phases = phase_bytes(work, ONE)
    phase = max(phases, key=lambda name: sum(phases[name].values()))
    return phase, sum(phases[phase].values())


@pytest.mark.parametrize(("family", "sharing", "activation", "lora"), sampled(CASES))
def test_predicted_peak(family, sharing, activation, lora):
    adapter = Adapter(4, FAMILIES[family].lora_targets)
    work = workload(
        family,
        sharing=sharing,
        activation=activation,
        student_lora=adapter if lora else None,
        fake_lora=None if sharing == "separate" else adapter,
    )
    (phase, predicted), measured = biggest(work), measured_peak(work)
    print(f"{phase}: {predicted / 2**20:.2f} MiB predicted, {measured / 2**20:.2f} MiB measured")
    assert predicted == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(("family", "activation"), sampled([("sd3", "none"), ("flux", "none"), ("sd3", "full")]))
def test_predicted_peak_of_fused_blocks(family, activation):
    lora = Adapter(4, FAMILIES[family].lora_targets)
    work = workload(family, sharing="shared_score", activation=activation, fake_lora=lora, blocks="fused")
    (_, predicted), measured = biggest(work), measured_peak(work)
    assert predicted == pytest.approx(measured, rel=0.05)
    assert predicted != pytest.approx(biggest(replace(work, blocks="eager"))[1], rel=0.01)


@pytest.mark.parametrize(("case", "measured"), sampled(json.loads(COMPILED.read_text())["bytes"].items()))
def test_predicted_peak_of_compiled_blocks(case, measured):
    """Against recorded figures: measuring again takes minutes of the compiler."""
    assert biggest(compiled_workload(*case.split()))[1] == pytest.approx(measured, rel=0.05)
