"""Prompts longer than the encoder takes: all named with their places, cut at words, or left out."""

import pytest

from dmdr_fast.data.prompts import Prompt
from dmdr_fast.data.too_long import fit, refusal, truncated
from dmdr_fast.errors import UserError

LONG = "a red cat on a green hill"
PROMPTS = [Prompt("sea", "line 1"), Prompt(LONG, "line 3"), Prompt("x" * 40, "line 4"), Prompt(LONG, "line 9")]
TOKENS = {LONG: 27, "x" * 40: 42}


def letters(texts):
    """A token a letter, and two around them."""
    return [len(text) + 2 for text in texts]


def test_all_are_named_with_their_lines():
    said = refusal("data.prompts", PROMPTS, TOKENS, 12)
    assert said.startswith(
        "data.prompts: the text encoder takes 12 tokens, but line 3 has 27, line 4 has 42, line 9 has 27; shorten"
    )
    assert "data.max_length" in said and "data.too_long to truncate or skip" in said
    assert "data.too_long" not in refusal("--prompts", PROMPTS, TOKENS, 12)
    many = [Prompt(LONG, f"line {n}") for n in range(1000)]
    assert "line 49 has 27 and 950 more;" in refusal("data.prompts", many, TOKENS, 12)


def test_they_are_cut_at_words_or_left_out():
    cut = fit(PROMPTS, TOKENS, 12, letters, "truncate")
    assert [p.text for p in cut] == ["sea", "a red cat", "x" * 10, "a red cat"]
    assert [p.place for p in cut] == [p.place for p in PROMPTS]
    assert fit(PROMPTS, TOKENS, 12, letters, "skip") == (PROMPTS[0],)


@pytest.mark.parametrize("limit", range(3, 27))
def test_the_longest_beginning_that_fits(limit):
    (cut,) = truncated([LONG], limit, letters)
    assert LONG.startswith(cut) and len(cut) + 2 <= limit
    words = LONG.split()
    fitting = [" ".join(words[:n]) for n in range(1, len(words) + 1) if len(" ".join(words[:n])) + 2 <= limit]
    assert cut == (fitting[-1] if fitting else LONG[: limit - 2])


def test_a_limit_that_holds_nothing():
    with pytest.raises(UserError, match=r"data\.max_length: 2 tokens hold no prompt"):
        truncated([LONG], 2, letters)
