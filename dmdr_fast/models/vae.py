"""From latents to images: diffusers' AutoencoderKL, or nothing for pixel-space models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dmdr_fast.models.families.loading import variant_of
from dmdr_fast.models.recompute import set_recompute

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, ModelMixin


class LatentDecoder(nn.Module):
    """A frozen AutoencoderKL: D(z / scaling_factor + shift_factor) of a diffusion model's latent z.

    Both factors come from the VAE's config (0.18215 and none for sd-vae-ft-ema), or from the diffusion model
    (:meth:`denormalise`). Differentiable in z.
    """

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae.requires_grad_(False).eval()
        self.scaling_factor: float | Tensor = vae.config.scaling_factor
        self.shift_factor: float | Tensor = getattr(vae.config, "shift_factor", None) or 0.0

    def denormalise(self, statistics: tuple[Tensor, Tensor] | None) -> None:
        """Take (mean [c], standard deviation [c]) of the VAE's latents, which a REPA-E model sees normalised by them.

        The VAE's own factors are then not used. None changes nothing.
        """
        if statistics is not None:
            mean, deviation = (values.view(1, -1, 1, 1) for values in statistics)
            del self.scaling_factor, self.shift_factor
            self.register_buffer("scaling_factor", 1.0 / deviation)
            self.register_buffer("shift_factor", mean)

    @classmethod
    def from_pretrained(cls, path: str | Path, *, dtype: torch.dtype = torch.float32) -> LatentDecoder:
        """Load a folder or hub id ("stabilityai/sd-vae-ft-ema", DMDR's) with its weights in ``dtype``.

        Raises:
            FileNotFoundError: nothing at ``path``, or weights missing there.
            ValueError: what is there is not an AutoencoderKL.
        """
        remedy = "set decoder.path to a folder with config.json and safetensors, or a hub id that can be reached"
        if not Path(path).exists() and (str(path).startswith(("/", ".", "~")) or str(path).count("/") > 1):
            raise FileNotFoundError(f"VAE: no folder {path}: {remedy}")
        from diffusers import AutoencoderKL  # seconds to import, and optional: pixel-space models do without

        try:
            return cls(AutoencoderKL.from_pretrained(str(path), torch_dtype=dtype, variant=variant_of(Path(path))))
        except OSError as error:
            raise FileNotFoundError(f"VAE: cannot load {path} ({_first_line(error)}): {remedy}") from error
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"VAE: {path} is not an AutoencoderKL ({_first_line(error)}): {remedy}") from error

    def train(self, mode: bool = True) -> LatentDecoder:
        """The decoder stays in evaluation mode, whatever the model around it does."""
        return super().train(False)

    def decode(self, latent: Tensor) -> Tensor:
        """Image [B, C, f H, f W] in about [-1, 1], in the VAE's dtype, of a latent [B, c, H, W]."""
        channels = self.vae.config.latent_channels
        if latent.ndim != 4 or latent.shape[1] != channels:
            raise ValueError(
                f"VAE: latent must be [B, {channels}, H, W], got {list(latent.shape)}: "
                f"set model.channels to {channels}, or decoder.path to the VAE of the model's latents"
            )
        wide = latent.to(torch.promote_types(latent.dtype, self.vae.dtype))
        return self.vae.decode((wide / self.scaling_factor + self.shift_factor).to(self.vae.dtype)).sample


def save_decoder_memory(vae: ModelMixin, *, tiling: bool, recompute: bool) -> None:
    """Less memory for decoding with ``vae``, one of diffusers' autoencoders, with or without grad.

    tiling:     ``enable_tiling``: latents larger than a tile are decoded tile by tile and blended where they overlap;
                nearly the same image.
    recompute:  the blocks of the decoder are recomputed in the backward pass; the same gradients. With tiling a tile is
                recomputed as one, so the graph is that of one tile, where tiles alone would keep the graph of all.

    Raises:
        ValueError: an autoencoder that cannot do it.
    """
    if tiling:
        if not hasattr(vae, "enable_tiling"):
            raise ValueError(f"{type(vae).__name__} decodes no tiles: set decoder.tiling to false")
        vae.enable_tiling()
    if recompute:
        if not getattr(vae, "_supports_gradient_checkpointing", False):
            raise ValueError(f"{type(vae).__name__} recomputes no blocks: set decoder.recompute to false")
        set_recompute(vae, "full")
        if tiling:
            vae.decoder.forward = partial(_recomputed, vae.decoder.forward)


def decoder_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type of ``decoder.dtype`` on ``device``: auto is bf16 on CUDA and fp32 elsewhere."""
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def speed_up_convolutions(vae: ModelMixin, device: torch.device) -> None:
    """On CUDA: weights with the channels last, as tensor cores read them, and cuDNN tries its kernels on every shape.

    A run decodes few shapes, thousands of times each. Otherwise cuDNN transposes around every convolution.
    """
    if device.type == "cuda":
        vae.to(memory_format=torch.channels_last)
        torch.backends.cudnn.benchmark = True


def _recomputed(forward: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(*inputs)
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False)


class IdentityDecoder(nn.Module):
    """For models in pixel space: the latent is the image."""

    def decode(self, latent: Tensor) -> Tensor:
        """``latent`` itself."""
        return latent


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
