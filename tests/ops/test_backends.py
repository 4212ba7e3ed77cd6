"""Which backend runs: device, dtype, the environment switches, what a backend supports, what is logged."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch

from dmdr_fast import backends, ops, reference
from dmdr_fast.backends.plans import Recorder
from dmdr_fast.ops._library import RAW
from tests.cases import OPS, valid_calls

PACKED = torch.randn(2, 8)


def stand_in(refuses=None):
    """A backend with one kernel, which marks its results, and its own opinion of what it supports."""
    backend = backends.Backend(Recorder)
    backend.implements("gated_activation_fwd", refuses=lambda a: refuses)(
        lambda run, a, out: out.out.copy_(reference.run("gated_activation_fwd", a) + 100)
    )
    return backend


@pytest.fixture(autouse=True)
def only_a_cpu_backend(monkeypatch):
    monkeypatch.delenv("DMDR_FAST_BACKEND")
    monkeypatch.delenv("DMDR_FAST_STRICT", raising=False)
    monkeypatch.setattr(backends, "_logged", set())
    loaded = {"cpu": stand_in(), "triton": "it cannot be loaded (no triton)", "cuda": stand_in()}
    monkeypatch.setattr(backends, "load", loaded.get)
    _forget()
    yield loaded
    _forget()


def _forget() -> None:
    for raw in RAW.values():
        raw.plans.clear()


def ran_on_stand_in() -> bool:
    return bool((ops.silu_mul(PACKED) > 50).all())


def test_auto_takes_the_cpu_kernel_for_cpu_tensors():
    assert ran_on_stand_in()
    choice = ops.explain("silu_mul", PACKED)
    assert (choice.function, choice.backend) == ("gated_activation_fwd", "cpu")
    assert "auto on cpu tensors" in str(choice)


def test_reference_can_be_forced(monkeypatch):
    monkeypatch.setenv("DMDR_FAST_BACKEND", "reference")
    monkeypatch.setenv("DMDR_FAST_STRICT", "1")  # asked for: not a fallback
    assert not ran_on_stand_in()
    assert ops.explain("silu_mul", PACKED).reason == "DMDR_FAST_BACKEND=reference"


def test_float64_runs_in_the_reference_even_when_strict(monkeypatch):
    monkeypatch.setenv("DMDR_FAST_STRICT", "1")
    assert (ops.silu_mul(PACKED.double()) < 50).all()
    assert ops.normal_noise(torch.empty(2, dtype=torch.float64), torch.tensor([1, 2])).dtype is torch.float64
    assert "float64" in str(ops.explain("silu_mul", PACKED.double()))


def test_a_missing_kernel_falls_back_and_says_so_once(caplog):
    with caplog.at_level(logging.WARNING, logger="dmdr_fast"):
        for _ in range(2):
            ops.multi_lora(**valid_calls()["multi_lora"])
    (record,) = caplog.records
    assert "multi_lora_fwd runs in the plain PyTorch reference. cpu: it has no multi_lora_fwd" in record.getMessage()
    choice = ops.explain("multi_lora", **valid_calls()["multi_lora"])
    assert choice.backend == "reference"
    assert choice.refused == (("cpu", "it has no multi_lora_fwd"),)


def test_a_refused_call_falls_back_with_the_backends_reason(only_a_cpu_backend, caplog):
    only_a_cpu_backend["cpu"] = stand_in(refuses="rows longer than 4")
    with caplog.at_level(logging.WARNING, logger="dmdr_fast"):
        assert not ran_on_stand_in()
    assert "cpu: rows longer than 4" in caplog.text


def test_strict_makes_a_fallback_an_error(monkeypatch):
    monkeypatch.setenv("DMDR_FAST_STRICT", "1")
    assert ran_on_stand_in()
    with pytest.raises(ops.FallbackError, match=r"multi_lora_fwd .*cpu: it has no multi_lora_fwd"):
        ops.multi_lora(**valid_calls()["multi_lora"])


def test_a_backend_that_cannot_load_is_one_line_for_all_ops(only_a_cpu_backend, caplog):
    only_a_cpu_backend["cpu"] = "it cannot be loaded (not built)"
    with caplog.at_level(logging.WARNING, logger="dmdr_fast"):
        ops.silu_mul(PACKED)
        ops.multi_lora(**valid_calls()["multi_lora"])
    (record,) = caplog.records
    assert "ops run in the plain PyTorch reference. cpu: it cannot be loaded (not built)" in record.getMessage()


def test_a_forced_backend_on_the_wrong_device_falls_back(monkeypatch):
    monkeypatch.setenv("DMDR_FAST_BACKEND", "cuda")
    assert not ran_on_stand_in()
    assert ops.explain("silu_mul", PACKED).refused == (("cuda", "it runs on cuda tensors, these are on cpu"),)


def test_triton_runs_on_cpu_tensors_in_its_interpreter_only(monkeypatch, only_a_cpu_backend):
    only_a_cpu_backend["triton"] = stand_in()
    monkeypatch.setenv("DMDR_FAST_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not ran_on_stand_in()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert ran_on_stand_in()


def test_unknown_names_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"explain: name: expected one of dmd_gradient, .* got 'softmax'"):
        ops.explain("softmax", PACKED)
    monkeypatch.setenv("DMDR_FAST_BACKEND", "metal")
    with pytest.raises(ValueError, match=r"DMDR_FAST_BACKEND: expected one of auto, .* got 'metal'"):
        ops.silu_mul(PACKED)


def test_cuda_tensors_go_to_triton_first_and_to_cuda_where_a_result_favours_it(monkeypatch):
    assert backends._candidates("auto", "cuda", "renoise_fwd") == ("triton", "cuda")
    monkeypatch.setattr(backends, "CUDA_FIRST", frozenset({"renoise_fwd"}))
    assert backends._candidates("auto", "cuda", "renoise_fwd") == ("cuda", "triton")


@pytest.mark.parametrize("op", sorted(OPS))
def test_every_op_explains_itself_without_computing(op, monkeypatch):
    monkeypatch.setattr(backends, "run", lambda *args: pytest.fail("explain computed"))
    choice = ops.explain(op, **valid_calls()[op])
    assert (choice.function in RAW and choice.backend in ("cpu", "reference")) or choice.function == op == "grpo_loss"


def test_importing_the_ops_imports_no_kernel_toolchain():
    code = (
        "import sys, dmdr_fast.ops\n"
        "print([m for m in ('triton', 'deepspeed', 'diffusers', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
