"""The planner's page shows what the planner says."""

import re
import subprocess
import sys
from pathlib import Path

from dmdr_fast.cli import CONFIGS

PAGE = (Path(__file__).parents[2] / "docs" / "planner.md").read_text()


def test_the_answer_for_flux_is_the_planner_s():
    shown = re.search(r"The full answer for FLUX\.1-dev:\n\n```\n(.*?)\n```", PAGE, re.S)[1]
    # In a process of its own, as a reader runs it: 0.03 GB of a trace depend on what ran before it.
    command = [sys.executable, "-m", "dmdr_fast.plan", "--config", str(CONFIGS / "flux_dev.yaml"), "--gpus", "8"]
    run = subprocess.run([*command, "--gpu-memory", "80"], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == shown
    peak = re.search(r"fits: ([\d.]+) of 80 GB", shown)[1]
    assert f"| **{peak}** |" in PAGE
