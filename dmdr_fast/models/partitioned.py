"""Parameters that ZeRO-3 has split over the ranks, seen whole."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

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
