"""Find the layers that fused ops can take over, and hand them over."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

from torch import nn

from dmdr_fast.patch.report import ABSENT, Edit, Left, PatchReport, Replaced
from dmdr_fast.patch.structure import OPS, QK_NORM_ROPE, Replacement, Site, changed_source, own_forward

# Module that defines the layers -> ours that replaces them. A model has such layers only if the former is
# imported already, so looking for them imports no library.
FAMILIES = {
    "diffusers.models.normalization": "norms",
    "diffusers.models.activations": "activations",
    "diffusers.models.transformers.transformer_sd3": "sd3",
    "diffusers.models.transformers.transformer_flux": "flux",
    "diffusers.models.transformers.transformer_flux2": "flux2",
    "diffusers.models.transformers.transformer_z_image": "z_image",
    "diffusers.models.transformers.transformer_qwenimage": "qwen_image",
    "dmdr_fast.models.sit": "sit",
}
MODELS = "SD3, Flux, Flux2, ZImage or QwenImage Transformer2DModel, or SiT"


def patch(model: nn.Module, ops: Iterable[str] | None = None, *, strict: bool = True) -> PatchReport:
    """Let the ops of ``dmdr_fast.ops`` compute what layers of ``model`` compute; nothing else changes.

    Instance by instance: layers change class where they stand and attention processors are exchanged; no
    class of another library is touched. Parameters, state_dict keys, module names and references stay, LoRA
    layers inside (PEFT's and ours) go on working, added before or after. Outputs and gradients agree to
    rounding (an op rounds once where the model rounds after every step), under torch.compile and activation
    checkpointing too. Patch before anything hooks into the layers: accelerate, ``fully_shard``,
    ``deepspeed.initialize``, ``torch.compile``.

    Args:
        model: diffusers' SD3, FLUX.1, FLUX.2, Z-Image or Qwen-Image transformer (0.39 to 0.42), our SiT, or a
            model that contains one.
        ops: which ops, by name; None is all that fit and pay (Z-Image's SwiGLU has to be named).

                layer_norm_modulate                 adaptive layer norms
                gated_residual                      x + gate * branch
                gated_residual_layer_norm_modulate  the latter where an adaptive norm follows, as one
                rms_norm_scale                      an RMS norm and the scale after it
                gated_residual_rms_norm             x + gate * RMS norm of a branch
                qk_norm_rope                        RMS norm of queries and keys, and their rotation
                gelu_mul, silu_mul                  GEGLU, SwiGLU

        strict: raise where something is not as known; otherwise it is left as it is and reported.

    Returns:
        ``PatchReport`` with ``replaced``, ``left`` (with reasons), ``counts`` and ``undo()``; a context manager
        that undoes on exit.

    Raises:
        TypeError: ``model`` is no module, ``ops`` a string.
        ValueError: a model that is compiled or sharded already; an unknown op; with ``strict``, a model or a layer of
            unknown structure, or an op in ``ops`` that finds no place. The model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: model: expected a torch.nn.Module, got {type(model).__name__}")
    _check_early(model)
    wanted = _wanted(ops)
    families, unusable = _families()
    table = {entry.original: entry for family in families for entry in family.REPLACEMENTS}
    replaced: list[Replaced] = []
    left: list[Left] = []
    edits: list[Edit] = []
    for path, module in model.named_modules():
        for target, exchange in ((module, _change_class), (_processor(module), _exchange_processor)):
            sites, unfit, entry = _examine(path, module, target, table, wanted, named=ops is not None)
            replaced += sites
            left += unfit
            if entry is not None:
                edits += exchange(path or "the model", module, entry.fused, wanted)
        left += _unknown_processor(path, module, table, wanted)
    if strict:
        _check_model(model, families, unusable)
        _check_places(model, wanted if ops is not None else (), replaced, left)
    for edit in edits:
        setattr(edit.target, edit.attribute, edit.after)
    return PatchReport(replaced, left, edits)


def _wanted(ops: Iterable[str] | None) -> frozenset[str]:
    if ops is None:
        return frozenset(OPS)
    if isinstance(ops, str):
        raise TypeError(f"patch: ops: expected a list of op names, got a string: write ops=[{ops!r}]")
    wanted = frozenset(ops)
    if not wanted or not wanted <= set(OPS):
        raise ValueError(f"patch: ops: expected some of {', '.join(OPS)}, got {sorted(wanted)}")
    return wanted


def _families() -> tuple[list[ModuleType], list[str]]:
    """Our modules for the layers that are imported, and why one could not be used (a diffusers too old)."""
    families, unusable = [], []
    for source, name in FAMILIES.items():
        if source in sys.modules:
            try:
                families.append(importlib.import_module(f"dmdr_fast.patch.{name}"))
            except ImportError as error:
                unusable.append(f"{source}: {error}")
    return families, unusable


def _examine(
    path: str,
    module: nn.Module,
    target: object,
    table: dict[type, Replacement],
    wanted: frozenset[str],
    named: bool,
) -> tuple[list[Replaced], list[Left], Replacement | None]:
    """What the ops take over of ``target`` (the module or its processor), what not, and the replacement.

    One odd place leaves the whole target as it is: its replacement is one class.
    """
    base = next((cls for cls in type(target).__mro__ if cls in table), None)
    if base is None:
        return [], [], None
    entry = table[base]
    found = [
        Left(site.op, site.module, site.on_request)
        if isinstance(site, Site) and site.on_request and not named
        else site
        for site in entry.sites(module, wanted)
    ]
    sites = [Replaced(site.op, _join(path, site.module)) for site in found if isinstance(site, Site)]
    left = [replace(site, module=_join(path, site.module)) for site in found if isinstance(site, Left)]
    odd = next((site.reason for site in left if site.unknown), None)
    if sites and odd is None:
        odd = _odd_class(target, entry) or changed_source(entry)
        if odd is None and target is module:
            odd = own_forward(module, "it")
    if odd is not None:
        affected = dict.fromkeys(site.op for site in sites)
        return [], left + [Left(op, path, odd, unknown=True) for op in affected], None
    return sites, left, entry if sites else None


def _odd_class(target: object, entry: Replacement) -> str | None:
    if isinstance(target, entry.fused):
        return "it is patched already: undo that patch first, or name all ops in one call"
    if type(target) is not entry.original:
        name = f"{type(target).__module__}.{type(target).__qualname__}"
        return f"it is a {name}, a subclass of {entry.original.__name__} that may compute something else"
    return None


def _processor(module: nn.Module) -> object:
    return getattr(module, "processor", None)


def _unknown_processor(
    path: str, module: nn.Module, table: dict[type, Replacement], wanted: frozenset[str]
) -> Iterator[Left]:
    """An attention with QK norms whose processor is none of those known."""
    processor = _processor(module)
    if QK_NORM_ROPE not in wanted or processor is None or getattr(module, "norm_q", None) is None:
        return
    if not any(cls in table for cls in type(processor).__mro__):
        yield Left(QK_NORM_ROPE, path, f"its processor is a {type(processor).__qualname__}", unknown=True)


def _change_class(path: str, module: nn.Module, fused: type, wanted: frozenset[str]) -> Iterator[Edit]:
    """The module stays the same object: hooks, references and ZeRO-3 partitions stay as they are."""
    if "fused_ops" in fused.__annotations__:
        yield Edit(module, "fused_ops", ABSENT, wanted, path)
    yield Edit(module, "__class__", type(module), fused, path)


def _exchange_processor(path: str, module: nn.Module, fused: type, wanted: frozenset[str]) -> Iterator[Edit]:
    """A processor may serve several attentions, patched and not: a copy of it takes its place here."""
    copy: Any = object.__new__(fused)
    copy.__dict__.update(vars(module.processor))
    yield Edit(module, "processor", module.processor, copy, path)


def _check_early(model: nn.Module) -> None:
    """Neither torch.compile nor FSDP has taken the layers over. ZeRO-3's partitioned weights may be there."""
    wrapper = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())
    sharded = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())
    for path, module in model.named_modules():
        if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
            done, instead = "compiled", "torch.compile it"
        elif isinstance(module, wrapper) or any(isinstance(weight, sharded) for weight in module._parameters.values()):
            done, instead = "sharded", "shard it (fully_shard, FSDP, tensor parallelism)"
        else:
            continue
        raise ValueError(f"patch: model: {path or 'it'} is {done} already: patch it first, then {instead}")


