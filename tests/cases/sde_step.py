"""Cases of sde_step_logprob."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dmdr_fast import ops
from tests.cases import _wrong as wrong
from tests.cases._kinds import LATENTS, SEED, Call, Compiled, Draw, HostCall, Op, Raw, Sizes, meta, of_sample, stream

if TYPE_CHECKING:
    from tests.ops.sweep import Case, Choices


def formula(
    x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, *, kind: str, eta: float,
    next_sample: Tensor | None = None, seed: Tensor | None = None, kept: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    dtype, x, v = x.dtype, x.to(wide), v.to(wide)
    t, after = of_sample(sigma, x), of_sample(sigma_next, x)
    dt = after - t
    if kind == "cps":
        angle = eta * math.pi / 2
        predicted, noise = x - t * v, x + (1 - t) * v
        mean, std = (1 - after) * predicted + after * math.cos(angle) * noise, after * math.sin(angle)
    else:
        gam = eta * torch.sqrt(t / (1 - torch.where(t == 1, after, t))) if kind == "flow_grpo" else eta + 0 * t
        mean = x * (1 + gam**2 / (2 * t) * dt) + v * (1 + gam**2 * (1 - t) / (2 * t)) * dt
        std = gam * torch.sqrt(-dt)
    drawn = next_sample
    if drawn is None:
        drawn = (mean + std * stream(x, seed)).to(dtype)
    error = (drawn.detach().to(wide) if kept is None else kept) - mean
    if kind == "cps":
        logprob = -(error**2)
    else:
        logprob = -(error**2) / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
    return drawn, logprob.flatten(1).mean(1), mean, std.flatten()


def sweep(d: Choices) -> Case:
    shape = d.latent_shape()
    kind = d.one_of("flow_grpo", "dance", "cps")
    sigma = d.uniform(0.3, 0.9, shape[0])
    if shape[0] > 1:
        sigma[0] = 1
    x, v = d.normal(*shape), d.normal(*shape)
    after = d.one_of(None, d.normal(*shape).to(x.dtype))
    tensors = {"x": x, "v": v, "sigma": sigma, "sigma_next": 0.7 * sigma, "next_sample": after}
    tensors["seed"] = SEED if after is None else None
    return d.case("sde_step_logprob", tensors, kind=kind, eta=0.6)


def wrong_arguments() -> wrong.Wrong:
    yield from wrong.tokens()
    yield from wrong.latents("v", "next_sample")
    yield from wrong.seeds(next_sample=None)
    yield from wrong.noise_or_seed("next_sample")
    above = "sigma: expected a finite number above 0 and at most 1, got"
    yield {"sigma": 0.0}, f"{above} 0.0"
    yield {"sigma": wrong.one_bad(1.5)}, f"{above} values from"
    yield {"sigma_next": -0.1}, "sigma_next: expected a finite number of at least 0"
    above_sigma = torch.tensor([0.3, 0.1, 0.1])
    yield {"sigma_next": above_sigma}, "sigma_next: expected below sigma .* got 0.3 against 0.25"
    yield {"kind": "ddim"}, "kind: expected one of 'flow_grpo', 'dance', 'cps', got 'ddim'"
    yield from wrong.numbers("eta", 0.0, -0.5)
    yield {"kind": "cps", "eta": -0.5}, "eta: expected a finite number of at least 0, got -0.5"


def host(sizes: Sizes) -> dict[str, HostCall]:
    x, v, sigma, seed = sizes.x(), sizes.x(), torch.rand(sizes.batch), torch.tensor([1, 2])
    after, options = sigma / 2, {"kind": "dance", "eta": 0.3}

    def call():
        return ops.sde_step_logprob(x, v, sigma, after, seed=seed, **options)[:3]

    return {"sde_step_logprob": HostCall(call, [x, v], launches=[3, 4])}


KINDS = (("flow_grpo", 0.7), ("dance", 0.3), ("cps", 0.5))


def _of(draw: Draw, shapes: tuple, small: bool) -> Iterator[Call]:
    for shape in shapes:
        sigma = torch.tensor([1.0, 0.6]) if small else draw.per_sample(shape[0])
        for kind, eta in KINDS:
            label = f"{kind}-{'x'.join(map(str, shape))}"
            x, v = draw(*shape), draw(*shape)
            after, times = draw(*shape, dtype=x.dtype), (sigma, 0.8 * sigma)
            yield Call("sde_step_fwd", label, (x, v, *times, after, None, 0, kind, eta))
            yield Call("sde_step_fwd", f"draw-{label}", (x, v, *times, None, SEED, 1, kind, eta))
            # The gradient of a sample's log-prob is about 1 / elements of it: scaled so that fp16 can hold it.
            per_sample = draw.per_sample(shape[0]) * x[:1].numel()
            grads = draw(*shape), per_sample, draw(*shape, dtype=torch.float32)
            yield Call("sde_step_bwd", label, (*grads, x, v, *times, after, kind, eta, True, True))
            args = (None, per_sample, None, x, v, *times, after, kind, eta, not small, True)
            yield Call("sde_step_bwd", f"logprob-{label}", args)


def large() -> Iterator[Call]:
    x, v, sigma = torch.randn(2, 4, 71, 173), torch.randn(2, 4, 71, 173), torch.rand(2) * 0.5 + 0.3
    yield Call("sde_step_fwd", "large", (x, v, sigma, sigma * 0.9, None, SEED, 0, "flow_grpo", 0.7))


def compiled() -> dict[str, Compiled]:
    x, scalar, seed = meta(8, 16, 128, 128), meta(8, dtype=torch.float32), meta(2, dtype=torch.int64)
    step = x, x, scalar, scalar
    return {
        "sde_step_fwd": Compiled(
            "sde_step_fwd",
            (*step, None, seed, 0, "flow_grpo", 0.7),
            {"sde_draw_kernel": 4096, "sde_square_kernel": 2048},
        ),
        "sde_step_bwd": Compiled(
            "sde_step_bwd",
            (x, scalar, None, *step, x, "flow_grpo", 0.7, False, True),
            {"sde_step_bwd_kernel": 2048},
        ),
    }


def exact(reference, args: list, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    drawn, *rest = reference.sde_step_fwd(*args)
    if results[0].numel():
        _, *rest = reference.sde_step_fwd(*args[:4], results[0].double(), None, 0, *args[7:])
    return drawn, *rest


def valid(draw: Callable[..., Tensor]) -> dict[str, Any]:
    sigma = torch.tensor([0.25, 0.5, 0.75])
    latents = {name: draw(3, 4, 5) for name in ("x", "v", "next_sample")}
    return {**latents, "sigma": sigma, "sigma_next": sigma - 0.125, "kind": "dance", "eta": 0.3}


DRAWN = {"next_sample": None, "seed": torch.tensor([1, 2])}
OPS = {
    "sde_step_logprob": Op(
        valid=valid,
        formula=formula,
        sweep=sweep,
        wrong=wrong_arguments,
        wrt="x v",
        constants="next_sample sigma sigma_next",
        variants={"drawn": {**DRAWN, "kind": "flow_grpo"}, "cps": {**DRAWN, "kind": "cps"}},
        outputs=3,  # the std is one of the constants'
        keeps=True,
        host=host,
    )
}
RAW = Raw(
    calls=lambda draw: _of(draw, LATENTS, False),
    small=lambda draw: _of(draw, ((2, 3, 5, 7),), True),
    large=large,
    compiled=compiled,
    exact={"sde_step_fwd": exact},
)
