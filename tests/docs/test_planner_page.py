"""The planner's page shows what the planner says."""

import re
from pathlib import Path

import pytest
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch.nn import functional

from dmdr_fast.cli import CONFIGS
from dmdr_fast.plan.__main__ import main

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
