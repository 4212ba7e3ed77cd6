"""``dmdr_fast.patch(model)``: the fused ops inside a model that somebody else wrote.

>>> report = dmdr_fast.patch(transformer)       # or: with dmdr_fast.patch(transformer) as report: ...
>>> print(report)
>>> report.undo()

The package is callable, so that ``dmdr_fast.patch(model)`` works whether or not a module of it was imported.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import ModuleType

from torch import nn

from dmdr_fast.patch.apply import patch
from dmdr_fast.patch.report import Left, PatchReport, Replaced
from dmdr_fast.patch.structure import OPS

__all__ = ["OPS", "Left", "PatchReport", "Replaced", "patch"]


class _Patch(ModuleType):
    def __call__(self, model: nn.Module, ops: Iterable[str] | None = None, *, strict: bool = True) -> PatchReport:
        return patch(model, ops, strict=strict)

    __call__.__doc__ = patch.__doc__


sys.modules[__name__].__class__ = _Patch
