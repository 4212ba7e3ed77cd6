"""Calls of every raw function that libdmdr_cpu has, as plain data: what tests run and compare."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]


@dataclass(frozen=True)
class Call:
    """``name(*args)`` of a backend, and a label for the test's id."""

    name: str
    label: str
    args: tuple

    def __str__(self) -> str:
        return f"{self.name}-{self.label}"


class Draw:
    """Random tensors of one dtype, contiguous or as strided views of larger ones, or of mixed dtypes."""

    def __init__(self, dtype: torch.dtype | None, strided: bool, seed: int = 0) -> None:
        self._dtype, self._strided = dtype, strided
        self._generator = torch.Generator().manual_seed(seed)
        self._drawn = 0

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        self._drawn += 1
        dtype = dtype or self._dtype or DTYPES[self._drawn % 3]
        values = torch.randn(shape, generator=self._generator).to(dtype)
        if not self._strided or not shape:
            return values
        # NaN around the view: what must not be read shows.
        wider = torch.full((*shape[:-1], shape[-1] + 3), math.nan, dtype=dtype)
        wider[..., 1 : shape[-1] + 1] = values
        return wider[..., 1 : shape[-1] + 1]

    def per_sample(self, batch: int, low: float = 0.05, high: float = 0.95) -> Tensor:
        return low + (high - low) * torch.rand(batch, generator=self._generator)


LATENTS = (
    (3, 5),
    (1, 7),
    (2, 3, 5, 7),
    (1, 4, 2, 9, 11),
    (0, 4, 4),
    (2, 0),
    (2, 16, 33, 33),
    (5, 1, 1, 1, 1, 3),
)
TOKENS = ((2, 5, 33), (1, 1, 8), (3, 130, 64), (0, 4, 16), (2, 3, 1040))


def calls(dtype: torch.dtype | None, strided: bool) -> Iterator[Call]:
    """Every function on every shape; ``dtype`` None mixes them."""
    draw = Draw(dtype, strided)
    for shape in LATENTS:
        yield from _latent_calls(draw, shape)
    for shape in TOKENS:
        yield from _token_calls(draw, shape)
    yield from _lora_calls(draw)
    yield from _rope_calls(draw)
    yield from _image_calls(draw)


def _latent_calls(draw: Draw, shape: tuple[int, ...]) -> Iterator[Call]:
    label = "x".join(map(str, shape))
    batch = shape[0]
    seed = torch.tensor([-3, 1 << 40])
    alpha, sigma = draw.per_sample(batch), draw.per_sample(batch)
    x = draw(*shape)
    yield Call("renoise_fwd", label, (x, alpha, sigma, draw(*shape), None, 0))
    yield Call("renoise_fwd", f"seed-{label}", (x, alpha, sigma, None, seed, 5))
    yield Call("renoise_bwd", label, (draw(*shape), alpha, x.dtype))
    yield Call("renoise_scale_bwd", label, (draw(*shape), x))
    yield Call("normal_noise_fwd", label, (list(shape), seed, 6, x.dtype))

    mask = torch.rand(batch, *[1] * (len(shape) - 2), shape[-1]) > 0.4
    latents = tuple(draw(*shape) for _ in range(5))
    for options in _dmd_options(draw, batch, mask, x.dtype):
        uncond = latents[4] if options[2] is not None or options[5] != 1.0 else None
        yield Call("dmd_gradient_fwd", label, (*latents[:4], uncond, sigma, *options[1:]))
    yield Call("dmd_loss_bwd", label, (torch.tensor(1.5), draw(*shape), torch.tensor(0.3), x.dtype))

    for kind, eta in (("flow_grpo", 0.7), ("dance", 0.3), ("cps", 0.5)):
        v, after, next_sigma = draw(*shape), draw(*shape, dtype=x.dtype), 0.8 * sigma
        yield Call("sde_step_fwd", f"{kind}-{label}", (x, v, sigma, next_sigma, after, None, 0, kind, eta))
        yield Call("sde_step_fwd", f"draw-{label}", (x, v, sigma, next_sigma, None, seed, 1, kind, eta))
        # The gradient of a sample's log-prob is about 1 / elements of it: scaled so that fp16 can hold it.
        grads = draw(*shape), draw.per_sample(batch) * x[:1].numel(), draw(*shape, dtype=torch.float32)
        step = (x, v, sigma, next_sigma, after, kind, eta, True, True)
        yield Call("sde_step_bwd", f"{kind}-{label}", (*grads, *step))
        yield Call("sde_step_bwd", f"{kind}-logprob-{label}", (None, grads[1], None, *step))

    packed = 2 * draw(*shape[:-1], 2 * shape[-1])
    for activation in ("gelu", "gelu_tanh", "silu"):
        for gate_first in (False, True):
            yield Call("gated_activation_fwd", f"{activation}-{label}", (packed, activation, gate_first))
            yield Call(
                "gated_activation_bwd",
                f"{activation}-{label}",
                (draw(*shape), packed, activation, gate_first),
            )


