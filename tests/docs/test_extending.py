"""The page "Adding a method, a family, a reward" names every file of its examples, and a method needs no others."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from dmdr_fast.algorithm.rl.method import Method, option
from dmdr_fast.algorithm.step import dmdr_update
from dmdr_fast.algorithm.streams import Shard, Streams

from ..algorithm.networks import SHAPE, networks, recipe, reward_model, update

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text()
EXAMPLES = {"A method of reinforcement learning": "dpo", "A family of teachers": "flux", "A reward": "hps"}
MOST_EDITED = 4


def rows(title):
    """(file, what goes into it) of the first table under a heading."""
    section = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    return re.findall(r"^\| `([^`]+/[^`]+|[^`]+\.yml)` \| (.*) \|$", section, re.M)


def names(file, example):
    """Whether the code of a file has the example's name as a string of its own, or imports its module."""
    source = file.read_text()
    for node in ast.walk(ast.parse(source)) if example in source else ():
        if isinstance(node, ast.Constant) and node.value == example:
            return True
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and f".{example}:" in node.value:
            return True
        if isinstance(node, ast.ImportFrom) and (node.module or "").endswith(f".{example}"):
            return True
    return False


@pytest.mark.parametrize("title", EXAMPLES)
def test_the_page_names_every_file(title):
    files = [path for path, _ in rows(title)]
    assert len(files) == len(set(files)) and all((ROOT / path).is_file() for path in files)
    package = {path for path in files if path.startswith("dmdr_fast/") and path.endswith(".py")}
    users = ROOT / "dmdr_fast" / "eval"  # runs of the methods that are compared
    found = [f for f in (ROOT / "dmdr_fast").rglob("*.py") if names(f, EXAMPLES[title]) and users not in f.parents]
    own = {path for path in package if Path(path).stem == EXAMPLES[title]}
    assert own and {str(file.relative_to(ROOT)) for file in found} | own == package


def test_few_files_are_edited_for_a_method():
    edited = [path for path, what in rows("A method of reinforcement learning") if not what.startswith("New: ")]
    assert len(edited) <= MOST_EDITED, edited


def test_what_it_quotes_is_in_the_files():
    squeezed = re.sub(r"\s+", "", (ROOT / "dmdr_fast/algorithm/rl/dpo.py").read_text())
    quoted = re.findall(r"^```python\n(.*?)^```", PAGE, re.S | re.M)
    assert len(quoted) == 2 and all(re.sub(r"\s+", "", block) in squeezed for block in quoted)


NUDGE = """
import sys
from dataclasses import dataclass
from dmdr_fast.algorithm.rl.method import Method, option
from dmdr_fast.algorithm.rl.methods import METHODS

@dataclass(frozen=True)
class Nudge(Method):
    name = "nudge"
    uses_reward = True
    strength: float = option(1.0, "How hard it pulls.", gt=0)
    group_size: int = option(2, "Samples that are compared.", gt=0)

METHODS["nudge"] = Nudge
from dmdr_fast import cli, preflight
from dmdr_fast.errors import UserError

config = cli.parse(["--rl.method", "nudge", "--rl.nudge.strength", "2"])[0]
assert config.rl.chosen == Nudge(2.0, 2), config.rl.chosen
shown = cli.build_parser().format_help()
assert "How hard it pulls. (float > 0; default 1.0)" in " ".join(shown.split()), shown
for words in (["--rl.nudge.strength", "0"], ["--rl.nudge.group_size", "1"], ["--rl.nudge.strenght", "2"]):
    try:
        cli.parse(["--rl.method", "nudge", *words])
    except UserError as error:
        print(error)
try:
    preflight._check_groups(cli.parse(["--rl.method", "nudge", "--train.micro_batch_size", "3"])[0])
except UserError as error:
    print(error)
assert "torch" not in sys.modules
"""


def test_a_method_of_one_s_own_is_configured_and_checked():
    done = subprocess.run([sys.executable, "-c", NUDGE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    strength, group, unknown, batch = done.stdout.splitlines()
    assert strength == "rl.nudge.strength: expected float > 0; got 0"
    assert group == "rl.nudge.group_size: 1 leaves nothing to compare; set it to 2 or more"
    assert "rl.nudge.strenght: unknown key" in unknown and "did you mean rl.nudge.strength?" in unknown
    assert batch.startswith("rl.nudge.group_size: 2 does not divide the global batch of 3")


@dataclass(frozen=True)
class Pull(Method):
    """The gradient of pull x0."""

    uses_reward = needs_rollout = True
    pull: float = option(3.0, "How hard.")

    def leaf(self, update, sample, x0):
        return torch.full_like(x0, self.pull), {"pulled": x0.new_tensor(self.pull)}


def test_a_method_of_one_s_own_trains_the_generator():
    """Alone, at weight 0.5, its gradient is that of 0.5 pull sum x0, and x0 = x - v at t = 1 in one step."""
    nets, generator, *_ = networks()
    before = [parameter.detach().clone() for parameter in generator.parameters()]
    numbers = recipe(1, method=Pull(), regularizer="none", reward_weight=0.5)
    reward = reward_model(lambda x: x, lambda images, labels: images.flatten(1).mean(1))
    now = update(nets, numbers, Streams(3), [Shard(0, 4, 4)], reward=reward)
    x = now.streams.noise("rollout", 0, 0, 0, shape=SHAPE, shard=now.shards[0], device=now.device)
    loss = 0.5 * 3.0 * (x - generator(x, torch.ones(4), now.data((0, 0), now.shards[0]).condition)).sum()
    expected = torch.autograd.grad(loss, list(generator.parameters()))
    assert dmdr_update(now).metrics["pulled"] == 3.0
    for parameter, old, gradient in zip(generator.parameters(), before, expected, strict=True):
        torch.testing.assert_close(parameter.detach(), old - 1e-2 * gradient, rtol=1e-5, atol=1e-8)
