"""A plan is how a raw function runs on arguments of one signature: kept from the first call for all that follow.

A backend's function is written for one call. It takes a :class:`Recorder`, the call's arguments and the results to
write, allocates what it needs besides with ``run.new`` and starts kernels with the recorder's own method, and all that
it does follows from the signature: shapes, strides, dtypes, 16-byte alignment, options. The first call runs it and
takes notes; the next ones allocate and launch by the notes, with their own pointers. Host time of layer_norm_modulate
on Triton without its plan: 29 us, with it 9.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from dmdr_fast.backends.views import with_rows
from dmdr_fast.reference import Result


class Live(int):
    """An int argument that is no part of the signature (an offset into a stream of noise): read at every call.

    What is computed of it is a plain int, and must follow from the signature.
    """

    place: int


class Recorder:
    """Runs a backend's function and notes its allocations and launches.

    Places: the tensors of the call, then its :class:`Live` ints, then what is allocated, by number.

    Attributes:
        device: of the tensors.
    """

    def __init__(self, arguments: Sequence[Any]) -> None:
        tensors = [value for value in arguments if isinstance(value, Tensor)]
        live = [value for value in arguments if isinstance(value, Live)]
        self.device = tensors[0].device
        self._places = {id(tensor): (place, 0) for place, tensor in enumerate(tensors)}
        for place, value in enumerate(live, len(tensors)):
            value.place = place
        self._held: list[Tensor] = tensors
        self._first_new = len(tensors) + len(live)
        self._allocations: list[Callable[[], Tensor]] = []
        self._launches: list[Callable[[list[int]], None]] = []
        self._repeatable = True

    def new(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor."""
        return self.allocate(torch.empty_strided, tuple(shape), _contiguous_strides(shape), dtype=dtype)

    def result(self, result: Result) -> Tensor:
        """A tensor for it, 0 where it has to be."""
        shape = (0,) if result.shape is None else result.shape
        if result.zero:
            return self.allocate(torch.zeros, tuple(shape), dtype=result.dtype)
        return self.new(shape, result.dtype)

    def kept(self, tensor: Tensor) -> Tensor:
        """A tensor that is no argument and that all calls may read, such as a table."""
        return self.allocate(lambda device: tensor)

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

    def on_device(self, start: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """``start(*args, **options)`` with the tensors' device as the thread's current one, where launches go."""
        elsewhere = self.device.type == "cuda" and self.device.index != torch.cuda.current_device()
        with torch.cuda.device(self.device) if elsewhere else nullcontext():
            return start(*args, **options)

    def note(self, launch: Callable[[list[int]], None]) -> None:
        """``launch(values)`` starts what was just started, with the pointers and ints of another call."""
        self._launches.append(launch)

    def plan(self, outputs: Tensor | tuple[Tensor, ...]) -> Plan | None:
        """The notes; None where they cannot be repeated. ``outputs`` is what the function returned."""
        places = [self.place(output) for output in (outputs if isinstance(outputs, tuple) else (outputs,))]
        # What a graph allocates once is the graph's; on meta tensors nothing was launched.
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if capturing or self.device.type == "meta" or not self._repeatable:
            return None
        made = [place[0] - self._first_new for place in places if place is not None]
        # What the notes keep of the recorder must not keep the tensors of this call.
        self._places.clear()
        self._held.clear()
        return Plan(self._allocations, self._launches, operator.itemgetter(*made))

    def allocate(self, function: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
        """``function(*args, **options, device=...)``: called again for every call."""
        allocate = functools.partial(function, *args, **options, device=self.device)
        tensor = allocate()
        self._places[id(tensor)] = self._first_new + len(self._allocations), 0
        self._held.append(tensor)
        self._allocations.append(allocate)
        return tensor


class Plan:
    """Allocations and launches of a call, to be repeated; see the module."""

    def __init__(
        self,
        allocations: list[Callable[[], Tensor]],
        launches: list[Callable[[list[int]], None]],
        outputs: Callable[[list[Tensor]], Tensor | tuple[Tensor, ...]],
    ) -> None:
        self._allocations, self._launches, self._outputs = allocations, launches, outputs

    def __call__(self, values: list[int]) -> Tensor | tuple[Tensor, ...]:
        """``values``: the pointers of the call's tensors and its live ints. Consumed."""
        made = [allocate() for allocate in self._allocations]
        values += [tensor.data_ptr() for tensor in made]
        for launch in self._launches:
            launch(values)
        return self._outputs(made)


def _contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
