"""A trained role on disk: every part of a weight and of its optimizer's state, by the parameter's name.

A folder holds, of each rank that keeps a part, ``KIND.00000.safetensors`` (1-D parts by name) for KIND "weight" (fp32
master), "ema" and each of the optimizer's states ("exp_avg", ...), and ``parts.00000.json``: where the parts begin in
their whole, flattened parameters, the whole shapes, what the optimizer counts, and the loss scale of fp16. A reader
takes the elements that it needs from whichever files hold them, so any number of ranks and any ZeRO stage reads what
any other has written, to the bit. 8-bit moments are the exception: their blocks follow the writer's partition, and go
with ``blocks.00000.pt``.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dmdr_fast.disk import Writes
from dmdr_fast.engine.runtime import Runtime
from dmdr_fast.errors import UserError

if TYPE_CHECKING:
    from dmdr_fast.engine.roles import AdapterRole, TrainedRole
    from dmdr_fast.engine.shards import EMA


@dataclass(frozen=True)
class Part:
    """Elements [start, start + length) of a flattened parameter, kept at [offset, offset + length) of a slot."""

    name: str
    shape: tuple[int, ...]  # of the whole parameter
    start: int
    offset: int
    length: int


@dataclass(frozen=True)
class Slot:
    """A tensor that the optimizer steps: the fp32 masters of ``parts``, and the key of its state."""

    master: Tensor
    parts: tuple[Part, ...]


# (name, whole shape) of a parameter, by its id.
Named = dict[int, tuple[str, tuple[int, ...]]]


def slots(role: TrainedRole | AdapterRole, *, write: bool = False) -> Iterator[Slot]:
    """The tensors that this rank's optimizer steps; with ``write``, what is done to them reaches the network's weights.

    With ``write`` all ranks must iterate to the end.
    """
    optimizer = role.optimizer
    named: Named = {id(p): (n, tuple(getattr(p, "ds_shape", p.shape))) for n, p in role.trained.items()}
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        yield from _stage_3(optimizer, named, write)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        yield from _stage_2(optimizer, named, write)
    elif isinstance(optimizer, FP16_Optimizer):  # bf16 at stage 0, a fused optimizer: one flat master per group
        for flat, group in zip(optimizer.fp32_groups_flat, optimizer.fp16_groups, strict=True):
            yield Slot(flat, _in_a_row((*named[id(p)], 0, p.numel()) for p in group))
            for parameter, part in zip(group, flat.detach().split([p.numel() for p in group]), strict=True):
                parameter.data.copy_(part.view_as(parameter))
    else:
        pairs = [(p, p) for p in role.trained.values()]
        if isinstance(optimizer, FP16_UnfusedOptimizer):  # bf16 at stage 0: a master per parameter
            groups = zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True)
            pairs = [pair for masters, group in groups for pair in zip(masters, group, strict=True)]
        for master, parameter in pairs:
            yield Slot(master, _in_a_row([(*named[id(parameter)], 0, parameter.numel())]))
            if master is not parameter:
                parameter.data.copy_(master.data)


def _in_a_row(kept: Iterable[tuple[str, tuple[int, ...], int, int]]) -> tuple[Part, ...]:
    parts, offset = [], 0
    for name, shape, start, length in kept:
        parts.append(Part(name, shape, start, offset, length))
        offset += length
    return tuple(parts)


def _stage_2(optimizer: DeepSpeedZeroOptimizer, named: Named, write: bool) -> Iterator[Slot]:
    for flat, group in zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True):
        kept = [(named[id(p)], p._hp_mapping) for p in group if p._hp_mapping is not None]
        yield Slot(
            flat,
            tuple(
                Part(name, shape, m.lp_fragment_address.start, m.hp_fragment_address.start, m.hp_fragment_address.numel)
                for (name, shape), m in kept
            ),
        )
    if write:
        optimizer.update_lp_params()


def _stage_3(optimizer: DeepSpeedZeroOptimizer_Stage3, named: Named, write: bool) -> Iterator[Slot]:
    if write:
        optimizer.checkpoint_event_prologue()  # small parameters, which are kept whole, are partitioned for now
    for index, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
        swapped = optimizer._swappable_optimizer_subgroup(index)  # on NVMe
        if swapped:
            optimizer._optimizer_states_and_gradient_swap_in(index)
        parts, offset = [], 0
        for parameter in optimizer.fp16_groups[index]:
            length = parameter.ds_tensor.ds_numel
            start = parameter.ds_zero_partition_rank * length
            kept = min(length, parameter.ds_numel - start)  # what lies beyond the parameter's end is padding
            if kept > 0:
                name, shape = named[id(parameter)]
                parts.append(Part(name, shape, start, offset, kept))
            offset += length
        yield Slot(flat, tuple(parts))
        if write:
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        if swapped and write:
            optimizer._optimizer_states_and_gradient_swap_out(index)
        elif swapped:
            optimizer._release_swap_buffers(index)
    if write:
        optimizer.checkpoint_event_epilogue()


def _partitioned(role: TrainedRole | AdapterRole) -> bool:
    """Whether each rank keeps its own parts; otherwise all keep the same."""
    return isinstance(role.optimizer, (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3))


def _torch_optimizer(role: TrainedRole | AdapterRole) -> torch.optim.Optimizer:
    return getattr(role.optimizer, "optimizer", role.optimizer)


def _in_blocks(state: dict[str, Any], size: int) -> bool:
    """Whether a slot's state cannot be cut anywhere: 8-bit values with a scale per block."""
    tensors = [v for v in state.values() if isinstance(v, Tensor)]
    return any(type(v) is not Tensor or not v.is_floating_point() or v.numel() not in (1, size) for v in tensors)


