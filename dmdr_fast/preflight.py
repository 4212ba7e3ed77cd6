"""Checks that need no weights, made before anything is loaded; those that import torch come last."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path

from dmdr_fast.algorithm.rl.methods import METHODS
from dmdr_fast.config import Config, RewardTerm
from dmdr_fast.deepspeed_json import read_deepspeed_json
from dmdr_fast.errors import UserError
from dmdr_fast.hub import check_hub, is_hub_id

HUB_PREFIX = "hf://"
DATA_SETS = ("digits", "scenes")  # that eval.data and eval.features know by name


def check(config: Config) -> None:
    """Look at what the configuration names on disk.

    Raises:
        UserError: run_dir cannot be written, a folder is missing or the hub does not have it, a file of prompts or the
            DeepSpeed JSON is unreadable, a package that the configuration asks for is not installed, or a reward is
            unknown, takes other arguments, or is not of the kind that the RL method needs.
    """
    _check_packages(config)
    check_writable("run_dir", config.run_dir)
    _check_weights("teacher.weights", config.teacher.weights)
    if config.student.model is not None:
        _check_weights("student.model.weights", config.student.model.weights)
    _check_prompts(config)
    read_deepspeed_json(config)
    _check_groups(config)
    _check_places(config, _check_rewards(config))


def _check_groups(config: Config) -> None:
    """Whether the global batch, over the ranks that the launcher has started, is whole groups."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    batches = {phase.train.batch * ranks for phase in config.each_phase}
    methods = (config.rl.method, *config.rl.chosen.parts) if config.has_rl else ()
    for name, batch in product(methods, sorted(batches)):
        group = config.rl.options(name).compared
        if group is not None and batch % group:
            raise UserError(
                f"rl.{name}.group_size: {group} does not divide the global batch of {batch} "
                "(train.micro_batch_size x train.gradient_accumulation x ranks); change one of them"
            )


def _check_rewards(config: Config) -> dict[str, str]:
    """Whether every reward exists, takes what it is given, and is differentiable where the method needs its gradient.

    A user's file is read, no weights are loaded. Returns what the built-in ones will load, by key.
    """
    from dmdr_fast.rewards.registry import is_differentiable

    names: dict[str, str] = {}
    for where, terms in (("reward.terms", config.reward.terms), ("reward.held_out", config.reward.held_out)):
        names |= check_terms(where, terms, config.num_classes)
        for term in terms:
            if where == "reward.terms" and not is_differentiable(term.kind):
                _check_gradient(config, term.called)
    return names


def check_terms(where: str, terms: Iterable[RewardTerm], num_classes: int | None) -> dict[str, str]:
    """Whether every reward exists, takes what it is given and reads what there is: ``num_classes`` labels, or prompts.

    A user's file is read, no weights are loaded. Returns what the built-in ones will load, by key: ``where``, the word
    that an error names the rewards by, in front.

    Raises:
        UserError: one does not.
    """
    from dmdr_fast.rewards.registry import KINDS, READS, prepare_reward, weights_of_reward

    names: dict[str, str] = {}
    lacking, there = ("labels", "prompts") if num_classes is None else ("prompts", "labels")
    for term in terms:
        try:
            made = prepare_reward(term.kind, term.path, term.name, term.options, num_classes=num_classes)
        except (ValueError, FileNotFoundError) as error:
            raise UserError(str(error).replace("reward.terms", where)) from None
        if term.kind in READS[lacking]:
            raise UserError(
                f"{where}: {term.called} reads {lacking}, and a model of {there} has none; choose another reward"
            )
        if term.kind in KINDS:
            found = weights_of_reward(*made)
            names |= {f"{where}: {term.called}: {name}": value for name, value in found.items()}
    return names


def _check_gradient(config: Config, reward: str) -> None:
    """Whether no method needs the gradient that a reward does not have."""
    rl, others = config.rl, " or ".join(n for n, m in METHODS.items() if m.uses_reward and not m.needs_gradient)
    after = rl.method if config.has_rl else "none"
    for key, name, remedy in (("rl.tilt.method", rl.tilt.method, "none"), ("rl.method", after, others)):
        if rl.options(name).needs_gradient:
            raise UserError(
                f"reward.terms: {reward} gives scores without a gradient, which {key} {name} needs; set {key} to "
                f"{remedy}, or take a differentiable reward"
            )