def _check_model(model: nn.Module, families: list[ModuleType], unusable: list[str]) -> None:
    models = tuple(cls for family in families for cls in getattr(family, "MODELS", ()))
    if not any(isinstance(module, models) for module in model.modules()):
        why = f" (not supported as installed: {'; '.join(unusable)})" if unusable else ""
        raise ValueError(
            f"patch: model: expected {MODELS}, or a model that contains one, got {type(model).__name__}{why}"
            ". strict=False patches the layers it shares with these"
        )


def _check_places(model: nn.Module, requested: Iterable[str], replaced: list[Replaced], left: list[Left]) -> None:
    """A structure that is not known, or a requested op without a place, is an error that names it."""
    unknown = [entry for entry in left if entry.unknown]
    if unknown:
        first = unknown[0]
        raise ValueError(
            f"patch: {first.op}: {first.module or 'the model'} is of unknown structure: {first.reason}"
            + (f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else "")
            + ". Leave the op out of ops=, or pass strict=False to leave such places as they are"
        )
    for op in sorted(set(requested) - {entry.op for entry in replaced}):
        reasons = dict.fromkeys(f"{entry.module}: {entry.reason}" for entry in left if entry.op == op)
        why = f" ({next(iter(reasons))})" if reasons else ""
        raise ValueError(
            f"patch: {op}: found no place for it in {type(model).__name__}{why}. "
            "Leave it out of ops=, or pass strict=False"
        )


def _join(path: str, name: str) -> str:
    return ".".join(part for part in (path, name) if part)
