"""Random calls of every op: shapes, ranks, dtypes and their mixtures, memory layouts, variants."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "window", "permuted", "scattered")
SEED = torch.tensor([-3, 1 << 40])


@dataclass(frozen=True)
class Case:
    """``ops.<op>(**tensors, **options)``.

    Attributes:
        dtype: of all latents, tokens or images; None where they differ.
        wrt: the tensors that get a gradient.
    """

    op: str
    dtype: torch.dtype | None
    tensors: dict[str, Tensor]
    options: dict[str, Any]
    wrt: tuple[str, ...]

    def __repr__(self) -> str:
        shapes = [f"{name}={t.dtype}{list(t.shape)} strides {t.stride()}" for name, t in self.tensors.items()]
        return f"{self.op}({', '.join(shapes)}, {self.options})"


class Draw:
    """The choices of one call, and its numbers."""

    def __init__(self, draw: Callable) -> None:
        self.draw = draw
        self.dtype = draw(st.sampled_from((*DTYPES, None)))
        self.layout = draw(st.sampled_from(LAYOUTS))
        self._rng = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

    def one_of(self, *values: Any) -> Any:
        return self.draw(st.sampled_from(values))

    def size(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def batch(self) -> int:
        return self.one_of(2, 3, 1, 0)

    def latent_shape(self) -> tuple[int, ...]:
        """[B, ...], 3-D to 6-D."""
        rank = self.size(2, 5)
        return (self.batch(), *(self.size(1, 9 if rank < 4 else 5) for _ in range(rank)))

    def normal(self, *shape: int) -> Tensor:
        """N(0, 1) in the call's dtype and layout; what lies around a view is NaN."""
        dtype = self.dtype or DTYPES[int(torch.randint(3, (1,), generator=self._rng))]
        values = torch.randn(shape, generator=self._rng).to(dtype)
        if self.layout == "window":
            wider = torch.full((*shape[:-1], shape[-1] + 3), math.nan, dtype=dtype)
            wider[..., 1 : shape[-1] + 1] = values
            return wider[..., 1 : shape[-1] + 1]
        if self.layout == "permuted" and len(shape) > 2:
            return values.transpose(0, -2).contiguous().transpose(0, -2)
        if self.layout == "scattered" and len(shape) > 1:
            return values.transpose(-1, -2).contiguous().transpose(-1, -2)
        return values

    def uniform(self, low: float, high: float, batch: int) -> Tensor:
        """U(low, high) in float32, one per sample."""
        return low + (high - low) * torch.rand(batch, generator=self._rng)

    def mask(self, shape: tuple[int, ...]) -> Tensor:
        """Selects something of every sample."""
        mask = torch.rand((shape[0], *[1] * (len(shape) - 2), shape[-1]), generator=self._rng) > 0.4
        mask[..., 0] = True
        return mask

    def case(self, op: str, tensors: dict[str, Tensor | None], wrt: str = "", **options: Any) -> Case:
        given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        return Case(op, self.dtype, given, options, tuple(name for name in wrt.split() if name in given))


def _normal_noise(d: Draw) -> Case:
    return d.case("normal_noise", {"shape_like": d.normal(*d.latent_shape()), "seed": SEED})


def _renoise(d: Draw) -> Case:
    shape = d.latent_shape()
    given = d.one_of(True, False)
    tensors = {
        "x0": d.normal(*shape), "alpha": d.uniform(0, 1, shape[0]), "sigma": d.uniform(0, 1, shape[0]),
        "noise": d.normal(*shape) if given else None, "seed": None if given else SEED,
    }  # fmt: skip
    return d.case("renoise", tensors, "x0 noise alpha sigma")


