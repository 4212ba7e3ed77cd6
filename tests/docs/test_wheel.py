"""What a wheel carries beside the modules: the licence, the marker of types, who made it."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import yaml

from dmdr_fast import built_in

ROOT = Path(__file__).parents[2]
BUILD = """
import sys
from scikit_build_core.build import build_wheel
build_wheel(sys.argv[1], {"wheel.cmake": "false", "build-dir": sys.argv[1] + "/build"})
"""


def test_a_wheel_has_the_licence_the_marker_of_types_and_its_metadata(tmp_path):
    """Without the C++ kernels, which take a minute to compile."""
    subprocess.run([sys.executable, "-c", BUILD, str(tmp_path)], cwd=ROOT, check=True, capture_output=True, timeout=60)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        info = next(name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(file.read(info).decode())
        licence = file.read(info.replace("METADATA", "licenses/LICENSE")).decode()
    assert {"dmdr_fast/py.typed", "dmdr_fast/configs/digits.yaml", "dmdr_fast/kernels/renoise.py"} <= names
    source = Path(built_in.__file__).parent
    teacher = (file for file in built_in.PIPELINES["scenes"].rglob("*") if file.is_file())
    assert {f"dmdr_fast/{file.relative_to(source)}" for file in (*teacher, *built_in.PROMPTS.values())} <= names
    assert licence == (ROOT / "LICENSE").read_text()
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Author"] == "The dmdr_fast authors"
    classifiers = metadata.get_all("Classifier")
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 15)} <= set(classifiers)
    assert "Typing :: Typed" in classifiers
    extras = metadata.get_all("Provides-Extra")
    assert {"flash-attn", "memory", "wandb", "parquet", "docs"} <= set(extras)


def test_citation_changelog_and_package_agree_on_the_version():
    from dmdr_fast import __version__

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__ and citation["license"] == "Apache-2.0"
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert f'version = "{__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_public_ci_runs_lint_and_the_tests_on_every_python():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    commands = {step["run"] for job in jobs.values() for step in job["steps"] if "run" in step}
    assert commands == {"make lint", "make docs", "make test"}
    assert jobs["test"]["strategy"]["matrix"]["python"] == [f"3.{minor}" for minor in range(10, 15)]
