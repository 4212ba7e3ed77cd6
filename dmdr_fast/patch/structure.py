"""What the families share: how a replacement is described, and how a module is recognised."""

from __future__ import annotations

import ast
import copy
import hashlib
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache

from torch import nn

from dmdr_fast.patch.report import Left

LAYER_NORM = "layer_norm_modulate"
GATED = "gated_residual"
GATED_NORM = "gated_residual_layer_norm_modulate"
RMS_SCALE = "rms_norm_scale"
GATED_RMS = "gated_residual_rms_norm"
QK_NORM_ROPE = "qk_norm_rope"
GELU_MUL = "gelu_mul"
SILU_MUL = "silu_mul"
# By full name, since diffusers need not be there. FP32LayerNorm computes in float32 whatever the input, as
# the op does.
LAYER_NORMS = {"torch.nn.modules.normalization.LayerNorm", "diffusers.models.normalization.FP32LayerNorm"}
RMS_NORMS = {"torch.nn.modules.normalization.RMSNorm", "diffusers.models.normalization.RMSNorm"}
OPS = (LAYER_NORM, GATED, GATED_NORM, RMS_SCALE, GATED_RMS, QK_NORM_ROPE, GELU_MUL, SILU_MUL)


@dataclass(frozen=True)
class Site:
    """A place for ``op``.

    Attributes:
        op: name in ``dmdr_fast.ops``.
        module: path below the module that is replaced.
        on_request: why the op is used here only if it is named in ``ops=``, or None.
    """

    op: str
    module: str = ""
    on_request: str | None = None


@dataclass(frozen=True)
class Replacement:
    """A class of layers (or of attention processors) and the subclass that runs the fused ops.

    Attributes:
        fused: subclass of ``original`` with the same state.
        sites: (module, wanted ops) -> the places in it, as :class:`Site`, and those where an op does not fit,
            as :class:`Left`. For a processor the module is its attention.
        known: method of ``original`` -> digests (see :func:`digest`) of the sources that ``fused`` computes
            the same as: a class that changed since may compute something else. Empty for our own classes.
    """

    fused: type
    sites: Callable[[nn.Module, frozenset[str]], Iterable[Site | Left]]
    known: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def original(self) -> type:
        return self.fused.__bases__[0]


def stands_in(cls: type) -> type:
    """Class decorator: answer to the name of the class it replaces, and be known where that one is.

    diffusers and accelerate look layers up by class name (``_no_split_modules``, ``_repeated_blocks``).
    Pickle goes by the qualified name, which stays. diffusers' hooks (FirstBlockCache, layer skipping) find what they
    have to know of a block or a processor in a registry, by the class itself.
    """
    original = cls.__bases__[0]
    cls.__name__ = original.__name__
    if (hooks := sys.modules.get("diffusers.hooks._helpers")) is not None:
        for registry in (hooks.TransformerBlockRegistry, hooks.AttentionProcessorRegistry):
            with suppress(ValueError):  # it has no entry for the original
                registry.register(cls, copy.copy(registry.get(original)))
    return cls


def changed_source(replacement: Replacement) -> str | None:
    """Why the installed source is none of those the replacement was written for, or None if it is."""
    original = replacement.original
    for method, known in replacement.known.items():
        found = digest(getattr(original, method))
        if found not in known:
            return (
                f"{original.__module__}.{original.__name__}.{method} is not the source this version knows "
                f"(digest {found}): use a release of diffusers from 0.39 to 0.42"
            )
    return None


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
    assert isinstance(definition, (ast.FunctionDef, ast.AsyncFunctionDef))
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
) -> Iterator[Site | Left]:
    """The places of x + gate * branch(...), of the modulated ``norm``, or of both in a row."""
    if branch is not None and norm is not None and GATED_NORM in wanted:
        yield _unless(_odd_layer_norm(block, norm), GATED_NORM, norm)
        return
    if branch is not None and GATED in wanted:
        yield Site(GATED, branch)
    if norm is not None and LAYER_NORM in wanted:
        yield _unless(_odd_layer_norm(block, norm), LAYER_NORM, norm)


