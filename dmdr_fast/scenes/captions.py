"""What a scene shows, as five attributes, and the English that says so. Every wording can be read back."""

from __future__ import annotations

import itertools
import re
from typing import NamedTuple

RELATIONS = ("left of", "above")  # of the first object to the second
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = ("red", "green", "blue", "yellow", "magenta", "white")

# {a} is the first object and {b} the second; a row per relation.
WORDINGS = (
    (
        "a {a} to the left of a {b}",
        "a {b} to the right of a {a}",
        "to the left of a {b}: a {a}",
        "to the right of a {a}: a {b}",
        "a {a} and to its right a {b}",
    ),
    (
        "a {a} above a {b}",
        "a {b} below a {a}",
        "above a {b}: a {a}",
        "below a {a}: a {b}",
        "a {a} and below it a {b}",
    ),
)


class Attributes(NamedTuple):
    """Indices into :data:`RELATIONS`, :data:`DIGITS` and :data:`COLOURS`; the first object is the left or upper one."""

    relation: int
    first_digit: int
    first_colour: int
    second_digit: int
    second_colour: int


SIZES = Attributes(len(RELATIONS), len(DIGITS), len(COLOURS), len(DIGITS), len(COLOURS))


def caption(scene: Attributes, wording: int) -> str:
    """The English of a scene; ``wording`` is an index into its relation's row of :data:`WORDINGS`."""
    first = f"{COLOURS[scene.first_colour]} {DIGITS[scene.first_digit]}"
    second = f"{COLOURS[scene.second_colour]} {DIGITS[scene.second_digit]}"
    return WORDINGS[scene.relation][wording].format(a=first, b=second)


def parse(prompt: str) -> Attributes:
    """The scene that a caption describes. Capitals, and spaces around words and colons, do not matter.

    Raises:
        ValueError: a text that is none of :data:`WORDINGS`.
    """
    text = " ".join(prompt.lower().replace(":", " : ").split()).replace(" :", ":")
    for relation, pattern in _PATTERNS:
        if found := pattern.fullmatch(text):
            return Attributes(
                relation,
                DIGITS.index(found["digit_a"]),
                COLOURS.index(found["colour_a"]),
                DIGITS.index(found["digit_b"]),
                COLOURS.index(found["colour_b"]),
            )
    example = caption(Attributes(0, 7, 0, 2, 1), 0)
    raise ValueError(f"prompt {prompt!r} describes no scene; write it as in {example!r}")


def combinations(*, held_out: bool) -> list[Attributes]:
    """The combinations of attributes that training sets hold, 5,760, or the 1,440 that none of them holds."""
    every = map(Attributes, *zip(*itertools.product(*map(range, SIZES)), strict=True))
    return [scene for scene in every if is_held_out(scene) == held_out]


def is_held_out(scene: Attributes) -> bool:
    """Whether a scene is of the fifth that no training set holds.

    relation + first digit + 2 second digit + first colour + 3 second colour = 0 (mod 5). Whatever three attributes and
    one digit are, the other digit is seen in eight of its ten values: only the combination is new.
    """
    weighted = (
        scene.relation + scene.first_digit + 2 * scene.second_digit + scene.first_colour + 3 * scene.second_colour
    )
    return weighted % 5 == 0


def _pattern(wording: str) -> re.Pattern[str]:
    def named(name: str) -> str:
        return f"(?P<colour_{name}>{'|'.join(COLOURS)}) (?P<digit_{name}>{'|'.join(DIGITS)})"

    return re.compile(wording.format(a=named("a"), b=named("b")))


_PATTERNS = [(relation, _pattern(wording)) for relation, row in enumerate(WORDINGS) for wording in row]
