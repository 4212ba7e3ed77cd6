"""The decoder is diffusers' own on rescaled latents, and differentiable."""

import pytest
import torch

from dmdr_fast.models.vae import IdentityDecoder, LatentDecoder, decoder_dtype, speed_up_convolutions

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module", params=[None, 0.1159])
def folder(request, tmp_path_factory):
    """A small AutoencoderKL (factor 2, 4 latent channels), with and without a shift."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.3611,
        shift_factor=request.param,
    )
    path = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(path)
    return path, vae.eval(), request.param or 0.0


def test_decode_equals_diffusers(folder):
    path, vae, shift = folder
    decoder = LatentDecoder.from_pretrained(path)
    latent = torch.randn(2, 4, 6, 6)
    want = vae.decode(latent / 0.3611 + shift).sample
    got = decoder.decode(latent)
    assert got.shape == (2, 3, 12, 12) and torch.equal(got, want)


def test_gradient_reaches_the_latent_and_no_weight(folder):
    decoder = LatentDecoder.from_pretrained(folder[0]).double()
    latent = torch.randn(1, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    direction, weight = torch.randn_like(latent), torch.randn(1, 3, 8, 8, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((decoder.decode(latent) * weight).sum(), latent)
    step = 1e-5 * direction
    with torch.no_grad():
        difference = ((decoder.decode(latent + step) - decoder.decode(latent - step)) * weight).sum() / 2e-5
    torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-6, atol=1e-8)
    assert not any(p.requires_grad for p in decoder.parameters())


def test_stays_in_evaluation_mode_and_keeps_dtype(folder):
    decoder = LatentDecoder.from_pretrained(folder[0], dtype=torch.bfloat16)
    decoder.train()
    assert not any(module.training for module in decoder.modules())
    assert decoder.decode(torch.randn(1, 4, 4, 4)).dtype == torch.bfloat16


def test_missing_or_wrong_weights_are_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere: set decoder.path"):
        LatentDecoder.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"cannot load .*set decoder.path"):
        LatentDecoder.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((folder[0] / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match=r"cannot load .*set decoder.path"):
        LatentDecoder.from_pretrained(tmp_path)


def test_latent_of_another_model_is_refused(folder):
    decoder = LatentDecoder.from_pretrained(folder[0])
    with pytest.raises(
        ValueError, match=r"latent must be \[B, 4, H, W\], got \[1, 16, 4, 4\]: set model.channels to 4"
    ):
        decoder.decode(torch.randn(1, 16, 4, 4))


def test_identity_decoder_is_the_identity():
    latent = torch.randn(2, 1, 8, 8)
    assert IdentityDecoder().decode(latent) is latent


@pytest.mark.parametrize(("name", "device", "dtype"), [
    ("auto", "cuda", torch.bfloat16), ("auto", "cpu", torch.float32), ("fp32", "cuda", torch.float32),
    ("bf16", "cpu", torch.bfloat16),
])  # fmt: skip
def test_the_type_of_the_decoding(name, device, dtype):
    assert decoder_dtype(name, torch.device(device)) == dtype


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_convolutions_on_cuda_have_their_channels_last(folder, monkeypatch, device):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    decoder, latent = LatentDecoder.from_pretrained(folder[0]), torch.randn(2, 4, 6, 6)
    want = decoder.decode(latent)
    speed_up_convolutions(decoder.vae, torch.device(device))  # the weights themselves are on the CPU
    weight = decoder.vae.decoder.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == (device == "cuda")
    assert torch.backends.cudnn.benchmark == (device == "cuda")
    torch.testing.assert_close(decoder.decode(latent), want)
