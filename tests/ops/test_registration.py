"""torch.ops.dmdr_fast.*: schemas, fakes and autograd under opcheck, and whole graphs under torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from dmdr_fast import backends, ops, reference
from dmdr_fast.ops._library import RAW
from tests.cases import OPS, SEED, valid_calls
from tests.raw import as_tuple

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture
def recorded(monkeypatch):
    """Raw function name to the arguments of its calls, from every public op's forward and backward."""
    calls: dict[str, list[tuple]] = {}
    run = backends.run

    def record(name, args):
        calls.setdefault(name, []).append(args)
        return run(name, args)

    monkeypatch.setattr(backends, "run", record)
    for dtype in (torch.float32, torch.bfloat16):
        for op, call in valid_calls(dtype).items():
            differentiate(op, call)
    for op, call in valid_calls().items():
        for changes in OPS[op].variants.values():
            differentiate(op, call | changes)
    rounded = {"mask": torch.ones(3, 1, 5), "out_dtype": torch.bfloat16}
    differentiate("dmd_loss", valid_calls()["dmd_loss"] | rounded)
    monkeypatch.setattr(backends, "run", run)
    return calls


def differentiate(op, call):
    constants = OPS[op].constants.split()
    call = {
        name: value.detach().clone().requires_grad_(name not in constants and value.dtype in FLOATS)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in call.items()
    }
    out = getattr(ops, op)(**call)
    leaves = [out] if isinstance(out, torch.Tensor) else [t for t in out if isinstance(t, torch.Tensor)]
    roots = [t for t in leaves if t.requires_grad]
    if roots:
        torch.autograd.backward(roots, [torch.randn_like(t) for t in roots])


def test_every_raw_function_is_registered_and_called(recorded):
    assert recorded.keys() == RAW.keys() == reference.FUNCTIONS.keys()
    assert all(hasattr(torch.ops.dmdr_fast, name) for name in RAW)


def test_opcheck(recorded):
    for name, calls in recorded.items():
        operator = getattr(torch.ops.dmdr_fast, name).default
        for args in calls:
            args = tuple(a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args)
            opcheck(operator, args, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))
        # Tracing with dynamic shapes and autograd is the slow one: the last call of each.
        opcheck(operator, with_gradients(name, args), test_utils=("test_aot_dispatch_dynamic",))


def test_opcheck_on_the_cpu_kernels(recorded, monkeypatch):
    monkeypatch.setenv("DMDR_FAST_BACKEND", "cpu")
    for name, calls in recorded.items():
        args = tuple(a.detach().clone() if isinstance(a, torch.Tensor) else a for a in calls[-1])
        operator = getattr(torch.ops.dmdr_fast, name).default
        opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))


def with_gradients(name, args):
    """Float latents that require grad, for the forwards; scalars and gradients themselves have none."""
    if not name.endswith("_fwd") or name == "dmd_gradient_fwd":
        return args
    return tuple(
        a.detach().clone().requires_grad_() if isinstance(a, torch.Tensor) and a.dtype in FLOATS and a.dim() > 1 else a
        for a in args
    )


def transposed(tensor):
    """The same values, column-major."""
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2) if tensor.dim() > 1 else tensor


def test_results_are_new_contiguous_tensors(recorded):
    for name, calls in recorded.items():
        for args in calls:
            strided = tuple(transposed(a) if isinstance(a, torch.Tensor) else a for a in args)
            out = as_tuple(reference.run(name, RAW[name].arguments(*strided)))
            storages = {a.untyped_storage().data_ptr() for a in strided if isinstance(a, torch.Tensor)}
            for tensor in out:
                assert tensor.is_contiguous(), name
                assert tensor.numel() == 0 or tensor.untyped_storage().data_ptr() not in storages, name


def flatten(out):
    if isinstance(out, torch.Tensor):
        return [out]
    return [leaf for part in out for leaf in flatten(part)]


def run_with_gradients(function, call):
    leaves = {n: v for n, v in call.items() if isinstance(v, torch.Tensor) and v.requires_grad}
    outputs = [t for t in flatten(function(**call)) if t is not call.get("next_sample")]
    roots = [t for t in outputs if t.requires_grad]
    grads = torch.autograd.grad([t.sum() for t in roots], list(leaves.values()), allow_unused=True) if roots else []
    return outputs, [g for g in grads if g is not None]


@pytest.mark.parametrize("op", sorted(OPS))
def test_compiles_to_one_graph_with_dynamic_shapes(op, monkeypatch):
    monkeypatch.setenv("DMDR_FAST_BACKEND", "auto")  # the kernels that run without a GPU
    torch._dynamo.reset()
    function = getattr(ops, op)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    constants = OPS[op].constants.split()
    for batch in (3, 2):
        call = {
            name: value[:batch].clone() if isinstance(value, torch.Tensor) and value.shape[:1] == (3,) else value
            for name, value in valid_calls()[op].items()
        }
        for name, value in call.items():
            if isinstance(value, torch.Tensor) and value.dtype in FLOATS and name not in constants:
                value.requires_grad_()
        eager, traced = run_with_gradients(function, call), run_with_gradients(compiled, call)
        for ours, theirs in zip([*eager[0], *eager[1]], [*traced[0], *traced[1]], strict=True):
            assert torch.equal(ours, theirs)


def test_compiles_with_inductor_between_other_operations():
    torch._dynamo.reset()

    def update(x0, fake, real, sigma, seed):
        x_t = ops.renoise(x0.tanh(), 1 - sigma, sigma, seed=seed, offset=3)
        return ops.dmd_loss(x0.tanh(), x_t, fake, real * 2, sigma=sigma)

    x0 = torch.randn(3, 4, 5, requires_grad=True)
    args = (torch.randn(3, 4, 5), torch.randn(3, 4, 5), torch.tensor([0.25, 0.5, 0.75]), SEED)
    eager, compiled = update(x0, *args), torch.compile(update, fullgraph=True, dynamic=True)(x0, *args)
    torch.testing.assert_close(compiled, eager)
    grads = [torch.autograd.grad(loss, x0)[0] for loss in (compiled, eager)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("op", sorted(OPS))
def test_autocast_changes_nothing(op):
    call = valid_calls()[op]
    expected = flatten(getattr(ops, op)(**call))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = flatten(getattr(ops, op)(**call))
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


def test_checkpointed_segments_give_the_same_gradients():
    from torch.utils.checkpoint import checkpoint

    x = torch.randn(2, 4, 8, requires_grad=True)
    shift, scale = torch.randn(2, 8, requires_grad=True), torch.randn(2, 8, requires_grad=True)

    def segment(x, shift, scale):
        return ops.silu_mul(ops.layer_norm_modulate(x, shift, scale)).square()

    plain = torch.autograd.grad(segment(x, shift, scale).sum(), (x, shift, scale))
    saved = torch.autograd.grad(checkpoint(segment, x, shift, scale, use_reentrant=False).sum(), (x, shift, scale))
    assert all(torch.equal(a, b) for a, b in zip(plain, saved, strict=True))
