"""Weights with "fp16" in their names are read alike, whole or in shards, beside plain ones or not."""

import shutil

import diffusers
import pytest
import torch

from dmdr_fast.models.export import call_arguments, export_pipeline, load_arguments
from dmdr_fast.models.families import TextEncoder, open_family
from dmdr_fast.models.families.loading import variant_of, weights_of
from dmdr_fast.models.stored import stored_tensors
from tests.families import saved

KINDS = ("plain", "fp16", "both", "fp16 in shards")


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """kind -> a small SD3 pipeline's folder, of the same fp16 values."""
    folder = tmp_path_factory.mktemp("variants")
    pipe = diffusers.DiffusionPipeline.from_pretrained(saved("sd3", folder), torch_dtype=torch.float16)
    shards = {"max_shard_size": "20KB"}
    for kind, calls in zip(
        KINDS, ([{}], [{"variant": "fp16"}], [{"variant": "fp16"}, {}], [{"variant": "fp16"} | shards]), strict=True
    ):
        for arguments in calls:
            pipe.save_pretrained(folder / kind, **arguments)
    return {kind: folder / kind for kind in KINDS}


@pytest.fixture(scope="module")
def plain(pipelines):
    family = open_family(str(pipelines["plain"]))
    return family.load_transformer(torch.float32), family.load_vae(torch.float32), encoded(family)


def encoded(family):
    return TextEncoder(family, dtype=torch.float32).encode(["a red cat"])[0]


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].float(), expected[name].float()) for name in expected)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_every_way_of_reading(pipelines, plain, kind):
    network, vae, embedding = plain
    family = open_family(str(pipelines[kind]))
    assert (variant_of(pipelines[kind] / "transformer") == "fp16") == (kind != "both")
    assert_equal(family.load_transformer(torch.float32).state_dict(), network.state_dict())  # at stage 0
    stored = stored_tensors(weights_of(family.path, family.folder))  # at stage 3
    assert_equal({name: tensor.read() for name, tensor in stored.items()}, network.state_dict())
    assert_equal(family.load_vae(torch.float32).state_dict(), vae.state_dict())
    assert_equal(encoded(family), embedding)


@pytest.mark.parametrize("kind", ["fp16", "fp16 in shards"])
def test_the_export_needs_no_word_about_it(pipelines, plain, tmp_path, kind):
    out = export_pipeline(open_family(str(pipelines[kind])), tmp_path / "out", grid=(1.0, 0.0), size=(16, 16))
    pipe = diffusers.DiffusionPipeline.from_pretrained(out, torch_dtype=torch.float32)
    assert_equal(pipe.vae.state_dict(), plain[1].state_dict())
    assert not list(out.rglob("*fp16*"))


def test_an_export_of_another_dtype_than_the_teachers_runs_as_it_is_said_to(pipelines, tmp_path):
    """Text encoders and VAE lie in it as the teacher has them, in fp16."""
    family = open_family(str(pipelines["plain"]))
    out = export_pipeline(family, tmp_path / "out", grid=(1.0, 0.0), size=(16, 16), dtype=torch.float32)
    pipe = diffusers.DiffusionPipeline.from_pretrained(out, **load_arguments(out))
    pipe.set_progress_bar_config(disable=True)
    assert {pipe.transformer.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float32}
    assert pipe("a red cat", output_type="pt", **call_arguments(out)).images.isfinite().all()


def test_a_missing_shard_is_named(pipelines, tmp_path):
    shutil.copytree(pipelines["fp16 in shards"], tmp_path / "p")
    shard = sorted((tmp_path / "p" / "transformer").glob("*-00002-of-*"))[0]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=rf"transformer lacks shard {shard.name}"):
        open_family(str(tmp_path / "p")).load_transformer(torch.float32)
