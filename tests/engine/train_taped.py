"""train.py with ``compute.cuda_graphs`` on a CPU: each graph is a tape of its operations."""

import runpy
from pathlib import Path

from dmdr_fast.engine import graphs
from tests.engine import tape

if __name__ == "__main__":
    graphs.DEVICE, graphs.capture, graphs.new_pool = "cpu", tape.capture, lambda: None
    runpy.run_path(str(Path(__file__).parents[2] / "dmdr_fast" / "train.py"), run_name="__main__")
