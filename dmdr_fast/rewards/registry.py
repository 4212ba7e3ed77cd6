"""From a reward's name in the configuration to the reward: the built-in kinds, and a user's own class."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import torch

    from dmdr_fast.rewards.base import Reward

# Modules are imported when a reward is built: the kinds, and whether they suit ReFL, are known without torch.
KINDS = {
    "digits": "dmdr_fast.rewards.digits:DigitsReward",
    "digits_held_out": "dmdr_fast.rewards.digits_held_out:DigitsHeldOutReward",
    "scenes": "dmdr_fast.rewards.scenes:ScenesReward",
    "scenes_held_out": "dmdr_fast.rewards.scenes:ScenesHeldOutReward",
    "scenes_right": "dmdr_fast.rewards.scenes:ScenesRightReward",
    "classifier": "dmdr_fast.rewards.classifier:TransformersClassifierReward",
    "clip_score": "dmdr_fast.rewards.clip_score:CLIPScoreReward",
    "pickscore": "dmdr_fast.rewards.pickscore:PickScoreReward",
    "hps": "dmdr_fast.rewards.hps:HPSReward",
    "image_reward": "dmdr_fast.rewards.image_reward:ImageRewardReward",
    "aesthetic": "dmdr_fast.rewards.aesthetic:AestheticReward",
}
NEEDS_PATH = ("classifier",)
SCORE_ONLY = ("scenes_right",)
# What a kind scores an image by, where the image alone will not do.
READS = {
    "labels": ("digits", "digits_held_out", "classifier"),
    "prompts": ("scenes", "scenes_held_out", "scenes_right", "clip_score", "pickscore", "hps", "image_reward"),
}
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def build_reward(
    kind: str,
    path: str | None = None,
    name: str | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    num_classes: int | None = None,
    device: torch.device | str = "cpu",
) -> Reward:
    """The reward of one entry of ``reward.terms``, on ``device``.

    Args:
        kind: a key of :data:`KINDS`, or a class as ``package.module:Name`` or ``path/file.py:Name`` (relative to
            the working directory).
        path: folder or hub id of its weights, given to the constructor as ``path``; None: not given.
        name: its name in logs and errors; None: its own, or for a class without one the class's.
        options: further keyword arguments of the constructor. For built-in kinds ``dtype`` is fp32, bf16 or fp16.
        num_classes: given to constructors that take ``num_classes``.
        device: where it goes, if it is an ``nn.Module``; another class places itself.

    Raises:
        ValueError: unknown kind, class or option, a class that is no reward, or a constructor that raises.
        FileNotFoundError: no file, or nothing that loads at ``path``.
    """
    reward_class, arguments = prepare_reward(kind, path, name, options, num_classes=num_classes)
    try:
        reward = reward_class(**arguments)
    except Exception as error:
        if kind in KINDS:  # these say themselves what to change
            raise
        raise ValueError(f"reward.terms: {name or kind}: its constructor raised {_said(error)}") from error
    if name is not None or getattr(reward, "name", None) is None:
        reward.name = name or kind.rpartition(":")[2]
    return reward.to(device) if hasattr(reward, "to") else reward


def prepare_reward(
    kind: str,
    path: str | None = None,
    name: str | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    num_classes: int | None = None,
) -> tuple[type, dict[str, Any]]:
    """The class of a reward and the arguments that its constructor gets. Loads no weights.

    Raises:
        ValueError, FileNotFoundError: as :func:`build_reward`, but for what the constructor itself raises.
    """
    where = f"reward.terms: {name or kind}"
    reward_class = _reward_class(kind)
    arguments = {**(options or {}), **({} if path is None else {"path": path})}
    if kind in KINDS:
        if kind in NEEDS_PATH and path is None:
            raise ValueError(f"{where}: expected path, the folder or hub id of its weights, got none: set path")
        arguments = _with_dtype(arguments, where)
    signature = inspect.signature(reward_class)
    if num_classes is not None and "num_classes" in signature.parameters:
        arguments.setdefault("num_classes", num_classes)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        known = ", ".join(p for p in signature.parameters if p not in ("name", "args", "kwargs")) or "none"
        raise ValueError(
            f"{where}: its constructor does not take what is given ({error}): it takes {known}; change path or options"
        ) from None
    return reward_class, arguments


def weights_of_reward(reward_class: type, arguments: Mapping[str, Any]) -> dict[str, str]:
    """The folders and hub ids that a built-in reward will load from, by the name of its argument."""
    parameters = inspect.signature(reward_class).parameters.values()
    given = {p.name: arguments.get(p.name, p.default) for p in parameters if "str | Path" in str(p.annotation)}
    return {name: str(value) for name, value in given.items() if isinstance(value, (str, Path))}


def is_differentiable(kind: str) -> bool:
    """Whether the kind can serve ReFL. All of :data:`KINDS` but :data:`SCORE_ONLY` can; a user's class says it itself.

    Loads no weights.

    Raises:
        ValueError, FileNotFoundError: as :func:`build_reward` for the kind.
    """
    return kind not in SCORE_ONLY if kind in KINDS else _reward_class(kind).differentiable


def _reward_class(kind: str) -> type[Reward]:
    if kind in KINDS:
        module, _, name = KINDS[kind].rpartition(":")
        return getattr(importlib.import_module(module), name)
    source, colon, name = kind.rpartition(":")
    if not colon:
        near = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"reward.terms: kind: unknown {kind!r}; did you mean {near}? Expected one of {', '.join(KINDS)}, "
            "or a class of your own as package.module:Name or path/file.py:Name"
        )
    module = _module_of_file(source, kind) if source.endswith(".py") else _module_of_name(source, kind)
    reward_class = getattr(module, name, None)
    if not inspect.isclass(reward_class):
        classes = [n for n, v in vars(module).items() if inspect.isclass(v) and v.__module__ == module.__name__]
        raise ValueError(
            f"reward.terms: kind: {kind}: expected a class {name} in {source}, which has "
            f"{', '.join(classes) or 'no class'}: change the name behind the colon"
        )
    if not isinstance(getattr(reward_class, "differentiable", None), bool) or not callable(
        getattr(reward_class, "__call__", None)  # noqa: B004 - of the class: instances must have it
    ):
        raise ValueError(
            f"reward.terms: kind: {kind}: expected a reward, a class with `differentiable = True` or `= False` in "
            "its body and __call__(images, *, labels=None, prompts=None) -> [B]: add what is missing"
        )
    return cast("type[Reward]", reward_class)


def _module_of_file(source: str, kind: str):
    file = Path(source).expanduser().resolve()
    if not file.is_file():
        raise FileNotFoundError(f"reward.terms: kind: {kind}: no file {file}: change the path before the colon")
    name = f"dmdr_fast_reward:{file}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None  # of a .py file there are
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up while it runs
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise ValueError(f"reward.terms: kind: {kind}: {file} does not run: {_said(error)}") from error
        # Behind what the file has imported: pickle takes the first module that holds an object such as
        # torch.contiguous_format, and the compiler's cache pickles those; this one cannot be imported by its name.
        sys.modules[name] = sys.modules.pop(name)
    return sys.modules[name]


def _module_of_name(source: str, kind: str):
    if (here := str(Path.cwd())) not in sys.path:  # the launcher puts the script's folder there, not this one
        sys.path.append(here)
    try:
        return importlib.import_module(source)
    except Exception as error:
        raise ValueError(
            f"reward.terms: kind: {kind}: cannot import {source}: {_said(error)}: expected a module on PYTHONPATH or "
            "in the working directory, or path/file.py:Name"
        ) from error


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _with_dtype(arguments: dict[str, Any], where: str) -> dict[str, Any]:
    """Arguments whose ``dtype``, if any, is torch's."""
    import torch

    if "dtype" not in arguments or isinstance(arguments["dtype"], torch.dtype):
        return arguments
    if arguments["dtype"] not in DTYPES:
        raise ValueError(f"{where}: options.dtype: expected one of {', '.join(DTYPES)}, got {arguments['dtype']!r}")
    return {**arguments, "dtype": getattr(torch, DTYPES[arguments["dtype"]])}
