"""The page "Architecture" and the README's layout: files, functions and folders that are there, and all of them."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

from ..test_layers import imported

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
README = (ROOT / "README.md").read_text()
PACKAGE = ROOT / "dmdr_fast"
FOLDERS = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}


def section(title):
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def defined(path):
    """The functions and classes of a file, methods as "Class.method"."""
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        if isinstance(node, ast.ClassDef):
            yield from (f"{node.name}.{each.name}" for each in node.body if isinstance(each, ast.FunctionDef))


def test_every_file_that_is_named_is_there():
    named = re.findall(r"`((?:dmdr_fast|kernels|csrc|tests)/[^`]+)`", PAGE)
    assert len(re.findall(r"^\| [1-9] \| `", PAGE, re.M)) == 6
    assert all((ROOT / path).exists() for path in named), [path for path in named if not (ROOT / path).exists()]


def test_every_function_of_the_update_is_in_a_file_beside_it():
    rows = re.findall(r"^\| \d\. .* \| (.*) \| (.*) \|$", section("One update"), re.M)
    assert len(rows) == 8
    for functions, files in rows:
        found = {name for path in re.findall(r"`(.*?)`", files) for name in defined(path)}
        found |= set(defined("dmdr_fast/algorithm/rl/method.py"))
        assert set(re.findall(r"`(.*?)`", functions)) <= found, functions


def test_every_folder_is_listed_above_those_that_it_imports():
    listed = re.findall(r"^\| `([^`]+)` \|", section("Which folder holds what"), re.M)
    names = [path.partition("/")[2] or path for path in listed]
    assert set(names) >= FOLDERS | {"kernels", "csrc"}
    for i, name in enumerate(names):
        for file in (PACKAGE / name).rglob("*.py"):
            assert not set(imported(file)) & set(names[:i]) - {name.partition("/")[0]}, file


def test_the_layout_of_the_readme_names_every_folder():
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    layout = README.partition("\n## Layout\n")[2].split("```")[1]
    listed = {folder for row in re.findall(r"^(\S+/(?:, \S+/)*) ", layout, re.M) for folder in row.split(", ")}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    folders = {f"{path.partition('/')[0]}/" for path in tracked if "/" in path} - {"dmdr_fast/"}
    assert listed == folders | {f"dmdr_fast/{name}/" for name in FOLDERS}
