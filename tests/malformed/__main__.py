"""The tally: ``python -m tests.malformed [--kind KIND ...] [--count N]``."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

from . import KINDS, cases, verdict


def main() -> int:
    """Print a line per kind, and one per fault. 0 where there is none."""
    parser = argparse.ArgumentParser(prog="python -m tests.malformed", description=__doc__)
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument(
        "--count",
        type=int,
        default=200,
        help="Drawn inputs per kind, beside those by hand (200); a quarter of it where an input is a run.",
    )
    parser.add_argument("--all", action="store_true", help="Print what became of every input.")
    options = parser.parse_args()
    print(f"{'kind':<16}{'inputs':>8}{'refused':>9}{'accepted':>10}{'faults':>8}")
    faults = []
    for kind in options.kind:
        tally: Counter[str] = Counter()
        for case in cases(kind, options.count):
            with tempfile.TemporaryDirectory() as folder:
                outcome, said = verdict(case, Path(folder))
            tally[outcome] += 1
            if outcome == "fault":
                faults.append(f"{kind}: {case.name}: {said}")
            if options.all:
                print(f"  {outcome}: {case.name}: {said}")
        print(
            f"{kind:<16}{tally.total():>8}{tally['refused']:>9}{tally['accepted']:>10}{tally['fault']:>8}", flush=True
        )
    print("\n".join(faults))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
