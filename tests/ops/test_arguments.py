"""Each argument of a valid call made wrong, one at a time: the message names it, expected and got."""

from __future__ import annotations

import math

import pytest
import torch

from dmdr_fast import ops
from tests.ops.calls import LATENT, latent, valid_calls

NAN, INF = math.nan, math.inf
BF16 = torch.bfloat16
FLOAT_TYPES = "expected float32, bfloat16, float16 or float64, got int64"
INTEGERS = torch.zeros(LATENT, dtype=torch.int64)
ON_META = torch.empty(LATENT, device="meta")


def per_sample(**bad):
    """A [3] tensor that starts with the bad value."""
    (value,) = bad.values()
    return torch.tensor([value, 0.25, 0.125])


def latents(op, *names):
    for name in names:
        yield op, {name: latent(3, 4, 6)}, rf"{name}: expected shape \[3, 4, 5\] like \w+, got \[3, 4, 6\]"
        yield op, {name: latent(2, 4, 5)}, rf"{name}: expected shape \[3, 4, 5\] like \w+, got \[2, 4, 5\]"
        yield op, {name: INTEGERS}, f"{name}: {FLOAT_TYPES}"
        yield op, {name: 1.0}, f"{name}: expected a tensor, got float"
        yield op, {name: ON_META}, f"{name}: expected on cpu like .*, got meta"


def scalars(op, name, minimum=None):
    yield op, {name: torch.rand(4)}, rf"{name}: expected a number or shape \[3\].* got \[4\]"
    yield op, {name: torch.rand(3, 1)}, rf"{name}: expected a number or shape \[3\].* got \[3, 1\]"
    yield op, {name: "1"}, f"{name}: expected a number, got str"
    yield op, {name: torch.tensor([1, 1, 1])}, f"{name}: {FLOAT_TYPES}"
    for bad in (NAN, INF, -INF):
        yield op, {name: bad}, f"{name}: expected a finite number.*, got {bad}"
        yield op, {name: per_sample(bad=bad)}, f"{name}: expected a finite number.*, got values from"
    if minimum is not None:
        yield op, {name: minimum - 1.0}, f"{name}: expected a finite number of at least {minimum}"
        yield (
            op,
            {name: per_sample(bad=minimum - 1.0)},
            f"{name}: expected a finite number of at least {minimum}",
        )


def numbers(op, name, *bad):
    yield op, {name: "1"}, f"{name}: expected a number, got str"
    yield op, {name: torch.tensor(1.0)}, f"{name}: expected a number, got Tensor"
    for value in (NAN, INF, *bad):
        yield op, {name: value}, f"{name}: expected a finite number.*, got {value}"


def seeds(op, **without):
    yield op, {**without, "seed": torch.tensor([1.0, 2.0])}, "seed: expected an int64 tensor .* got float32"
    yield op, {**without, "seed": (1, 2)}, "seed: expected an int64 tensor .* got tuple"
    yield op, {**without, "seed": torch.tensor([1, 2, 3])}, r"seed: expected shape \[2\].* got \[3\]"
    yield (
        op,
        {**without, "seed": torch.empty(2, dtype=torch.int64, device="meta")},
        "seed: expected on cpu .* meta",
    )
    yield op, {"offset": -1}, "offset: expected 0 or more, got -1"
    yield op, {"offset": 1.0}, "offset: expected an int .* got float"


def dmd(op):
    yield op, {"x0": latent(3)}, r"x0: expected at least 2 dimensions, got shape \[3\]"
    yield from latents(op, "x_t", "pred_fake", "pred_real", "pred_real_uncond")
    yield from scalars(op, "sigma", minimum=0)
    for name in ("alpha",):
        for _, change, match in scalars(op, name, minimum=0):
            yield op, {**change, "prediction": "eps"}, match
    yield from scalars(op, "cfg_scale")
    yield from scalars(op, "weight")
    yield from numbers(op, "eps", -1.0)
    yield op, {"cfg_scale": None}, "cfg_scale: expected with its counterpart"
    yield op, {"pred_real_uncond": None}, "pred_real_uncond: expected with its counterpart"
    for name in ("cfg_mode", "prediction", "normalizer", "eps_mode", "nan_policy"):
        yield op, {name: "other"}, f"{name}: expected one of '.*, got 'other'"
    yield op, {"out_dtype": torch.int32}, "out_dtype: expected a float dtype of torch, got torch.int32"
    yield op, {"mask": torch.ones(3, 4)}, r"mask: expected 3 dimensions.* got \[3, 4\]"
    yield op, {"mask": torch.ones(3, 2, 5)}, r"mask: expected 3 dimensions, each 1 or .* got \[3, 2, 5\]"
    yield op, {"mask": torch.zeros(3, 1, 1)}, "mask: expected at least one selected element, got none"
    yield op, {"mask": True}, "mask: expected a tensor, got bool"
    yield op, {"mask": torch.ones(3, 1, 1, device="meta")}, "mask: expected on cpu like x0, got meta"


