"""Checks that need neither torch nor weights, made before anything is loaded."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from dmdr_fast.config import Config
from dmdr_fast.deepspeed_json import read_deepspeed_json
from dmdr_fast.errors import UserError

HUB_PREFIX = "hf://"


def check(config: Config) -> None:
    """Look at what the configuration names on disk.

    Raises:
        UserError: run_dir cannot be written, the teacher's weights or pipeline are missing, a file of prompts or the
            DeepSpeed JSON is unreadable, a package that the configuration asks for is not installed, or a reward is
            unknown or not of the kind that the RL method needs.
    """
    _check_packages(config)
    _check_run_dir(config.run_dir)
    _check_weights(config.teacher.weights)
    _check_pipeline(config.teacher.pipeline)
    _check_prompts(config)
    read_deepspeed_json(config)
    _check_rewards(config)
    _check_groups(config)


def _check_groups(config: Config) -> None:
    """Whether the global batch, over the ranks that the launcher has started, is whole groups."""
    name = config.rl.method
    group = {"grpo": config.rl.grpo.group_size, "dpo": config.rl.dpo.group_size}.get(name, 1)
    batch = config.train.micro_batch_size * config.train.gradient_accumulation * int(os.environ.get("WORLD_SIZE", "1"))
    if batch % group:
        raise UserError(
            f"rl.{name}.group_size: {group} does not divide the global batch of {batch} "
            "(train.micro_batch_size x train.gradient_accumulation x ranks); change one of them"
        )


def _check_rewards(config: Config) -> None:
    """Whether every reward exists, and ReFL's are differentiable; a user's file is read, no weights are loaded."""
    from dmdr_fast.rewards.registry import is_differentiable

    for where, terms in (("reward.terms", config.reward.terms), ("reward.held_out", config.reward.held_out)):
        for term in terms:
            try:
                graded = is_differentiable(term.kind)
            except (ValueError, FileNotFoundError) as error:
                raise UserError(str(error)) from None
            if config.rl.method == "refl" and where == "reward.terms" and not graded:
                raise UserError(
                    f"reward.terms: {term.name or term.kind} gives scores without a gradient, which rl.method refl "
                    "needs; set rl.method to grpo or dpo, or take a differentiable reward"
                )


# Packages that a choice needs: any one of them will do.
PACKAGES = {
    "optimizer.kind": {"adamw_8bit": ("bitsandbytes", "torchao"), "paged_adamw_8bit": ("bitsandbytes",)},
    "memory.frozen": {"float8": ("torchao",)},
    "memory.attention": {"flash_attn": ("flash_attn",), "flash_attn_3": ("flash_attn_interface",)},
}


def _check_packages(config: Config) -> None:
    for name, choices in PACKAGES.items():
        section, leaf = name.split(".")
        chosen = getattr(getattr(config, section), leaf)
        packages = choices.get(chosen, ())
        if packages and not any(importlib.util.find_spec(package) for package in packages):
            raise UserError(
                f"{name}: {chosen} needs {' or '.join(packages)}, which is not installed; "
                f"install it, or choose another {name}"
            )


def _check_run_dir(path: Path) -> None:
    probe = path / f".writable.{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(f"run_dir: {path} cannot be written ({error.strerror}); name another folder") from None


def _check_weights(weights: str | None) -> None:
    if weights is None:
        return
    if weights.startswith(HUB_PREFIX):
        if weights.count("/") < HUB_PREFIX.count("/") + 2:
            raise UserError(f"teacher.weights: {weights} names no file; write {HUB_PREFIX}ORG/REPO/FILE")
    elif not Path(weights).expanduser().is_file():
        raise UserError(
            f"teacher.weights: no such file: {weights}; give a .safetensors or .pt path, or {HUB_PREFIX}ORG/REPO/FILE"
        )


def _check_pipeline(pipeline: str | None) -> None:
    """A folder must be there; a hub id is left to the hub."""
    if pipeline is None:
        return
    folder = Path(pipeline).expanduser()
    if not folder.is_dir() and (pipeline.startswith(("/", ".", "~")) or pipeline.count("/") != 1):
        raise UserError(
            f"teacher.pipeline: no such folder: {pipeline}; give a diffusers pipeline folder or a hub id ORG/NAME"
        )


def _check_prompts(config: Config) -> None:
    if config.model.family == "sit":
        return
    from dmdr_fast.data.prompts import load_prompts

    for name, path in (("data.prompts", config.data.prompts), ("eval.prompts", config.eval.prompts)):
        if path is not None:
            try:
                load_prompts(path, config.data.key)
            except UserError as error:
                raise UserError(f"{name}: {error}") from None
