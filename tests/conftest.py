"""What all tests share: one thread per process, one cache, and an order that keeps the processes busy to the end."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the suite runs several processes side by side

# Tests that compile, or start processes and wait for them. They come first: at the end short ones fill all workers.
LONG = ("kernels/test_interpreter.py", "eval/test_claims.py", "cuda/", "engine/", "plan/", "benchmarks/", "docs/")
# What a machine of GPUs may lack: there the tests of the kernels, which need none of these, run all the same.
OPTIONAL = {"deepspeed", "diffusers", "hypothesis", "peft", "pydantic", "scipy", "sklearn", "transformers"}
CACHE = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """What is fitted once (a digits teacher, classifiers) is kept for the session, for all its processes."""
    config.addinivalue_line("markers", "timeout(seconds): of pytest-timeout, where it is installed")
    if not hasattr(config, "workerinput"):
        config.stash[CACHE] = os.environ["DMDR_FAST_CACHE"] = tempfile.mkdtemp(prefix="dmdr_fast-tests-")
    # Where diffusers copies the code of exported pipelines to, in each process its own.
    os.environ["HF_MODULES_CACHE"] = f"{os.environ['DMDR_FAST_CACHE']}/modules-{os.getpid()}"


def pytest_unconfigure(config: pytest.Config) -> None:
    if CACHE in config.stash:
        shutil.rmtree(config.stash[CACHE], ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def own_linear() -> Iterator[None]:
    """ZeRO-3 in this process replaces F.linear for good, by one without forward-mode derivatives: put it back."""
    functional = sys.modules.get("torch.nn.functional")  # absent where a test needs no torch
    linear = getattr(functional, "linear", None)
    yield
    if functional is not None:
        functional.linear = linear


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not _is_long(item.path))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    """Skip a file of tests that cannot be imported where one of ``OPTIONAL`` is missing.

    It is not asked about a folder's own conftest.py: such a one calls ``pytest.importorskip`` before it imports.
    """
    report = yield
    cause = report.call.excinfo and report.call.excinfo.value.__cause__
    if isinstance(cause, ModuleNotFoundError) and (cause.name or "").partition(".")[0] in OPTIONAL:
        report.outcome, report.longrepr = "skipped", (str(collector.path), 0, f"Skipped: needs {cause.name}")
    return report


def _is_long(path: Path) -> bool:
    tests = Path(__file__).parent
    return path.is_relative_to(tests) and path.relative_to(tests).as_posix().startswith(LONG)
