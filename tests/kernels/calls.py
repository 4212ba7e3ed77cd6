"""Small calls of every raw function: Triton's interpreter takes milliseconds for a block."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tests.native.calls import MEAN, STD, Call, Draw

SEED = torch.tensor([-3, 1 << 40])


def small_calls(dtype: torch.dtype | None, strided: bool) -> Iterator[Call]:
    """Every raw function, each variant once; ``dtype`` None mixes the dtypes of a call's tensors."""
    sections = (
        _noise_calls,
        _dmd_calls,
        _sde_calls,
        _token_calls,
        _row_calls,
        _lora_calls,
        _one_scale_calls,
        _rope_calls,
        _activation_calls,
        _image_calls,
    )
    for section in sections:  # each draws for itself: what one needs more leaves the others' numbers
        yield from section(Draw(dtype, strided))


def _noise_calls(draw: Draw) -> Iterator[Call]:
    for shape in ((2, 3, 5, 7), (1, 300), (5, 1)):
        label = "x".join(map(str, shape))
        alpha, sigma = draw.per_sample(shape[0]), draw.per_sample(shape[0])
        x = draw(*shape)
        yield Call("renoise_fwd", label, (x, alpha, sigma, draw(*shape), None, 0))
        yield Call("renoise_fwd", f"seed-{label}", (x, alpha, sigma, None, SEED, 5))
        yield Call("renoise_bwd", label, (draw(*shape), alpha, x.dtype))
        yield Call("renoise_scale_bwd", label, (draw(*shape), x))
        yield Call("normal_noise_fwd", label, (list(shape), SEED, 6, x.dtype))
    # A view whose rows do not merge, and the gradient of a sum.
    x = draw(2, 4, 6, 9)[:, 1:3, 2:5]
    yield Call("renoise_fwd", "crop", (x, draw.per_sample(2), draw.per_sample(2), None, SEED, 8))
    yield Call("renoise_bwd", "expanded", (draw(1).expand(2, 3, 5), draw.per_sample(2), x.dtype))


def _dmd_calls(draw: Draw) -> Iterator[Call]:
    batch, shape = 3, (3, 2, 5, 7)
    latents = tuple(draw(*shape) for _ in range(5))
    mask = torch.rand(batch, 1, 5, 7, generator=torch.Generator().manual_seed(1)) > 0.4
    # g / numel is too small for float16.
    scaled = torch.float32 if latents[0].dtype is torch.float16 else latents[0].dtype
    scalars = draw.per_sample(batch)
    base = {
        "sigma": draw.per_sample(batch), "alpha": None, "cfg_tensor": None, "mask": None, "weight": None,
        "cfg_scale": 1.0, "cfg_mode": "standard", "prediction": "flow", "normalizer": "per_sample", "eps": 1e-8,
        "eps_mode": "add", "nan_policy": "zero", "out_dtype": latents[0].dtype, "reduction": "mean", "factor": 0.5,
        "scaled": False,
    }  # fmt: skip
    changes = (
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
    )
    for index, change in enumerate(changes):
        guided = "cfg_scale" in change or "cfg_tensor" in change
        args = (*latents[:4], latents[4] if guided else None, *(base | change).values())
        yield Call("dmd_gradient_fwd", str(index), args)
    loss = torch.tensor(1.5), draw(*shape), torch.tensor(0.3)
    yield Call("dmd_loss_bwd", "", (*loss, latents[0].dtype))


def _sde_calls(draw: Draw) -> Iterator[Call]:
    shape = (2, 3, 5, 7)
    sigma = torch.tensor([1.0, 0.6])
    for kind, eta in (("flow_grpo", 0.7), ("dance", 0.3), ("cps", 0.5)):
        x, v = draw(*shape), draw(*shape)
        after = draw(*shape, dtype=x.dtype)
        yield Call("sde_step_fwd", kind, (x, v, sigma, 0.8 * sigma, after, None, 0, kind, eta))
        yield Call("sde_step_fwd", f"draw-{kind}", (x, v, sigma, 0.8 * sigma, None, SEED, 1, kind, eta))
        # The gradient of a sample's log-prob is about 1 / elements of it: scaled so that fp16 can hold it.
        grads = draw(*shape), draw.per_sample(2) * x[:1].numel(), draw(*shape, dtype=torch.float32)
        step = x, v, sigma, 0.8 * sigma, after, kind, eta
        yield Call("sde_step_bwd", kind, (*grads, *step, True, True))
        yield Call("sde_step_bwd", f"logprob-{kind}", (None, grads[1], None, *step, False, True))


