"""Cases of normal_noise and renoise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dmdr_fast import ops
from tests.cases import _wrong as wrong
from tests.cases._kinds import (
    LATENTS,
    SEED,
    Call,
    Compiled,
    Draw,
    HostCall,
    Op,
    Raw,
    Sizes,
    leaf,
    meta,
    of_sample,
    stream,
)

if TYPE_CHECKING:
    from tests.ops.sweep import Case, Choices


def noise_formula(shape_like: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
    return (stream(shape_like, seed),)


def formula(
    x0: Tensor, alpha: Tensor, sigma: Tensor, noise: Tensor | None = None, seed: Tensor | None = None
) -> tuple[Tensor, ...]:
    noise = stream(x0, seed) if noise is None else noise
    return ((of_sample(alpha, x0) * x0 + of_sample(sigma, x0) * noise).to(x0.dtype),)


def noise_sweep(d: Choices) -> Case:
    return d.case("normal_noise", {"shape_like": d.normal(*d.latent_shape()), "seed": SEED})


def sweep(d: Choices) -> Case:
    shape = d.latent_shape()
    given = d.one_of(True, False)
    tensors = {
        "x0": d.normal(*shape), "alpha": d.uniform(0, 1, shape[0]), "sigma": d.uniform(0, 1, shape[0]),
        "noise": d.normal(*shape) if given else None, "seed": None if given else SEED,
    }  # fmt: skip
    return d.case("renoise", tensors)


def wrong_noise() -> wrong.Wrong:
    yield {"shape_like": wrong.INTEGERS}, f"shape_like: {wrong.FLOAT_TYPES}"
    yield from wrong.seeds()


def wrong_arguments() -> wrong.Wrong:
    yield {"x0": 1.0}, "x0: expected a tensor, got float"
    yield {"x0": wrong.INTEGERS}, f"x0: {wrong.FLOAT_TYPES}"
    yield from wrong.latents("noise")
    yield from wrong.scalars("alpha", minimum=0)
    yield from wrong.scalars("sigma", minimum=0)
    yield from wrong.seeds(noise=None)
    yield from wrong.noise_or_seed("noise")


def noise_host(sizes: Sizes) -> dict[str, HostCall]:
    x, seed = leaf(4, 16, 16, 16), torch.tensor([1, 2])
    return {"normal_noise": HostCall(lambda: ops.normal_noise(x, seed))}


def host(sizes: Sizes) -> dict[str, HostCall]:
    x, sigma, seed = leaf(4, 16, 16, 16), torch.rand(4), torch.tensor([1, 2])
    return {"renoise": HostCall(lambda: ops.renoise(x, sigma, sigma, seed=seed), [x], launches=[1, 2])}


def _of(draw: Draw, shapes: tuple) -> Iterator[Call]:
    for shape in shapes:
        label = "x".join(map(str, shape))
        alpha, sigma = draw.per_sample(shape[0]), draw.per_sample(shape[0])
        x = draw(*shape)
        yield Call("renoise_fwd", label, (x, alpha, sigma, draw(*shape), None, 0))
        yield Call("renoise_fwd", f"seed-{label}", (x, alpha, sigma, None, SEED, 5))
        yield Call("renoise_bwd", label, (draw(*shape), alpha, x.dtype))
        yield Call("renoise_scale_bwd", label, (draw(*shape), x))
        yield Call("normal_noise_fwd", label, (list(shape), SEED, 6, x.dtype))


def small(draw: Draw) -> Iterator[Call]:
    yield from _of(draw, ((2, 3, 5, 7), (1, 300), (5, 1)))
    # A view whose rows do not merge, and the gradient of a sum.
    x = draw(2, 4, 6, 9)[:, 1:3, 2:5]
    yield Call("renoise_fwd", "crop", (x, draw.per_sample(2), draw.per_sample(2), None, SEED, 8))
    yield Call("renoise_bwd", "expanded", (draw(1).expand(2, 3, 5), draw.per_sample(2), x.dtype))


def large() -> Iterator[Call]:
    x, factor, sigma = torch.randn(2, 4, 71, 173), torch.randn(2, 4, 71, 173), torch.rand(2)
    yield Call("renoise_fwd", "large", (x, sigma, sigma, None, SEED, 3))
    yield Call("renoise_scale_bwd", "large", (x, factor))


def compiled() -> dict[str, Compiled]:
    x, scalar, seed = meta(8, 16, 128, 128), meta(8, dtype=torch.float32), meta(2, dtype=torch.int64)
    return {
        "renoise_fwd, drawn noise": Compiled(
            "renoise_fwd",
            (x, scalar, scalar, None, seed, 0),
            {"seeded_renoise_kernel": 4096},
        ),
        "renoise_fwd, given noise": Compiled(
            "renoise_fwd",
            (x, scalar, scalar, x, None, 0),
            {"renoise_kernel": 2048},
        ),
        "renoise_bwd": Compiled(
            "renoise_bwd",
            (x, scalar, torch.bfloat16),
            {"scaled_kernel": 2048},
        ),
        "renoise_scale_bwd": Compiled(
            "renoise_scale_bwd",
            (x, x),
            {"product_sums_kernel": 4096},
        ),
        "normal_noise_fwd": Compiled(
            "normal_noise_fwd",
            (list(x.shape), seed, 0, torch.bfloat16),
            {"normal_noise_kernel": 4096},
        ),
    }


SIGMA = torch.tensor([0.25, 0.5, 0.75])
OPS = {
    "normal_noise": Op(
        valid=lambda draw: {"shape_like": draw(3, 4, 5), "seed": torch.tensor([1, 2])},
        formula=noise_formula,
        sweep=noise_sweep,
        wrong=wrong_noise,
        host=noise_host,
    ),
    "renoise": Op(
        valid=lambda draw: {"x0": draw(3, 4, 5), "alpha": 1 - SIGMA, "sigma": SIGMA, "noise": draw(3, 4, 5)},
        formula=formula,
        sweep=sweep,
        wrong=wrong_arguments,
        wrt="x0 alpha sigma noise",
        variants={"seeded": {"noise": None, "seed": torch.tensor([1, 2])}},
        host=host,
    ),
}
RAW = Raw(
    calls=lambda draw: _of(draw, LATENTS),
    small=small,
    large=large,
    compiled=compiled,
    instructions={
        "seeded_renoise_kernel": 38,
        "renoise_kernel": 57,
        "scaled_kernel": 38,
        "normal_noise_kernel": 34,
    },
)
