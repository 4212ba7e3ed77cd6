"""The gate passes what is right and stops what is not: values, gradients, NaN."""

import pytest
import torch

from benchmarks import gate, measure
from benchmarks.bench_gated_residual import gated_residual
from benchmarks.case import Case
from dmdr_fast import ops

CPU = torch.device("cpu")
SHAPE = (2, 3, 64)


@pytest.fixture(autouse=True)
def reference_backend(monkeypatch):
    monkeypatch.setenv("DMDR_FAST_BACKEND", "reference")


def case(dtype=torch.float32, **changes):
    def tensors(inputs):
        return {"x": inputs.normal(*SHAPE), "h": inputs.normal(*SHAPE), "gate": inputs.normal(2, 64)}

    values = {"forward_bytes": 1, "wrt": ("x", "h", "gate")} | changes
    return Case("gated_residual", SHAPE, dtype, tensors, gated_residual, **values)


def break_op(monkeypatch, broken):
    right = ops.gated_residual

    def wrong(x, h, gate):
        out = right(x, h, gate)
        return out if x.dtype is torch.float64 else broken(out)

    monkeypatch.setattr(ops, "gated_residual", wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_op_passes_with_measured_errors(dtype):
    errors = gate.check(case(dtype), CPU)
    assert list(errors) == ["out", "grad of x", "grad of h", "grad of gate"]
    assert 0 < errors["out"].fused <= errors["out"].bound <= gate.bound(dtype, None)


def test_wrong_value_is_stopped_and_named(monkeypatch):
    break_op(monkeypatch, lambda out: out * (1 + 1e-5))
    with pytest.raises(gate.GateFailure, match=r"gated_residual .*float32.* out: 1\.0\de-05, allowed"):
        gate.check(case(), CPU)


def test_wrong_gradient_is_stopped(monkeypatch):
    break_op(monkeypatch, lambda out: out.detach() + 1.001 * (out - out.detach()))
    with pytest.raises(gate.GateFailure, match=r"grad of x: 1\.00e-03"):
        gate.check(case(), CPU)


def test_nan_is_stopped(monkeypatch):
    break_op(monkeypatch, lambda out: out + float("nan"))
    with pytest.raises(gate.GateFailure, match="out: nan"):
        gate.check(case(), CPU)


def test_nothing_is_timed_behind_a_failed_gate(monkeypatch):
    break_op(monkeypatch, lambda out: 2 * out)
    monkeypatch.setattr(measure, "_timed", lambda *args: pytest.fail("timed"))
    with pytest.raises(gate.GateFailure):
        measure.run_case(case(), CPU)


def test_bound_is_twice_eager_between_half_a_unit_and_the_ceiling():
    assert gate.bound(torch.float32, 1e-6) == 2e-6
    assert gate.bound(torch.float32, 1.0) == gate.bound(torch.float32, None) == 1e-5
    assert gate.bound(torch.bfloat16, None) == 4e-3
    assert gate.bound(torch.bfloat16, 0.0) == 2.0**-8
    assert gate.bound(torch.float32, 2e-5, fp32_ceiling=3e-5) == 3e-5


def test_relative_error_of_a_known_difference():
    assert gate.relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0]).double()) == pytest.approx(0.1)
