"""Registration of the raw functions as ``torch.ops.dmdr_fast.*``.

``torch.library.Library`` rather than ``custom_op``, and autograd on the Autograd key rather than through
``register_autograd``: that one asks the schema for defaults in every call, 100 us for the 20 arguments of
dmd_gradient (CPU, one thread), which counts where the trainer runs 8x8 latents.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextvars import ContextVar

import torch

from dmdr_fast import backends

_LIBRARY = torch.library.Library("dmdr_fast", "DEF")

# Set while `explain` asks: the raw functions then note the choice of backend instead of computing.
_choices: ContextVar[list[backends.Choice] | None] = ContextVar("dmdr_fast_choices", default=None)

# Formulas that torch's flop counter has not got yet: to import it is to import triton, so they wait here.
_flop_formulas: dict[str, Callable] = {}


def define(
    schema: str,
    fake: Callable,
    *,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    flops: Callable | None = None,
) -> Callable:
    """Register a raw function: its schema, fake implementation and derivative; the backends implement it.

    Args:
        schema: ``name(Tensor x, ...) -> Tensor``.
        fake: same arguments, returns empty tensors of the result's shape, dtype and device.
        setup_context: as in ``torch.library.register_autograd``.
        backward: likewise; without it differentiating through the function is an error.
        flops: for torch's FlopCounterMode, as ``torch.utils.flop_counter.register_flop_formula`` takes it.

    Returns:
        The operator, to be called with positional arguments.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, _implementation(name, fake), "CompositeExplicitAutograd")
    torch.library.register_fake(f"dmdr_fast::{name}", fake, lib=_LIBRARY)
    if flops is not None:
        _flop_formulas[name] = flops
    operator = getattr(torch.ops.dmdr_fast, name).default
    _LIBRARY.impl(name, _autograd(name, operator, setup_context, backward or _not_differentiable(name)), "Autograd")
    return operator


def explain(public: Callable, args: tuple, kwargs: dict) -> backends.Choice:
    """The choice for the first raw function that ``public(*args, **kwargs)`` calls; computes nothing."""
    choices: list[backends.Choice] = []
    token = _choices.set(choices)
    try:
        with torch.no_grad():
            public(*args, **kwargs)
    finally:
        _choices.reset(token)
    return choices[0]


def _implementation(name: str, fake: Callable) -> Callable:
    def implementation(*args):
        choices = _choices.get()
        if choices is not None:
            choices.append(backends.explain(name, args))
            return fake(*args)
        # The dtypes are the tensors' own: autocast must not reach the matmuls of the reference.
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                return backends.run(name, args)
        return backends.run(name, args)

    return implementation


# The forward calls the operator again below the Autograd key: modes (fake tensors, flop counts) must see it.
def _autograd(name: str, operator: Callable, setup_context: Callable | None, backward: Callable) -> Callable:
    def forward(ctx, *args):
        with torch._C._AutoDispatchBelowAutograd():
            output = operator(*args)
        if setup_context is not None:
            setup_context(ctx, args, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function = type(name, (torch.autograd.Function,), members)

    def implementation(*args):
        if name in _flop_formulas:
            _register_flops(name)
        if torch.is_grad_enabled():
            for arg in args:
                if isinstance(arg, torch.Tensor) and arg.requires_grad:
                    return function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    return implementation


def _register_flops(name: str) -> None:
    counter = sys.modules.get("torch.utils.flop_counter")
    if counter is not None:
        counter.register_flop_formula(getattr(torch.ops.dmdr_fast, name))(_flop_formulas.pop(name))


def _not_differentiable(name: str) -> Callable:
    def backward(ctx, *grads):
        raise RuntimeError(
            f"dmdr_fast::{name} has no derivative: it is itself a gradient or a draw. "
            "Second derivatives (create_graph=True) need the formula in plain PyTorch."
        )

    return backward
