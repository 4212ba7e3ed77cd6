"""The C ABI: what the header declares, what the library exports and refuses, and how it is found."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dmdr_fast
from dmdr_fast.backends.cpu import BACKEND, LIBRARY
from dmdr_fast.backends.native import Library, NativeError, abi, library_path
from dmdr_fast.backends.native.library import Calls
from dmdr_fast.backends.views import OUTER, Strided
from tests.raw import RawFunctions

HEADER = Path(__file__).parents[2] / "csrc" / "include" / "dmdr" / "abi.h"
# What the header calls a field, in the terms of abi.STRUCTS.
KINDS = {"dmdr_tensor": "tensor", "double": "double", "int64_t": "int"}


def header_text() -> str:
    return re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.S)


def header_fields(struct_name: str) -> list[tuple[str, str]]:
    """(kind, name) of every field that the header's struct has, nested ones laid out in place."""
    body = re.search(rf"typedef struct {struct_name} {{(.*?)}} {struct_name};", header_text(), re.S).group(1)
    fields = []
    for declaration in body.split(";"):
        if not declaration.strip():
            continue
        words, names = re.match(r"\s*(?:const )?(\w+)\s+(.*)", declaration, re.S).groups()
        for name in names.split(","):
            name = name.strip()
            if name.startswith("*"):
                fields.append(("pointer", name[1:].strip()))
            elif name.startswith("shape["):
                fields.append(("shape", "shape"))
            elif words == "dmdr_qk_side":
                fields += [(kind, f"{name}_{field}") for kind, field in header_fields("dmdr_qk_side")]
            else:
                fields.append((KINDS[words], name))
    return fields


def exported_functions() -> dict[str, str]:
    """Function and argument struct of every kernel that the header declares."""
    return dict(re.findall(r"DMDR_EXPORT int (dmdr_\w+)\(const (dmdr_\w+_args) \*", header_text()))


def test_the_version_is_the_headers():
    assert int(re.search(r"#define DMDR_ABI_VERSION (\d+)", header_text()).group(1)) == abi.VERSION
    assert int(re.search(r"#define DMDR_OUTER (\d+)", header_text()).group(1)) == OUTER
    assert LIBRARY.functions.dmdr_abi_version() == abi.VERSION


@pytest.mark.parametrize("struct_name", abi.STRUCTS)
def test_packed_fields_are_the_headers_in_order(struct_name):
    fields = [("int" if isinstance(kind, tuple) else kind, names) for kind, names in abi.STRUCTS[struct_name]]
    packed = [(kind, name) for kind, names in fields for name in names.split()]
    assert [("int", "size"), ("int", "num_threads"), *packed] == header_fields(struct_name)


def test_every_declared_kernel_is_exported_and_checks_the_struct_size():
    functions = exported_functions()
    assert len(functions) > 20
    assert set(functions.values()) == set(abi.STRUCTS)
    for name, struct_name in functions.items():
        entry = getattr(LIBRARY.functions, name)
        entry.restype, entry.argtypes = ctypes.c_int, (ctypes.c_char_p, ctypes.c_void_p)
        size = len(abi.packed(struct_name, {})[0])
        for wrong in (size - 8, size + 8, 0):
            assert entry(wrong.to_bytes(8, "little") + bytes(size), None) == 1, name
        assert entry(None, None) == 1, name


def test_statuses_have_sentences():
    texts = {LIBRARY.functions.dmdr_error_string(status).decode() for status in range(6)}
    assert len(texts) == 6 and all(texts)


def test_a_refused_call_names_function_and_reason():
    x = torch.zeros(1, 1)
    with pytest.raises(NativeError, match=r"dmdr_multi_lora_fwd: a size, mode or pointer .*status 3"):
        Calls(LIBRARY, (x,)).call("multi_lora_fwd", "dmdr_multi_lora_args", {"batch": -1})


def test_a_wrong_dtype_code_is_refused(monkeypatch):
    monkeypatch.setitem(abi.DTYPE_CODE, torch.float32, 7)
    x = torch.zeros(1, 1)
    view = Strided(x, (1,))
    with pytest.raises(NativeError, match="dtype is none of float32, bfloat16 and float16"):
        fields = {"shape": (1,) * 6, "x0": view, "out": view, "alpha": x}
        Calls(LIBRARY, (x,)).call("renoise_bwd", "dmdr_renoise_args", fields)


def test_nothing_else_is_exported():
    assert not hasattr(LIBRARY.functions, "_ZN4dmdr8baseline11renoise_fwdERK17dmdr_renoise_args")


def test_a_missing_library_says_how_to_build_it(monkeypatch, tmp_path):
    monkeypatch.setattr(dmdr_fast, "__path__", [str(tmp_path)])
    with pytest.raises(ImportError, match=r"libdmdr_cpu.so is not in .*Build it with `pip install .`.*C\+\+ compiler"):
        Library(library_path("dmdr_cpu"), "cpu")


def test_a_library_that_does_not_load_is_named(monkeypatch, tmp_path):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libdmdr_cpu.so").write_bytes(b"not a library")
    monkeypatch.setattr(dmdr_fast, "__path__", [str(tmp_path)])
    with pytest.raises(ImportError, match=r"libdmdr_cpu.so cannot be loaded"):
        Library(library_path("dmdr_cpu"), "cpu")


def test_heads_that_are_too_wide_and_empty_matrices_are_refused():
    wide = torch.zeros(1, 1, 1, 1026)
    args = (wide, wide, wide, wide, None, None, None, None, wide[..., 0], wide[..., 0], 1e-6, True, False)
    cpu = RawFunctions(BACKEND)
    assert "at most 1024 features, got 1026" in cpu.supports("qk_norm_rope_bwd", *args)
    x, empty = torch.zeros(1, 2), torch.zeros(2, 0)
    assert "A is [2, 0]" in cpu.supports("multi_lora_fwd", x, x, empty, empty.mT, torch.ones(1))


@pytest.mark.thorough
@pytest.mark.parametrize("level", ["baseline", "v3", "v4"])
def test_lower_instruction_sets_are_as_accurate(level):
    """The kernels that older machines run: tests of accuracy again, in a process that stops at a lower level."""
    script = (
        "import sys, pytest\n"
        "from dmdr_fast.backends.cpu import LIBRARY\n"
        "LIBRARY.functions.dmdr_cpu_level.restype = __import__('ctypes').c_char_p\n"
        f"if LIBRARY.functions.dmdr_cpu_level() != b'{level}': sys.exit(77)\n"
        "options = ['-q', '-p', 'no:cacheprovider', '-k', 'bf16 or mixed']\n"
        "sys.exit(pytest.main([*options, 'tests/native/test_accuracy.py']))"
    )
    env = {**os.environ, "DMDR_CPU_LEVEL": level, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", script], env=env, cwd=HEADER.parents[3], capture_output=True, text=True)
    if run.returncode == 77:
        pytest.skip(f"this CPU has no level {level}")
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