def _token_calls(draw: Draw) -> Iterator[Call]:
    batch, tokens, width = 2, 5, 33
    for full, shape in (
        ((batch, tokens, width), (width,)),
        ((batch, tokens, width), (batch, width)),
        ((batch, tokens, width), (batch, tokens, width)),
        ((batch, 2, 3, width), (batch, 2, 1, width)),  # frames
    ):
        label = f"{list(full)}-by-{list(shape)}"
        x, h, grad, grad_y = (draw(*full) for _ in range(4))
        other_gate = draw(width)
        shift, scale, gate = (draw(*shape) for _ in range(3))
        mean, rstd = draw(*full[:-1], dtype=torch.float32), draw.per_sample(x[..., 0].numel()).view(full[:-1])
        yield Call("layer_norm_modulate_fwd", label, (x, shift, scale, 1e-6, h.dtype))
        yield Call("gated_residual_fwd", label, (x, h, gate))
        yield Call("gated_residual_layer_norm_modulate_fwd", label, (x, h, gate, shift, scale, 1e-6, grad.dtype))
        for weight in (draw(width), None):
            yield Call("rms_norm_scale_fwd", label, (x, weight, scale, 1e-6, h.dtype))
            yield Call("gated_residual_rms_norm_fwd", label, (x, h, gate, weight, 1e-6))
            need_weight = weight is not None
            yield Call("rms_norm_scale_bwd", label, (grad, x, weight, scale, rstd, 1e-6, True, need_weight, True))
        yield Call("rms_norm_scale_bwd", label, (grad, x, draw(width), scale, rstd, 1e-6, False, True, False))
        for need in ((True, True), (True, False), (False, True)):
            yield Call("layer_norm_modulate_bwd", label, (grad_y, x, scale, mean, rstd, 1e-6, shift.dtype, *need))
            yield Call("gated_residual_bwd", label, (grad, h, gate, *need))
        for grads, need in (
            ((grad, grad_y), (True, True, True)),
            ((None, grad_y), (False, True, True)),
            ((grad, None), (True, False, True)),
        ):
            args = (*grads, x, h, other_gate, scale, mean, rstd, 1e-6, shift.dtype, *need)
            yield Call("gated_residual_layer_norm_modulate_bwd", label, args)


def _row_calls(draw: Draw) -> Iterator[Call]:
    batch, tokens = 2, 5
    for width in (1, 48, 100):  # one feature, two full pieces of a row, a last piece that is not full
        x, vector = draw(batch, tokens, width), draw(batch, 1, width)
        stats = draw(batch, tokens, dtype=torch.float32), draw.per_sample(batch * tokens).view(batch, tokens)
        label = f"{width} features"
        yield Call("layer_norm_modulate_fwd", label, (x, vector, vector, 1e-6, x.dtype))
        yield Call("layer_norm_modulate_bwd", label, (x, x, vector, *stats, 1e-6, x.dtype, True, True))


def _lora_calls(draw: Draw) -> Iterator[Call]:
    for tokens, n_in, rank, n_out in (((5,), 33, 3, 17), ((), 20, 17, 16), ((2, 40), 70, 4, 20)):
        x, base, grad = (draw(3, *tokens, size) for size in (n_in, n_out, n_out))
        A, B, low_rank = draw(rank, n_in).mT, draw(rank, n_out), draw(3, *tokens, rank, dtype=torch.float32)
        scale = torch.tensor([0.7, 0.0, 1.3])
        low_rank[1] = 0
        yield Call("multi_lora_fwd", f"rank-{rank}", (x, base, A, B, scale))
        for need in ((True, True, True), (False, True, False)):
            yield Call("multi_lora_bwd", f"rank-{rank}", (grad, x, low_rank, A, B, scale, *need))


def _one_scale_calls(draw: Draw) -> Iterator[Call]:
    x, base, grad = draw(3, 5, 33), draw(3, 5, 17), draw(3, 5, 17)
    A, B, low_rank = draw(33, 3), draw(3, 17), draw(3, 5, 3, dtype=torch.float32)
    for label, scale in (("expanded", torch.tensor([0.7]).expand(3)), ("0-d", torch.tensor(0.7))):  # not copied
        yield Call("multi_lora_fwd", label, (x, base, A, B, scale))
        yield Call("multi_lora_bwd", label, (grad, x, low_rank, A, B, scale, True, True, True))


def _rope_calls(draw: Draw) -> Iterator[Call]:
    batch, tokens, heads_q, heads_k = 2, 3, 3, 2
    for width in (16, 22):
        q, grad_q = (draw(batch, tokens, heads_q, width) for _ in range(2))
        # Keys as attention code often has them: heads before tokens in memory.
        k, grad_k = (draw(batch, heads_k, tokens, width).transpose(1, 2) for _ in range(2))
        weights, angles = (draw(width), draw(width)), (draw(1, tokens, width), draw(1, tokens, width))
        q_rstd = draw.per_sample(batch * tokens * heads_q).view(batch, tokens, heads_q)
        k_rstd = draw.per_sample(batch * tokens * heads_k).view(batch, tokens, heads_k)
        for label, w, a, interleaved in (
            ("interleaved", weights, angles, True),
            ("halves", weights, angles, False),
            ("no-rope", (None, weights[0]), (None, None), True),
            ("no-weights", (None, None), tuple(draw(batch, tokens, width) for _ in range(2)), True),
        ):
            yield Call("qk_norm_rope_fwd", label, (q, k, *w, *a, 1e-6, interleaved))
            rest = (q, k, *w, *a, q_rstd, k_rstd, 1e-6, interleaved)
            yield Call("qk_norm_rope_bwd", label, (grad_q, grad_k, *rest, True))
            yield Call("qk_norm_rope_bwd", f"{label}-k", (None, grad_k, *rest, True))
    odd = draw(1, 2, 2, 15)
    yield Call("qk_norm_rope_fwd", "odd", (odd, odd, None, None, None, None, 1e-6, True))


def _activation_calls(draw: Draw) -> Iterator[Call]:
    packed, grad = 2 * draw(2, 3, 66), draw(2, 3, 33)
    for activation in ("gelu", "gelu_tanh", "silu"):
        for gate_first in (False, True):
            yield Call("gated_activation_fwd", activation, (packed, activation, gate_first))
            yield Call("gated_activation_bwd", activation, (grad, packed, activation, gate_first))


def _image_calls(draw: Draw) -> Iterator[Call]:
    for (batch, channels, height, width), size in (
        ((1, 2, 37, 51), (9, 7)),
        ((1, 1, 6, 5), (11, 12)),
        ((2, 1, 5, 7), (5, 7)),
        ((1, 1, 1, 1), (3, 3)),
    ):
        mean, std = MEAN[:channels], STD[:channels]
        image = _channels_last(draw(batch, channels, height, width)) if channels == 2 else draw(batch, 1, height, width)
        bits = (batch, channels, height, (width + 7) // 8)
        inside = torch.randint(0, 256, bits, dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
        grad = draw(batch, channels, *size)
        for antialias in (True, False):
            label = f"{height}x{width}-{'aa' if antialias else 'plain'}"
            yield Call("preprocess_reward_fwd", label, (image, *size, mean, std, antialias, -1.0, 1.0, True))
            yield Call("preprocess_reward_bwd", label, (grad, inside, width, std, antialias, 0.0, 2.0, image.dtype))


def _channels_last(image: Tensor) -> Tensor:
    return image.contiguous(memory_format=torch.channels_last)
