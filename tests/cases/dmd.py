"""Cases of dmd_gradient and dmd_loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dmdr_fast import ops
from tests.cases import _wrong as wrong
from tests.cases._kinds import LATENTS, Call, Compiled, Draw, HostCall, Op, Raw, Sizes, leaf, meta, of_sample

if TYPE_CHECKING:
    from tests.ops.sweep import Case, Choices


def gradient_formula(x0: Tensor, *args: Tensor, **options) -> tuple[Tensor, ...]:
    grad, norm, counted = _dmd(x0, *args, **options)
    return grad, norm, 0.5 * _mean(grad.to(norm.dtype) ** 2, counted)


def loss_formula(
    x0: Tensor, *args: Tensor, reduction: str = "mean", factor: float = 0.5, **options
) -> tuple[Tensor, ...]:
    with torch.no_grad():
        grad, norm, counted = _dmd(x0, *args, **options)
    difference = x0.to(norm.dtype) - (x0 - grad).detach().to(norm.dtype)
    square = torch.where(counted, difference**2, 0.0)
    return (factor * (square.sum() if reduction == "sum" else _mean(square, counted)),)


def _dmd(
    x0, x_t, pred_fake, pred_real, pred_real_uncond=None, *, sigma, alpha=None, cfg_scale=None, cfg_mode="standard",
    prediction="flow", normalizer="per_sample", eps=1e-8, eps_mode="add", mask=None, weight=None,
):  # fmt: skip
    """g, the normaliser [B], and what the means count."""
    wide = torch.float64 if x0.dtype is torch.float64 else torch.float32
    if pred_real_uncond is not None:
        start = pred_real_uncond if cfg_mode == "standard" else pred_real
        scale = of_sample(cfg_scale, x0) if isinstance(cfg_scale, Tensor) else cfg_scale
        pred_real = start + scale * (pred_real - pred_real_uncond)
    s, a = of_sample(sigma, x0), of_sample(1 - sigma if alpha is None else alpha, x0)
    denoise: Callable[[Tensor], Tensor] = {
        "flow": lambda p: x_t - s * p,
        "eps": lambda p: (x_t - s * p) / a,
        "v": lambda p: a * x_t - s * p,
        "x0": lambda p: p,
    }[prediction]
    fake, real = denoise(pred_fake), denoise(pred_real)
    counted = torch.ones_like(x0, dtype=torch.bool) if mask is None else mask.expand(x0.shape)
    distance = torch.where(counted, (x0 - real).abs().to(wide), 0.0)
    if normalizer == "per_sample":
        norm = distance.flatten(1).sum(1) / counted.flatten(1).sum(1)
    elif normalizer == "global":
        norm = (distance.sum() / counted.sum()).expand(x0.shape[0])
    else:
        norm = torch.ones(x0.shape[0], dtype=wide)
    if normalizer != "none":
        norm = {"add": norm + eps, "clamp": norm.clamp(min=eps), "none": norm}[eps_mode]
    grad = (fake - real) / of_sample(norm, x0)
    if weight is not None:
        grad = of_sample(weight, x0) * grad
    return torch.where(counted, grad, 0.0).to(x0.dtype), norm, counted


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    """0 for nothing."""
    return torch.where(counted, values, 0.0).sum() / counted.sum().clamp(min=1)


def sweep(d: Choices, op: str, **options: Any) -> Case:
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
    return d.case(op, tensors, **options)


def loss_sweep(d: Choices) -> Case:
    return sweep(d, "dmd_loss", reduction=d.one_of("mean", "sum"), factor=d.one_of(0.5, 1.0))


def wrong_gradient() -> wrong.Wrong:
    yield {"x0": torch.randn(3)}, r"x0: expected at least 2 dimensions, got shape \[3\]"
    yield from wrong.latents("x_t", "pred_fake", "pred_real", "pred_real_uncond")
    yield from wrong.scalars("sigma", minimum=0)
    for change, match in wrong.scalars("alpha", minimum=0):
        yield {**change, "prediction": "eps"}, match
    yield from wrong.scalars("cfg_scale")
    yield from wrong.scalars("weight")
    yield from wrong.numbers("eps", -1.0)
    yield {"cfg_scale": None}, "cfg_scale: expected with its counterpart"
    yield {"pred_real_uncond": None}, "pred_real_uncond: expected with its counterpart"
    for name in ("cfg_mode", "prediction", "normalizer", "eps_mode", "nan_policy"):
        yield {name: "other"}, f"{name}: expected one of '.*, got 'other'"
    yield {"out_dtype": torch.int32}, "out_dtype: expected a float dtype of torch, got torch.int32"
    yield {"mask": torch.ones(3, 4)}, r"mask: expected 3 dimensions.* got \[3, 4\]"
    yield {"mask": torch.ones(3, 2, 5)}, r"mask: expected 3 dimensions, each 1 or .* got \[3, 2, 5\]"
    yield {"mask": torch.zeros(3, 1, 1)}, "mask: expected at least one selected element, got none"
    yield {"mask": True}, "mask: expected a tensor, got bool"
    yield {"mask": torch.ones(3, 1, 1, device="meta")}, "mask: expected on cpu like x0, got meta"


def wrong_loss() -> wrong.Wrong:
    yield from wrong_gradient()
    yield {"reduction": "none"}, "reduction: expected one of 'mean', 'sum', got 'none'"
    yield from wrong.numbers("factor")


def _guided(op: Callable, *shape: int) -> tuple[Callable[[], Any], Tensor]:
    x0, others, sigma = leaf(*shape), [leaf(*shape).detach() for _ in range(4)], torch.rand(shape[0])
    return lambda: op(x0, *others, sigma=sigma, cfg_scale=4.0), x0


def gradient_host(sizes: Sizes) -> dict[str, HostCall]:
    return {"dmd_gradient": HostCall(_guided(ops.dmd_gradient, 4, 16, 16, 16)[0])}


def loss_host(sizes: Sizes) -> dict[str, HostCall]:
    call, x0 = _guided(ops.dmd_loss, 4, 16, 16, 16)
    beyond, large = _guided(ops.dmd_loss, 2, 16, 128, 128)
    return {
        "dmd_loss": HostCall(call, [x0], launches=[1, 2]),
        "dmd_loss, large": HostCall(beyond, [large], launches=[2, 3]),
    }


def _of(draw: Draw, shapes: tuple) -> Iterator[Call]:
    for shape in shapes:
        label, batch = "x".join(map(str, shape)), shape[0]
        latents = [draw(*shape) for _ in range(5)]
        mask = draw.mask(batch, *[1] * (len(shape) - 2), shape[-1])
        for change in _variants(draw, latents[0], mask):
            options = OPTIONS | {"sigma": draw.per_sample(batch), "out_dtype": latents[0].dtype} | change
            uncond = latents[4] if options["cfg_tensor"] is not None or options["cfg_scale"] != 1 else None
            yield Call("dmd_gradient_fwd", label, (*latents[:4], uncond, *options.values()))
        loss = torch.tensor(1.5), draw(*shape), torch.tensor(0.3), latents[0].dtype
        yield Call("dmd_loss_bwd", label, loss)


# After the latents, in their order.
OPTIONS = {
    "sigma": None, "alpha": None, "cfg_tensor": None, "mask": None, "weight": None, "cfg_scale": 1.0,
    "cfg_mode": "standard", "prediction": "flow", "normalizer": "per_sample", "eps": 1e-8, "eps_mode": "add",
    "nan_policy": "zero", "out_dtype": None, "reduction": "mean", "factor": 0.5, "scaled": False,
}  # fmt: skip


def _variants(draw: Draw, x0: Tensor, mask: Tensor) -> Iterator[dict[str, Any]]:
    """Each variant once, not their product."""
    scalars = draw.per_sample(x0.shape[0])
    yield {}
    yield {"cfg_scale": 4.5}
    # g / numel is too small for float16.
    yield {"cfg_scale": 4.5, "scaled": True, "out_dtype": torch.float32 if x0.dtype is torch.float16 else x0.dtype}
    yield {"cfg_scale": 2.5, "cfg_mode": "offset", "prediction": "x0"}
    yield {"cfg_tensor": 4 * scalars, "prediction": "eps", "alpha": scalars}
    yield {"prediction": "v", "normalizer": "global", "reduction": "sum", "factor": 1.0}
    yield {"prediction": "eps", "normalizer": "none", "out_dtype": torch.float32}
    yield {"mask": mask, "weight": scalars}
    yield {"mask": mask, "normalizer": "global", "nan_policy": "keep"}
    yield {"mask": mask, "normalizer": "none", "nan_policy": "zero_sample"}
    yield {"mask": mask, "reduction": "sum", "scaled": True, "nan_policy": "zero_sample"}
    yield {"eps": 0.9, "eps_mode": "clamp", "nan_policy": "torch"}
    yield {"eps_mode": "none"}


def large() -> Iterator[Call]:
    options = OPTIONS | {"sigma": torch.rand(2) * 0.5 + 0.3, "out_dtype": torch.float32, "scaled": True}
    yield Call("dmd_gradient_fwd", "large", (*(torch.randn(2, 4, 71, 173) for _ in range(5)), *options.values()))
    # More than the kernels of a CPU take through both passes at a time.
    options |= {"sigma": torch.rand(3) * 0.5 + 0.3, "cfg_scale": 3.0, "scaled": False}
    yield Call("dmd_gradient_fwd", "larger", (*(torch.randn(3, 14, 160, 173) for _ in range(5)), *options.values()))


def compiled() -> dict[str, Compiled]:
    # SiT's latents at 256 pixels; the largest sample that one block holds; SD3.5's latents at 1024 pixels.
    scalar, number = meta(8, dtype=torch.float32), meta(dtype=torch.float32)
    found = {}
    for shape, policy, elements, launches in (
        ((8, 4, 32, 32), "zero", {"dmd_gradient_sample_kernel": 4096}, None),
        ((8, 16, 32, 32), "zero", {"dmd_gradient_sample_kernel": 16384}, 1),
        ((8, 16, 128, 128), "zero_sample", {"dmd_distance_kernel": 2048, "dmd_gradient_kernel": 2048}, 2),
    ):
        x = meta(*shape)
        options = OPTIONS | {"sigma": scalar, "cfg_scale": 3.5, "nan_policy": policy, "out_dtype": torch.bfloat16}
        found[f"dmd_gradient_fwd, {x[0].numel()} elements"] = Compiled(
            "dmd_gradient_fwd",
            (x, x, x, x, x, *options.values()),
            elements,
            launches,
        )
    found["dmd_loss_bwd"] = Compiled(
        "dmd_loss_bwd",
        (number, x, number, torch.bfloat16),
        {"dmd_loss_bwd_kernel": 2048},
        launches=1,
    )
    return found


def valid(draw: Callable[..., Tensor]) -> dict[str, Any]:
    latents = {name: draw(3, 4, 5) for name in ("x0", "x_t", "pred_fake", "pred_real", "pred_real_uncond")}
    return {**latents, "sigma": torch.tensor([0.25, 0.5, 0.75]), "cfg_scale": 2.0}


OPS = {
    "dmd_gradient": Op(
        valid=valid,
        formula=gradient_formula,
        sweep=lambda d: sweep(d, "dmd_gradient"),
        wrong=wrong_gradient,
        host=gradient_host,
    ),
    "dmd_loss": Op(
        valid=valid,
        formula=loss_formula,
        sweep=loss_sweep,
        wrong=wrong_loss,
        wrt="x0",
        variants={
            "masked": {"mask": torch.arange(20).view(1, 4, 5) % 3 > 0, "normalizer": "global"},
            "eps": {"prediction": "eps", "reduction": "sum", "cfg_scale": torch.tensor([2.0, 3.0, 0.5])},
        },
        twice=False,  # its gradient is a constant
        host=loss_host,
    ),
}
RAW = Raw(
    calls=lambda draw: _of(draw, LATENTS),
    small=lambda draw: _of(draw, ((3, 2, 5, 7),)),
    large=large,
    compiled=compiled,
)
