"""Low-rank adapters (LoRA, arXiv 2106.09685) for several roles on one frozen network.

``add_lora`` turns the target ``nn.Linear`` layers of any model into ``LoraLinear`` where they stand; each
role (fake score, generator, ...) brings its own adapter with its own scale, which may differ from sample to
sample: that is how the fake score at s_f and the real score at s_r run as one batch over one frozen base
(DMDR's DynaDG).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmdr_fast import ops
from dmdr_fast.models.partitioned import whole_parameters, whole_shape

Form = Literal["standard", "post_projection"]
Scale = float | Tensor | None
# Names of (A, B) on a layer, by form; the role is appended. post_projection has a pair for q and one for v.
PAIRS: dict[str, tuple[tuple[str, str], ...]] = {
    "standard": (("lora_A", "lora_B"),),
    "post_projection": (("lora_A_q", "lora_B_q"), ("lora_A_v", "lora_B_v")),
}


class LoraLinear(nn.Linear):
    """``nn.Linear`` plus ``adapters`` (role to adapter), each reading the plain layer's input or output.

    standard:         y = W x + b + sum over roles of s (x A) B
    post_projection:  of [q | k | v] = W x + b:  q + s (q A_q) B_q,  k,  v + s (v A_v) B_v

    ``weight`` and ``bias`` keep their names and the adapters are parameters of this very module, not of a
    child: ZeRO-3 gathers a module's own parameters when the module runs.
    """

    adapters: dict[str, LoraAdapter]

    def base(self, x: Tensor) -> Tensor:
        """The plain layer."""
        return F.linear(x, self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        base = self.base(x)
        out = base
        for adapter in self.adapters.values():
            if adapter.scale is None:
                continue
            if adapter.form == "standard":
                out = ops.multi_lora(x, out, *self._pair(adapter, 0), adapter.scale)
            else:
                a, b = (torch.stack(pair) for pair in zip(self._pair(adapter, 0), self._pair(adapter, 1), strict=True))
                out = ops.multi_lora(base, out, a, b, adapter.scale)
        return out

    def _pair(self, adapter: LoraAdapter, index: int) -> tuple[Tensor, Tensor]:
        a, b = PAIRS[adapter.form][index]
        return getattr(self, f"{a}_{adapter.role}"), getattr(self, f"{b}_{adapter.role}")


class LoraAdapter:
    """One role's adapter: its parameters over all target layers, and the scale they act with (off at first).

    Made by ``add_lora``. A ``copy.deepcopy`` of the model has its own, in ``model.lora_adapters[role]``.
    """

    def __init__(self, model: nn.Module, role: str, rank: int, form: Form, layers: dict[str, LoraLinear]):
        self.model, self.role, self.rank, self.form, self.layers = model, role, rank, form, layers
        self.scale: Tensor | None = None

    def set_scale(self, scale: Scale) -> None:
        """Set the scale until the next call: None, a float for all samples, or fp32 [B].

        None is off: bit-equal to the base, and free. A float is kept as a 0-d tensor where the adapter is
        (move the model first): to torch.compile a changed tensor is no new graph, a changed float is one.
        """
        if isinstance(scale, Tensor):
            if scale.ndim != 1 or scale.dtype != torch.float32:
                raise ValueError(
                    f"LoRA {self.role!r}: scale must be None, a float or a float32 tensor [B], "
                    f"got {scale.dtype} {list(scale.shape)}"
                )
        elif scale is not None:
            if not math.isfinite(scale):
                raise ValueError(f"LoRA {self.role!r}: scale must be finite, got {scale}")
            like = next(self.parameters())
            # full, not tensor: a fill on the device, where a copy from the host would wait for it
            scale = torch.full((), scale, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
        self.scale = scale

    @contextmanager
    def scaled(self, scale: Scale) -> Iterator[LoraAdapter]:
        """``set_scale`` inside the block, the scale from before after it."""
        before = self.scale
        self.set_scale(scale)
        try:
            yield self
        finally:
            self.scale = before

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter), the role left out of the name: "blocks.0.attn.qkv.lora_A"."""
        for path, layer in self.layers.items():
            for pair in PAIRS[self.form]:
                for name in pair:
                    yield f"{path}.{name}", getattr(layer, f"{name}_{self.role}")

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trained tensors, in ``named_parameters``' order."""
        return (parameter for _, parameter in self.named_parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """Copies by the names of ``named_parameters``, whole; under ZeRO-3 all ranks must call together."""
        with whole_parameters(self.parameters(), write=False):
            return {name: parameter.detach().clone() for name, parameter in self.named_parameters()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy ``state`` in, all of it; ValueError where a name or a shape differs.

        Before ``deepspeed.initialize``: a ZeRO optimizer's own fp32 copies do not follow.
        """
        own = dict(self.named_parameters())
        if own.keys() != state.keys():
            odd = sorted(own.keys() ^ state.keys())
            raise ValueError(
                f"LoRA {self.role!r}: expected {len(own)} tensors, got {len(state)}; first that differs: "
                f"{odd[0]}. The adapter must have been made with the same targets and form"
            )
        for name, parameter in own.items():
            if whole_shape(parameter) != state[name].shape:
                raise ValueError(
                    f"LoRA {self.role!r}: {name} expected {list(whole_shape(parameter))}, "
                    f"got {list(state[name].shape)}: use the rank of the saved adapter"
                )
        with whole_parameters(own.values(), write=True):
            for name, parameter in own.items():
                parameter.copy_(state[name])


def add_lora(
    model: nn.Module,
    role: str,
    *,
    rank: int,
    targets: Sequence[str],
    form: Form = "standard",
    init_std: float | None = None,
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
    registered: bool = True,
) -> LoraAdapter:
    """Give ``model`` an adapter for ``role`` on every ``nn.Linear`` whose name ends in one of ``targets``.

    All parameters of the model but the adapters' stop requiring grad. B starts at zero, so the model computes
    what it did; the adapter is off until ``set_scale``. The layers change class in place and their weights
    are never read: hooks, references and ZeRO-3 partitions stay as they are. Add adapters before
    ``deepspeed.initialize``, whose ZeRO-3 then partitions them with the base; seed ``generator`` alike on all
    ranks.

    Args:
        role: an identifier, part of the parameters' names; it may not start with "q_" or "v_".
        targets: suffixes of module names such as "attn.qkv"; each must match a layer.
        form: see ``LoraLinear``; "post_projection" (the DMDR reference's) needs a fused qkv layer.
        init_std: A ~ N(0, init_std^2); by default U(-1, 1) / sqrt(in) for "standard", as PEFT has it, and
            N(0, 1) for "post_projection", as the DMDR reference has it.
        dtype: of A and B; fp32 beside bf16 weights is fine.
        generator: a CPU generator; values are drawn on the CPU, the same whatever the model's device.
        registered: False keeps A and B out of the layers' own parameters: no engine around the model sees them, so
            ZeRO-3 leaves them whole on every rank, and ``model.to`` where they are.

    Raises:
        ValueError: an unknown form, a rank below 1, a role that is taken or no identifier, a target that
            matches no layer. The model is then as it was.
    """
    if form not in PAIRS:
        raise ValueError(f"LoRA {role!r}: form must be one of {sorted(PAIRS)}, got {form!r}")
    if rank < 1:
        raise ValueError(f"LoRA {role!r}: rank must be at least 1, got {rank}")
    adapters = getattr(model, "lora_adapters", {})
    # lora_A_q_x is the q part of role "x", so no role may be called "q_x"
    if not role.isidentifier() or role.startswith(("q_", "v_")) or role in adapters:
        raise ValueError(
            "LoRA: role must be an identifier, not start with q_ or v_, and not be one of "
            f"{sorted(adapters)}, got {role!r}"
        )
    layers = target_layers(model, role, targets)
    if form == "post_projection":
        _check_fused(role, layers)
    if not adapters:
        model.requires_grad_(False)
    wearing = {name: _lora_linear(layer) for name, layer in layers.items()}
    adapter = LoraAdapter(model, role, rank, form, wearing)
    for layer in wearing.values():
        layer.adapters[role] = adapter
        sizes = (layer.in_features, layer.out_features) if form == "standard" else (layer.out_features // 3,) * 2
        for name_a, name_b in PAIRS[form]:
            a, b = _start(sizes, rank, form, init_std, generator)
            for name, value in ((name_a, a), (name_b, b)):
                parameter = nn.Parameter(value.to(layer.weight.device, dtype))
                if registered:
                    layer.register_parameter(f"{name}_{role}", parameter)
                else:
                    layer.__dict__[f"{name}_{role}"] = parameter
    model.__dict__["lora_adapters"] = {**adapters, role: adapter}
    return adapter


def _lora_linear(layer: nn.Linear) -> LoraLinear:
    """The layer itself, of the class that reads adapters from now on."""
    if not isinstance(layer, LoraLinear):
        layer.__class__ = LoraLinear
        layer.__dict__["adapters"] = {}
    return cast(LoraLinear, layer)


def recompute_contexts(model: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """``context_fn`` of ``torch.utils.checkpoint``: recompute with the scales that the adapters have now.

    By the time the backward pass recomputes, the caller may have set other scales; without this the gradients
    would be those of another forward.
    """
    return nullcontext(), _Scales(model)


class _Scales(AbstractContextManager):
    """The adapters' scales as they were when this was made; entered once per backward pass through the block."""

    def __init__(self, model: nn.Module) -> None:
        self.then = [(adapter, adapter.scale) for adapter in getattr(model, "lora_adapters", {}).values()]
        self.before: list[Tensor | None] = []

    def __enter__(self) -> None:
        self.before = [adapter.scale for adapter, _ in self.then]
        for adapter, scale in self.then:
            adapter.scale = scale

    def __exit__(self, *error: object) -> None:
        for (adapter, _), scale in zip(self.then, self.before, strict=True):
            adapter.scale = scale


def _start(
    sizes: tuple[int, int], rank: int, form: Form, init_std: float | None, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    a = torch.empty(sizes[0], rank, device="cpu")
    if init_std is None and form == "standard":
        a.uniform_(-(sizes[0] ** -0.5), sizes[0] ** -0.5, generator=generator)
    else:
        a.normal_(0.0, 1.0 if init_std is None else init_std, generator=generator)
    return a, torch.zeros(rank, sizes[1], device="cpu")


def target_layers(model: nn.Module, role: str, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """The ``nn.Linear`` layers whose names end in one of ``targets``, by name; errors as :func:`add_lora`."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if isinstance(targets, str) or not targets:
        raise ValueError(f"LoRA {role!r}: targets must be a list of layer-name suffixes, got {targets!r}")
    found = {}
    for name, module in linears.items():
        if any(f".{name}".endswith(f".{target}") for target in targets):
            found[name] = module
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in found):
            kinds = sorted({re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in linears})
            raise ValueError(f"LoRA {role!r}: target {target!r} matches no nn.Linear; the model has {', '.join(kinds)}")
    for name, module in found.items():
        if type(module) is not nn.Linear and not isinstance(module, LoraLinear):
            raise ValueError(
                f"LoRA {role!r}: {name} is a {type(module).__name__} with a forward of its own, expected "
                "nn.Linear: take it out of the targets, or add the adapters before whatever replaced it"
            )
    return found


def _check_fused(role: str, layers: dict[str, nn.Linear]) -> None:
    for name, layer in layers.items():
        if layer.out_features % 3:
            raise ValueError(
                f"LoRA {role!r}: post_projection needs a fused qkv layer, three equal parts; {name} has "
                f"{layer.out_features} outputs: target the qkv layers, or use form='standard'"
            )
