"""Peak memory against allocations of known size."""

import torch

from benchmarks.memory import peak_bytes

CPU = torch.device("cpu")
MEBI = 1 << 20


def test_peak_is_the_most_held_at_once():
    def call():
        first = torch.empty(3 * MEBI, dtype=torch.uint8)
        second = torch.empty(5 * MEBI, dtype=torch.uint8)
        del first
        third = torch.empty(2 * MEBI, dtype=torch.uint8)
        return second, third

    assert peak_bytes(call, CPU) == 8 * MEBI


def test_what_lived_before_is_not_counted():
    held = [torch.empty(4 * MEBI, dtype=torch.uint8)]

    def call():
        torch.empty(3 * MEBI, dtype=torch.uint8)

    assert peak_bytes(call, CPU) == 3 * MEBI
    held.clear()


def test_memory_inside_an_operator_is_seen():
    # A stable sort returns values and indices (4 + 8 bytes an element) and works on copies of them inside.
    values = torch.randn(MEBI)
    assert peak_bytes(lambda: values.sort(stable=True), CPU) > 12 * MEBI
