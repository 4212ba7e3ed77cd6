"""One case from gate to row: check, prepare the alternatives, time them interleaved, add memory and launches."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.exc import InductorError

from benchmarks import cpu, cuda, gate
from benchmarks.case import Case, upstream
from benchmarks.memory import peak_bytes
from benchmarks.timing import Readings, Spread, interleave
from dmdr_fast import ops

SECONDS = 1.2  # per case, all alternatives together
_MOST_SETS = 16


@dataclass(frozen=True)
class Row:
    """One line of the table; times in seconds.

    Attributes:
        what: "forward", "forward + backward" or "update".
        times: of "fused", "eager", "compile" (absent where it cannot run) and "copy".
        eager_ratio, compile_ratio: eager's (compile's) time over the fused op's, round by round.
        traffic: bytes of the floor; 0 where there is no byte model.
        copy_rate: bytes per second of the copy measured in the same rounds.
        peak: bytes at most held at once above the inputs; launches: kernels on a GPU.
        kernels: of a CPU, the part of the fused op's time that its kernels take; a GPU's times are of kernels alone.
        host: of a GPU, in multiples of ``a + b`` of two small tensors (:mod:`benchmarks.host`); None if not measured.
        errors: what the gate measured.
        missing: why an alternative is not in ``times``.
    """

    op: str
    size: str
    dtype: str
    backend: str
    what: str
    times: dict[str, Spread]
    eager_ratio: Spread
    compile_ratio: Spread | None = None
    traffic: int = 0
    copy_rate: float = 0.0
    peak: dict[str, int] = field(default_factory=dict)
    launches: dict[str, int] = field(default_factory=dict)
    kernels: float | None = None
    host: float | None = None
    errors: dict[str, gate.GateError] = field(default_factory=dict)
    missing: str = ""
    note: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """What names the line in a file of results."""
        return self.op, self.size, self.dtype, self.backend, self.what


def run_case(case: Case, device: torch.device, compiled: bool = True) -> list[Row]:
    """Gate and time ``case`` on every backend of ``device``: a row for the forward and one with the backward.

    ``compiled``: beside torch.compile too, whose compilation takes most of a case's time on a GPU.
    """
    rows = []
    for backend in backends(case, device):
        with forced(backend):
            errors = gate.check(case, device)
            label = _backend_that_runs(case, device)
        rows += [replace(row, backend=label, errors=errors) for row in _timed(case, backend, device, compiled)]
    return rows


def backends(case: Case, device: torch.device) -> tuple[str, ...]:
    """The settings of DMDR_FAST_BACKEND to measure: the one that is set; on a GPU otherwise both kernel backends."""
    chosen = os.environ.get("DMDR_FAST_BACKEND", "auto")
    if chosen != "auto" or device.type != "cuda":
        return (chosen,)
    kernels = []
    for backend in ("triton", "cuda"):
        with forced(backend):
            if _backend_that_runs(case, device) == backend:
                kernels.append(backend)
    return tuple(kernels) or ("auto",)


@contextmanager
def forced(backend: str) -> Iterator[None]:
    """DMDR_FAST_BACKEND inside the block."""
    before = os.environ.get("DMDR_FAST_BACKEND")
    os.environ["DMDR_FAST_BACKEND"] = backend
    try:
        yield
    finally:
        if before is None:
            del os.environ["DMDR_FAST_BACKEND"]
        else:
            os.environ["DMDR_FAST_BACKEND"] = before


def _backend_that_runs(case: Case, device: torch.device) -> str:
    tensors = {name: tensor.detach() for name, tensor in case.draw(device, seed=0).items()}
    return ops.explain(case.op, **tensors, **case.options).backend


def _timed(case: Case, backend: str, device: torch.device, with_compile: bool) -> list[Row]:
    machine = cuda if device.type == "cuda" else cpu
    sets, incoming = _rotated_inputs(case, device)
    functions: dict[str, Callable] = {"fused": case.fused, "eager": case.plain}
    compiled, missing = _compiled(case, sets[0], incoming[0]) if with_compile else (None, "")
    if compiled is not None:
        functions["compile"] = compiled
    traffic = case.forward_bytes + case.backward_bytes
    copying, copied = machine.copy(traffic, device)
    kernels = Readings([], [])
    with forced(backend), cpu.kernel_clock() as calls:
        once = {name: _call(function, sets[0], case.wrt, incoming[0]) for name, function in functions.items()}
        peak = {name: peak_bytes(call, device) for name, call in once.items()}  # and the run before the timed ones
        launched = {name: cuda.launches(call) for name, call in once.items()} if device.type == "cuda" else {}
        runs = {name: machine.run(function, sets, case.wrt, incoming) for name, function in functions.items()}
        if machine is cpu:
            runs["fused"] = cpu.in_kernels(runs["fused"], calls, kernels)
        readings = interleave({**runs, "copy": copying}, seconds=SECONDS)
    copy_rate = copied / Spread.of(readings["copy"].total).median
    whole = _row(case, "forward + backward" if case.wrt else "forward", traffic, copy_rate, readings)
    whole = replace(whole, peak=peak, launches=launched, missing=missing, kernels=_median(kernels.total))
    if not case.wrt:
        return [whole]
    forward = _row(case, "forward", case.forward_bytes, copy_rate, readings)
    return [replace(forward, kernels=_median(kernels.forward)), whole]


def _median(seconds: list[float]) -> float | None:
    """None where no kernel of the library was called."""
    return Spread.of(seconds).median if any(seconds) else None


def _rotated_inputs(case: Case, device: torch.device) -> tuple[list[dict[str, Tensor]], list[tuple[Tensor, ...]]]:
    """As many sets of inputs (and incoming gradients) as twice the last cache holds, at most 16."""
    cache = cuda.cache_bytes(device) if device.type == "cuda" else cpu.cache_bytes()
    first = case.draw(device, seed=0)
    size = sum(tensor.nbytes for tensor in first.values())
    count = min(_MOST_SETS, 1 + 2 * cache // max(size, 1))
    sets = [first, *(case.draw(device, seed) for seed in range(1, count))]
    incoming = []
    for seed, tensors in enumerate(sets):
        outputs = case.fused(**tensors)
        incoming.append(upstream(tuple(out.detach() for out in outputs), case.dtype, seed))
    return sets, incoming


def _compiled(case: Case, tensors: dict[str, Tensor], incoming: tuple[Tensor, ...]) -> tuple[Callable | None, str]:
    """Eager's function under torch.compile, compiled; or None and why it cannot be."""
    torch.compiler.reset()
    compiled = torch.compile(case.eager, dynamic=False, fullgraph=True)

    def function(**tensors: Tensor) -> tuple[Tensor, ...]:
        return case.select(compiled(**tensors, **case.options))

    try:
        _call(function, tensors, case.wrt, incoming)()
    except (BackendCompilerFailed, InductorError) as error:
        return None, f"torch.compile: {str(error).strip().splitlines()[0]}"
    return function, ""


def _call(
    function: Callable, tensors: dict[str, Tensor], wrt: tuple[str, ...], incoming: tuple[Tensor, ...]
) -> Callable[[], object]:
    """One forward (and backward) that leaves nothing behind."""

    def call() -> None:
        outputs = function(**tensors)
        if wrt:
            torch.autograd.grad(outputs, [tensors[name] for name in wrt], incoming)

    return call


def _row(case: Case, what: str, traffic: int, copy_rate: float, readings: dict[str, Readings]) -> Row:
    part = {name: r.forward if what == "forward" else r.total for name, r in readings.items()}
    return Row(
        op=case.name,
        size="x".join(map(str, case.shape)),
        dtype=str(case.dtype).removeprefix("torch."),
        backend="",
        what=what,
        times={name: Spread.of(seconds) for name, seconds in part.items()},
        eager_ratio=ratio(part["eager"], part["fused"]),
        compile_ratio=ratio(part["compile"], part["fused"]) if "compile" in part else None,
        traffic=traffic,
        copy_rate=copy_rate,
        note=case.note,
    )


def ratio(slower: list[float], faster: list[float]) -> Spread:
    """Round by round: what slows a whole round down cancels."""
    return Spread.of([a / b for a, b in zip(slower, faster, strict=True)])
