"""Rewards by name: the built-in kinds, a user's own class, and the errors that say what to change."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dmdr_fast.rewards.registry import KINDS, READS, build_reward, is_differentiable

OWN = str(Path(__file__).with_name("own_rewards.py"))


def test_what_a_kind_reads_is_what_its_page_says():
    page = (Path(__file__).parents[2] / "docs" / "rl" / "rewards.md").read_text(encoding="utf-8")
    said = dict(re.findall(r"^\| `(\w+)` \|[^|]*\| (label|prompt|-) \|", page, re.M))
    assert said == {k: next((what[:-1] for what, kinds in READS.items() if k in kinds), "-") for k in KINDS}


@pytest.mark.parametrize("kind", [f"{OWN}:Brightness", "tests.rewards.own_rewards:Brightness"])
def test_a_user_s_class_by_file_and_by_module(kind):
    images = torch.rand(3, 1, 4, 4)
    reward = build_reward(kind, options={"scale": 2.0}, num_classes=10)
    torch.testing.assert_close(reward(images), 2 * images.mean((1, 2, 3)))
    assert reward.name == "brightness" and is_differentiable(kind)
    assert build_reward(kind, name="mine").name == "mine"


def test_a_file_comes_behind_what_it_imports(tmp_path, monkeypatch):
    """Else pickle, and so the compiler's cache, looks for torch's objects in it, by a name that cannot be imported."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "imported_by_a_reward.py").touch()
    own = tmp_path / "own.py"
    own.write_text("import imported_by_a_reward\n\n\nclass Mine:\n    name, differentiable = 'mine', True\n")
    assert build_reward(f"{own}:Mine").name == "mine"
    order = list(sys.modules)
    assert order.index("imported_by_a_reward") < order.index(f"dmdr_fast_reward:{own.resolve()}")


def test_a_class_without_a_name_gets_its_own(monkeypatch):
    monkeypatch.chdir(Path(OWN).parent)
    assert build_reward("own_rewards.py:PromptLength").name == "PromptLength"
    assert build_reward("own_rewards:PromptLength").name == "PromptLength"
    assert not is_differentiable("own_rewards.py:PromptLength")


def test_built_in_kinds_are_known_without_torch():
    code = (
        "import sys; from dmdr_fast.rewards.registry import KINDS, is_differentiable; "
        "print(*filter(is_differentiable, KINDS), 'torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    *graded, torch_was_loaded = said.split()
    assert torch_was_loaded == "False" and {"digits", "clip_score"} <= set(graded)
    for kind, place in KINDS.items():
        module, _, name = place.partition(":")
        assert getattr(__import__(module, fromlist=[name]), name).differentiable is (kind in graded)


@pytest.mark.parametrize(
    "kind,said",
    [
        ("digit", r"unknown 'digit'; did you mean digits\? .*path/file.py:Name"),
        (f"{OWN}:Bright", r"expected a class Bright in .*, which has Brightness, PromptLength"),
        (f"{OWN}:NoReward", r"expected a reward, a class with `differentiable"),
        ("no_such_package.rewards:Name", r"cannot import no_such_package.rewards: ModuleNotFoundError"),
    ],
)
def test_a_kind_that_is_not_there(kind, said):
    for ask in (build_reward, is_differentiable):
        with pytest.raises(ValueError, match=said):
            ask(kind)


def test_a_file_that_is_not_there_or_does_not_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"reward.terms: kind: .*no file .*gone.py"):
        is_differentiable(f"{tmp_path}/gone.py:Name")
    (tmp_path / "broken.py").write_text("import torch\n1 / 0\n")
    for _ in range(2):  # a module that failed half-way is not kept
        with pytest.raises(ValueError, match=r"broken.py does not run: ZeroDivisionError"):
            is_differentiable(f"{tmp_path}/broken.py:Name")


def test_constructor_arguments_are_checked():
    with pytest.raises(ValueError, match=r"reward.terms: digits: .*unexpected keyword argument 'path'.*it takes cache"):
        build_reward("digits", path="somewhere")
    with pytest.raises(ValueError, match=r"reward.terms: cls: expected path, the folder or hub id"):
        build_reward("classifier", name="cls")
    with pytest.raises(ValueError, match=r"options.dtype: expected one of fp32, bf16, fp16, got 'double'"):
        build_reward("classifier", path="x", options={"dtype": "double"})
    with pytest.raises(ValueError, match=r"reward.terms: gone: its constructor raised OSError: weights are gone"):
        build_reward(f"{OWN}:Unbuildable", name="gone")
    with pytest.raises(FileNotFoundError, match=r"no folder /nowhere"):
        build_reward("classifier", path="/nowhere", options={"dtype": "bf16"}, num_classes=10)
