"""The families run on the backend that is there; draws start from one seed."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")

from tests.patch.families import FAMILIES


@pytest.fixture(autouse=True)
def fixed_draws():
    torch.manual_seed(0)


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]