def _dmd_options(draw: Draw, batch: int, mask: Tensor, dtype: torch.dtype) -> Iterator[tuple]:
    """(sigma, alpha, cfg_tensor, mask, weight, cfg_scale, ...): each variant once, not their product."""
    base = {
        "sigma": None, "alpha": None, "cfg_tensor": None, "mask": None, "weight": None, "cfg_scale": 1.0,
        "cfg_mode": "standard", "prediction": "flow", "normalizer": "per_sample", "eps": 1e-8, "eps_mode": "add",
        "nan_policy": "zero", "out_dtype": dtype, "reduction": "mean", "factor": 0.5, "scaled": False,
    }  # fmt: skip
    scaled = torch.float32 if dtype is torch.float16 else dtype  # g / numel is too small for float16
    scalars = draw.per_sample(batch)
    for change in (
        {},
        {"cfg_scale": 4.5},
        {"cfg_scale": 4.5, "scaled": True, "out_dtype": scaled},
        {"cfg_scale": 2.5, "cfg_mode": "offset", "prediction": "x0"},
        {"cfg_tensor": 4 * scalars, "prediction": "eps", "alpha": scalars},
        {"prediction": "v", "normalizer": "global", "reduction": "sum", "factor": 1.0},
        {"prediction": "eps", "normalizer": "none", "out_dtype": torch.float32},
        {"mask": mask, "weight": scalars},
        {"mask": mask, "normalizer": "global", "nan_policy": "keep"},
        {"mask": mask, "normalizer": "none", "nan_policy": "zero_sample"},
        {"mask": mask, "reduction": "sum", "scaled": True, "nan_policy": "zero_sample"},
        {"eps": 0.9, "eps_mode": "clamp", "nan_policy": "torch"},
        {"eps_mode": "none"},
    ):
        yield tuple((base | change).values())


def _token_calls(draw: Draw, shape: tuple[int, int, int]) -> Iterator[Call]:
    batch, rows, features = shape
    for full, vector in (
        (shape, (features,)),
        (shape, (batch, features)),
        (shape, shape),
        ((batch, 2, rows, features), (batch, 2, 1, features)),  # frames
    ):
        label = f"{list(full)}-by-{list(vector)}"
        x, h, grad, grad_y = (draw(*full) for _ in range(4))
        shift, scale, gate = (draw(*vector) for _ in range(3))
        mean, rstd = draw(*full[:-1], dtype=torch.float32), draw.per_sample(x[..., 0].numel()).view(full[:-1])
        yield Call("layer_norm_modulate_fwd", label, (x, shift, scale, 1e-6, h.dtype))
        for need in ((True, True), (True, False), (False, True)):
            yield Call("layer_norm_modulate_bwd", label, (grad_y, x, scale, mean, rstd, 1e-6, shift.dtype, *need))
        yield Call("gated_residual_fwd", label, (x, h, gate))
        yield Call("gated_residual_bwd", label, (grad, h, gate, True, True))
        yield Call("gated_residual_bwd", label, (grad, h, gate, False, True))
        yield Call("gated_residual_layer_norm_modulate_fwd", label, (x, h, gate, shift, scale, 1e-6, grad.dtype))
        for grads in ((grad, grad_y), (None, grad_y), (grad, None)):
            for gates in (gate, draw(features)):
                args = (*grads, x, h, gates, scale, mean, rstd, 1e-6, shift.dtype, True, True, True)
                yield Call("gated_residual_layer_norm_modulate_bwd", label, args)
        for weight in (draw(features), None):
            yield Call("rms_norm_scale_fwd", label, (x, weight, scale, 1e-6, h.dtype))
            yield Call("gated_residual_rms_norm_fwd", label, (x, h, gate, weight, 1e-6))
            for need in ((True, weight is not None, True), (True, False, False), (False, weight is not None, False)):
                yield Call("rms_norm_scale_bwd", label, (grad, x, weight, scale, rstd, 1e-6, *need))


