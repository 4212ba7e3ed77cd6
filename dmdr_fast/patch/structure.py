"""What the families share: how a replacement is described, and how a module is recognised."""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache

from torch import nn

from dmdr_fast.patch.report import Left

LAYER_NORM = "layer_norm_modulate"
GATED = "gated_residual"
GATED_NORM = "gated_residual_layer_norm_modulate"
QK_NORM_ROPE = "qk_norm_rope"
GELU_MUL = "gelu_mul"
SILU_MUL = "silu_mul"
OPS = (LAYER_NORM, GATED, GATED_NORM, QK_NORM_ROPE, GELU_MUL, SILU_MUL)


class UnknownStructure(Exception):
    """A module of a known class that is not built as its replacement expects; says why, as a clause."""


@dataclass(frozen=True)
class Site:
    """A place for ``op``; ``module`` is its path below the module that is replaced."""

    op: str
    module: str = ""


@dataclass(frozen=True)
class Replacement:
    """A class of layers (or of attention processors) and the subclass that runs the fused ops.

    Attributes:
        fused: subclass of ``original`` with the same state.
        sites: (module, wanted ops) -> the places in it, as :class:`Site`, and those the ops do not fit, as
            :class:`Left`; raises :class:`UnknownStructure`. For a processor the module is its attention.
        known: method of ``original`` -> digests (see :func:`digest`) of the sources that ``fused`` computes
            the same as. A class that changed since may compute something else. Empty for our own classes.
    """

    fused: type
    sites: Callable[[nn.Module, frozenset[str]], Iterable[Site | Left]]
    known: Mapping[str, frozenset[str]] = field(default_factory=dict)

    @property
    def original(self) -> type:
        return self.fused.__bases__[0]


def stands_in(cls: type) -> type:
    """Class decorator: answer to the name of the class it replaces.

    diffusers and accelerate look layers up by class name (``_no_split_modules``, ``_repeated_blocks``).
    Pickle goes by the qualified name, which stays.
    """
    cls.__name__ = cls.__bases__[0].__name__
    return cls


def check_source(replacement: Replacement) -> None:
    """Raise UnknownStructure where the installed source is none of those the replacement was written for."""
    original = replacement.original
    for method, known in replacement.known.items():
        found = digest(getattr(original, method))
        if found not in known:
            raise UnknownStructure(
                f"{original.__module__}.{original.__name__}.{method} is not the source this version knows "
                f"(digest {found}): use a diffusers release from 0.39 to 0.42, or leave it unpatched"
            )


@cache
def digest(function: Callable) -> str:
    """12 hex digits of a function's syntax tree, without comments, docstring and annotations.

    The same on all Python versions from 3.10, unlike a hash of its bytecode or of ``ast.unparse``.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return "no source"
    (definition,) = tree.body
    if ast.get_docstring(definition, clean=False) is not None:
        definition.body = definition.body[1:]
    definition.decorator_list, definition.returns = [], None
    words = []
    for node in ast.walk(definition):
        if isinstance(node, ast.arg):
            node.annotation = None
        words.append(type(node).__name__)
        values = (getattr(node, name, None) for name in node._fields if name not in ("kind", "type_comment"))
        words += [repr(value) for value in values if isinstance(value, (str, int, float, complex, bytes))]
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:12]


def adaptive_sites(
    block: nn.Module, wanted: frozenset[str], *, branch: str | None = None, norm: str | None = None
) -> Iterator[Site]:
    """The places of x + gate * branch(...), of the modulated ``norm``, or of both in a row."""
    if norm is not None and wanted & {LAYER_NORM, GATED_NORM}:
        check_layer_norm(block, norm)
    if branch is not None and norm is not None and GATED_NORM in wanted:
        yield Site(GATED_NORM, norm)
        return
    if branch is not None and GATED in wanted:
        yield Site(GATED, branch)
    if norm is not None and LAYER_NORM in wanted:
        yield Site(LAYER_NORM, norm)


def check_layer_norm(block: nn.Module, name: str) -> None:
    """``block.<name>`` is a layer norm without weights over the last dimension, and nothing watches it."""
    norm = getattr(block, name)
    # Its statistics are float32 in either class, as the op's are.
    if type(norm) is not nn.LayerNorm and type(norm).__name__ != "FP32LayerNorm":
        raise UnknownStructure(f"{name} is a {type(norm).__name__}, expected nn.LayerNorm")
    if norm.weight is not None or norm.bias is not None:
        raise UnknownStructure(f"{name} has weights, expected elementwise_affine=False")
    if len(norm.normalized_shape) != 1:
        raise UnknownStructure(f"{name} is over {len(norm.normalized_shape)} dimensions, expected the last")
    check_unwatched(norm, name)


def qk_sites(attention: nn.Module, pairs: Iterable[tuple[str, str]]) -> Iterator[Site | Left]:
    """One place for the whole attention, if every pair of norms in it is of a kind the op computes."""
    pairs = [pair for pair in pairs if any(getattr(attention, name, None) is not None for name in pair)]
    if not pairs:
        yield Left(QK_NORM_ROPE, "", "it has no QK norm")
        return
    for pair in pairs:
        norms = [getattr(attention, name) for name in pair]
        for name, norm in zip(pair, norms, strict=True):
            if type(norm).__name__ != "RMSNorm":
                yield Left(QK_NORM_ROPE, "", f"{name} is a {type(norm).__name__}, the op's norm is RMSNorm")
                return
            if getattr(norm, "bias", None) is not None:
                raise UnknownStructure(f"{name} has a bias, which qk_norm_rope has not")
            check_unwatched(norm, name)
        if norms[0].eps is None or norms[0].eps != norms[1].eps:
            raise UnknownStructure(f"{pair[0]} and {pair[1]} have eps {norms[0].eps} and {norms[1].eps}")
    yield Site(QK_NORM_ROPE)


def check_unwatched(module: nn.Module, name: str) -> None:
    """The fused op does not call ``module``: nobody may be waiting for that call."""
    watched = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(module, hooks) for hooks in watched):
        raise UnknownStructure(
            f"{name} has hooks, which the fused op would pass by: patch first, then add them (also "
            "deepspeed.initialize and fully_shard)"
        )
    check_own_forward(module, name)


def check_own_forward(module: nn.Module, name: str) -> None:
    """``module`` runs its class's forward, not one set on the instance."""
    if "forward" in vars(module):
        raise UnknownStructure(
            f"{name}has a forward of its own on the instance (a hook of accelerate or diffusers?): patch first"
        )