def _dmd(d: Draw, op: str, wrt: str, **options: Any) -> Case:
    shape = d.latent_shape()
    scalars = {name: d.uniform(0.1, 0.9, shape[0]) for name in ("sigma", "alpha", "weight")}
    tensors = {name: d.normal(*shape) for name in ("x0", "x_t", "pred_fake", "pred_real")} | {"sigma": scalars["sigma"]}
    options |= {
        "prediction": d.one_of("flow", "eps", "v", "x0"), "normalizer": d.one_of("per_sample", "global", "none"),
    }  # fmt: skip
    options |= {"eps_mode": d.one_of("add", "clamp", "none"), "eps": d.one_of(1e-8, 0.9)}
    cfg = d.one_of("none", "number", "tensor")
    if cfg != "none":
        tensors["pred_real_uncond"] = d.normal(*shape)
        options["cfg_mode"] = d.one_of("standard", "offset")
        options["cfg_scale"] = 3.5 if cfg == "number" else 4 * scalars["weight"]
    tensors["alpha"] = d.one_of(None, scalars["alpha"])
    tensors["weight"] = d.one_of(None, scalars["weight"])
    if shape[0]:
        tensors["mask"] = d.one_of(None, d.mask(shape))
    return d.case(op, tensors, wrt, **options)


def _dmd_gradient(d: Draw) -> Case:
    return _dmd(d, "dmd_gradient", "")


def _dmd_loss(d: Draw) -> Case:
    return _dmd(d, "dmd_loss", "x0", reduction=d.one_of("mean", "sum"), factor=d.one_of(0.5, 1.0))


def _preprocess_reward(d: Draw) -> Case:
    channels = d.size(1, 3)
    image = d.normal(d.batch(), channels, d.size(1, 20), d.size(1, 30))
    options = {"size": (d.size(1, 20), d.size(1, 20)), "antialias": d.one_of(True, False)}
    mean, std = [0.48, 0.46, 0.41][:channels], [0.27, 0.26, 0.28][:channels]
    return d.case("preprocess_reward", {"image": image}, "image", mean=mean, std=std, **options)


def _sde_step_logprob(d: Draw) -> Case:
    shape = d.latent_shape()
    kind = d.one_of("flow_grpo", "dance", "cps")
    sigma = d.uniform(0.3, 0.9, shape[0])
    if shape[0] > 1:
        sigma[0] = 1
    x, v = d.normal(*shape), d.normal(*shape)
    after = d.one_of(None, d.normal(*shape).to(x.dtype))
    tensors = {"x": x, "v": v, "sigma": sigma, "sigma_next": 0.7 * sigma, "next_sample": after}
    tensors["seed"] = SEED if after is None else None
    return d.case("sde_step_logprob", tensors, "x v", kind=kind, eta=0.6)


def _grpo_loss(d: Draw) -> Case:
    count = d.one_of(7, 1, 600)
    rng = torch.Generator().manual_seed(count)
    tensors = {name: 0.1 * torch.randn(count, generator=rng) for name in ("logprob", "old_logprob")}
    tensors["advantage"] = 3 * torch.randn(count, generator=rng)
    return d.case("grpo_loss", tensors, "logprob", clip_low=0.05, clip_high=0.1)


def _modulations(d: Draw, shape: tuple[int, ...], count: int) -> list[Tensor]:
    """Of one layout, that of a random choice of x's dimensions."""
    batch, tokens, width = shape
    layout = d.one_of((batch, width), (width,), (batch, 1, width), (batch, tokens, width))
    return [d.normal(*layout) for _ in range(count)]


def _token_shape(d: Draw) -> tuple[int, int, int]:
    return d.batch(), d.size(1, 6), d.size(9, 40)  # in a narrower row the gradient of a norm is a cancellation


def _layer_norm_modulate(d: Draw) -> Case:
    shape = _token_shape(d)
    shift, scale = _modulations(d, shape, 2)
    tensors = {"x": d.normal(*shape), "shift": shift, "scale": scale}
    return d.case("layer_norm_modulate", tensors, "x shift scale")


def _gated_residual(d: Draw) -> Case:
    shape = _token_shape(d)
    tensors = {"x": d.normal(*shape), "h": d.normal(*shape), "gate": _modulations(d, shape, 1)[0]}
    return d.case("gated_residual", tensors, "x h gate")


