"""Interleaving, medians, and what is rounded to a reading."""

import pytest
import torch

from benchmarks import cpu
from benchmarks.timing import Readings, Spread, interleave
from dmdr_fast import ops


def test_spread_is_median_and_middle_sixty_percent():
    assert Spread.of(range(11)) == Spread(median=5.0, p20=2.0, p80=8.0)


def test_rounds_visit_all_and_rotate_the_order():
    order = []

    def run(name):
        def timed(index):
            order.append(name)
            return 1.0, 2.0

        return timed

    readings = interleave({name: run(name) for name in "ABC"}, seconds=0, least=4)
    assert "".join(order) == "ABCBCACABABC"
    assert readings["B"] == Readings([1.0] * 4, [2.0] * 4)


def test_short_calls_are_repeated_to_a_millisecond_and_averaged_over_rotating_inputs():
    seen = []

    def timed(index):
        seen.append(index)
        return 1e-4 * index, 3e-4 if not seen[1:] else 2e-4 * index

    readings = interleave({"A": timed}, seconds=0, least=2)
    assert seen == [0, 0, 1, 2, 3, 4, 5]  # the first round only says three calls to a reading
    assert readings["A"].forward == pytest.approx([1e-4, 4e-4])
    assert readings["A"].total == pytest.approx([2e-4, 8e-4])


def test_time_bounds_the_rounds_above_the_least():
    calls = []

    def timed(index):
        calls.append(index)
        return 1.0, 1.0

    interleave({"A": timed}, seconds=3600, least=1, most=7)
    assert calls == list(range(7))
    interleave({"A": timed}, seconds=0, least=2)
    assert len(calls) == 7 + 2


@pytest.mark.parametrize(("asked", "moved"), [(1, 8), (1 << 20, 1 << 20), (1 << 30, 128 << 20)])
def test_a_copy_is_a_call_with_a_new_tensor(monkeypatch, asked, moved):
    calls = []
    monkeypatch.setattr(cpu, "run", lambda *args: calls.append(args) or "run")
    assert cpu.copy(asked, torch.device("cpu")) == ("run", moved)
    ((function, sets, _, incoming),) = calls
    (copied,) = function(**sets[0])
    source = sets[0]["source"]
    assert torch.equal(copied, source) and copied.data_ptr() != source.data_ptr() and 2 * source.nbytes == moved
    assert len(incoming) == len(sets) <= 64


def test_time_in_the_kernels_is_part_of_the_calls():
    x0, inputs = torch.randn(4, 8, 64, 64, requires_grad=True), [torch.randn(4, 8, 64, 64) for _ in range(3)]
    sets, incoming = [{"x0": x0, "x_t": inputs[0]}], [(torch.tensor(2.0),)]

    def loss(x0, x_t):
        return (ops.dmd_loss(x0, x_t, inputs[1], inputs[2], sigma=0.5),)

    loss(**sets[0])  # a plan from outside, which calls past the clock
    readings = Readings([], [])
    with cpu.kernel_clock() as calls:
        timed = cpu.in_kernels(cpu.run(loss, sets, ("x0",), incoming), calls, readings)
        seconds = [timed(index) for index in range(3)]
    assert [name for name, _ in calls] == ["dmd_gradient_fwd", "dmd_gradient_bwd"]
    for (forward, total), inside, both in zip(seconds, readings.forward, readings.total, strict=True):
        assert 0 < inside < forward and inside < both < total
    loss(**sets[0])
    assert len(calls) == 2
