"""Every op on every backend against its formula in float64, on random shapes, dtypes, layouts and variants.

An error may be twice that of eager PyTorch in the same dtype, and stays under a ceiling. The same calls show that an op
is functional: nothing that comes in is written, a second backward and a second run give the same bits.

Triton's kernels run on a GPU, or in the interpreter where the process is one: tests/kernels/test_interpreter.py.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dmdr_fast import ops
from tests.cases import OPS
from tests.kernels.conftest import INTERPRETED
from tests.ops.sweep import Case, cases

EXAMPLES = 2 if INTERPRETED else 25

# Relative L2. Triton's interpreter truncates where it rounds to bfloat16.
CEILING = {torch.float32: 1e-5, torch.bfloat16: 8e-3 if INTERPRETED else 4e-3, torch.float16: 1e-3}
# Granted always: eager may be exact by chance. Half a unit in the last place; float32's sums take a few.
FLOOR = {**CEILING, torch.float32: 5e-7, torch.float16: 2**-11}

ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PLACES = (
    [("triton", "cpu")]
    if INTERPRETED
    else [
        ("reference", "cpu"),
        ("cpu", "cpu"),
        pytest.param(("triton", "cuda"), marks=ON_GPU),
        pytest.param(("cuda", "cuda"), marks=ON_GPU),
    ]
)


@pytest.fixture(params=PLACES, ids=lambda place: place[0])
def device(request, monkeypatch):
    backend, device = request.param
    monkeypatch.setenv("DMDR_FAST_BACKEND", backend)
    # The CUDA library has some of the ops; elsewhere a fallback would hide what is to be tested.
    monkeypatch.setenv("DMDR_FAST_STRICT", "0" if backend == "cuda" else "1")
    return device


@pytest.mark.parametrize("op", OPS)
@settings(
    max_examples=EXAMPLES, derandomize=True, database=None, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(data=st.data())
def test_agrees_with_the_formula_and_is_functional(op, device, data):
    case = data.draw(cases(op))
    tensors = {name: tensor.to(device) for name, tensor in case.tensors.items()}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    outputs, grads, incoming = run(case, tensors)
    if not INTERPRETED:  # which runs one block after the other: nothing could differ
        outputs_again, grads_again, _ = run(case, tensors)
        for name, value in (outputs | grads).items():
            again = (outputs_again | grads_again)[name]
            assert torch.equal(value, again) or value.isnan().any(), f"{name} of two runs"
    for name, value in before.items():
        assert torch.equal(value, tensors[name]), f"{name} was written"

    compared = {name: value.cpu() for name, value in (outputs | grads).items()}
    exact = evaluate(case, torch.float64, incoming, outputs)
    eager = evaluate(case, None, incoming, None) if case.dtype is not None else {}
    assert compared.keys() == exact.keys()
    for name, value in compared.items():
        assert value.shape == exact[name].shape
        error = relative_error(value, exact[name])
        bound = CEILING[value.dtype]
        if name in eager:
            bound = min(bound, max(FLOOR[value.dtype], 2 * relative_error(eager[name], exact[name])))
        assert error <= bound, f"{name}: relative L2 error {error:.1e}, allowed {bound:.1e}"


def run(case: Case, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Outputs, gradients of two backwards through one graph, and what came in from above."""
    leaves = {name: tensor.detach().requires_grad_(name in case.wrt) for name, tensor in tensors.items()}
    outputs = named(getattr(ops, case.op)(**leaves, **on(case.options, leaves)))
    roots = {name: out for name, out in outputs.items() if out.requires_grad}
    incoming = {name: gradient_for(out, leaves) for name, out in roots.items()}
    kept = {name: grad.clone() for name, grad in incoming.items()}
    grads = {}
    if roots:
        wrt = [leaves[name] for name in case.wrt]
        first, second = (
            torch.autograd.grad(list(roots.values()), wrt, list(incoming.values()), retain_graph=True) for _ in range(2)
        )
        assert all(map(torch.equal, first, second)), "two backwards through one graph"
        assert all(map(torch.equal, kept.values(), incoming.values())), "an incoming gradient was written"
        assert all(grad.dtype is leaf.dtype for grad, leaf in zip(first, wrt, strict=True))
        grads = {f"gradient of {name}": grad for name, grad in zip(case.wrt, first, strict=True)}
    return {name: out.detach() for name, out in outputs.items()}, grads, incoming


def evaluate(
    case: Case, dtype: torch.dtype | None, incoming: dict[str, Tensor], rounded: dict[str, Tensor] | None
) -> dict[str, Tensor]:
    """Results of the formula with all floats in ``dtype`` (None: as they are), on the CPU."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.cpu().to(dtype) if dtype and tensor.is_floating_point() else tensor.cpu()

    leaves = {name: cast(tensor).detach().requires_grad_(name in case.wrt) for name, tensor in case.tensors.items()}
    options = {name: cast(value) if isinstance(value, Tensor) else value for name, value in case.options.items()}
    if rounded is not None and OPS[case.op].keeps:
        options["kept"] = cast(rounded["0"])
    outputs = dict(enumerated(OPS[case.op].formula(**leaves, **options)))
    grads = {}
    if incoming:
        roots = {name: out for name, out in outputs.items() if name in incoming}
        above = [incoming[name].cpu().to(out.dtype) for name, out in roots.items()]
        wrt = [leaves[name] for name in case.wrt]
        found = torch.autograd.grad(list(roots.values()), wrt, above, allow_unused=True)
        found = [torch.zeros_like(leaf) if grad is None else grad for grad, leaf in zip(found, wrt, strict=True)]
        grads = {f"gradient of {name}": grad for name, grad in zip(case.wrt, found, strict=True)}
    return {name: out.detach() for name, out in outputs.items()} | grads


def named(result) -> dict[str, Tensor]:
    """The tensors of a result by their position, those of a tuple inside it in its place."""
    leaves = [result] if isinstance(result, Tensor) else []
    for part in () if leaves else result:
        leaves += [part] if isinstance(part, Tensor) else list(part)
    return dict(enumerated(leaves))


def enumerated(tensors) -> list[tuple[str, Tensor]]:
    return [(str(index), tensor) for index, tensor in enumerate(tensors)]


def gradient_for(out: Tensor, leaves: dict[str, Tensor]) -> Tensor:
    """Normal numbers; larger where ``out`` is a mean, whose gradient float16 could not hold otherwise."""
    generator = torch.Generator().manual_seed(out.numel())
    grad = torch.randn(out.shape, generator=generator)
    if out.dim() < 2:
        grad = grad * max(tensor.numel() for tensor in leaves.values()) / max(out.numel(), 1)
    return grad.to(out)


def on(options: dict, leaves: dict[str, Tensor]) -> dict:
    """The options on the device of the tensors."""
    device = next(iter(leaves.values())).device
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}


def relative_error(value: Tensor, truth: Tensor) -> float:
    """In L2; infinite where one is NaN and the other is not."""
    if not torch.equal(value.isnan(), truth.isnan()):
        return float("inf")
    value, truth = value.double().nan_to_num(), truth.double().nan_to_num()
    return float((value - truth).norm() / truth.norm().clamp(min=1e-30))