def _lora_calls(draw: Draw) -> Iterator[Call]:
    for batch, rows, n_in, rank, n_out in (
        (2, (5,), 33, 3, 17),
        (3, (4, 9), 64, 8, 48),
        (1, (200,), 96, 16, 530),
        (2, (), 7, 1, 5),
        (0, (3,), 4, 2, 4),
        (2, (130,), 1030, 40, 20),
    ):
        label = f"{batch}-{n_in}-{rank}-{n_out}"
        x, base, grad = (draw(batch, *rows, size) for size in (n_in, n_out, n_out))
        A, B, low_rank = draw(n_in, rank), draw(rank, n_out), draw(batch, *rows, rank, dtype=torch.float32)
        scale = draw.per_sample(batch)
        if batch == 3:
            scale[1] = 0
            low_rank[1] = 0
            A = A.mT.contiguous().mT
        yield Call("multi_lora_fwd", label, (x, base, A, B, scale))
        for need in ((True, True, True), (False, True, False), (True, False, False), (False, False, True)):
            yield Call("multi_lora_bwd", label, (grad, x, low_rank, A, B, scale, *need))


def _rope_calls(draw: Draw) -> Iterator[Call]:
    for batch, rows, heads_q, heads_k, features in (
        (2, 5, 3, 3, 64),
        (1, 130, 4, 2, 32),
        (0, 3, 2, 2, 8),
        (2, 3, 1, 2, 10),
    ):
        label = f"{batch}x{rows}x{heads_q}x{features}"
        q, grad_q = (draw(batch, rows, heads_q, features) for _ in range(2))
        # Keys as attention code often has them: heads before tokens in memory.
        k, grad_k = (draw(batch, heads_k, rows, features).transpose(1, 2) for _ in range(2))
        weights, angles = (draw(features), draw(features)), (draw(1, rows, features), draw(1, rows, features))
        q_rstd = draw.per_sample(batch * rows * heads_q).view(batch, rows, heads_q)
        k_rstd = draw.per_sample(batch * rows * heads_k).view(batch, rows, heads_k)
        for w, a, interleaved in (
            (weights, angles, True),
            (weights, angles, False),
            ((None, weights[0]), (None, None), True),
            ((None, None), tuple(draw(batch, rows, features) for _ in range(2)), True),
        ):
            yield Call("qk_norm_rope_fwd", label, (q, k, *w, *a, 1e-6, interleaved))
            rest = (q, k, *w, *a, q_rstd, k_rstd, 1e-6, interleaved)
            yield Call("qk_norm_rope_bwd", label, (grad_q, grad_k, *rest, True))
            yield Call("qk_norm_rope_bwd", label, (None, grad_k, *rest, True))
            yield Call("qk_norm_rope_bwd", label, (grad_q, None, *rest, False))


