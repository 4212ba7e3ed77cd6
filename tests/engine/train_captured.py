"""train.py whose compiled blocks are captured whole and then run as they are: what is compiled, without a compiler."""

import runpy
from pathlib import Path

from dmdr_fast.engine import compute

if __name__ == "__main__":
    compute.BACKEND = "eager"
    runpy.run_path(str(Path(__file__).parents[2] / "dmdr_fast" / "train.py"), run_name="__main__")
