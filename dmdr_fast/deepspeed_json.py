"""The JSON of ``deepspeed.config``: known keys with their types, and none that the configuration itself sets.

"auto" stands for our own value, or for DeepSpeed's default where we have none: the key is left out.
"""

from __future__ import annotations

import difflib
import json
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from dmdr_fast.cli import accepted, leaves
from dmdr_fast.config import Config
from dmdr_fast.config.deepspeed_json import DeepSpeedJSON, DeepSpeedOptimizer
from dmdr_fast.errors import UserError

# Keys of DeepSpeed's that something else decides here, whatever they hold.
REFUSED = {
    "scheduler": "it would set the learning rate beside ours; set optimizer.generator.warmup_steps, "
    "optimizer.fake.warmup_steps, optimizer.*.decay",
    "activation_checkpointing": "set memory.activation",
    "amp": "set deepspeed.dtype",
    "torch_autocast": "set deepspeed.dtype",
    "tensorboard": "the run writes run_dir/tensorboard by itself; leave it out",
    "wandb": "set log.wandb",
    "csv_monitor": "the run writes run_dir/log.jsonl by itself; leave it out",
}


def read_deepspeed_json(config: Config) -> dict[str, Any]:
    """The keys of ``deepspeed.config`` that come on top of our own; none where there is no such file.

    Raises:
        UserError: it is unreadable, has a key that is unknown or of another type, or one that the configuration owns
            with another value than the configuration's.
    """
    path = config.deepspeed.config
    if path is None:
        return {}
    try:
        values = json.loads(path.read_bytes(), object_pairs_hook=_without_doubles)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"deepspeed.config: {path} is not a readable JSON file: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"deepspeed.config: {path} must hold keys and values, got {json.dumps(values)[:80]}")
    try:
        return _checked(_without_auto(values), config)
    except ValueError as error:
        raise UserError(f"deepspeed.config: {path}: {error}") from None


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)} is in it twice")
    return values


def _without_auto(value: Any) -> Any:
    """``value`` without the keys that are "auto", and without groups that held nothing else."""
    if not isinstance(value, dict):
        return value
    kept = {name: _without_auto(inner) for name, inner in value.items() if inner != "auto"}
    return {name: inner for name, inner in kept.items() if inner != {} or value[name] == {}}


def _checked(values: dict[str, Any], config: Config) -> dict[str, Any]:
    for name in values.keys() & REFUSED.keys():
        raise ValueError(f"{name}: {REFUSED[name]}")
    try:
        given = DeepSpeedJSON.model_validate(values).model_dump(exclude_unset=True)
    except ValidationError as error:
        raise ValueError(_problem(error.errors()[0])) from None
    _drop_owned(given, config)
    _check_use(given, config)
    return given


def _problem(problem: ErrorDetails) -> str:
    words = [str(word) for word in problem["loc"]]
    path, fields = ".".join(words), dict(leaves(DeepSpeedJSON))
    fields |= {f"optimizer.{name}": field for name, field in leaves(DeepSpeedOptimizer)}
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path, [*fields, *_groups(fields)], n=1, cutoff=0.0)[0]
        return f"{path}: unknown key; did you mean {near}?"
    if problem["type"] == "home":
        return f"{path}: {problem['msg']}"
    if problem["type"] == "missing":
        return f"{path}: missing; expected {accepted(fields[path])}"
    if path not in fields and path not in _groups(fields):  # a fault inside a list is the key's
        path = path.rpartition(".")[0]
    if path not in fields and path not in _groups(fields):
        return f"{'.'.join(words)!r}: {problem['msg']}"
    wanted = "a group of keys" if path in _groups(fields) else accepted(fields[path])
    return f"{path}: expected {wanted}; got {json.dumps(problem['input'])[:80]}"


def _groups(fields: dict[str, Any]) -> set[str]:
    return {name.rpartition(".")[0] for name in fields} - {""}


def _drop_owned(given: dict[str, Any], config: Config) -> None:
    """Take out what says the same as the configuration.

    Raises:
        ValueError: it says another thing; the message has the key to set.
    """
    for path, (same, keys) in _owned(config).items():
        *groups, name = path.split(".")
        inner: Any = given
        for group in groups:
            inner = inner.get(group) or {}
        if name in inner:
            value = inner.pop(name)
            if not same or any(value != ours for ours in same):
                raise ValueError(
                    f"{path}: {json.dumps(value)}; the configuration owns it: set {keys} and leave this out"
                )


def _owned(config: Config) -> dict[str, tuple[list[Any], str]]:
    """Of each key that the configuration owns: the values that say the same, and the key to set.

    No ``train_batch_size`` does: it depends on the number of ranks.
    """
    train, roles = config.train, (config.optimizer.generator, config.optimizer.fake)
    owned: dict[str, tuple[list[Any], str]] = {
        "train_batch_size": ([], "train.micro_batch_size and train.gradient_accumulation"),
        "train_micro_batch_size_per_gpu": ([train.micro_batch_size], "train.micro_batch_size"),
        "gradient_accumulation_steps": ([train.gradient_accumulation], "train.gradient_accumulation"),
        "gradient_clipping": ([config.optimizer.clip], "optimizer.clip"),
        "bf16.enabled": ([config.deepspeed.dtype == "bf16"], "deepspeed.dtype"),
        "fp16.enabled": ([config.deepspeed.dtype == "fp16"], "deepspeed.dtype"),
        "zero_allow_untested_optimizer": ([True], "optimizer.kind"),
        "zero_force_ds_cpu_optimizer": ([False], "optimizer.kind"),
        "zero_optimization.stage": ([config.deepspeed.stage], "deepspeed.stage"),
        "optimizer.params.betas": (
            [[*role.betas] for role in roles],
            "optimizer.generator.betas and optimizer.fake.betas",
        ),
    }
    for name in ("lr", "eps", "weight_decay"):
        same = [getattr(role, name) for role in roles]
        owned[f"optimizer.params.{name}"] = (same, f"optimizer.generator.{name} and optimizer.fake.{name}")
    return owned


def _check_use(given: dict[str, Any], config: Config) -> None:
    """ValueError for what DeepSpeed would pass over in silence, or fail on later."""
    zero, stage = given.get("zero_optimization", {}), config.deepspeed.stage
    for name, stages in (("offload_param", (3,)), ("offload_optimizer", (2, 3))):
        place = zero.get(name, {})
        if place.get("device", "none") == "none":
            continue
        where = f"zero_optimization.{name}"
        if stage not in stages:
            raise ValueError(
                f"{where}: needs deepspeed.stage {' or '.join(map(str, stages))}, which is {stage}; set it"
            )
        if place["device"] == "nvme" and not place.get("nvme_path"):
            raise ValueError(f"{where}.nvme_path: missing; name a folder on the NVMe disk")
        if name == "offload_optimizer" and config.sharing == "shared_all":
            raise ValueError(f"{where}: the small adapters of sharing shared_all stay on the device; leave it out")
    summed, dtype = given.get("data_types", {}).get("grad_accum_dtype"), config.deepspeed.dtype
    if stage == 0 and summed not in (None, dtype):
        raise ValueError(f"data_types.grad_accum_dtype: {summed}; deepspeed.stage 0 sums in {dtype}; leave it out")
    if given.get("optimizer") is None:
        return
    if config.sharing == "shared_all":
        raise ValueError("optimizer: the adapters of sharing shared_all take optimizer.kind; leave it out")
    if config.optimizer.kind != "adamw":
        raise ValueError(f"optimizer: set beside optimizer.kind {config.optimizer.kind}; leave one of them out")