def _check_places(config: Config, rewards: dict[str, str]) -> None:
    """Whether every folder is there, and the hub has what is asked of it."""
    names: dict[str, tuple[str, str | None]] = {key: (name, None) for key, name in rewards.items()}
    if config.decoder.kind == "vae" and config.decoder.path is not None:
        names["decoder.path"] = (config.decoder.path, None)
    if config.eval.samples and config.eval.data is not None:
        if config.eval.data not in DATA_SETS and not _is_folder(config.eval.data):
            known = " or ".join(DATA_SETS)
            raise UserError(f"eval.data: no such folder: {config.eval.data}; give a folder of images, or {known}")
        if config.eval.features not in (None, *DATA_SETS):
            names["eval.features"] = (config.eval.features, None)
    teacher, student = config.teacher, config.student
    for key, part in (("teacher", teacher), ("student", student)):
        if part.pipeline is not None:
            names[f"{key}.pipeline"] = (part.pipeline, part.revision)
    files = {"teacher.weights": teacher.weights}
    files["student.model.weights"] = None if student.model is None else student.model.weights
    for key, file in files.items():
        if file is not None and file.startswith(HUB_PREFIX):
            names[key] = ("/".join(file.removeprefix(HUB_PREFIX).split("/")[:2]), None)
    check_names(names)


def check_names(names: Mapping[str, tuple[str, str | None]]) -> None:
    """Whether each (folder or hub id, revision), by the key that names it, is there, or the hub has it.

    Raises:
        UserError: one is not.
    """
    asked = {}
    for key, (name, revision) in names.items():
        try:
            if is_hub_id(name):
                asked[key] = (name, revision)
        except FileNotFoundError as error:
            raise UserError(f"{key}: {error}; give a folder, or a hub id ORG/NAME") from None
    if asked:
        check_hub(asked)


def _is_folder(path: str) -> bool:
    try:
        return Path(path).expanduser().is_dir()
    except OSError:  # a name that is too long
        return False


def _is_file(path: str) -> bool:
    try:
        return Path(path).expanduser().is_file()
    except OSError:
        return False


# Packages that a choice needs: any one of them will do.
PACKAGES: dict[str, dict[str, tuple[str, ...]]] = {
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
    if config.log.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise UserError("log.wandb: wandb is not installed; pip install wandb, or leave log.wandb out")


def check_writable(key: str, path: Path) -> None:
    """Whether ``path``, the folder that ``key`` names, is there or can be made, and can be written in.

    Raises:
        UserError: it cannot.
    """
    probe = path / f".writable.{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{key}: {path} cannot be written ({reason}); name another folder") from None


def _check_weights(key: str, weights: str | None) -> None:
    if weights is None:
        return
    if weights.startswith(HUB_PREFIX):
        if weights.count("/") < HUB_PREFIX.count("/") + 2:
            raise UserError(f"{key}: {weights} names no file; write {HUB_PREFIX}ORG/REPO/FILE")
    elif not _is_file(weights):
        raise UserError(
            f"{key}: no such file: {weights}; give a .safetensors or .pt path, or {HUB_PREFIX}ORG/REPO/FILE"
        )


def _check_prompts(config: Config) -> None:
    if config.model.family == "sit":
        return
    from dmdr_fast.data.prompts import load_prompts

    terms = (*config.reward.terms, *config.reward.held_out)
    shown = "data.prompts" if config.eval.prompts is None else "eval.prompts"
    for name, path in (("data.prompts", config.data.prompts), ("eval.prompts", config.eval.prompts)):
        if path is not None:
            try:
                prompts = load_prompts(path, config.data.key)
            except UserError as error:
                raise UserError(f"{name}: {error}") from None
            features = config.eval.features if name == shown else None
            check_captions(f"{name}: {path}", [prompt.text for prompt in prompts], terms, features)


def check_captions(
    where: str, prompts: Iterable[str], terms: Iterable[RewardTerm], features: str | None = None
) -> None:
    """Whether what reads scenes, among ``terms`` and as the evaluation's ``features``, can read the prompts.

    Raises:
        UserError: one cannot, with ``where`` in front.
    """
    from dmdr_fast.scenes.captions import parse

    readers = [f"the reward {term.kind} reads" for term in terms if term.kind.startswith("scenes")]
    readers += ["eval.features scenes read"] if features == "scenes" else []
    try:
        for prompt in prompts if readers else ():
            parse(prompt)
    except ValueError as error:
        raise UserError(f"{where}: {error}, which {readers[0]}") from None
