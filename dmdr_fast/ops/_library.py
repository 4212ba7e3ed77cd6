"""Raw functions: what a public op runs, as ``torch.ops.dmdr_fast.*`` and, in eager mode, past the dispatcher.

The arguments of a raw function are those of its formula. Their annotations make the schema and the checks of options;
the description of the results and every backend take them as a named tuple. Fakes and the tensors that a backend writes
are made from the description, and the rules of the derivative from names.

A call in eager mode costs what it must: one look at each argument makes the call's signature, the signature finds the
plan (:mod:`dmdr_fast.backends.plans`), the plan allocates and launches. Checks ran when the signature was new. Whatever
is not plain eager mode (torch.compile, dispatch modes, tensor subclasses) goes through the dispatcher; whatever asks
for more than a first derivative in reverse mode (``torch.func``, forward mode, ``create_graph=True``) goes to the
reference, which PyTorch differentiates.
"""

from __future__ import annotations

import functools
import operator
import sys
import types
import typing
from collections import namedtuple
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from dmdr_fast import backends, reference
from dmdr_fast.backends.plans import Live, Plan
from dmdr_fast.ops import _checks
from dmdr_fast.reference import FUNCTIONS, RESULTS, Result, first_tensor

_LIBRARY = torch.library.Library("dmdr_fast", "DEF")
_BELOW_AUTOGRAD = torch._C._AutoDispatchBelowAutograd

# A plan takes some KB; a training run has some hundred signatures.
_MOST_PLANS = 1024
# A live int is in the signature by what a kernel is specialised for, and by its place in the largest block.
_LARGEST_BLOCK = 4096

_TENSORS = frozenset((Tensor, torch.nn.Parameter))
_SCHEMA = {
    Tensor: "Tensor", bool: "bool", int: "SymInt", Live: "SymInt", float: "float", str: "str",
    torch.dtype: "ScalarType", list[int]: "SymInt[]", list[float]: "float[]",
}  # fmt: skip

# Its names are known at run time only.
_named: Callable[[str, Sequence[str]], type[Any]] = namedtuple

# By name.
RAW: dict[str, Raw] = {}


# A call as :class:`Raw` sees it: its signature; the pointers of its tensors and its live int, at the places of their
# arguments; whether gradients are on and an argument requires one; the signature's plan, None for a new one. A plain
# tuple: a named one costs 0.3 us.
Call = tuple[tuple, list[int], bool, Plan | None]


