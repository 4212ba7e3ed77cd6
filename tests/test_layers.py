"""The arrows of the architecture: train -> engine -> algorithm -> ops -> backends -> kernels, and never back."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "dmdr_fast"
# What the modules of a layer may import from the package, besides their own layer.
ALLOWED = {
    "errors.py": set(),
    "built_in.py": set(),
    "config": {"algorithm"},  # what a method is asked: no tensors, see the last test
    "reference.py": set(),
    "backends": {"reference", "errors", "kernels"},
    "ops": {"backends", "reference", "errors"},
    "algorithm": {"ops"},
    "models": {"ops", "built_in", "errors"},
    "rewards": {"ops", "data", "scenes", "errors"},
    "scenes": {"algorithm", "built_in", "cli", "commit", "data", "errors"},
    "data": {"built_in", "cache", "errors", "locks"},
    "eval": {"algorithm", "cli", "commit", "data", "disk", "ops", "scenes", "errors"},
    "patch": {"ops", "models", "errors"},
    "preflight.py": {"algorithm", "config", "data", "deepspeed_json", "errors", "hub", "rewards", "scenes"},
    "deepspeed_json.py": {"cli", "config", "errors"},
    "plan": {
        "algorithm",
        "built_in",
        "cli",
        "config",
        "data",
        "deepspeed_json",
        "models",
        "ops",
        "patch",
        "rewards",
        "scenes",
        "errors",
    },
}


def imported(file):
    """Second parts of every dmdr_fast.X that a file imports, inside functions too; TYPE_CHECKING blocks left out."""
    tree = ast.parse(file.read_text())
    skipped = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in skipped:
            continue
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "dmdr_fast" else [f"dmdr_fast.{a.name}" for a in node.names]
        for name in names:
            if name.startswith("dmdr_fast."):
                yield name.split(".")[1]


@pytest.mark.parametrize("layer", ALLOWED)
def test_a_layer_imports_only_what_is_below_it(layer):
    path = PACKAGE / layer
    files = [path] if path.is_file() else sorted(path.rglob("*.py"))
    for file in files:
        assert set(imported(file)) - {layer.removesuffix(".py")} <= ALLOWED[layer], file


def module_of(file):
    name = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
    return name.removesuffix(".__init__")


def loads(file, modules):
    """The modules of the package that importing a file imports: at its top level, TYPE_CHECKING blocks left out."""
    waiting = list(ast.parse(file.read_text()).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield from ([whole] if whole in modules else [node.module] if node.module in modules else [])
        elif not isinstance(node, ast.FunctionDef):
            waiting += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]


def test_no_module_imports_itself_by_way_of_others():
    files = {module_of(file): file for file in PACKAGE.rglob("*.py")}
    graph = {name: set(loads(file, files)) - {name} for name, file in files.items()}
    assert "dmdr_fast.algorithm.step" in graph["dmdr_fast.engine.trainer"]
    left = dict(graph)
    while leaves := {name for name, needs in left.items() if not needs & left.keys()}:
        left = {name: needs for name, needs in left.items() if name not in leaves}
    assert not left, {name: sorted(needs & left.keys()) for name, needs in left.items()}


def loaded_by(statement):
    code = f"import sys; {statement}; print(*(m for m in sys.modules if '.' not in m))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_the_ops_need_no_triton_deepspeed_or_diffusers():
    assert not loaded_by("import dmdr_fast.ops") & {"triton", "deepspeed", "diffusers", "transformers"}


def test_the_command_line_answers_mistakes_without_torch():
    assert not loaded_by("import dmdr_fast.cli, dmdr_fast.preflight") & {"torch", "deepspeed", "numpy"}
