"""The kernel libraries of csrc/, and the backend that each of them is.

A function of a backend is written once for both: what differs (memory, threads, stream, current device) is here.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dmdr_fast
from dmdr_fast.backends import Backend
from dmdr_fast.backends.native import abi
from dmdr_fast.backends.plans import Live, Recorder
from dmdr_fast.backends.views import Strided, shared_view

# From here on a fresh output is likely to be new pages of the system, and two huge ones fit in.
_HUGE = 4 << 20


class NativeError(RuntimeError):
    """A kernel library refused a call."""


Refusal = Callable[["Library", Any], str | None] | None
# (function, entry, refuses) by the name of a raw function.
_REGISTERED: dict[str, tuple[Callable, str, Refusal]] = {}


def implements(name: str, *, entry: str | None = None, refuses: Refusal = None) -> Callable:
    """Register the decorated function as the raw function ``name`` of the libraries that have ``dmdr_<entry>``.

    Args:
        entry: None means ``name``.
        refuses: of a library and the arguments: why it cannot run them, or None.
    """

    def register(function: Callable) -> Callable:
        _REGISTERED[name] = function, entry or name, refuses
        return function

    return register


def on_samples(name: str, struct_name: str, entry: str | None = None, **fields: str) -> None:
    """Register the raw function ``name`` as ``dmdr_<entry>``, its tensors all of one shape [B, ...].

    ``fields``: arguments, or results, by field of the struct, where their names differ.
    """

    @implements(name, entry=entry)
    def call(run: Calls, a, out) -> None:
        given = {field: getattr(out if source in out._fields else a, source) for field, source in fields.items()}
        run.call(entry or name, struct_name, run.samples(struct_name, a, out, **given))


class Library:
    """``lib<stem>.so``, loaded and of this ABI.

    Attributes:
        device_type: of the tensors that it takes: "cpu" or "cuda".
        functions: the library as ctypes has it.

    Raises:
        ImportError: it is missing, cannot be loaded, or was built for another version of the package.
    """

    def __init__(self, path: Path, device_type: str) -> None:
        self.device_type = device_type
        try:
            self.functions = ctypes.CDLL(os.fspath(path))
        except OSError as error:
            raise ImportError(f"{path} cannot be loaded: {error}") from error
        self.functions.dmdr_abi_version.restype = ctypes.c_int64
        self.functions.dmdr_error_string.restype = ctypes.c_char_p
        version = self.functions.dmdr_abi_version()
        if version != abi.VERSION:
            raise ImportError(
                f"{path} has ABI version {version}, this package expects {abi.VERSION}: build it again "
                "(`pip install .`, or `cmake --build build` in a checkout)"
            )
        if device_type == "cpu":
            self.functions.dmdr_cpu_expect_writes.argtypes = (ctypes.c_void_p, ctypes.c_int64)
            self.functions.dmdr_cpu_expect_writes.restype = None

    def backend(self) -> Backend:
        """The backend of all registered functions that the library has."""
        backend = Backend(functools.partial(Calls, self), takes_empty=self.device_type == "cpu")
        for name, (function, entry, refuses) in _REGISTERED.items():
            if hasattr(self.functions, f"dmdr_{entry}"):
                refusal = None if refuses is None else functools.partial(refuses, self)
                backend.implements(name, refuses=refusal)(function)
        return backend

    def entry(self, name: str) -> Callable[[bytearray], None]:
        """``dmdr_<name>`` of the bytes of its argument struct, on torch's number of threads or its current stream.

        Raises (when called):
            NativeError: the kernel returned a status other than 0.
        """
        function = getattr(self.functions, f"dmdr_{name}")
        function.argtypes, function.restype = (ctypes.c_char_p, ctypes.c_void_p), ctypes.c_int
        on_cpu = self.device_type == "cpu"

        def call(arguments: bytearray) -> None:
            stream = None
            if on_cpu:
                struct.pack_into("=q", arguments, 8, torch.get_num_threads())
            else:
                stream = torch.cuda.current_stream().cuda_stream
            status = function(bytes(arguments), stream)
            if status != 0:
                raise NativeError(f"dmdr_{name}: {self.functions.dmdr_error_string(status).decode()} (status {status})")

        return call

    def workspace_size(self, name: str, *sizes: int) -> int:
        """``dmdr_<name>_workspace(*sizes)``: how many elements."""
        function = getattr(self.functions, f"dmdr_{name}_workspace")
        function.argtypes, function.restype = (ctypes.c_int64,) * len(sizes), ctypes.c_int64
        return function(*sizes)


class Calls(Recorder):
    """Calls functions of a library."""

    def __init__(self, library: Library, arguments: tuple) -> None:
        super().__init__(arguments)
        self.library = library
        self._wide: list[tuple[Tensor, Tensor]] = []  # results, and what is written in their place

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Callable[[], Tensor]:
        """Makes an uninitialised contiguous tensor that a kernel is about to fill.

        On a CPU large ones ask for huge pages first: the allocator hands them back to the system when they are freed,
        and taking 4 KiB pages anew costs more than the kernel (renoise_bwd of 100 MB: 64 ms, 17 ms with huge pages;
        one thread, Zen 4).
        """
        empty, library = super().empty(shape, dtype), self.library
        if library.device_type != "cpu" or torch.Size(shape).numel() * dtype.itemsize < _HUGE:
            return empty

        def huge() -> Tensor:
            output = empty()
            library.functions.dmdr_cpu_expect_writes(output.data_ptr(), output.nbytes)
            return output

        return huge

    def workspace(self, name: str, *sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """What ``dmdr_<name>_workspace`` asks for."""
        return self.new((self.library.workspace_size(name, *sizes),), dtype)

    def fields(
        self, struct_name: str, a: tuple, out: tuple, view: Callable[[Tensor], Strided] | None = None, /, **given: Any
    ) -> dict[str, Any]:
        """The fields of an argument struct, see :func:`abi.packed`: as given, else the result or argument of that name.

        Pointers are made contiguous, and float32 where they are floats: :meth:`call` rounds a result that is not, and
        leaves no plan then.

        Args:
            view: gives a tensor its strides.
        """
        fields = {}
        for kind, names in abi.STRUCTS[struct_name]:
            for name in names.split():
                value = given[name] if name in given else getattr(out, name, getattr(a, name, None))
                if kind == "tensor" and view is not None and isinstance(value, Tensor):
                    value = view(value)
                elif kind == "pointer" and isinstance(value, Tensor) and name != "workspace":
                    given_value, dtype = value, torch.float32 if value.is_floating_point() else value.dtype
                    value = value.to(dtype).contiguous()
                    if value is not given_value and any(given_value is result for result in out):
                        self._wide.append((given_value, value))
                fields[name] = value
        return fields

    def samples(self, struct_name: str, a: tuple, out: tuple, /, **given: Any) -> dict[str, Any]:
        """The same where all tensors have one shape [B, ...]."""
        fields = self.fields(struct_name, a, out, **given)
        names = [name for kind, names in abi.STRUCTS[struct_name] if kind == "tensor" for name in names.split()]
        shape, views = shared_view(*(fields[name] for name in names))
        return fields | dict(zip(names, views, strict=True)) | {"shape": shape}

    def call(self, name: str, struct_name: str, fields: dict[str, Any]) -> None:
        """``dmdr_<name>`` with the fields of its argument struct by name, see :func:`abi.packed`."""
        entry, (template, pointers) = self.library.entry(name), abi.packed(struct_name, fields)
        places = []
        for position, source, offset in pointers:
            if isinstance(source, Live):
                places.append((position, source.place, 0))
            else:
                place, start = self.place(source) or (0, 0)
                places.append((position, place, start + offset))
                struct.pack_into("=q", template, position, source.data_ptr() + offset)

        def again(values: list[int]) -> None:
            arguments = bytearray(template)  # one for each call: backwards run on threads of their own
            for position, place, offset in places:
                struct.pack_into("=q", arguments, position, values[place] + offset)
            entry(arguments)

        entry(template)
        self.note(again)
        for result, wide in self._wide:
            result.copy_(wide)
            self._repeatable = False


def library_path(stem: str) -> Path:
    """Where ``lib<stem>.so`` lies.

    An editable installation has the sources in one folder and what CMake built in another; both are on the
    package's ``__path__``.

    Raises:
        ImportError: it is in none of them; the message says how to build it.
    """
    folders = [Path(folder) / "lib" for folder in dmdr_fast.__path__]
    for folder in folders:
        path = folder / f"lib{stem}.so"
        if path.is_file():
            return path
    looked = ", ".join(str(folder) for folder in folders)
    raise ImportError(
        f"lib{stem}.so is not in {looked}. Build it with `pip install .` or, in a checkout, "
        "`cmake -S . -B build && cmake --build build` (needs a C++ compiler)"
    )
