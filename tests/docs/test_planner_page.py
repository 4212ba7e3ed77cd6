"""The planner's page shows what the planner says."""

import re
from pathlib import Path

import pytest
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch.nn import functional

from dmdr_fast import cli
from dmdr_fast.cli import CONFIGS
from dmdr_fast.plan.__main__ import main
from dmdr_fast.plan.from_config import workload
from dmdr_fast.plan.plan import make_plan
from dmdr_fast.plan.workload import GB, Hardware

PAGE = (Path(__file__).parents[2] / "docs" / "planner.md").read_text()


@pytest.mark.thorough
def test_the_answer_for_flux_is_the_planner_s(capsys, monkeypatch):
    """In a process, too, in which DeepSpeed has put its linear in the place of torch's."""
    shown = re.search(r"The full answer for FLUX\.1-dev:\n\n```\n(.*?)\n```", PAGE, re.S)[1]
    monkeypatch.setattr(functional, "linear", zero3_linear_wrap)
    assert main(["--config", str(CONFIGS / "flux_dev.yaml"), "--gpus", "8", "--gpu-memory", "80"]) == 0
    assert capsys.readouterr().out.strip() == shown
    peak = re.search(r"fits: ([\d.]+) of 80 GB", shown)[1]
    assert f"| **{peak}** |" in PAGE


@pytest.mark.thorough
@pytest.mark.parametrize("column", range(3))
def test_the_table_of_the_large_recipes_is_the_planner_s(column):
    table = re.search(r"(^\|.*\n)+", PAGE, re.M)[0].replace("*", "")  # the page's first
    rows = (re.split(r" *\| *", line.strip("| ")) for line in table.splitlines()[2:])
    shown = {name: cells[column] for name, *cells in rows}
    plan = make_plan(workload(cli.load(CONFIGS / shown["recipe"].strip("`"))), Hardware())
    kinds = plan.phases[plan.peak_phase]
    found = {
        "weights": kinds["parameters"] / GB,
        "gradients, buckets, optimizer, EMA": sum(kinds[k] for k in ("gradients", "buckets", "optimizer", "EMA")) / GB,
        "decoder and reward models": kinds["decoder and reward"] / GB,
        "the largest phase's own": (kinds["gathered weights"] + kinds["activations"]) / GB,
        "peak, GB": plan.peak / GB,
        "s per update (estimate)": plan.seconds,
    }
    assert {name: shown[name] for name in found} == {name: f"{value:.1f}" for name, value in found.items()}
    assert shown["the phase"] == plan.peak_phase and shown["samples of an update"] == str(plan.samples)
    assert shown["F-units of an update, all micro-batches"] == f"{sum(cost.units for cost in plan.costs.values()):g}"