class Raw:
    """A raw function: its arguments, its results, its formula and its derivative; the backends implement it.

    Args:
        name: e.g. ``gated_residual_fwd``.
        results: the names of the results, ``"y mean rstd"``; all are tensors.
        describe: of the arguments as a named tuple, as all below but the formula: a :class:`Result` for each result.
        formula: the results in plain PyTorch, see :data:`dmdr_fast.reference.FUNCTIONS`. Its parameters are the raw
            function's, their annotations make the schema. A string is one of its Literal, a dtype one of floats.
        check: of the public op's name and the arguments: raises unless they are right; reads no values.
        check_values: likewise, and reads them; called where that costs nothing.
        backward: the rule of the derivative, see :func:`by`. Without it differentiating goes through the formula.
        constants: numbers of the results that have no gradient.
        recompute: of the arguments: those that are functions of others (a backward's statistics), by name. Derivatives
            of the formula take them so.
        derived: of the arguments: the results for all derivatives but the first in reverse mode, where that is not the
            formula.
        flops: for torch's FlopCounterMode, as ``torch.utils.flop_counter.register_flop_formula`` takes it.

    Attributes:
        arguments: makes a named tuple of them.
        hints: their types by name.
        plans: by signature.
        live: number of the argument that is :class:`Live`; None without one.
        look: of a call's arguments: the call, see :func:`_look`.
        operator: ``torch.ops.dmdr_fast.<name>.default``.
    """

    def __init__(
        self,
        name: str,
        results: str,
        describe: Callable[[Any], Result | tuple[Result, ...]],
        formula: Callable[..., Any],
        *,
        check: Callable[[str, Any], None] | None = None,
        check_values: Callable[[str, Any], None] | None = None,
        backward: Callable[[Raw], Rule] | None = None,
        constants: tuple[int, ...] = (),
        recompute: Callable[[Any], dict[str, Tensor]] | None = None,
        derived: Callable[[Any], Any] | None = None,
        flops: Callable | None = None,
    ) -> None:
        self.name, self.results = name, tuple(results.split())
        self.hints = typing.get_type_hints(formula)
        self.hints.pop("return", None)
        self.arguments = _named(name, tuple(self.hints))
        self._own_check, self._check_values = check, check_values
        choices = [field for field, hint in self.hints.items() if typing.get_origin(hint) is Literal]
        self._choices = {field: typing.get_args(self.hints[field]) for field in choices}
        self._dtypes = [field for field, hint in self.hints.items() if hint in (torch.dtype, torch.dtype | None)]
        self._derived = derived or (lambda a: reference.run(name, a._replace(**recompute(a)) if recompute else a))
        self.live = next((index for index, hint in enumerate(self.hints.values()) if hint is Live), None)
        self.plans: dict[tuple, Plan] = {}
        self.look = _look(list(self.hints.values()), self.plans)

        made, several = _named(name, self.results), len(self.results) > 1
        FUNCTIONS[name], RAW[name] = formula, self
        RESULTS[name] = lambda a: made(*describe(a)) if several else made(describe(a))
        returned = "(" + ", ".join(f"Tensor {result}" for result in self.results) + ")" if several else "Tensor"
        schema = ", ".join(f"{_schema_type(hint)} {field}" for field, hint in self.hints.items())
        _LIBRARY.define(f"{name}({schema}) -> {returned}", tags=(torch.Tag.pt2_compliant_tag,))
        self.operator: Callable[..., Any] = getattr(torch.ops.dmdr_fast, name).default
        self._function = None if backward is None else _function(self, backward(self), constants)
        if flops is not None:
            _flop_formulas[name] = flops
        torch.library.register_fake(f"dmdr_fast::{name}", lambda *args: self.fake(self.arguments(*args)), lib=_LIBRARY)
        _LIBRARY.impl(name, lambda *args: self.run(args, self.look(args)), "CompositeExplicitAutograd")
        _LIBRARY.impl(name, self._autograd, "Autograd")

    def checked(self, op: str, *args: Any) -> Any:
        """As the public op ``op`` calls it: arguments of a new signature are checked, values on the CPU always."""
        if torch.compiler.is_compiling():
            self._check(op, args)
            return self.operator(*args)
        call = self.look(args)
        if call is None or call[3] is None:
            self._check(op, args)
        if self._check_values is not None and _checks.readable(args[0]):
            self._check_values(op, self.arguments(*args))
        return self.eager(args, call)

    def __call__(self, *args: Any) -> Any:
        """As the rule of a derivative calls it: the arguments are known to be right."""
        return self.operator(*args) if torch.compiler.is_compiling() else self.eager(args, self.look(args))

    def _check(self, op: str, args: tuple) -> None:
        a = self.arguments(*args)
        for name, allowed in self._choices.items():
            _checks.choice(op, name, getattr(a, name), allowed)
        for name in self._dtypes:
            if getattr(a, name) is not None:
                _checks.dtype(op, name, getattr(a, name))
        if self._own_check is not None:
            self._own_check(op, a)

    def formula(self, *args: Any) -> Any:
        """The same in plain PyTorch, which differentiates it any number of times and in every mode."""
        return self._derived(self.arguments(*args))

    def fake(self, args: tuple) -> Any:
        """The results, of unspecified contents."""
        results, like = RESULTS[self.name](args), first_tensor(args)
        made = [like.new_empty((0,) if one.shape is None else one.shape, dtype=one.dtype) for one in results]
        return tuple(made) if len(made) > 1 else made[0]

    def run(self, args: tuple, call: Call | None) -> Any:
        """The results, without a derivative."""
        if call is not None and (plan := call[3]) is not None:
            return plan(call[1])
        # Each tensor becomes one of its own, whatever the caller passed twice: the recorder tells them apart so.
        own: list[Any] = [arg.detach() if isinstance(arg, Tensor) else arg for arg in args]
        if self.live is not None:
            own[self.live] = Live(own[self.live])
        outputs, plan = backends.run(self.name, self.arguments(*own))
        if plan is not None and call is not None:
            if len(self.plans) >= _MOST_PLANS:
                self.plans.clear()
            self.plans[call[0]] = plan
        return outputs

    def eager(self, args: tuple, call: Call | None) -> Any:
        if call is None:
            return self.formula(*args) if _transformed() else self.operator(*args)
        if call[2]:
            return self.formula(*args) if self._function is None else self._function.apply(call, *args)
        return self.run(args, call)

    def _autograd(self, *args: Any) -> Any:
        """What the dispatcher calls first. Plain tensors go past the rest of it, which costs 4 us; for others the
        operator is called again below the Autograd key: modes (fake tensors, flop counts) must see it."""
        if _flop_formulas:
            _register_flops()
        if (call := self.look(args)) is not None:
            _, values, graded, plan = call
            return self.eager(args, call) if graded or plan is None else plan(values)
        if _transformed():
            return self.formula(*args)
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            return self.formula(*args) if self._function is None else self._function.apply(None, *args)
        with _BELOW_AUTOGRAD():
            return self.operator(*args)


