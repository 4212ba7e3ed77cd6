"""The ops are tested on the reference here; each kernel backend has its own tests against it."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def reference_backend(monkeypatch):
    monkeypatch.setenv("DMDR_FAST_BACKEND", "reference")


@pytest.fixture(autouse=True)
def fixed_draws():
    torch.manual_seed(0)
