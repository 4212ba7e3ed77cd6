"""Prompts of text-to-image runs."""

from __future__ import annotations

from typing import Literal

from dmdr_fast.config.base import File, Positive, Section
from dmdr_fast.config.base import key as documented


class Data(Section):
    """The prompts, and where their embeddings are kept. Runs on class labels read none of it."""

    prompts: File | None = documented(
        None,
        "Prompts: a .txt (one a line), .jsonl, .json, .csv or .parquet file, a folder of Parquet files, or scenes.",
    )
    key: str = documented("prompt", "Key or column of the prompt, in any file but a .txt.")
    negative_prompt: str = documented("", "The prompt of the unconditional prediction in CFG.")
    max_length: Positive | None = documented(None, "Text tokens that a prompt may have; null: the pipeline's default.")
    too_long: Literal["error", "truncate", "skip"] = documented(
        "error",
        "A prompt of more tokens. error: all are named with their lines; truncate: its first whole words, for rewards "
        "too; skip: it is left out.",
    )
    cache: File | None = documented(None, "Folder of the text embeddings; null: DMDR_FAST_CACHE, or the user's cache.")
