"""Prompts that are longer than the text encoder reads: named all at once, cut off, or left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from dmdr_fast.data.prompts import Prompt
from dmdr_fast.errors import UserError

NAMED = 50  # places in one message

TooLong = Literal["error", "truncate", "skip"]
Count = Callable[[Sequence[str]], list[int]]  # tokens of each text


def fit(
    prompts: Sequence[Prompt], tokens: Mapping[str, int], limit: int, count: Count, policy: TooLong
) -> tuple[Prompt, ...]:
    """The prompts without, or with shortened, texts of more than ``limit`` tokens; ``tokens`` has those texts."""
    if policy == "skip":
        return tuple(prompt for prompt in prompts if prompt.text not in tokens)
    cut = dict(zip(tokens, truncated(list(tokens), limit, count), strict=True))
    return tuple(replace(prompt, text=cut.get(prompt.text, prompt.text)) for prompt in prompts)


def refusal(key: str, prompts: Sequence[Prompt], tokens: Mapping[str, int], limit: int) -> str:
    """What is said about texts that are too long: every place that has one, with its tokens."""
    places = [f"{prompt.place} has {tokens[prompt.text]}" for prompt in prompts if prompt.text in tokens]
    remedy = ", raise data.max_length, or set data.too_long to truncate or skip" if key.startswith("data.prom") else ""
    more = f" and {len(places) - NAMED} more" if len(places) > NAMED else ""
    named = ", ".join(places[:NAMED])
    return f"{key}: the text encoder takes {limit} tokens, but {named}{more}; shorten what is longer{remedy}"


def truncated(texts: Sequence[str], limit: int, count: Count) -> list[str]:
    """The longest beginnings with at most ``limit`` tokens each, by bisection; of whole words where one fits.

    Raises:
        UserError: not even one character fits.
    """
    low, high = [0] * len(texts), [len(text) for text in texts]  # low fits, high does not
    while open_ := [i for i in range(len(texts)) if high[i] - low[i] > 1]:
        middle = [(low[i] + high[i]) // 2 for i in open_]
        counts = count([texts[i][:m] for i, m in zip(open_, middle, strict=True)])
        for i, m, tokens in zip(open_, middle, counts, strict=True):
            low[i], high[i] = (m, high[i]) if tokens <= limit else (low[i], m)
    if 0 in low:
        raise UserError(f"data.max_length: {limit} tokens hold no prompt at all; raise it")
    cut = [text[:end].rstrip() for text, end in zip(texts, low, strict=True)]
    whole = [t[e - 1].isspace() or t[e].isspace() for t, e in zip(texts, low, strict=True)]
    words = [c if w else c.rsplit(None, 1)[0] for c, w in zip(cut, whole, strict=True)]
    return [w if n <= limit else c for w, c, n in zip(words, cut, count(words), strict=True)]