def sandwich_sites(block: nn.Module, wanted: frozenset[str], before: str, after: str) -> Iterator[Site | Left]:
    """The places of an RMS norm and its scale ``before`` a branch, and of x + gate * norm(h) ``after`` it."""
    if RMS_SCALE in wanted:
        yield _unless(_odd_rms_norm(block, before), RMS_SCALE, before)
    if GATED_RMS in wanted:
        yield _unless(_odd_rms_norm(block, after), GATED_RMS, after)
    elif GATED in wanted:
        yield Site(GATED, after)


def qk_sites(attention: nn.Module, wanted: frozenset[str], *pairs: tuple[str, str]) -> Iterator[Site | Left]:
    """One place for the whole attention, if every pair of norms in it is of a kind the op computes."""
    if QK_NORM_ROPE not in wanted:
        return
    present = [pair for pair in pairs if any(getattr(attention, name, None) is not None for name in pair)]
    kinds = {_full_name(getattr(attention, name)) for pair in present for name in pair}
    if not present:
        yield Left(QK_NORM_ROPE, "", "it has no QK norm")
    elif not kinds <= RMS_NORMS:
        foreign = not all(kind.startswith(("torch.nn.", "diffusers.")) for kind in kinds)
        kind = " and ".join(sorted(kinds - RMS_NORMS))
        yield Left(QK_NORM_ROPE, "", f"its QK norm is {kind}, the op's is RMSNorm", unknown=foreign)
    else:
        odd = [reason for pair in present if (reason := _odd_rms_norms(attention, pair))]
        yield _unless(odd[0] if odd else None, QK_NORM_ROPE, "")


def _full_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _unless(odd: str | None, op: str, module: str) -> Site | Left:
    return Site(op, module) if odd is None else Left(op, module, odd, unknown=True)


def _odd_layer_norm(block: nn.Module, name: str) -> str | None:
    """Why ``block.<name>`` is not a plain layer norm, or None."""
    norm = getattr(block, name)
    if _full_name(norm) not in LAYER_NORMS:
        return f"{name} is a {type(norm).__name__}, expected nn.LayerNorm"
    if norm.weight is not None or norm.bias is not None:
        return f"{name} has weights, expected elementwise_affine=False"
    if len(norm.normalized_shape) != 1:
        return f"{name} is over {len(norm.normalized_shape)} dimensions, expected the last"
    return watched(norm, name)


def _odd_rms_norm(block: nn.Module, name: str) -> str | None:
    """Why ``block.<name>`` is not a plain RMS norm, or None."""
    norm = getattr(block, name)
    if _full_name(norm) not in RMS_NORMS:
        return f"{name} is a {type(norm).__name__}, expected RMSNorm"
    if getattr(norm, "bias", None) is not None or norm.eps is None:
        return f"{name} has a bias or no eps, the op has no bias and an eps"
    return watched(norm, name)


def _odd_rms_norms(attention: nn.Module, pair: tuple[str, str]) -> str | None:
    norms = [getattr(attention, name) for name in pair]
    if any(getattr(norm, "bias", None) is not None for norm in norms):
        return f"{pair[0]} or {pair[1]} has a bias, which the op has not"
    if norms[0].eps is None or norms[0].eps != norms[1].eps:
        return f"{pair[0]} and {pair[1]} have eps {norms[0].eps} and {norms[1].eps}, the op has one for both"
    return watched(norms[0], pair[0]) or watched(norms[1], pair[1])


def watched(module: nn.Module, name: str) -> str | None:
    """Why ``module``, which the fused op does not call, is waited for by somebody; or None."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(module, kind) for kind in hooks):
        return f"{name} has hooks, which the fused op would pass by: patch before they are added"
    return own_forward(module, name)


def own_forward(module: nn.Module, name: str) -> str | None:
    """Why ``module`` does not run its class's forward, or None if it does."""
    if "forward" in vars(module):
        return f"{name} has a forward set on the instance (by accelerate or diffusers?): patch before that"
    return None
