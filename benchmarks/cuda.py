"""Measuring on a GPU: replays of CUDA graphs over inputs rotated past the L2 cache, and launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.timing import Run

_MOST_PAIRS = 64


def cache_bytes(device: torch.device) -> int:
    """Size of the L2 cache."""
    return torch.cuda.get_device_properties(device).L2_cache_size


def run(
    function: Callable[..., tuple[Tensor, ...]],
    sets: Sequence[dict[str, Tensor]],
    wrt: tuple[str, ...],
    incoming: Sequence[tuple[Tensor, ...]],
) -> Run:
    """A timed replay of ``function`` and its backward over all ``sets``, per set: no host work inside the clock."""

    def forward() -> None:
        for tensors in sets:
            function(**tensors)

    def whole() -> None:
        for tensors, grads in zip(sets, incoming, strict=True):
            torch.autograd.grad(function(**tensors), [tensors[name] for name in wrt], grads)

    forward_graph = _captured(forward)
    graph = _captured(whole) if wrt else forward_graph

    def timed(index: int) -> tuple[float, float]:
        return _seconds(forward_graph) / len(sets), _seconds(graph) / len(sets)

    return timed


def copy(traffic: int, device: torch.device) -> tuple[Run, int]:
    """A copy that moves about ``traffic`` bytes (read plus written), captured and rotated like the ops.

    Returns:
        The run, and the bytes it moves.
    """
    elements = max(traffic // 8, 1)
    count = min(_MOST_PAIRS, -(-2 * cache_bytes(device) // max(traffic, 1)))
    pairs = [(torch.randn(elements, device=device), torch.empty(elements, device=device)) for _ in range(count)]

    def copies() -> None:
        for source, target in pairs:
            target.copy_(source)

    graph = _captured(copies)

    def timed(index: int) -> tuple[float, float]:
        seconds = _seconds(graph) / count
        return seconds, seconds

    return timed, 8 * elements


def launches(call: Callable[[], object]) -> int:
    """Kernels, copies and fills that one ``call`` puts on the device."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type is DeviceType.CUDA for event in recorded.events())


def _captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """``call`` as a graph, after the runs on a side stream that libraries and autotuning need."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def _seconds(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3
