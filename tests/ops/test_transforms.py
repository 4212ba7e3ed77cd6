"""Derivatives of every kind of every op, public and as ``torch.ops.dmdr_fast.*``, against its formula's in float64.

Forward mode, torch.func, batches of gradients, second derivatives: what the kernels do not have is the reference's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jacrev, jvp, vjp, vmap

from dmdr_fast import ops
from dmdr_fast.ops._library import Raw
from tests.cases import OPS, valid_calls

CASES = {
    name: (op, changes)
    for op, about in OPS.items()
    if about.wrt
    for name, changes in ((op, {}), *((f"{op}, {label}", changes) for label, changes in about.variants.items()))
}


class Problem(NamedTuple):
    """A function of some tensors, the same as a formula in float64, and directions for both.

    Attributes:
        inputs, tangents: of ``function``, alike.
        cotangents: of its results.
        close: compares a result with the formula's.
    """

    function: Callable[..., tuple[Tensor, ...]]
    formula: Callable[..., tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...]
    tangents: tuple[Tensor, ...]
    cotangents: tuple[Tensor, ...]

    def agree(self, derivative: Callable[..., object]) -> None:
        """``derivative(function, inputs, tangents, cotangents)`` is that of the formula in float64."""
        ours = derivative(self.function, self.inputs, self.tangents, self.cotangents)
        truth = derivative(self.formula, *(tuple(t.double() for t in part) for part in self[2:]))
        tolerance = 1e-9 if self.inputs[0].dtype is torch.float64 else 3e-5
        for value, exact in zip(flat(ours), flat(truth), strict=True):
            assert value.shape == exact.shape
            error = (value.double() - exact).norm() / exact.norm().clamp(min=1e-3)
            assert error < tolerance, f"relative error {error:.1e}"


def problem(case: str, dtype: torch.dtype) -> Problem:
    op, changes = CASES[case]
    call = {name: value for name, value in (valid_calls(dtype)[op] | changes).items() if value is not None}
    if dtype is torch.float64:
        call = {name: widened(value) for name, value in call.items()}
    about = OPS[op]
    names = [name for name in about.wrt.split() if name in call]
    wide = {name: widened(value) for name, value in call.items()}

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        return results(getattr(ops, op)(**call | dict(zip(names, inputs, strict=True))))[: about.outputs]

    def formula(*inputs: Tensor) -> tuple[Tensor, ...]:
        return about.formula(**wide | dict(zip(names, inputs, strict=True)))[: about.outputs]

    if "next_sample" in call:  # handed back as it came
        function, formula = (lambda *x, f=f: f(*x)[1:] for f in (function, formula))
    inputs = tuple(call[name] for name in names)
    cotangents = tuple(torch.randn_like(out) for out in function(*inputs))
    return Problem(function, formula, inputs, tuple(torch.randn_like(x) for x in inputs), cotangents)


def widened(value: object) -> object:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def results(out: Tensor | tuple) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else tuple(out)


def flat(values: object) -> list[Tensor]:
    return [values] if isinstance(values, Tensor) else [leaf for value in values for leaf in flat(value)]


PLACES = {
    "float64": ("reference", torch.float64, False),
    "float32": ("reference", torch.float32, False),
    "float32 on the CPU kernels": ("cpu", torch.float32, False),
    "float64, raw operators": ("reference", torch.float64, True),
    "float32 on the CPU kernels, raw operators": ("cpu", torch.float32, True),
}


@pytest.fixture(params=PLACES)
def dtype(request, monkeypatch):
    backend, dtype, raw = PLACES[request.param]
    monkeypatch.setenv("DMDR_FAST_BACKEND", backend)
    if raw:
        monkeypatch.setattr(Raw, "checked", lambda self, op, *args: self.operator(*args))
        monkeypatch.setattr(Raw, "__call__", lambda self, *args: self.operator(*args))
    return dtype


def tangent(function, inputs, tangents, _):
    return jvp(function, inputs, tangents)


def dual_tensors(function, inputs, tangents, _):
    with forward_ad.dual_level():
        out = function(*(forward_ad.make_dual(*pair) for pair in zip(inputs, tangents, strict=True)))
        return [forward_ad.unpack_dual(part).tangent for part in out]


def cotangent(function, inputs, _, cotangents):
    out, pull = vjp(function, *inputs)
    return out, pull(cotangents)


def gradient(function, inputs, tangents, cotangents):
    """torch.func's, and autograd's own."""
    scalar = projected(function, cotangents)
    leaves = [x.clone().requires_grad_() for x in inputs]
    return grad(scalar, argnums=tuple(range(len(inputs))))(*inputs), torch.autograd.grad(scalar(*leaves), leaves)


def jacobian(function, inputs, *_):
    return jacrev(function, argnums=tuple(range(len(inputs))))(*inputs)


def batch(function, inputs, tangents, _):
    return vmap(function)(*(torch.stack((x, x + 0.1 * t)) for x, t in zip(inputs, tangents, strict=True)))


def gradients_of_a_batch(function, inputs, tangents, cotangents):
    pairs = [torch.stack((x, x + 0.1 * t)) for x, t in zip(inputs, tangents, strict=True)]
    return vmap(grad(projected(function, cotangents), argnums=tuple(range(len(inputs)))))(*pairs)


def batch_of_gradients(function, inputs, _, cotangents):
    """As torch.autograd.functional.jacobian(vectorize=True) takes them, and by vmap of a backward."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    above = [torch.stack((c, -2 * c)) for c in cotangents]

    def pull(*above):
        return torch.autograd.grad(out, leaves, above, retain_graph=True)

    return torch.autograd.grad(out, leaves, above, retain_graph=True, is_grads_batched=True), vmap(pull)(*above)


