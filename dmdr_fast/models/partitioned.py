"""Parameters that ZeRO-3 has split over the ranks, seen whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn


def whole_parameters(parameters: Iterable[nn.Parameter], *, write: bool) -> AbstractContextManager:
    """The ``parameters`` in full inside the block; all ranks must enter together.

    Partitioned ones (of a model built under ``deepspeed.zero.Init``, or given to a ZeRO-3 engine) are
    gathered on entry and split again on exit; with ``write``, rank 0's values are then every rank's.
    Ordinary ones are left alone.
    """
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    if not partitioned:
        return nullcontext()
    import deepspeed  # only a model that deepspeed has partitioned comes here

    return deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if write else None)


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The parameter's shape when gathered: a partitioned one reports ``[0]`` as its own."""
    return getattr(parameter, "ds_shape", parameter.shape)


# A gather makes one flat copy of its parameters besides them: half a GB of bf16 at a time.
GATHER_ELEMENTS = 1 << 28
KEPT = "kept_whole"  # in ds_active_sub_modules, where DeepSpeed notes who still needs a parameter


@contextmanager
def kept_whole(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """The ``parameters`` in full inside the block, however many forwards run in it; all ranks must enter together.

    Without it every forward of a ZeRO-3 model gathers each module's parameters and lets them go: N student steps
    gather the model N times. Reading only: weights changed inside are lost. Ordinary parameters are left alone.
    """
    absent: list[Any] = [p for p in parameters if hasattr(p, "ds_status") and p.ds_status.name == "NOT_AVAILABLE"]
    for bucket in _buckets(absent):
        bucket[0].all_gather_coalesced(bucket).wait()
    for parameter in absent:
        parameter.ds_active_sub_modules.add(KEPT)
    try:
        yield
    finally:
        for parameter in absent:
            parameter.ds_active_sub_modules.discard(KEPT)
        if absent:
            absent[0].partition(param_list=absent, has_been_updated=False)


def _buckets(parameters: list[Any]) -> Iterator[list[Any]]:
    """Runs of one dtype of at most ``GATHER_ELEMENTS`` elements, or of one parameter."""
    bucket: list[Any] = []  # parameters with what DeepSpeed has hung on them
    for parameter in parameters:
        size = sum(p.ds_numel for p in bucket) + parameter.ds_numel
        if bucket and (size > GATHER_ELEMENTS or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket
