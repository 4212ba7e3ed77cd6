"""What the pages must list whole: ops, environment variables, console scripts, folders of the package."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

from dmdr_fast import ops, patch
from dmdr_fast.placement import LAUNCHERS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()
PROJECT = (ROOT / "pyproject.toml").read_text()
VARIABLE = re.compile(r"[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+|RANK")


def literals(source: str) -> set[str]:
    """Names of variables in a module that reads the environment: as strings, or as keywords of ``environ.update``."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
        elif isinstance(node, ast.keyword) and node.arg:
            found.add(node.arg)
    return {name for name in found if VARIABLE.fullmatch(name)}


def variables() -> set[str]:
    """Every environment variable that the package, its kernels, its build and its launchers' places read."""
    found = {name for names in LAUNCHERS.values() for name in names} - {""}
    for folder in ("dmdr_fast", "kernels"):
        for file in (ROOT / folder).rglob("*.py"):
            if "environ" in (source := file.read_text()) or "getenv" in source:
                found |= literals(source)
    for file in [*(ROOT / "csrc").rglob("*.cpp"), *(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cu")]:
        found |= set(re.findall(r'getenv\("(\w+)"\)', file.read_text()))
    found |= set(re.findall(r"environment variable ([A-Z]\w*)", (ROOT / "CMakeLists.txt").read_text()))
    found |= set(re.findall(r'env = "(\w+)"', PROJECT))
    return found


def listed() -> set[str]:
    """First cells of the tables of docs/environment.md."""
    rows = re.findall(r"^\| (`[^|]*`) \|", (DOCS / "environment.md").read_text(), re.M)
    return {name for cell in rows for name in re.findall(r"`(\w+)`", cell)}


def test_every_variable_is_on_its_page_and_no_other():
    read, page = variables(), listed()
    assert read - page == set(), "read by the package and not in docs/environment.md"
    assert page - read == set(), "in docs/environment.md and read by nothing"


def test_a_variable_that_is_new_is_found():
    assert literals("os.environ.get('NEW_ONE', 'x'); os.environ.update(RANK='0')") == {"NEW_ONE", "RANK"}


def public() -> dict[str, object]:
    """Everything that the API page documents, by the path where it is defined: a module may have the op's own name."""
    modules = [got for got in vars(ops.nn).values() if getattr(got, "__module__", "") == ops.nn.__name__]
    found = [getattr(ops, name) for name in ops.__all__ if name != "nn"] + modules
    found += [getattr(patch, name) for name in patch.__all__ if name != "OPS"]
    return {f"{got.__module__}.{got.__qualname__}": got for got in found}


PUBLIC = public()


def test_every_public_op_is_on_the_api_page_once():
    shown = re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(), re.M)
    assert sorted(shown) == sorted(PUBLIC)


@pytest.mark.parametrize("path", sorted(PUBLIC))
def test_markdown_shows_a_docstring_as_it_is_meant(path):
    """An argument's text that begins with > would be a quotation; roles are of another markup."""
    text = inspect.getdoc(PUBLIC[path])
    assert not re.search(r"^\s*(?:\w+(?:, \w+)*: )?>(?!>> )", text, re.M)
    assert not re.search(r":(?:func|class|meth|mod|data):`", text)
    assert not re.search(r"^Returns:\n    [^:\n]*: ", text, re.M), "the words before a colon would be the type"


@pytest.mark.parametrize("path", sorted(path for path, got in PUBLIC.items() if inspect.isfunction(got)))
def test_a_public_op_names_its_arguments_results_and_errors(path):
    sections = set(re.findall(r"^(\w+):$", inspect.getdoc(PUBLIC[path]), re.M))
    assert {"Args", "Returns", "Raises"} <= sections


def test_every_console_script_is_on_a_page_and_in_the_readme():
    scripts = re.findall(r'^(dmdr-\w+) = "', PROJECT, re.M)
    pages = "".join(page.read_text() for page in DOCS.rglob("*.md"))
    assert scripts
    for script in scripts:
        assert f"{script} " in pages and f"{script} " in README, script


def test_the_readme_s_layout_has_every_folder_of_the_package():
    layout = README.partition("## Layout")[2]
    for file in (ROOT / "dmdr_fast").glob("*/__init__.py"):
        assert f"dmdr_fast/{file.parent.name}/" in layout, file.parent.name


def test_every_extra_of_a_user_is_in_the_readme():
    extras = re.findall(
        r"^([\w-]+) = \[", PROJECT.partition("[project.optional-dependencies]")[2].partition("\n[")[0], re.M
    )
    install = README.partition("## Install")[2].partition("\n## ")[0]
    for extra in set(extras) - {"dev", "docs"}:
        assert f"`{extra}`" in install, extra


def test_every_target_of_make_is_in_the_readme():
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    for target in targets:
        assert f"make {target}" in README, target