@pytest.mark.parametrize("case", CASES)
def test_first_derivatives(case, dtype):
    one = problem(case, dtype)
    for derivative in (
        tangent, dual_tensors, cotangent, gradient, jacobian, batch, gradients_of_a_batch, batch_of_gradients,
    ):  # fmt: skip
        one.agree(derivative)


def double_backward(function, inputs, tangents, cotangents):
    leaves, above = ([t.clone().requires_grad_() for t in part] for part in (inputs, cotangents))
    grads = torch.autograd.grad(function(*leaves), leaves, above, create_graph=True)
    along = sum((g * t).sum() for g, t in zip(grads, tangents, strict=True))
    return torch.autograd.grad(along, [*leaves, *above], allow_unused=True, materialize_grads=True)


def tangent_of_gradient(function, inputs, tangents, cotangents):
    return jvp(grad(projected(function, cotangents), argnums=tuple(range(len(inputs)))), inputs, tangents)[1]


def projected(function, cotangents):
    return lambda *x: sum((out * c).sum() for out, c in zip(function(*x), cotangents, strict=True))


@pytest.mark.parametrize("case", [case for case, (op, _) in CASES.items() if OPS[op].twice])
def test_second_derivatives(case, dtype):
    one = problem(case, dtype)
    for derivative in (double_backward, tangent_of_gradient):
        one.agree(derivative)


def test_what_dmd_loss_injects_is_a_constant(dtype):
    one = problem("dmd_loss", dtype)
    (hessian,) = tangent_of_gradient(one.function, *one[2:])
    assert not hessian.any()
    injected = grad(lambda x: one.function(x)[0])(*one.inputs)
    leaf, above = one.inputs[0].clone().requires_grad_(), one.cotangents[0].clone().requires_grad_()
    (pulled,) = torch.autograd.grad(one.function(leaf), leaf, above, create_graph=True)
    (slope,) = torch.autograd.grad(pulled, above, one.tangents[0])
    torch.testing.assert_close(slope, (injected * one.tangents[0]).sum())


def test_dmd_gradient_is_a_constant_in_every_mode(dtype):
    call = valid_calls(dtype)["dmd_gradient"]

    def function(x0, fake):
        return tuple(ops.dmd_gradient(**call | {"x0": x0, "pred_fake": fake}))

    inputs = call["x0"], call["pred_fake"]
    values, tangents = jvp(function, inputs, inputs)
    assert not any(part.any() for part in tangents)
    truth = OPS["dmd_gradient"].formula(**{name: widened(value) for name, value in call.items()})
    for value, exact in zip(values, truth, strict=True):
        torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=1e-4)
    assert not grad(lambda *x: function(*x)[2])(*inputs).any()


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, about in OPS.items() for name in about.constants.split()])
def test_a_constant_with_a_tangent_or_a_gradient_is_refused(op, name):
    call = valid_calls()[op]

    def function(value):
        return results(getattr(ops, op)(**call | {name: value}))[0]

    with pytest.raises(ValueError, match=f"{op}: {name}: expected a constant, got a tensor with a tangent"):
        jvp(function, (call[name],), (call[name],))
    with pytest.raises(ValueError, match=f"{op}: {name}: expected a constant, got a tensor that requires grad"):
        grad(lambda value: function(value).sum())(call[name])


def test_each_of_a_batch_draws_with_its_own_seed():
    x, sigma, seeds = torch.randn(3, 4, 5), torch.rand(4), torch.tensor([[1, 2], [1, 3], [-4, 2]])
    out = vmap(lambda x, seed: ops.renoise(x, 1 - sigma, sigma, seed=seed))(x, seeds)
    apart = [ops.renoise(x[i], 1 - sigma, sigma, seed=seeds[i]) for i in range(3)]
    torch.testing.assert_close(out, torch.stack(apart))
