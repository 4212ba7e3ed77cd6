"""Tiled and recomputed VAE decoding: the same gradients where they should be, and a smaller graph."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dmdr_fast.models.vae import LatentDecoder, save_decoder_memory
from tests.algorithm.memory import PeakMemory


def decoder(**levers):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=2, latent_channels=4, layers_per_block=1, sample_size=16, **blocks
    ).double()
    save_decoder_memory(vae, **levers)
    return LatentDecoder(vae)


def gradient_and_peak(levers):
    """d(sum of squares of the image)/d(latent), the image, and the peak of computing both; 2 x 2 tiles where tiled."""
    model = decoder(**levers)
    latent = torch.randn(1, 4, 12, 12, dtype=torch.float64, requires_grad=True)
    with PeakMemory() as memory:
        image = model.decode(latent)
        (gradient,) = torch.autograd.grad(image.square().sum(), latent)
    return gradient, image.detach(), memory.peak


def test_recomputing_changes_nothing_but_the_peak():
    runs = {
        (tiling, recompute): gradient_and_peak({"tiling": tiling, "recompute": recompute})
        for tiling in (False, True)
        for recompute in (False, True)
    }
    for tiling in (False, True):
        kept, again = runs[tiling, False], runs[tiling, True]
        torch.testing.assert_close(again[:2], kept[:2], rtol=1e-12, atol=1e-12)
        assert again[2] < 0.6 * kept[2]
    assert runs[True, True][2] < 0.6 * runs[False, True][2]
    assert not torch.equal(runs[True, True][1], runs[False, True][1])  # tiles are blended, and norms see one tile
    assert runs[True, False][1].shape == runs[False, False][1].shape == (1, 3, 24, 24)


@pytest.mark.parametrize(("lever", "message"), [("tiling", "decodes no tiles"), ("recompute", "recomputes no blocks")])
def test_an_autoencoder_that_cannot(lever, message):
    with pytest.raises(ValueError, match=f"Linear {message}: set decoder.{lever} to false"):
        save_decoder_memory(nn.Linear(1, 1), **{"tiling": False, "recompute": False, lever: True})