def _gated_residual_layer_norm_modulate(d: Draw) -> Case:
    shape = _token_shape(d)
    tensors = {"x": d.normal(*shape), "h": d.normal(*shape), "gate": _modulations(d, shape, 1)[0]}
    tensors["shift"], tensors["scale"] = _modulations(d, shape, 2)
    return d.case("gated_residual_layer_norm_modulate", tensors, "x h gate shift scale")


def _rms_norm_scale(d: Draw) -> Case:
    shape = _token_shape(d)
    tensors = {"x": d.normal(*shape), "weight": d.normal(shape[2]), "scale": _modulations(d, shape, 1)[0]}
    return d.case("rms_norm_scale", tensors, "x weight scale")


def _gated_residual_rms_norm(d: Draw) -> Case:
    shape = _token_shape(d)
    tensors = {"x": d.normal(*shape), "h": d.normal(*shape), "gate": _modulations(d, shape, 1)[0]}
    tensors["weight"] = d.one_of(None, d.normal(shape[2]))
    return d.case("gated_residual_rms_norm", tensors, "x h gate weight")


def _qk_norm_rope(d: Draw) -> Case:
    batch, tokens, width = d.batch(), d.size(1, 5), 2 * d.size(3, 17)
    tensors = {name: d.normal(batch, tokens, d.size(1, 3), width) for name in ("q", "k")}
    if d.one_of(True, False):
        tensors |= {name: d.normal(width) for name in ("q_weight", "k_weight")}
    if d.one_of(True, False):
        table = d.one_of((tokens, width), (batch, tokens, width))
        tensors |= {name: d.normal(*table) for name in ("cos", "sin")}
    return d.case("qk_norm_rope", tensors, "q k q_weight k_weight", interleaved=d.one_of(True, False))


def _packed(d: Draw, op: str) -> Case:
    *outer, width = d.latent_shape()
    return d.case(op, {"packed": d.normal(*outer, 2 * width)}, "packed")


def _multi_lora(d: Draw) -> Case:
    outer = d.batch(), *[d.size(1, 6) for _ in range(d.size(0, 2))]
    n_in, rank, n_out = d.size(8, 40), d.size(1, 20), d.size(8, 40)
    tensors = {
        "x": d.normal(*outer, n_in), "base_out": d.normal(*outer, n_out), "A": d.normal(n_in, rank),
        "B": d.normal(rank, n_out), "scale": d.uniform(0.2, 1.5, outer[0]),
    }  # fmt: skip
    if outer[0] > 1:
        tensors["scale"][1] = 0
    return d.case("multi_lora", tensors, "x base_out A B")


def _strategy(build: Callable[[Draw], Case]) -> st.SearchStrategy[Case]:
    return st.composite(lambda draw: build(Draw(draw)))()


CASES: dict[str, st.SearchStrategy[Case]] = {
    "normal_noise": _strategy(_normal_noise),
    "renoise": _strategy(_renoise),
    "dmd_gradient": _strategy(_dmd_gradient),
    "dmd_loss": _strategy(_dmd_loss),
    "preprocess_reward": _strategy(_preprocess_reward),
    "sde_step_logprob": _strategy(_sde_step_logprob),
    "grpo_loss": _strategy(_grpo_loss),
    "layer_norm_modulate": _strategy(_layer_norm_modulate),
    "gated_residual": _strategy(_gated_residual),
    "gated_residual_layer_norm_modulate": _strategy(_gated_residual_layer_norm_modulate),
    "rms_norm_scale": _strategy(_rms_norm_scale),
    "gated_residual_rms_norm": _strategy(_gated_residual_rms_norm),
    "qk_norm_rope": _strategy(_qk_norm_rope),
    "gelu_mul": _strategy(lambda d: _packed(d, "gelu_mul")),
    "silu_mul": _strategy(lambda d: _packed(d, "silu_mul")),
    "multi_lora": _strategy(_multi_lora),
}
