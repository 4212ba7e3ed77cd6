"""A sample of the tally in the test suite: cases by hand, a few drawn ones."""

from itertools import islice
from pathlib import Path

import pytest

from tests.tiers import sampled

from . import KINDS, cases, verdict


@pytest.mark.parametrize("every", sampled([8, 1]))
@pytest.mark.parametrize("kind", KINDS)
def test_every_input_is_refused_in_one_line_or_gives_what_it_should(tmp_path, kind, every):
    faults = []
    for i, case in enumerate(islice(cases(kind, 10), 0, None, every)):
        folder = Path(tmp_path / str(i))
        folder.mkdir()
        outcome, said = verdict(case, folder)
        if outcome == "fault":
            faults.append(f"{case.name}: {said}")
    assert not faults
