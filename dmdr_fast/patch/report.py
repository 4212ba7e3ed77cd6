"""What a patch did, and how to take it back."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

ABSENT = object()  # `before` of an attribute that was not there


@dataclass(frozen=True)
class Replaced:
    """One place where a fused op now runs.

    Attributes:
        op: name in ``dmdr_fast.ops``.
        module: path in the model: the norm that is computed (``layer_norm_modulate``, ``rms_norm_scale``,
            ``gated_residual_layer_norm_modulate`` and ``gated_residual_rms_norm``), the branch whose output is gated
            (``gated_residual``; in Z-Image's blocks the norm after it),
            the attention (``qk_norm_rope``) or the feed-forward layer (``gelu_mul``, ``silu_mul``).
    """

    op: str
    module: str


@dataclass(frozen=True)
class Left:
    """A place that looks like one for ``op`` and stays as it was.

    Attributes:
        op: name in ``dmdr_fast.ops``.
        module: path in the model.
        reason: why, as a clause.
        unknown: the structure is not one this version knows (an error with ``strict=True``), rather than
            one it knows the op does not fit.
    """

    op: str
    module: str
    reason: str
    unknown: bool = False


class Edit(NamedTuple):
    """``target.attribute`` went from ``before`` to ``after``; ``where`` names it to people."""

    target: object
    attribute: str
    before: object
    after: object
    where: str


class PatchReport:
    """The result of ``dmdr_fast.patch``: readable, and a context manager that undoes on exit.

    Attributes:
        replaced: tuple of ``Replaced``, in the model's order.
        left: tuple of ``Left``.
    """

    def __init__(self, replaced: Iterable[Replaced], left: Iterable[Left], edits: Iterable[Edit]):
        self.replaced, self.left = tuple(replaced), tuple(left)
        self._edits = list(edits)

    @property
    def counts(self) -> dict[str, int]:
        """How many places each op took, by its name."""
        return dict(Counter(entry.op for entry in self.replaced))

    def undo(self) -> None:
        """Put back the very objects that were there: same classes, same processors, bit-equal outputs.

        Applies to the model that was patched, not to copies of it. A second call does nothing.

        Raises:
            RuntimeError: a patched module was changed since; nothing is put back then.
        """
        for edit in self._edits:
            if getattr(edit.target, edit.attribute, ABSENT) is not edit.after or _forward_is_pinned(edit):
                raise RuntimeError(
                    f"patch: undo: {edit.where} is no longer as patch left it: first take back what was done "
                    "to it since (hooks of accelerate or diffusers, FSDP, a new attention processor)"
                )
        for edit in reversed(self._edits):
            if edit.before is ABSENT:
                delattr(edit.target, edit.attribute)
            else:
                setattr(edit.target, edit.attribute, edit.before)
        self._edits = []

    def __enter__(self) -> PatchReport:
        return self

    def __exit__(self, *exception) -> None:
        self.undo()

    def __str__(self) -> str:
        lines = [
            f"{op}: {count} replaced ({_places(entry.module for entry in self.replaced if entry.op == op)})"
            for op, count in sorted(self.counts.items())
        ]
        reasons = dict.fromkeys((entry.op, entry.reason) for entry in self.left)
        lines += [
            f"{op}: left {_places(e.module for e in self.left if (e.op, e.reason) == (op, reason))}: {reason}"
            for op, reason in reasons
        ]
        return "\n".join(lines) or "nothing found to replace"

    def __repr__(self) -> str:
        return f"<PatchReport {self.counts}, {len(self.left)} left>"


def _forward_is_pinned(edit: Edit) -> bool:
    """A hook keeps the fused forward alive on the instance: putting the class back would not reach it."""
    return edit.attribute == "__class__" and "forward" in vars(edit.target)


def _places(paths: Iterable[str]) -> str:
    """transformer_blocks.*.norm1 x19, ...: paths with their numbers folded."""
    folded = Counter(re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "*", path) for path in paths)
    return ", ".join(f"{path or 'the model'} x{count}" for path, count in folded.items())