def _look(hints: Sequence[Any], plans: dict[tuple, Plan]) -> Callable[[tuple], Call | None]:
    """Makes ``look(args)`` of a raw function whose arguments are of the types ``hints``: the :data:`Call`.

    It gives None where that is not plain eager mode: a dispatch mode or a transform is on, a tensor is of a subclass
    or has no memory of its own (a batch of gradients, ``is_grads_batched=True``), or an argument is of the wrong type.

    Its source is written out: a loop over the arguments takes half as long again. A device goes by its number, which
    takes half as long: -1 for meta tensors, -2 here for those of the CPU. An absent tensor counts as one at 16.
    """
    right, pointers, graded, key, tensors, values = [], [], [], [], [], []
    for index, hint in enumerate(hints):
        a, p, value = f"a{index}", f"p{index}", "0"
        if _is_tensor(hint):
            seen = "({1} if " + a + " is None else ({0}))" if hint != Tensor else "{0}"
            right.append(seen.format(f"type({a}) in TENSORS", True))
            pointers.append(f"{p} = " + seen.format(f"{a}.data_ptr()", 16))
            graded.append(seen.format(f"{a}.requires_grad", False))
            where = f"-2 if {a}.is_cpu else {a}.get_device()"
            key.append(seen.format(f"{a}.shape, {a}.is_contiguous() or {a}.stride(), {a}.dtype, {where}", None))
            tensors.append(value := p)
        elif hint is Live:
            key.append(f"{a} % {_LARGEST_BLOCK}, {a} == 1, {a} >= 2**31")
            value = a
        else:
            key.append(f"tuple({a})" if typing.get_origin(hint) is list else a)
        values.append(value)
    source = f"""
def look(args):
    if in_dispatch_mode() or is_transforming() or forward_ad._current_level >= 0:
        return None
    {", ".join(f"a{index}" for index in range(len(hints)))}, = args
    if not ({" and ".join(right)}):
        return None
    try:
        {"; ".join(pointers)}
        aligned = not ({" | ".join(tensors)}) & 15
        graded = is_grad_enabled() and ({" or ".join(graded)})
        key = (
            environment.get(BACKEND), aligned or ({" & 15, ".join(tensors)} & 15,), graded and ({", ".join(graded)},),
            {", ".join(key)},
        )
        return key, [{", ".join(values)}], graded, plans.get(key)
    except (RuntimeError, TypeError):
        return None
"""
    names: dict[str, Any] = {
        "in_dispatch_mode": torch._C._len_torch_dispatch_stack, "forward_ad": forward_ad,
        "is_transforming": torch._C._are_functorch_transforms_active, "is_grad_enabled": torch.is_grad_enabled,
        "TENSORS": _TENSORS, "environment": backends.ENVIRONMENT, "BACKEND": backends.BACKEND, "plans": plans,
    }  # fmt: skip
    exec(source, names)
    return names["look"]


# The derivative of a raw function: ``save(ctx, arguments, results)`` keeps what ``backward(ctx, needed, *gradients of
# the results)`` reads; that gives gradients by the number of their argument, None or left out where there is none.
# ``needed`` has a bool per argument.
Rule = tuple[Callable[[Any, tuple, Any], None], Callable[..., dict[int, Tensor | None]]]


def by(gradient: Raw, *, through: str | None = None, **names: str) -> Callable[[Raw], Rule]:
    """The rule of a raw function whose gradients ``gradient`` computes, made from the names of its arguments.

    ``grad_y`` is the gradient of the result y, ``grad`` that of the first; ``need_x_or_z`` says whether x or z needs
    one; ``x_dtype`` is the dtype of x; all others are arguments and results of the function. A result ``grad_x`` is the
    gradient of x.

    Args:
        through: an argument whose gradient is that of the first result, as it is.
        names: the function's arguments by what ``gradient`` calls them, where that is something else.
    """

    def rule(raw: Raw) -> Rule:
        arguments, fields = raw.arguments._fields, gradient.arguments._fields

        def number(field: str) -> int:
            """Of an argument, or behind the arguments that of a result."""
            return (arguments + raw.results).index(names.get(field, field))

        incoming = [f"grad_{result}" for result in raw.results]
        needs = [field for field in fields if field.startswith("need_")]
        kept = [field for field in fields if _is_tensor(gradient.hints[field]) and not field.startswith("grad")]
        options = [field for field in fields if not _is_tensor(gradient.hints[field]) and field not in needs]
        dtypes = [field for field in options if field not in arguments]  # x_dtype
        options = [field for field in options if field in arguments]
        pool = [*incoming, *kept, *options, *dtypes, *needs]
        ordered = _picked([pool.index(incoming[0] if field == "grad" else field) for field in fields])

        saved, copied = (_picked([*map(number, some)]) for some in (kept, options))
        sources = [number(field.removesuffix("_dtype")) for field in dtypes]
        groups = [[number(one) for one in field.removeprefix("need_").split("_or_")] for field in needs]
        given = [number(result.removeprefix("grad_")) for result in gradient.results]
        passed = None if through is None else arguments.index(through)

        def save(ctx, args, results):
            ctx.save_for_backward(*saved((*args, *results) if isinstance(results, tuple) else (*args, results)))
            ctx.options = *copied(args), *[args[index].dtype for index in sources]

        @functools.cache
        def wanted(needed: tuple[bool, ...]) -> list[bool]:
            return [any(map(needed.__getitem__, group)) for group in groups]

        def backward(ctx, needed, *grads):
            found = {}
            if passed is not None and needed[passed]:
                found[passed] = grads[0]
            if passed is None or any(map(needed.__getitem__, given)):
                made = gradient(*ordered((*grads, *ctx.saved_tensors, *ctx.options, *wanted(needed))))
                for index, part in zip(given, made if isinstance(made, tuple) else (made,), strict=True):
                    # An empty one belongs to a result that got no gradient.
                    if needed[index] and part.shape != (0,):
                        found[index] = part
            return found

        return save, backward

    return rule