def modulations(op, *names):
    for name in names:
        for shape in ((9,), (2, 8), (3, 4, 9), (3, 2, 8)):
            match = rf"{name}: expected shape \[8\], \[3, 8\], \[3, 1, 8\] or x's \[3, 4, 8\], got "
            yield op, {name: latent(*shape)}, match
        yield op, {name: torch.ones(8, dtype=torch.int64)}, f"{name}: {FLOAT_TYPES}"


def cases():
    yield "normal_noise", {"shape_like": INTEGERS}, f"shape_like: {FLOAT_TYPES}"
    yield from seeds("normal_noise")

    yield "renoise", {"x0": 1.0}, "x0: expected a tensor, got float"
    yield "renoise", {"x0": INTEGERS}, f"x0: {FLOAT_TYPES}"
    yield from latents("renoise", "noise")
    yield from scalars("renoise", "alpha", minimum=0)
    yield from scalars("renoise", "sigma", minimum=0)
    yield from seeds("renoise", noise=None)
    yield "renoise", {"noise": None}, "noise, seed: expected exactly one of them, got none"
    yield "renoise", {"seed": torch.tensor([1, 2])}, "noise, seed: expected exactly one of them, got both"

    yield from dmd("dmd_gradient")
    yield from dmd("dmd_loss")
    yield "dmd_loss", {"reduction": "none"}, "reduction: expected one of 'mean', 'sum', got 'none'"
    yield from numbers("dmd_loss", "factor")

    op = "preprocess_reward"
    yield op, {"image": latent(3, 9, 7)}, r"image: expected \[N, C, H, W\].* got shape \[3, 9, 7\]"
    yield op, {"image": latent(2, 3, 0, 7)}, r"image: expected \[N, C, H, W\].* got shape \[2, 3, 0, 7\]"
    yield op, {"image": torch.zeros(2, 3, 9, 7, dtype=torch.uint8)}, "image: expected float32, .* got uint8"
    for size in (0, (5, 0), (5, 5, 5), 5.0, (5.0, 5), "5"):
        yield op, {"size": size}, "size: expected (an int or|positive ints)"
    for name in ("mean", "std"):
        yield op, {name: [0.5] * 3}, f"{name}: expected 2 values, one per channel, got 3"
        yield op, {name: 0.5}, f"{name}: expected a sequence of floats, got float"
        yield op, {name: torch.ones(3)}, f"{name}: expected a sequence of floats, got Tensor"
        yield op, {name: [0.5, NAN]}, f"{name}: expected a finite number, got nan"
    yield op, {"std": [0.5, 0.0]}, "std: expected a finite number above 0, got 0.0"
    yield op, {"value_range": (1, -1)}, "value_range: expected low < high"
    yield op, {"value_range": 1.0}, r"value_range: expected \(low, high\), got 1.0"

    op = "sde_step_logprob"
    yield op, {"x": latent(3)}, "x: expected at least 2 dimensions"
    yield from latents(op, "v", "next_sample")
    yield from seeds(op, next_sample=None)
    yield op, {"next_sample": None}, "next_sample, seed: expected exactly one of them, got none"
    yield op, {"seed": torch.tensor([1, 2])}, "next_sample, seed: expected exactly one of them, got both"
    yield op, {"sigma": 0.0}, "sigma: expected a finite number above 0 and at most 1, got 0.0"
    yield (
        op,
        {"sigma": per_sample(bad=1.5)},
        "sigma: expected a finite number above 0 and at most 1, got values from",
    )
    yield op, {"sigma_next": -0.1}, "sigma_next: expected a finite number of at least 0"
    yield (
        op,
        {"sigma_next": torch.tensor([0.3, 0.1, 0.1])},
        "sigma_next: expected below sigma .* got 0.3 against 0.25",
    )
    yield op, {"kind": "ddim"}, "kind: expected one of 'flow_grpo', 'dance', 'cps', got 'ddim'"
    yield from numbers(op, "eta", 0.0, -0.5)
    yield op, {"kind": "cps", "eta": -0.5}, "eta: expected a finite number of at least 0, got -0.5"
    yield op, {"sigma": torch.full((3,), 0.9).requires_grad_()}, "sigma: expected a constant"
    yield op, {"next_sample": latent().requires_grad_()}, "next_sample: expected a constant"

    op = "grpo_loss"
    for name in ("old_logprob", "advantage"):
        yield op, {name: latent(4)}, rf"{name}: expected shape \[3\] like logprob, got \[4\]"
        yield op, {name: latent(3).requires_grad_()}, f"{name}: expected a constant"
    for name in ("logprob", "old_logprob"):
        yield op, {name: latent(3).bfloat16()}, f"{name}: expected float32 or float64 .* got torch.bfloat16"
    for name in ("clip_low", "clip_high", "adv_clip"):
        yield from numbers(op, name, -0.1)

    for op in ("layer_norm_modulate", "gated_residual_layer_norm_modulate"):
        yield op, {"x": latent(8)}, "x: expected at least 2 dimensions"
        yield from modulations(op, "shift", "scale")
        yield op, {"scale": latent(8)}, "scale: expected one per sample like shift, got one per batch"
        yield from numbers(op, "eps", 0.0, -1.0)
        yield op, {"out_dtype": "bfloat16"}, "out_dtype: expected a float dtype of torch, got 'bfloat16'"
    op = "rms_norm_scale"
    yield op, {"x": latent(8)}, "x: expected at least 2 dimensions"
    yield from modulations(op, "scale")
    yield op, {"out_dtype": "bfloat16"}, "out_dtype: expected a float dtype of torch, got 'bfloat16'"
    for op in ("rms_norm_scale", "gated_residual_rms_norm"):
        yield op, {"weight": latent(7)}, r"weight: expected shape \[8\] \(D\), got \[7\]"
        yield op, {"weight": INTEGERS[0, 0]}, f"weight: {FLOAT_TYPES}"
        yield from numbers(op, "eps", 0.0, -1.0)
    for op in ("gated_residual", "gated_residual_layer_norm_modulate", "gated_residual_rms_norm"):
        yield op, {"h": latent(3, 4, 9)}, r"h: expected shape \[3, 4, 8\] like x, got \[3, 4, 9\]"
        yield from modulations(op, "gate")

    op = "qk_norm_rope"
    yield op, {"q": latent(3, 5, 8)}, r"q: expected \[B, T, heads, D\], got shape \[3, 5, 8\]"
    yield op, {"k": latent(3, 4, 1, 8)}, r"k: expected shape \[3, 5, 1, 8\] .* got \[3, 4, 1, 8\]"
    for name in ("q_weight", "k_weight"):
        yield op, {name: latent(7)}, rf"{name}: expected shape \[8\] \(D\), got \[7\]"
    for name in ("cos", "sin"):
        yield op, {name: latent(5, 4)}, rf"{name}: expected shape \[5, 8\] \(T, D\), got \[5, 4\]"
        yield op, {name: latent(1, 5, 8)}, rf"{name}: expected shape \[3, 5, 8\] \(B, T, D\), got \[1, 5, 8\]"
        yield op, {name: None}, f"{name}: expected with its counterpart, got None"
        yield op, {name: latent(5, 8).requires_grad_()}, f"{name}: expected a constant"
    odd = {"q": latent(3, 5, 2, 7), "k": latent(3, 5, 1, 7), "q_weight": None, "k_weight": None}
    yield (
        op,
        {**odd, "cos": latent(5, 7), "sin": latent(5, 7)},
        "q: expected an even D for the rotation, got 7",
    )
    yield from numbers(op, "eps", 0.0)

    for op in ("gelu_mul", "silu_mul"):
        yield op, {"packed": latent(2, 7)}, r"packed: expected an even last dimension 2F, got shape \[2, 7\]"
        yield op, {"packed": torch.tensor(1.0)}, "packed: expected at least 1 dimensions"
    yield "gelu_mul", {"approximate": "erf"}, "approximate: expected one of 'none', 'tanh', got 'erf'"

    op = "multi_lora"
    yield op, {"x": latent(6)}, "x: expected at least 2 dimensions"
    yield op, {"A": latent(5, 2)}, r"A: expected shape \[6, 2\] .* got \[5, 2\]"
    yield op, {"A": latent(6)}, r"A: expected 2 dimensions, got shape \[6\]"
    yield op, {"B": latent(3, 7)}, r"B: expected shape \[2, 7\] .* got \[3, 7\]"
    yield op, {"base_out": latent(3, 4, 8)}, r"base_out: expected shape \[3, 4, 7\] .* got \[3, 4, 8\]"
    yield from scalars(op, "scale")
    yield op, {"scale": torch.ones(3).requires_grad_()}, "scale: expected a constant"


@pytest.mark.parametrize("op", sorted(valid_calls()))
def test_the_unchanged_call_is_valid(op):
    getattr(ops, op)(**valid_calls()[op])


@pytest.mark.parametrize(("op", "change", "match"), list(cases()))
def test_one_wrong_argument(op, change, match):
    with pytest.raises((TypeError, ValueError), match=f"^{op}: {match}"):
        getattr(ops, op)(**{**valid_calls()[op], **change})


def test_default_alpha_needs_sigma_up_to_one():
    call = {**valid_calls()["dmd_gradient"], "sigma": torch.tensor([0.5, 1.5, 0.5])}
    ops.dmd_gradient(**call)  # flow does not read alpha
    for prediction in ("eps", "v"):
        with pytest.raises(ValueError, match=r"dmd_gradient: sigma: expected .* at most 1"):
            ops.dmd_gradient(**call, prediction=prediction)
        ops.dmd_gradient(**call, prediction=prediction, alpha=1.0)
