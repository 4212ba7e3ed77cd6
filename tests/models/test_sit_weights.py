"""Reading checkpoints: what is accepted, what is dropped, and what each refusal says."""

import argparse
import pickle

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from dmdr_fast.models.sit import SiT, load_sit_weights
from dmdr_fast.models.sit_weights import latent_statistics
from dmdr_fast.models.vae import LatentDecoder

SMALL = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 3,
    "hidden_size": 24,
    "depth": 2,
    "num_heads": 3,
    "num_classes": 5,
}


@pytest.fixture
def published():
    """A state dict as a trained model has it: no value is the start's."""
    torch.manual_seed(3)
    return {name: torch.randn_like(value) for name, value in SiT(**SMALL).state_dict().items()}


def assert_loaded(path, want):
    model = SiT(**SMALL)
    load_sit_weights(model, path)
    got = model.state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


def test_safetensors(tmp_path, published):
    save_file(published, tmp_path / "sit.safetensors")
    assert_loaded(tmp_path / "sit.safetensors", published)


@pytest.mark.parametrize("wrap", [None, "ema", "model", "state_dict", "module"])
def test_pt_plain_or_in_a_container(tmp_path, published, wrap):
    torch.save({wrap: published} if wrap else published, tmp_path / "sit.pt")
    assert_loaded(tmp_path / "sit.pt", published)


def test_training_checkpoint_of_repa(tmp_path, published):
    """EMA before the raw weights, DDP's prefix, the projector head, the command line as a Namespace."""
    raw = {f"module.{name}": torch.zeros_like(value) for name, value in published.items()}
    ema = {f"module.{name}": value for name, value in published.items()}
    ema["module.projectors.0.0.weight"] = torch.zeros(2, 2)
    arguments = argparse.Namespace(model="SiT-XL/2", resolution=256)
    torch.save({"model": raw, "ema": ema, "opt": {"state": {}}, "args": arguments, "steps": 7}, tmp_path / "last.pt")
    assert_loaded(tmp_path / "last.pt", published)


def test_early_checkpoints_of_repa(tmp_path, published):
    """The blocks behind the projector are numbered from 0 again, as "decoder_blocks"."""
    early = {name.replace("blocks.1.", "decoder_blocks.0."): value for name, value in published.items()}
    torch.save({"ema": early}, tmp_path / "early.pt")
    assert_loaded(tmp_path / "early.pt", published)


def test_checkpoint_of_repa_e(tmp_path, published):
    """The norm of the latents, BatchNorm2d without affine, goes to the decoder: z sqrt(var) + mean, as its sampler."""
    mean, var = torch.randn(3), torch.rand(3) + 0.5
    norm = {"bn.running_mean": mean, "bn.running_var": var, "bn.num_batches_tracked": torch.tensor(9)}
    torch.save({"ema": published | norm, "vae": {}, "steps": 7}, tmp_path / "repae.pt")
    assert_loaded(tmp_path / "repae.pt", published)
    vae = AutoencoderKL(block_out_channels=(32,), latent_channels=3, scaling_factor=0.5)
    decoder = LatentDecoder(vae)
    decoder.denormalise(latent_statistics(tmp_path / "repae.pt"))
    z = torch.randn(2, 3, 8, 8)
    want = vae.decode(z * var.sqrt().view(1, 3, 1, 1) + mean.view(1, 3, 1, 1)).sample
    torch.testing.assert_close(decoder.decode(z), want)
    torch.save(published, tmp_path / "plain.pt")
    assert latent_statistics(tmp_path / "plain.pt") is None


def test_values_are_cast_to_the_models_dtype(tmp_path, published):
    save_file({name: value.double() for name, value in published.items()}, tmp_path / "sit.safetensors")
    model = SiT(**SMALL).to(torch.bfloat16)
    load_sit_weights(model, tmp_path / "sit.safetensors")
    assert torch.equal(model.pos_embed, published["pos_embed"].to(torch.bfloat16))


@pytest.mark.parametrize(
    "name,shape,remedy",
    [
        ("y_embedder.embedding_table.weight", (1001, 24), "set model.num_classes to 1000"),
        ("y_embedder.embedding_table.weight", (5, 24), "append a row of zeros and keep teacher.cfg_scale at 1; if the"),
        ("pos_embed", (1, 64, 24), "set model.resolution and model.patch_size to give 64 patches"),
        ("final_layer.linear.weight", (24, 24), "set model.learn_sigma"),
        ("blocks.1.mlp.fc1.weight", (96, 32), "set model.hidden_size"),
    ],
)
def test_shape_mismatch_names_key_shapes_and_remedy(tmp_path, published, name, shape, remedy):
    published[name] = torch.zeros(shape)
    torch.save(published, tmp_path / "sit.pt")
    model = SiT(**SMALL)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load_sit_weights(model, tmp_path / "sit.pt")
    message = str(error.value)
    assert name in message and f"expected {list(before[name].shape)}, got {list(shape)}" in message
    assert remedy in message
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_missing_and_unexpected_keys_are_refused(tmp_path, published):
    torch.save({k: v for k, v in published.items() if k != "blocks.1.attn.qkv.bias"}, tmp_path / "short.pt")
    with pytest.raises(ValueError, match=r"lacks blocks\.1\.attn\.qkv\.bias.*expects 32 tensors, got 31"):
        load_sit_weights(SiT(**SMALL), tmp_path / "short.pt")
    deeper = {k.replace("blocks.0", "blocks.2"): v for k, v in published.items()} | published
    torch.save(deeper, tmp_path / "deep.pt")
    with pytest.raises(ValueError, match=r"also has blocks\.2\..* and 7 more.*set model\.depth"):
        load_sit_weights(SiT(**SMALL), tmp_path / "deep.pt")


def test_files_that_are_not_checkpoints_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere\.pt: set the path"):
        load_sit_weights(SiT(**SMALL), tmp_path / "nowhere.pt")
    for name in ("text.pt", "text.safetensors"):
        (tmp_path / name).write_text("not a checkpoint")
        with pytest.raises(ValueError, match=f"{name} is not a readable checkpoint"):
            load_sit_weights(SiT(**SMALL), tmp_path / name)
    for content in ([1, 2], {0: torch.zeros(1)}, {"model": {"depth": 28}}):
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(ValueError, match="holds no state dict"):
            load_sit_weights(SiT(**SMALL), tmp_path / "other.pt")


class Malicious:
    def __reduce__(self):
        return (eval, ("1 + 1",))


def test_a_pickle_with_code_is_refused(tmp_path):
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"model": Malicious()}, protocol=2))
    torch.save({"model": Malicious()}, tmp_path / "evil_zip.pt")
    for name in ("evil.pt", "evil_zip.pt"):
        with pytest.raises(ValueError, match="weights_only=True"):
            load_sit_weights(SiT(**SMALL), tmp_path / name)
