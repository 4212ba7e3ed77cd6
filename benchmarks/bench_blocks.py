"""Stacks of transformer blocks by width: as the model has them, fused, compiled.

By width, because ``compute.blocks: auto`` chooses by it on a CPU. SiT's blocks, and SD3.5-Medium's: one with a second
attention over the image alone, as its first 13 are, and one without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from benchmarks.gate import GateError, GateFailure, relative_error
from benchmarks.measure import Row, ratio
from benchmarks.memory import peak_bytes
from benchmarks.timing import Spread, interleave, wall
from dmdr_fast import ops
from dmdr_fast.models.sit import SiT
from dmdr_fast.patch import patch

# Relative L2 difference from the blocks as they are: they round after every step, a fused op once.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
WIDTHS = (256, 384, 768, 1152)  # the small bench_step's, SiT-S, SiT-B, SiT-XL
PASSES = {"forward": False, "forward + backward": True}


class Stack(nn.Module):
    """The first blocks of a model, which it holds so that its kind is known."""

    def __init__(self, model: nn.Module, blocks: nn.ModuleList):
        super().__init__()
        self.model, self.blocks = model, blocks
        for parameter in blocks.parameters():  # adaLN-Zero starts at zero, which shows nothing
            nn.init.normal_(parameter, std=0.02)


class SiTStack(Stack):
    """Two blocks of a SiT of ``width``, in heads of ``head``."""

    def __init__(self, width: int, head: int = 64):
        model = SiT(hidden_size=width, depth=2, num_heads=width // head)
        super().__init__(model, model.blocks)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, c)
        return x


class SD3Stack(Stack):
    """Two blocks of an SD3.5-Medium of ``heads``: the first with a second attention over the image alone."""

    def __init__(self, heads: int = 24, head: int = 64):
        from diffusers import SD3Transformer2DModel

        model = SD3Transformer2DModel(
            num_layers=3,  # the last has no text stream
            num_attention_heads=heads,
            attention_head_dim=head,
            caption_projection_dim=heads * head,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
            pos_embed_max_size=8,
        )
        super().__init__(model, model.transformer_blocks[:2])

    def forward(self, x: Tensor, text: Tensor, temb: Tensor) -> Tensor:
        for block in self.blocks:
            text, x = block(x, text, temb)
        return x + text.mean()  # so that a backward reaches what both streams go through


@pytest.mark.parametrize("width", WIDTHS)
def test_sit_blocks(record, device, width):
    pytest.importorskip("pydantic")  # compile_blocks is the trainer's
    batch, dtype = (16, torch.bfloat16) if device.type == "cuda" else (4, torch.float32)

    shapes = ((batch, 256, width), (batch, width))
    record(lambda: measured("SiT", lambda: SiTStack(width), shapes, dtype, device))


def test_sd35_medium_blocks(record, device):
    pytest.importorskip("pydantic")
    pytest.importorskip("diffusers")
    # On a GPU four samples of 1024 pixels; on a CPU one of 256. 333 tokens of text.
    batch, tokens, dtype = (4, 4096, torch.bfloat16) if device.type == "cuda" else (1, 256, torch.float32)

    shapes = ((batch, tokens, 1536), (batch, 333, 1536), (batch, 1536))
    record(lambda: measured("SD3.5-Medium", SD3Stack, shapes, dtype, device))


def measured(
    model: str,
    stack: Callable[[], Stack],
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device,
) -> list[Row]:
    """Two rows for fused and two for compiled blocks, after their gates. ``shapes`` are those of the inputs."""
    from dmdr_fast.engine.compute import compile_blocks  # which needs pydantic

    torch.manual_seed(0)
    with device:
        eager = stack().to(dtype)
        inputs = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    stacks = {"eager": eager}
    stacks["fused"] = deepcopy(eager)
    patch(stacks["fused"])
    stacks["compiled"] = deepcopy(eager)
    compile_blocks(list(stacks["compiled"].blocks))
    errors = {name: _check(stack, eager, inputs, dtype, name) for name, stack in stacks.items() if name != "eager"}
    rows = []
    for what, graded in PASSES.items():
        runs = {name: wall(_pass(stack, inputs, graded), device) for name, stack in stacks.items()}
        peak = {name: peak_bytes(partial(run, 0), device) for name, run in runs.items()}
        times = {name: reading.total for name, reading in interleave(runs, seconds=4, least=3).items()}
        rows += [
            Row(
                op=f"blocks of {model} ({blocks})",
                size=f"{len(eager.blocks)} of " + "x".join(map(str, shapes[0])),
                dtype=str(dtype).removeprefix("torch."),
                backend=ops.explain("gelu_mul", torch.empty(2, device=device)).backend,
                what=what,
                times={"fused": Spread.of(times[blocks]), "eager": Spread.of(times["eager"])},
                eager_ratio=ratio(times["eager"], times[blocks]),
                peak={"fused": peak[blocks], "eager": peak["eager"]},
                errors=errors[blocks],
            )
            for blocks in errors
        ]
    return rows


def _check(stack: Stack, eager: Stack, inputs: list[Tensor], dtype: torch.dtype, name: str) -> dict[str, GateError]:
    found, plain = _results(stack, inputs), _results(eager, inputs)
    errors = {what: relative_error(found[what], plain[what].double()) for what in plain}
    wrong = [f"{what} {error:.2e}" for what, error in errors.items() if not error <= TOLERANCE[dtype]]
    if wrong:
        raise GateFailure(f"{name} blocks differ from the model's own: {', '.join(wrong)}; nothing is timed")
    return {what: GateError(error, None, TOLERANCE[dtype]) for what, error in errors.items()}


def _results(stack: Stack, inputs: list[Tensor]) -> dict[str, Tensor]:
    """The output, and the gradients of the inputs and of all weights, each of the two flat."""
    with torch.no_grad():
        ungraded = stack(*inputs)
    out = stack(*inputs)
    wrt = [*inputs, *stack.blocks.parameters()]
    grads = torch.autograd.grad(out, wrt, _upstream(out), allow_unused=True, materialize_grads=True)
    of_inputs, of_weights = grads[: len(inputs)], grads[len(inputs) :]
    return {
        "out": ungraded,
        "graded out": out.detach(),
        "grads of the inputs": torch.cat([grad.flatten() for grad in of_inputs]),
        "grads of the weights": torch.cat([grad.flatten() for grad in of_weights]),
    }


def _pass(stack: Stack, inputs: list[Tensor], graded: bool) -> Callable[[int], None]:
    incoming, wrt = _upstream(inputs[0]), [*inputs, *stack.blocks.parameters()]

    def run(_: int) -> None:
        with torch.set_grad_enabled(graded):
            out = stack(*inputs)
        if graded:
            torch.autograd.grad(out, wrt, incoming, allow_unused=True)

    return run


def _upstream(out: Tensor) -> Tensor:
    return torch.randn(out.shape, generator=torch.Generator(out.device).manual_seed(1), device=out.device).to(out.dtype)
