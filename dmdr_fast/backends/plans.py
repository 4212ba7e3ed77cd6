"""A plan is how a raw function runs on arguments of one signature: kept from the first call for all that follow.

A backend's function is written for one call. It takes a :class:`Recorder`, the call's arguments and the results to
write, allocates what it needs besides with ``run.new`` and starts kernels with the recorder's own method, and all that
it does follows from the signature: shapes, strides, dtypes, 16-byte alignment, options. The first call runs it and
takes notes; the next ones allocate and launch by the notes, with their own pointers. Host time of layer_norm_modulate
on Triton without its plan: 29 us, with it 9.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dmdr_fast.backends.views import with_rows
from dmdr_fast.reference import Result

# Results and, by a plan, tensors: of the pointers of a call's tensors and its live int, at the places of their
# arguments. The list is consumed.
Outputs = Tensor | tuple[Tensor, ...]
Plan = Callable[[list[int]], Outputs]

# How TorchInductor's own code allocates, on the current device: 0.4 us, where torch.empty_strided takes 0.8.
EMPTY: dict[str, Callable[[Sequence[int], Sequence[int], torch.dtype], Tensor]] = {
    device_type: getattr(torch._C._dynamo.guards, f"_empty_strided_{device_type}") for device_type in ("cpu", "cuda")
}
# Memory of a plan's own: each tensor in it starts at a multiple of this many bytes.
_ALIGNMENT = 128


class Live(int):
    """An int argument that is no part of the signature (an offset into a stream of noise): read at every call.

    What is computed of it is a plain int, and must follow from the signature.
    """

    place: int


class Recorder:
    """Runs a backend's function and notes its allocations and launches.

    Places: the arguments of the call, then what is allocated, by number; -1 is the last.

    Attributes:
        device: of the tensors.
    """

    def __init__(self, arguments: Sequence[Any]) -> None:
        self._held = [value for value in arguments if isinstance(value, Tensor)]
        self.device = self._held[0].device
        self._places = {id(value): (place, 0) for place, value in enumerate(arguments) if isinstance(value, Tensor)}
        for place, value in enumerate(arguments):
            if isinstance(value, Live):
                value.place = place
        self._first_new = len(arguments)
        self._allocations: list[Callable[[], Tensor]] = []
        self._launches: list[Callable[[list[int]], None]] = []
        self._repeatable = True
        self._own_bytes = 0  # of what `new` has made

    def new(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor that is no result. A plan allocates all of these as one, the last."""
        tensor = self.empty(shape, dtype)()
        self._places[id(tensor)] = -1, self._own_bytes
        self._own_bytes += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        self._held.append(tensor)
        return tensor

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Callable[[], Tensor]:
        """Makes an uninitialised contiguous tensor."""
        strides = torch.empty(shape, device="meta").stride()
        if (empty := EMPTY.get(self.device.type)) is not None:
            return functools.partial(empty, tuple(shape), strides, dtype)
        return functools.partial(torch.empty_strided, tuple(shape), strides, dtype=dtype, device=self.device)

    def result(self, result: Result) -> Tensor:
        """A tensor for it, 0 where it has to be."""
        shape = (0,) if result.shape is None else result.shape
        if result.zero:
            return self.allocate(functools.partial(torch.zeros, tuple(shape), dtype=result.dtype, device=self.device))
        return self.allocate(self.empty(shape, result.dtype))

    def kept(self, tensor: Tensor) -> Tensor:
        """A tensor that is no argument and that all calls may read, such as a table."""
        return self.allocate(lambda: tensor)

    def part(self, view: Tensor, whole: Tensor) -> Tensor:
        """``view``, known from now on as memory of ``whole``, which is an argument or was allocated here."""
        if view is not whole and (place := self._places.get(id(whole))) is not None:
            self._places[id(view)] = place[0], place[1] + view.data_ptr() - whole.data_ptr()
            self._held.append(view)
        return view

    def view(self, tensor: Tensor, *shape: int) -> Tensor:
        """``tensor`` in another shape, its last dimension contiguous; copied where strides do not allow it."""
        view = with_rows(tensor.reshape(shape))
        copied = view.untyped_storage()._cdata != tensor.untyped_storage()._cdata
        return view if copied else self.part(view, tensor)

    def place(self, tensor: Tensor) -> tuple[int, int] | None:
        """(place, bytes from its start); None for a tensor that a later call does not have, such as a copy."""
        place = self._places.get(id(tensor))
        self._repeatable &= place is not None
        return place

    def note(self, launch: Callable[[list[int]], None]) -> None:
        """``launch(values)`` starts what was just started, with the pointers and ints of another call."""
        self._launches.append(launch)

    def plan(self, outputs: Outputs) -> Plan | None:
        """The notes; None where they cannot be repeated. ``outputs`` is what the function returned."""
        places = [self.place(output) for output in (outputs if isinstance(outputs, tuple) else (outputs,))]
        # What a graph allocates once is the graph's; on meta tensors nothing was launched.
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if capturing or self.device.type == "meta" or not self._repeatable:
            return None
        if self._own_bytes:
            self._allocations.append(self.empty((self._own_bytes,), torch.uint8))
        # What the notes keep of the recorder must not keep the tensors of this call.
        self._places.clear()
        self._held.clear()
        again = self._repeated([place[0] - self._first_new for place in places if place is not None])
        one = self.device.type != "cuda" or torch.cuda.device_count() == 1
        return again if one else functools.partial(on_device, self.device, again)

    def _repeated(self, made: list[int]) -> Plan:
        """The notes as Python source, in which a loop over them costs nothing: the tensors ``made`` are the results."""
        names: dict[str, Any] = {f"allocate{index}": one for index, one in enumerate(self._allocations)}
        names |= {f"launch{index}": one for index, one in enumerate(self._launches)}
        tensors = range(len(self._allocations))
        source = "\n    ".join([
            "def again(values):",
            *(f"t{index} = allocate{index}()" for index in tensors),
            f"values += ({', '.join(f't{index}.data_ptr()' for index in tensors)},)",
            *(f"launch{index}(values)" for index in range(len(self._launches))),
            f"return {', '.join(f't{index}' for index in made)}",
        ])  # fmt: skip
        exec(source, names)
        return names["again"]

    def allocate(self, allocate: Callable[[], Tensor]) -> Tensor:
        """``allocate()``: called again for every call."""
        tensor = allocate()
        self._places[id(tensor)] = self._first_new + len(self._allocations), 0
        self._held.append(tensor)
        self._allocations.append(allocate)
        return tensor


def on_device(device: torch.device, start: Callable[..., Any], *args: Any) -> Any:
    """``start(*args)`` with ``device`` as the thread's current one, where allocations and launches go."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return start(*args)
    with torch.cuda.device(device):
        return start(*args)
