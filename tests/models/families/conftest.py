"""The small pipelines, saved once per test process."""

from functools import cached_property

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import DiffusionPipeline

from dmdr_fast.models.families import TextEncoder, open_family
from tests.families import PIPELINES, PROMPTS, VARIANTS, saved


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory):
    """A folder to save small pipelines in: ``saved(name, pipelines)``."""
    return tmp_path_factory.mktemp("pipelines")


class Case:
    """A family beside the diffusers pipeline that it must agree with."""

    def __init__(self, folder):
        self.folder = folder
        self.family = open_family(folder)
        self.name = self.family.name
        self.pipeline = DiffusionPipeline.from_pretrained(folder)
        self.pipeline.set_progress_bar_config(disable=True)
        self.network = getattr(self.pipeline, self.family.folder)
        self.encoder = TextEncoder(self.family, dtype=torch.float32)

    @cached_property
    def entries(self):
        """Of ``PROMPTS``."""
        return self.encoder.encode(PROMPTS)


@pytest.fixture(scope="session")
def cases(pipelines):
    """name -> Case, loaded when first asked for."""
    loaded = {}

    def case(name):
        if name not in loaded:
            loaded[name] = Case(saved(name, pipelines))
        return loaded[name]

    return case


@pytest.fixture(params=[*PIPELINES, *VARIANTS])
def case(request, cases):
    """Every family in turn."""
    return cases(request.param)
