"""One rank of a run: ``dmdr-train``, ``deepspeed``, ``torchrun``, ``srun`` and ``mpirun`` start one or more of it.

Without a launcher (``python dmdr_fast/train.py ...``) it is the same job on one rank.
"""

import os
import sys
from pathlib import Path

# Small CPU operations synchronise threads thousands of times a second. When other processes want the cores, OpenMP's
# spinning turned a 67 ms training step of the digits model into one of 443 ms (2 threads, 2 busy cores).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# A script's own folder comes first on sys.path, where dmdr_fast/cache.py and friends would pass for top-level modules;
# the folder above it belongs there, at the end, so that an uninstalled checkout works too.
_HERE = str(Path(__file__).resolve().parent)
sys.path[:] = [p for p in sys.path if str(Path(p or ".").resolve()) != _HERE] + [str(Path(_HERE).parent)]

from dmdr_fast import placement  # noqa: E402
from dmdr_fast.cli import dump, parse, run_user_command  # noqa: E402
from dmdr_fast.errors import RunEnded  # noqa: E402
from dmdr_fast.preflight import check  # noqa: E402


def main(argv: list[str]) -> int:
    """Parse, build, run. 0 when done or stopped on request, 1 when the run had to end early; mistakes exit with 2."""
    placement.take()
    config, print_only = parse(argv)
    if print_only:
        print(dump(config), end="")
        return 0
    check(config)
    from dmdr_fast.engine.trainer import train  # torch and deepspeed: after the configuration is known good

    try:
        train(config)
    except RunEnded as error:
        # In one write, as ranks speak at once; and not on the line of the first rank's progress.
        sys.stderr.write(("" if os.environ.get("RANK", "0") == "0" else "\n") + f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run_user_command(main))
