"""The emulation finds faults: else its passing tests would say nothing."""

from __future__ import annotations

import subprocess

import pytest

from tests.cuda import building


def run(request, name: str) -> subprocess.CompletedProcess:
    return subprocess.run([building.faulty_kernels(request.config), name], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("beyond_shared_memory", "a write outside the block's shared memory"),
        ("divergent_barrier", "threads wait at a barrier that others never reach"),
        ("shuffle_with_a_lane_that_left", "threads wait at a barrier that others never reach"),
        ("misaligned_vector", "misaligned address"),
    ],
)
def test_faults_end_the_process_with_a_message(request, fault, message):
    result = run(request, fault)
    assert result.returncode < 0 or result.returncode == 1
    assert message in result.stderr


@pytest.mark.parametrize("fault", ["missing_barrier", "missing_cluster_barrier"])
def test_a_missing_barrier_gives_other_numbers_in_another_order(request, fault):
    forward, reverse = run(request, fault).stdout.splitlines()
    assert forward != reverse


def test_a_kernel_with_its_barrier_gives_the_same_numbers(request):
    forward, reverse = run(request, "with_barrier").stdout.splitlines()
    assert forward == reverse == " ".join(str(63 - i) for i in range(64)) + " "