def save_role(folder: Path, role: TrainedRole | AdapterRole, ema: EMA | None, ranks: Runtime, write: Writes) -> None:
    """Write weights, optimizer and EMA into ``folder``, which ``write`` does. All ranks must call.

    One kind is written after the other: beside the role's own memory a rank's host holds one copy of one kind.
    """
    optimizer, writes = _torch_optimizer(role), ranks.is_main or _partitioned(role)
    if ranks.is_main:
        write(partial(folder.mkdir, parents=True, exist_ok=True))
    ranks.barrier()
    place: dict[str, Any] = {"parts": {}, "shapes": {}, "counts": defaultdict(dict)}
    place["loss_scale"] = role.loss_scale_state
    states, blocks = set(), {}
    for index, slot in enumerate(slots(role)):
        state = optimizer.state.get(slot.master, {})
        in_blocks = _in_blocks(state, slot.master.numel())
        if in_blocks:
            blocks[index] = state
        for part in slot.parts:
            place["parts"][part.name], place["shapes"][part.name] = [part.start, part.length], part.shape
        for kind, value in () if in_blocks else state.items():
            if isinstance(value, Tensor) and value.numel() == slot.master.numel() and value.ndim:
                states.add(kind)
                continue
            count = [value.item()] if isinstance(value, Tensor) else value  # a list is a tensor without dimensions
            place["counts"][kind] |= {part.name: count for part in slot.parts}
    kinds = ["weight", *sorted({k for part in ranks.gather(sorted(states)) for k in part})]
    for kind in kinds if ema is None else [*kinds, "ema"]:
        tensors = dict(_parts_of(kind, role, optimizer, ema))
        if writes:
            write(partial(save_file, tensors, folder / f"{kind}.{ranks.rank:05d}.safetensors"))
    if writes:
        write(partial((folder / f"parts.{ranks.rank:05d}.json").write_text, json.dumps(place)))
        if blocks:
            write(partial(torch.save, blocks, folder / f"blocks.{ranks.rank:05d}.pt"))


def _parts_of(
    kind: str, role: TrainedRole | AdapterRole, optimizer: torch.optim.Optimizer, ema: EMA | None
) -> Iterator[tuple[str, Tensor]]:
    """(name, 1-D part on the host) of one kind."""
    for slot in slots(role):
        state = optimizer.state.get(slot.master, {})
        if kind not in ("weight", "ema") and (kind not in state or _in_blocks(state, slot.master.numel())):
            continue
        flat = slot.master if kind == "weight" else state.get(kind)
        for part in slot.parts:
            whole, offset = (ema.shards[part.name], 0) if ema is not None and kind == "ema" else (flat, part.offset)
            values = whole.detach().reshape(-1)[offset : offset + part.length]
            yield part.name, values.to("cpu", copy=True)


def load_role(stored: StoredRole, role: TrainedRole | AdapterRole, ema: EMA | None, ranks: Runtime) -> None:
    """Take up what :func:`save_role` wrote, on however many ranks. All ranks must call.

    Raises:
        UserError: 8-bit moments of another number of ranks or another stage.
    """
    optimizer, role.loss_scale_state = _torch_optimizer(role), stored.loss_scale
    for index, slot in enumerate(slots(role, write=True)):
        flat = slot.master.detach().reshape(-1).to("cpu", copy=True)  # with the padding that it has
        slot.master.data.copy_(_filled(flat, stored, "weight", slot).view(slot.master.shape))
        blocks = stored.blocks(index, slot, ranks.rank if _partitioned(role) else 0)
        state = _moved(blocks, slot.master.device) if blocks else _stored_state(stored, slot, optimizer)
        if state:
            optimizer.state[slot.master] = state
        if ema is None:
            continue
        for part in slot.parts:
            shard = ema.shards[part.name]
            flat = shard.reshape(-1).to("cpu", copy=True)
            flat[: part.length] = stored.read("ema", part.name, part.start, part.length)
            shard.copy_(flat.view(shard.shape))


