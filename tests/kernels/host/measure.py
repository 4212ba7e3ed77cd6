"""Host time of every public op and raw operator on the Triton backend, in multiples of ``a + b`` of two small tensors.

``python -m tests.kernels.host.measure [op ...]`` writes what :func:`main` returns as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.kernels.host.driver import activate

_CALLS, _ROUNDS = 40, 9


def main(names: list[str]) -> dict[str, Any]:
    """Of the ops ``names``, or of all.

    Returns:
        ``unit``: microseconds of ``a + b``; ``ops``: by name ``forward`` and ``both`` (with the backward), ``launches``
        of the two and the names of the ``operators`` that run; ``operators``: by raw function, without gradients.
    """
    launched = activate()
    torch.set_num_threads(1)
    from dmdr_fast import backends
    from dmdr_fast.ops._library import RAW

    unit, found = _Unit(), {"ops": {}, "operators": {}}
    run, arguments = backends.run, {}
    for name, (forward, wrt) in calls().items():
        if names and name not in names:
            continue
        ran = {}
        backends.run = lambda raw, args, ran=ran: ran.setdefault(raw, args) and run(raw, args)
        both = with_backward(forward, wrt)
        both()
        backends.run = run
        arguments |= ran
        counts = []
        for call in (forward, both):
            call()
            before = launched()
            call()
            counts.append(launched() - before)
        times = {"forward": unit.of(forward), "both": unit.of(both)}
        found["ops"][name] = {**times, "launches": counts, "operators": sorted(ran)}
    with torch.no_grad():
        for raw, args in arguments.items():
            args = tuple(_own(arg) for arg in args)
            found["operators"][raw] = unit.of(lambda operator=RAW[raw].operator, args=args: operator(*args))
    return {"unit": unit.best, **found}


class _Unit:
    """Times calls and, in between, ``a + b``.

    Attributes:
        best: microseconds of ``a + b``.
    """

    def __init__(self) -> None:
        self._small, self.best = torch.randn(4, 4), float("inf")

    def of(self, call: Callable[[], object]) -> float:
        """The least time of a call over the least of ``a + b``, each of several rounds of this thread's own time."""
        small, best, unit = self._small, float("inf"), float("inf")
        call(), call()
        for _ in range(_ROUNDS):
            best = min(best, _microseconds(call))
            unit = min(unit, _microseconds(lambda: small + small))
        self.best = min(self.best, unit)
        return round(best / unit, 1)


def _microseconds(call: Callable[[], object]) -> float:
    start = time.thread_time_ns()
    for _ in range(_CALLS):
        call()
    return (time.thread_time_ns() - start) / _CALLS / 1e3


def with_backward(forward: Callable[[], Any], wrt: list[Tensor]) -> Callable[[], object]:
    """``forward`` and the backward from ones to ``wrt``, where there are any."""

    def graded() -> list[Tensor]:
        out = forward()
        return [part for part in ((out,) if isinstance(out, Tensor) else out) if part.requires_grad]

    incoming = [torch.ones_like(part) for part in graded()]
    return (lambda: torch.autograd.grad(graded(), wrt, incoming)) if wrt else forward


def _own(arg: object) -> object:
    """Of the plain type that a caller of the operator passes."""
    if isinstance(arg, Tensor):
        return arg.detach()
    return int(arg) if isinstance(arg, int) and not isinstance(arg, bool) else arg


def calls() -> dict[str, tuple[Callable[[], Any], list[Tensor]]]:
    """Name to (call, what gets a gradient); sizes are small, the host does not see them."""
    from dmdr_fast import ops

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16)

    def leaf(*shape: int) -> Tensor:
        return draw(*shape).requires_grad_()

    x, (x_t, fake, real, uncond), sigma = leaf(4, 16, 16, 16), (draw(4, 16, 16, 16) for _ in range(4)), torch.rand(4)
    large, (x_t2, fake2, real2, uncond2) = leaf(2, 16, 128, 128), (draw(2, 16, 128, 128) for _ in range(4))
    seed, two_sigmas, after = torch.tensor([1, 2]), sigma[:2].clone(), sigma[:2] / 2
    guided = {"cfg_scale": 4.0}
    tokens, h, (shift, scale, gate) = leaf(2, 64, 256), leaf(2, 64, 256), (leaf(2, 1, 256) for _ in range(3))
    weight, q, k, table = leaf(256), leaf(2, 64, 4, 64), leaf(2, 64, 4, 64), torch.randn(64, 64)
    q_weight, k_weight, packed, image = leaf(64), leaf(64), leaf(2, 64, 512), leaf(2, 3, 64, 64)
    a, b, scales, one = leaf(256, 16), leaf(16, 256), torch.rand(2), torch.tensor(0.5)
    return {
        "normal_noise": (lambda: ops.normal_noise(x, seed), []),
        "renoise": (lambda: ops.renoise(x, sigma, sigma, seed=seed), [x]),
        "dmd_gradient": (lambda: ops.dmd_gradient(x, x_t, fake, real, uncond, sigma=sigma, **guided), []),
        "dmd_loss": (lambda: ops.dmd_loss(x, x_t, fake, real, uncond, sigma=sigma, **guided), [x]),
        "dmd_loss, large": (
            lambda: ops.dmd_loss(large, x_t2, fake2, real2, uncond2, sigma=two_sigmas, **guided), [large],
        ),
        "sde_step_logprob": (
            lambda: ops.sde_step_logprob(tokens, h, two_sigmas, after, kind="dance", eta=0.3, seed=seed)[:3],
            [tokens, h],
        ),
        "preprocess_reward": (lambda: ops.preprocess_reward(image, 28, [0.5] * 3, [0.5] * 3), [image]),
        "layer_norm_modulate": (lambda: ops.layer_norm_modulate(tokens, shift, scale), [tokens, shift, scale]),
        "gated_residual": (lambda: ops.gated_residual(tokens, h, gate), [tokens, h, gate]),
        "gated_residual_layer_norm_modulate": (
            lambda: ops.gated_residual_layer_norm_modulate(tokens, h, gate, shift, scale),
            [tokens, h, gate, shift, scale],
        ),
        "rms_norm_scale": (lambda: ops.rms_norm_scale(tokens, weight, scale), [tokens, weight, scale]),
        "gated_residual_rms_norm": (
            lambda: ops.gated_residual_rms_norm(tokens, h, gate, weight), [tokens, h, gate, weight],
        ),
        "qk_norm_rope": (
            lambda: ops.qk_norm_rope(q, k, q_weight, k_weight, table, table), [q, k, q_weight, k_weight],
        ),
        "gelu_mul": (lambda: ops.gelu_mul(packed), [packed]),
        "silu_mul": (lambda: ops.silu_mul(packed), [packed]),
        "multi_lora": (lambda: ops.multi_lora(tokens, h, a, b, scales), [tokens, h, a, b]),
        "multi_lora, 0-d scale": (lambda: ops.multi_lora(tokens, h, a, b, one), [tokens, h, a, b]),
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])))
