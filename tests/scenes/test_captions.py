"""Captions say all five attributes, and what is held out is the combination alone."""

import itertools
from collections import Counter

import pytest

from dmdr_fast.scenes.captions import SIZES, WORDINGS, Attributes, caption, combinations, is_held_out, parse

EVERY = [Attributes(*values) for values in itertools.product(*map(range, SIZES))]


def test_the_english_of_a_scene():
    scene = Attributes(relation=0, first_digit=7, first_colour=0, second_digit=2, second_colour=1)
    assert caption(scene, 0) == "a red seven to the left of a green two"
    assert caption(scene, 1) == "a green two to the right of a red seven"
    scene = Attributes(relation=1, first_digit=3, first_colour=2, second_digit=9, second_colour=5)
    assert caption(scene, 3) == "below a blue three: a white nine"


def test_every_caption_is_read_back_and_no_two_scenes_share_one():
    captions = {caption(scene, wording): scene for scene in EVERY for wording in range(len(WORDINGS[0]))}
    assert len(captions) == 5 * 7200
    for text, scene in itertools.islice(captions.items(), 0, None, 7):
        assert parse(text) == scene
    assert parse("  Below a BLUE three :  a white\tnine ") == Attributes(1, 3, 2, 9, 5)


@pytest.mark.parametrize("text", ["", "a red seven", "a red seven to the left of a pink two", "a cat above a dog"])
def test_a_text_that_describes_no_scene(text):
    with pytest.raises(ValueError, match=r"describes no scene; write it as in 'a red seven to the left"):
        parse(text)


def test_a_fifth_is_held_out_and_every_four_attributes_are_seen_together():
    unseen, seen = combinations(held_out=True), combinations(held_out=False)
    assert (len(unseen), len(seen)) == (1440, 5760)
    assert sorted(unseen + seen) == EVERY and all(map(is_held_out, unseen))
    for digit in (1, 3):
        rest = Counter(scene[:digit] + scene[digit + 1 :] for scene in seen)
        assert set(rest.values()) == {8} and len(rest) == 720
