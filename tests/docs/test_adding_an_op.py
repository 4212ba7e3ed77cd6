"""The page "Adding an op" names every file of its example, and quotes them as they are."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "adding-an-op.md").read_text()
FILES = re.findall(r"^\| `([^`]+)` \|", PAGE, re.M)
# Files that use the op, or take a part of it.
USERS = ("dmdr_fast/patch/", "tests/patch/", "docs/", "benchmarks/results/", "benchmarks/gpu_check/", "CHANGELOG.md")
SHARING = {
    "dmdr_fast/ops/gated_residual_rms_norm.py",
    "kernels/gated_residual_rms_norm.py",
    "tests/typed_calls.py",
}
MOST = 12


def squeezed(text):
    return re.sub(r"\s+|# fmt: skip", "", text)


def test_the_page_names_every_file_of_the_op_once():
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    grep = ["git", "grep", "--untracked", "-l", "rms_norm_scale", "--", ".", ":!tests/docs"]
    found = subprocess.run(grep, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert sorted(FILES) == sorted(path for path in found if not path.startswith(USERS) and path not in SHARING)
    assert len(FILES) <= MOST


def test_what_it_quotes_is_in_those_files():
    sources = squeezed("".join((ROOT / path).read_text() for path in FILES if path.endswith((".py", ".cpp"))))
    for code in re.findall(r"^```(?:python|cpp)\n(.*?)^```", PAGE, re.S | re.M):
        for block in re.split(r"\n\n\n|\n(?=_fwd = |on_rows)", code):
            assert squeezed(block) in sources, block


def test_the_tests_that_it_runs_are_there():
    for command in re.search(r"^```bash\n(.*?)^```", PAGE, re.S | re.M)[1].splitlines():
        assert all((ROOT / path).exists() for path in re.findall(r"\b(?:tests|benchmarks)/\S*", command)), command