def _picked(places: list[int]) -> Callable[[tuple], tuple]:
    """Of a tuple: what lies at these places."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    return lambda values: tuple([values[place] for place in places])


def written(save: Callable[[Any, Any, Any], None], backward: Callable[..., dict]) -> Callable[[Raw], Rule]:
    """A rule written out: arguments, and what is needed of them, come as their named tuple, gradients go by name."""

    def rule(raw: Raw) -> Rule:
        made, number = raw.arguments, raw.arguments._fields.index

        def by_number(ctx, needed, *grads):
            return {number(name): part for name, part in backward(ctx, made._make(needed), *grads).items()}

        return lambda ctx, args, results: save(ctx, made._make(args), results), by_number

    return rule


def _is_tensor(hint: Any) -> bool:
    return hint in (Tensor, Tensor | None)


def _schema_type(hint: Any) -> str:
    if isinstance(hint, types.UnionType):
        (kind,) = (part for part in typing.get_args(hint) if part is not type(None))
        return _SCHEMA[kind] + "?"
    return "str" if typing.get_origin(hint) is Literal else _SCHEMA[hint]


def _transformed() -> bool:
    """A transform of torch.func, or forward-mode differentiation, is on."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _function(raw: Raw, rule: Rule, constants: tuple[int, ...]) -> type[torch.autograd.Function]:
    save, backward, missing = *rule, (None,) * len(raw.arguments._fields)

    def forward(ctx, call, *args):
        if call is None:  # the dispatcher below has to see it: fake tensors, counters, subclasses
            with _BELOW_AUTOGRAD():
                outputs = raw.operator(*args)
        else:
            outputs = raw.run(args, call)
        if constants:
            ctx.mark_non_differentiable(*[outputs[index] for index in constants])
        ctx.set_materialize_grads(False)  # a zero tensor for each result without a gradient costs a launch
        save(ctx, args, outputs)
        return outputs

    def backward_of(ctx, *grads):
        gradients: list[Tensor | None] = list(missing)
        if any(grad is not None for grad in grads):
            for index, gradient in backward(ctx, ctx.needs_input_grad[1:], *grads).items():
                gradients[index] = gradient
        return None, *gradients

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward_of)}
    return type(raw.name, (torch.autograd.Function,), members)


# Formulas that torch's flop counter has not got yet: to import it is to import triton, so they wait here.
_flop_formulas: dict[str, Callable] = {}


def _register_flops() -> None:
    module = sys.modules.get("torch.utils.flop_counter")
    if module is None:
        return
    packets = {name: getattr(torch.ops.dmdr_fast, name) for name in _flop_formulas}
    for name, packet in packets.items():
        module.register_flop_formula(packet)(_flop_formulas.pop(name))
    for mode in _get_current_dispatch_mode_stack():  # one that is on already has a copy of its own
        if isinstance(counter := getattr(mode, "counter", None), module.FlopCounterMode):
            counter.flop_registry.update({packet: module.flop_registry[packet] for packet in packets.values()})


class Explaining(TorchDispatchMode):
    """While on, raw functions answer with their fakes; ``choice`` is the backend's of the first one, None before it."""

    choice: backends.Choice | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raw = RAW.get(func._opname) if func.namespace == "dmdr_fast" else None
        if raw is None:
            return func(*args, **(kwargs or {}))
        arguments = raw.arguments(*args)
        self.choice = self.choice or backends.explain(raw.name, arguments)
        return raw.fake(arguments)