def _stored_state(stored: StoredRole, slot: Slot, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A slot's state; empty where none of its parameters has had a gradient, zeros for those that have not."""
    state: dict[str, Any] = {}
    for kind in stored.states:
        if any(stored.has(kind, part.name) for part in slot.parts):
            zeros = torch.zeros(slot.master.numel(), dtype=stored.dtype(kind))
            value = _filled(zeros, stored, kind, slot).view(slot.master.shape)
            state[kind] = torch.empty_like(slot.master.data, dtype=zeros.dtype).copy_(value)
    for kind, counts in stored.counts.items():
        count = next((counts[part.name] for part in slot.parts if part.name in counts), None)
        if count is not None:
            state[kind] = _counter(count, optimizer, slot.master.device)
    return state


def _filled(flat: Tensor, stored: StoredRole, kind: str, slot: Slot) -> Tensor:
    for part in slot.parts:
        if kind == "weight" or stored.has(kind, part.name):
            flat[part.offset : part.offset + part.length] = stored.read(kind, part.name, part.start, part.length)
    return flat


def _counter(value: Any, optimizer: torch.optim.Optimizer, device: torch.device) -> Any:
    """A count as the optimizer keeps it: torch's fused ones beside the parameter, its others on the host."""
    if not isinstance(value, list):
        return value
    beside = any(optimizer.defaults.get(name) for name in ("fused", "capturable"))
    return torch.tensor(value[0], dtype=torch.float32, device=device if beside else "cpu")


def _moved(state: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in state.items()}


class StoredRole:
    """A folder that :func:`save_role` wrote, opened for reading; nothing in it is unpickled but 8-bit moments.

    Attributes:
        shapes: of the whole parameters, by name.
        loss_scale: of fp16; {} in other types.
        counts: what the optimizer counts: kind to name to number, or a list of the one number of a tensor.
        states: the optimizer's states that can be cut: their kinds.
    """

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        """``names``: the files to read, those that a manifest has."""
        self.folder, self.names = folder, sorted(names)
        places = [name for name in self.names if name.startswith("parts.")]
        self._places = {name.split(".")[1]: json.loads((folder / name).read_text()) for name in places}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.counts: dict[str, dict[str, Any]] = defaultdict(dict)
        self.loss_scale: dict[str, float] = next((place["loss_scale"] for place in self._places.values()), {})
        self._where: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
        for rank, place in self._places.items():
            self.shapes |= {name: tuple(shape) for name, shape in place["shapes"].items()}
            for name, (start, length) in place["parts"].items():
                self._where[name].append((start, length, rank))
            for kind, values in place["counts"].items():
                self.counts[kind] |= values
        kinds = {name.split(".")[0] for name in self.names if name.endswith(".safetensors")}
        self.has_ema, self.states = "ema" in kinds, sorted(kinds - {"weight", "ema"})
        self._files: dict[tuple[str, str], tuple[Any, set[str]]] = {}

    def read(self, kind: str, name: str, start: int, length: int) -> Tensor:
        """Elements [start, start + length) of a flattened parameter's ``kind``, on the host."""
        found = []
        for begin, count, rank in sorted(self._where.get(name, ())):
            low, high = max(begin, start), min(begin + count, start + length)
            if low < high:
                found.append(self._open(kind, rank)[0].get_slice(name)[low - begin : high - begin])
        whole = torch.cat(found) if found else torch.empty(0)
        if len(whole) != length:
            raise UserError(f"{self.folder}: {kind} of {name} has {len(whole)} of {length} elements: another network's")
        return whole

    def has(self, kind: str, name: str) -> bool:
        """Whether there is such a state of a parameter: one without a gradient has none."""
        return any(name in self._open(kind, rank)[1] for _, _, rank in self._where.get(name, ()))

    def dtype(self, kind: str) -> torch.dtype:
        files = (self._open(kind, rank) for rank in self._places)
        return next(file.get_tensor(name).dtype for file, names in files for name in names)

    def whole(self) -> dict[str, Tensor]:
        """The parameters by name, whole and fp32: the EMA's where there is one."""
        kind = "ema" if self.has_ema else "weight"
        return {name: self.read_whole(kind, name) for name in self.shapes}

    def read_whole(self, kind: str, name: str) -> Tensor:
        """A parameter's ``kind`` in its shape."""
        shape = self.shapes[name]
        return self.read(kind, name, 0, math.prod(shape)).view(shape)

    def blocks(self, index: int, slot: Slot, rank: int) -> dict[str, Any] | None:
        """The 8-bit moments of this very slot; None where the moments are not in blocks."""
        if not any(name.startswith("blocks.") for name in self.names):
            return None
        name = f"blocks.{rank:05d}.pt"
        here = self._places.get(f"{rank:05d}", {"parts": {}})["parts"]
        if name not in self.names or any(here.get(p.name) != [p.start, p.length] for p in slot.parts):
            raise UserError(
                f"resume: {self.folder} has 8-bit moments of {len(self._places)} partition(s), which cannot be cut "
                "anew: go on with as many ranks and the same deepspeed.stage"
            )
        return torch.load(self.folder / name, map_location="cpu", weights_only=True).get(index)

    def _open(self, kind: str, rank: str) -> tuple[Any, set[str]]:
        """A file and the names in it."""
        if (kind, rank) not in self._files:
            name = f"{kind}.{rank}.safetensors"
            if name not in self.names:
                raise UserError(f"{self.folder}: {name} is not in its manifest")
            file = safe_open(self.folder / name, framework="pt")
            self._files[kind, rank] = file, set(file.keys())
        return self._files[kind, rank]
