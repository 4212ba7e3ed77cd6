"""What samples are made of: class labels, or prompts with cached text embeddings, numbered from 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dmdr_fast.algorithm.recipe import Batch, Data
from dmdr_fast.algorithm.streams import Shard, Streams
from dmdr_fast.config import Config
from dmdr_fast.data.prompts import Prompt, load_prompts
from dmdr_fast.data.text_cache import TextCache
from dmdr_fast.data.too_long import TooLong, fit, refusal
from dmdr_fast.engine.engines import DTYPES
from dmdr_fast.engine.model import Model
from dmdr_fast.engine.pipeline_model import PipelineModel
from dmdr_fast.engine.runtime import Runtime
from dmdr_fast.errors import UserError
from dmdr_fast.models.families import Condition, Family, TextEncoder, to_device
from dmdr_fast.preflight import check_captions


class Conditions(Protocol):
    """``count`` conditions; ``kind`` names their random stream."""

    @property
    def kind(self) -> str: ...
    @property
    def count(self) -> int: ...

    def batch(self, rows: np.ndarray) -> Batch:
        """The conditions numbered ``rows`` int64 [B], with the null condition beside them."""
        ...

    def known(self, rows: np.ndarray) -> tuple[Tensor, dict[str, Any]]:
        """(``Batch.classes``, ``Batch.reward_inputs``) alone, however many rows."""
        ...

    def captions(self, rows: np.ndarray) -> list[str]:
        """What a person reads beside a sample of each row."""
        ...


def drawn(conditions: Conditions, streams: Streams) -> Data:
    """Uniform draws for update ``index``: the shard's part of the global draw, each one ``group`` times."""

    def draw(index: tuple[int, ...], shard: Shard, group: int = 1) -> Batch:
        rows = streams.rng(conditions.kind, *index).integers(conditions.count, size=-(-shard.total // group))
        return conditions.batch(rows.repeat(group)[shard.start : shard.stop])

    return draw


@dataclass(frozen=True)
class Labels:
    """The classes of a class-conditional network; its class number ``count`` is the null class."""

    count: int
    device: torch.device

    kind = "labels"

    def batch(self, rows: np.ndarray) -> Batch:
        labels, known = self.known(rows)
        return Batch(labels, torch.full_like(labels, self.count), labels, known)

    def known(self, rows: np.ndarray) -> tuple[Tensor, dict[str, Any]]:
        labels = torch.from_numpy(rows.astype(np.int64)).to(self.device, non_blocking=True)
        return labels, {"labels": labels}

    def captions(self, rows: np.ndarray) -> list[str]:
        return [f"class {row}" for row in rows]


@dataclass(frozen=True)
class Prompts:
    """Prompts whose embeddings are in the cache, padded to ``length`` tokens."""

    prompts: tuple[str, ...]
    cache: TextCache
    family: Family
    negative: Condition  # batch 1, on the device
    length: int
    device: torch.device

    kind = "prompts"

    @property
    def count(self) -> int:
        return len(self.prompts)

    def batch(self, rows: np.ndarray) -> Batch:
        classes, known = self.known(rows)
        entries = [self.cache.get(prompt) for prompt in known["prompts"]]
        condition = to_device(self.family.condition(entries, self.length), self.device)
        return Batch(condition, self.family.null_condition(condition, self.negative), classes, known)

    def known(self, rows: np.ndarray) -> tuple[Tensor, dict[str, Any]]:
        numbers = torch.from_numpy(rows.astype(np.int64)).to(self.device, non_blocking=True)
        return numbers, {"prompts": self.captions(rows)}

    def captions(self, rows: np.ndarray) -> list[str]:
        return [self.prompts[row] for row in rows]


def build_conditions(config: Config, model: Model, ranks: Runtime) -> tuple[Conditions, Conditions]:
    """What is trained on, and what the evaluation shows: labels, or prompts whose embeddings are computed here.

    Ranks share the computing of what the cache lacks; the encoders are loaded only where something is, and released.
    All ranks must call.

    Raises:
        UserError: a file of prompts that cannot be read, a prompt too long, a cache that is another encoder's.
    """
    if not isinstance(model, PipelineModel):
        assert model.num_classes is not None  # which reads no prompts
        labels = Labels(model.num_classes, ranks.device)
        return labels, labels
    data = config.data
    assert data.prompts is not None  # every family but SiT has some
    prompts = load_prompts(data.prompts, data.key)
    named = {"data.prompts": prompts}
    if config.eval.prompts is not None:
        named["eval.prompts"] = load_prompts(config.eval.prompts, data.key)
    found = cached_prompts(config, model, ranks, named, too_long=data.too_long)
    if data.too_long == "truncate":
        _check_cut(config, found)
    return found["data.prompts"], found.get("eval.prompts", found["data.prompts"])


def _check_cut(config: Config, found: Mapping[str, Prompts]) -> None:
    """Whether what reads scenes can read prompts that are cut off; whole ones it could: ``preflight``.

    Raises:
        UserError: it cannot.
    """
    terms, shown = (*config.reward.terms, *config.reward.held_out), list(found)[-1]
    for key, part in found.items():
        where = f"data.too_long: {key} as truncate leaves them, raise data.max_length or set it to skip"
        check_captions(where, part.prompts, terms, config.eval.features if key == shown else None)


def cached_prompts(
    config: Config,
    model: PipelineModel,
    ranks: Runtime,
    named: Mapping[str, Sequence[Prompt]],
    *,
    too_long: TooLong = "error",
) -> dict[str, Prompts]:
    """Each list of prompts with its embeddings, computed first where the cache lacks them. All ranks must call.

    ``named``: by the word that an error names it by; ``too_long``: what becomes of a prompt that is too long.

    Raises:
        UserError: a prompt too long, or a cache that is another encoder's.
    """
    negative, family = config.data.negative_prompt, model.family
    # Text encoders overflow in fp16; the networks cast the embeddings.
    dtype = DTYPES["bf16" if config.deepspeed.dtype == "fp16" else config.deepspeed.dtype]
    encoder = TextEncoder(family, dtype=dtype, device=ranks.device)
    cache = TextCache(encoder, config.data.cache)
    _fitted("data.negative_prompt", [Prompt(negative, "it")], cache, ranks, "error", negative=True)
    texts = {key: _fitted(key, prompts, cache, ranks, too_long) for key, prompts in named.items()}
    everything = [text for part in texts.values() for text in part]
    _fill(cache, everything, negative, ranks)
    length = cache.longest(everything, [negative])
    null = to_device(family.condition([cache.get(negative, negative=True)], length), ranks.device)
    return {key: Prompts(part, cache, family, null, length, ranks.device) for key, part in texts.items()}


def _fitted(
    key: str, prompts: Sequence[Prompt], cache: TextCache, ranks: Runtime, policy: TooLong, *, negative: bool = False
) -> tuple[str, ...]:
    """The texts, none of them longer than the encoder takes. What the cache has is not: nothing longer gets there."""
    encoder, limit = cache.encoder, cache.encoder.limit
    tokens: dict[str, int] = {}
    lacking = cache.lacks((prompt.text for prompt in prompts), negative=negative)[ranks.rank :: ranks.world_size]
    fault = None
    try:
        counts = encoder.count(lacking) if lacking else []
        tokens = {text: n for text, n in zip(lacking, counts, strict=True) if n > limit}
    except (ValueError, FileNotFoundError) as error:
        fault = f"text embeddings: {error}"
    found = ranks.gather((tokens, fault))
    if faults := [f for _, f in found if f]:
        raise UserError(faults[0])
    tokens = {text: n for part, _ in found for text, n in part.items()}
    if tokens and policy == "error":
        raise UserError(refusal(key, prompts, tokens, limit))
    fitting = fit(prompts, tokens, limit, encoder.count, policy) if tokens else prompts
    if not fitting:
        raise UserError(
            f"{key}: every prompt has more than the {limit} tokens that the text encoder takes; shorten them"
        )
    if tokens:
        many = sum(prompt.text in tokens for prompt in prompts)
        done = {"truncate": "cut off", "skip": "left out"}[policy]
        ranks.say(f"{key}: {many} of {len(prompts)} prompts have more than {limit} tokens and are {done}")
    return tuple(prompt.text for prompt in fitting)


def _fill(cache: TextCache, prompts: Sequence[str], negative: str, ranks: Runtime) -> None:
    """Fill the cache together; an error of one rank is every rank's."""
    computed, fault = 0, None
    try:
        computed = cache.fill(prompts, [negative], part=ranks.rank, parts=ranks.world_size)
    except UserError as error:
        fault = str(error)
    faults = [f for f in ranks.gather(fault) if f]
    if faults:
        raise UserError(faults[0])
    cache.fill(prompts, [negative])  # what other ranks have computed, too
    total = sum(ranks.gather(computed))
    if total:
        ranks.say(f"text embeddings: {total} computed into {cache.directory}")
