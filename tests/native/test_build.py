"""The build's messages where something is missing. Configures only; compiles nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CMAKE = shutil.which("cmake")

pytestmark = pytest.mark.skipif(CMAKE is None, reason="needs cmake on PATH")


def configure(tmp_path: Path, *options: str, **env: str) -> subprocess.CompletedProcess:
    command = [CMAKE, "-S", str(ROOT), "-B", str(tmp_path / "build"), *options]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True)


def one_line(text: str) -> str:
    return " ".join(text.split())


def test_without_a_compiler_the_message_says_what_to_install(tmp_path):
    run = configure(tmp_path, CXX=str(tmp_path / "no-such-compiler"))
    assert run.returncode != 0
    assert "found no C++ compiler" in one_line(run.stderr)
    assert "apt install g++" in one_line(run.stderr)


def test_an_unknown_cuda_choice_is_refused(tmp_path):
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    run = configure(tmp_path, "-DDMDR_CUDA=maybe")
    assert run.returncode != 0
    assert "DMDR_CUDA must be AUTO, ON or OFF; got 'maybe'" in one_line(run.stderr)


@pytest.mark.parametrize("architectures", ["native", "80;all"])
def test_only_named_architectures_are_built(tmp_path, architectures):
    run = configure(tmp_path, f"-DDMDR_CUDA_ARCHITECTURES={architectures}")
    assert run.returncode != 0
    message = one_line(run.stderr)
    assert f"must be a list of compute capabilities such as 80;90, got '{architectures}'" in message


def test_cuda_that_is_asked_for_and_missing_is_an_error(tmp_path):
    run = configure(tmp_path, "-DDMDR_CUDA=ON", CUDACXX=str(tmp_path / "no-such-nvcc"))
    assert run.returncode != 0
    message = one_line(run.stderr)
    assert "DMDR_CUDA=ON, but no CUDA compiler was found. Put nvcc on PATH" in message
    assert "DMDR_CUDA=OFF builds the CPU kernels alone" in message
