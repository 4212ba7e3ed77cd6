"""The host's share of a call in the table, from the driver that runs nothing."""

import shutil
from dataclasses import replace

import pytest

from benchmarks import host

from .test_records import ROW


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc, to build the counting driver")
def test_each_row_gets_its_ops_own():
    pytest.importorskip("triton")
    both = replace(ROW, op="gelu_mul (tanh)", what="forward + backward")
    forward, backward, plain = host.added([ROW, both, replace(ROW, op="grpo_loss")])
    assert replace(forward, host=None) == ROW and plain.host is None
    assert 3 < forward.host < backward.host < 200
