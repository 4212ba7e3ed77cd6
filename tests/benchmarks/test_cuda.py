"""Measuring on a GPU: graphs replay the right work, copies have a copy's rate, launches are counted."""

import pytest
import torch

from benchmarks import cuda
from benchmarks.bench_gelu_mul import gelu_mul
from benchmarks.case import Case
from benchmarks.measure import run_case
from benchmarks.memory import peak_bytes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = torch.device("cuda")
MEBI = 1 << 20


def test_replay_computes_on_every_set_and_takes_time():
    sets = [{"x": torch.ones(8 * MEBI, device=GPU, requires_grad=True)} for _ in range(3)]
    seen = torch.zeros((), device=GPU)

    def square(x):
        seen.add_(1)
        return (x.square(),)

    timed = cuda.run(square, sets, ("x",), [(torch.ones(8 * MEBI, device=GPU),)] * 3)
    seen.zero_()
    forward, whole = timed(0)
    assert seen.item() == 2 * len(sets)  # the forward's graph, and the graph of both
    assert 0 < forward < whole < 0.1


def test_copy_rate_is_below_the_fastest_memory_there_is():
    timed, moved = cuda.copy(256 * MEBI, GPU)
    assert moved == 256 * MEBI
    seconds, _ = timed(0)
    assert 1e11 < moved / seconds < 1e13


def test_launches_of_known_work():
    x = torch.ones(1024, device=GPU)
    assert cuda.launches(lambda: x + x) == 1
    assert cuda.launches(lambda: (x + x) * x - x) == 3


def test_peak_memory():
    assert peak_bytes(lambda: torch.empty(4 * MEBI, device=GPU, dtype=torch.uint8), GPU) == 4 * MEBI


def test_a_case_from_gate_to_rows():
    case = Case(
        "gelu_mul",
        (64, 512),
        torch.bfloat16,
        lambda inputs: {"packed": inputs.normal(64, 512)},
        gelu_mul,
        forward_bytes=3 * 64 * 256 * 2,
        backward_bytes=5 * 64 * 256 * 2,
        wrt=("packed",),
    )
    rows = run_case(case, GPU)
    assert {row.what for row in rows} == {"forward", "forward + backward"}
    assert all(set(row.times) == {"fused", "eager", "compile", "copy"} for row in rows)
    assert all(row.launches["fused"] == 2 for row in rows if row.what != "forward" and row.backend != "reference")