def _image_calls(draw: Draw) -> Iterator[Call]:
    for (batch, channels, height, width), size in (
        ((2, 3, 37, 51), (24, 17)),
        ((1, 3, 256, 256), (224, 224)),
        ((1, 3, 20, 16), (33, 40)),
        ((2, 1, 5, 7), (5, 7)),
        ((1, 3, 1, 1), (3, 3)),
        ((0, 3, 8, 8), (4, 4)),
        ((1, 2, 9, 600), (7, 5)),
    ):
        mean, std = MEAN[:channels], STD[:channels]
        image = draw(batch, channels, height, width)
        inside = torch.randint(0, 256, (batch, channels, height, (width + 7) // 8), dtype=torch.uint8)
        grad = draw(batch, channels, *size)
        for antialias in (True, False):
            label = f"{height}x{width}-to-{size[0]}x{size[1]}-{'aa' if antialias else 'plain'}"
            yield Call("preprocess_reward_fwd", label, (image, *size, mean, std, antialias, -1.0, 1.0, True))
            yield Call("preprocess_reward_bwd", label, (grad, inside, width, std, antialias, 0.0, 2.0, image.dtype))


def large_calls() -> list[Call]:
    """Calls with more elements than a kernel runs on one thread."""
    sigma = torch.rand(2) * 0.5 + 0.3
    latents = [torch.randn(2, 4, 71, 173) for _ in range(5)]
    tokens = [torch.randn(2, 200, 160) for _ in range(4)]
    shift, scale, gate = (torch.randn(2, 1, 160) for _ in range(3))
    shared = torch.randn(160)
    mean, rstd = torch.randn(2, 200), torch.rand(2, 200)
    heads = [torch.randn(2, 200, 4, 64) for _ in range(4)]
    angles, weight = (torch.randn(1, 200, 64), torch.randn(1, 200, 64)), torch.randn(64)
    head_rstd = torch.rand(2, 200, 4)
    A, B = torch.randn(160, 12), torch.randn(12, 160)
    low_rank = torch.randn(2, 200, 12)
    seed = torch.tensor([1, 2])
    image, inside = torch.randn(2, 3, 150, 130), torch.randint(0, 256, (2, 3, 150, 17), dtype=torch.uint8)
    mean3, std3 = [0.5] * 3, [0.5] * 3
    dmd = (1.0, "standard", "flow", "per_sample", 1e-8, "add", "zero", torch.float32, "mean", 0.5, True)
    steps = [
        ("renoise_fwd", (latents[0], sigma, sigma, None, seed, 3)),
        ("renoise_scale_bwd", (latents[0], latents[1])),
        ("dmd_gradient_fwd", (*latents, sigma, None, None, None, None, *dmd)),
        ("sde_step_fwd", (*latents[:2], sigma, sigma * 0.9, None, seed, 0, "flow_grpo", 0.7)),
        ("multi_lora_fwd", (tokens[0], tokens[1], A, B, sigma)),
        ("multi_lora_bwd", (tokens[0], tokens[1], low_rank, A, B, sigma, True, True, True)),
        ("multi_lora_fwd", (*_bfloat16(tokens[0], tokens[1], A, B), sigma)),
        ("multi_lora_bwd", (*_bfloat16(*tokens[:2]), low_rank, *_bfloat16(A, B), sigma, True, True, True)),
        ("layer_norm_modulate_fwd", (tokens[0], shift, scale, 1e-6, torch.float32)),
        ("layer_norm_modulate_bwd", (tokens[0], tokens[1], scale, mean, rstd, 1e-6, torch.float32, True, True)),
        ("layer_norm_modulate_bwd", (tokens[0], tokens[1], shared, mean, rstd, 1e-6, torch.float32, True, True)),
        (
            "gated_residual_layer_norm_modulate_bwd",
            (*tokens, gate, scale, mean, rstd, 1e-6, torch.float32, True, True, True),
        ),
        ("rms_norm_scale_fwd", (tokens[0], shared, scale, 1e-6, torch.float32)),
        ("gated_residual_rms_norm_fwd", (*tokens[:2], gate, shared, 1e-6)),
        ("rms_norm_scale_bwd", (tokens[0], tokens[1], shared, scale, rstd, 1e-6, True, True, True)),
        ("qk_norm_rope_bwd", (*heads, weight, weight, *angles, head_rstd, head_rstd, 1e-6, True, True)),
        ("preprocess_reward_fwd", (image, 96, 112, mean3, std3, True, -1.0, 1.0, True)),
        (
            "preprocess_reward_bwd",
            (torch.randn(2, 3, 96, 112), inside, 130, std3, True, -1.0, 1.0, torch.float32),
        ),
    ]
    return [Call(name, "large", args) for name, args in steps]


def _bfloat16(*tensors: Tensor) -> list[Tensor]:
    return [tensor.bfloat16() for tensor in tensors]
