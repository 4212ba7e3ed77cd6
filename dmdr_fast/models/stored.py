"""Weights on disk, read tensor by tensor: into a model of which no process ever holds all.

    with parameters_on_meta():
        model = SiT(...)                      # no memory, but buffers are computed as ever
    load_partitioned(model, stored_tensors(path), dtype=torch.bfloat16, settings=deepspeed_config)

Rank 0 reads a module's tensors, ``deepspeed.zero.Init`` sends them round and leaves each rank its part, then comes the
next module: beside its own part a rank holds one module.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn


@dataclass(frozen=True)
class Stored:
    """A tensor that has not been read yet."""

    shape: torch.Size
    read: Callable[[], Tensor]


def stored_tensors(path: str | Path) -> dict[str, Stored]:
    """The tensors by name of a .safetensors file, or of a folder with the shards of one model.

    Only headers are read here.

    Raises:
        FileNotFoundError: no such file, no .safetensors in the folder, or a shard of its index is missing.
        ValueError: a file that is damaged.
    """
    found: dict[str, Stored] = {}
    for file in _files(Path(path)):
        try:
            with safe_open(file, framework="pt") as content:
                for name in content.keys():  # noqa: SIM118, it is no dictionary
                    shape = torch.Size(content.get_slice(name).get_shape())
                    found[name] = Stored(shape, partial(_read, file, name))
        except SafetensorError as error:
            raise ValueError(f"weights: {file} is damaged ({error}): copy it again") from error
    return found


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    # Of a variant alone (fp16) where there is no other.
    indexes = sorted(path.glob("*.safetensors.index.json")) or sorted(path.glob("*.safetensors.index.*.json"))
    for index in indexes:
        files = [path / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise FileNotFoundError(f"weights: {path} lacks shard {missing[0]} of {len(files)}: copy the weights again")
        return files
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise FileNotFoundError(
            f"weights: {path} must be a .safetensors file, or a folder with one or with an index of shards, got "
            f"{len(files)} .safetensors files"
        )
    return files


def _read(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as content:
        return content.get_tensor(name)


def parameter_value(stored: Mapping[str, Stored], name: str) -> Tensor:
    """The value of a parameter.

    Raises:
        ValueError: it is not of floating-point numbers, or has one that is not finite: no network computes with that.
    """
    value = stored[name].read()
    if not value.is_floating_point() or value.layout is not torch.strided or value.is_meta:
        raise ValueError(f"weights: {name} expected plain floating-point numbers, got {value.dtype} ({value.layout})")
    if not torch.isfinite(value if value.element_size() > 1 else value.float()).all():  # float8 has no isfinite
        raise ValueError(f"weights: {name} has values that are not finite: take weights from before they broke")
    return value


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules made inside have their parameters on the meta device; buffers are ordinary.

    (``torch.device("meta")`` would take the rotary tables along, which no file holds.)
    """
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(self, name, parameter)
        if parameter is not None:
            self._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]  # of every layer, for a while
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def load_partitioned(
    model: nn.Module, stored: Mapping[str, Stored], *, dtype: torch.dtype, settings: dict[str, Any]
) -> None:
    """Fill a model with parameters on meta from ``stored``, in ``dtype``, partitioned by ZeRO-3 as it goes.

    ``settings`` is the DeepSpeed configuration that the engine around it will have. All ranks call together; rank 0
    reads parameters, every rank its own copy of the buffers that ``stored`` has.

    Raises:
        ValueError: a parameter that ``stored`` lacks or has in another shape (nothing is read then), or one that
            is no finite floating-point number.
    """
    import deepspeed  # only ZeRO-3 comes here
    import torch.distributed as dist

    _check_fit(model, stored)
    reader = dist.get_rank() == 0
    for prefix, module in model.named_modules():
        names = {name: f"{prefix}.{name}" if prefix else name for name in module._parameters}
        names = {name: path for name, path in names.items() if module._parameters[name] is not None}
        own = nn.ParameterList(
            nn.Parameter(
                parameter_value(stored, path).to(dtype) if reader else torch.empty(stored[path].shape, dtype=dtype),
                requires_grad=module._parameters[name].requires_grad,
            )
            for name, path in names.items()
        )
        if len(own):
            deepspeed.zero.Init(module=own, config_dict_or_path=settings, dtype=dtype)
        module._parameters.update(zip(names, own, strict=True))
        for name, buffer in module._buffers.items():
            path = f"{prefix}.{name}" if prefix else name
            if path in stored:
                buffer.copy_(stored[path].read())


def load_whole(model: nn.Module, stored: Mapping[str, Stored], *, dtype: torch.dtype, device: torch.device) -> None:
    """Fill a model with parameters on meta from ``stored``, in ``dtype`` on ``device``, one tensor at a time.

    Raises:
        ValueError: a parameter that ``stored`` lacks or has in another shape (nothing is read then), or one that
            is no finite floating-point number.
    """
    _check_fit(model, stored)
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                value = parameter_value(stored, f"{prefix}.{name}" if prefix else name).to(device, dtype)
                module._parameters[name] = nn.Parameter(value, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            path = f"{prefix}.{name}" if prefix else name
            if path in stored:
                buffer.copy_(stored[path].read())


def with_lora(stored: Mapping[str, Stored], lora: Mapping[str, Stored], scale: float) -> dict[str, Stored]:
    """``stored`` with W + scale (A B)^T, summed in fp32, in the layers of an adapter, merged when they are read.

    ``lora`` holds "LAYER.lora_A" [in, r] and "LAYER.lora_B" [r, out].

    Raises:
        ValueError: a layer that ``stored`` lacks, or factors that do not fit it.
    """
    merged = dict(stored)
    for layer in sorted({name.rpartition(".")[0] for name in lora}):
        weight, (a, b) = stored.get(f"{layer}.weight"), (lora.get(f"{layer}.lora_{factor}") for factor in "AB")
        if a is None or b is None or (len(a.shape), len(b.shape), a.shape[1:]) != (2, 2, b.shape[:1]):
            found = [None if factor is None else list(factor.shape) for factor in (a, b)]
            raise ValueError(f"weights: {layer} expected lora_A [in, r] and lora_B [r, out], got {found}")
        if weight is None or list(weight.shape) != [b.shape[1], a.shape[0]]:
            got = "no such layer" if weight is None else f"a layer {list(weight.shape)}"
            raise ValueError(
                f"weights: {layer} expected a layer [{b.shape[1]}, {a.shape[0]}] for the adapter, got {got}"
            )
        merged[f"{layer}.weight"] = Stored(weight.shape, partial(_merged, weight, a, b, scale))
    return merged


def _merged(weight: Stored, a: Stored, b: Stored, scale: float) -> Tensor:
    return torch.addmm(weight.read().float(), b.read().float().T, a.read().float().T, alpha=scale)


def _check_fit(model: nn.Module, stored: Mapping[str, Stored]) -> None:
    for name, parameter in model.named_parameters():
        if name not in stored:
            raise ValueError(f"weights: {name} is missing: expected a tensor {list(parameter.shape)}")
        if stored[name].shape != parameter.shape:
            raise ValueError(f"weights: {name} expected {list(parameter.shape)}, got {list(stored[name].shape)}")
