"""The shapes that come with the package, and those of a saved pipeline."""

import json

import pytest

from dmdr_fast.cli import CONFIGS, load
from dmdr_fast.errors import UserError
from dmdr_fast.models.vae import save_decoder_memory
from dmdr_fast.plan.from_config import workload
from dmdr_fast.plan.shapes import count, find_shape, published
from tests.plan.measured import FLUX, VAE

SHAPES = list(published())


@pytest.mark.parametrize("shape", SHAPES, ids=[shape.name for shape in SHAPES])
def test_as_many_parameters_as_published(shape):
    """Published counts are rounded, and count the position table that SD3 stores."""
    weights, tables = count(shape)
    assert weights + tables == pytest.approx(shape.parameters, rel=0.035)


def test_a_folder_gives_the_shape_of_its_json_files(tmp_path):
    files = {
        "model_index.json": {
            "_class_name": "FluxPipeline",
            "transformer": ["diffusers", "FluxTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
        "transformer/config.json": FLUX,
        "vae/config.json": VAE,
        "scheduler/scheduler_config.json": {},
    }
    for name, values in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(values))
    shape = find_shape(str(tmp_path))
    assert shape.family == "flux" and shape.depths == (1, 3)
    assert all(p.is_meta for p in shape.build().parameters())
    assert shape.with_depths((2, 1)).depths == (2, 1)


RECIPES = sorted(CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=[recipe.stem for recipe in RECIPES])
def test_a_recipe_s_vae_has_the_levers_it_asks_for(recipe):
    config = load(recipe)
    shape = workload(config).shape
    vae = shape.build_vae()
    assert config.decoder.recompute <= shape.vae_recomputes
    if vae is not None:
        save_decoder_memory(vae, tiling=config.decoder.tiling, recompute=config.decoder.recompute)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match=r"no shape is known for 'no/such'.*qwen-image"):
        find_shape("no/such")
