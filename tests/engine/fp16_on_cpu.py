"""train.py where fp16 may train on a CPU, whose products are slow but right, and where scores overflow.

DeepSpeed asks for fast fp16 products and refuses otherwise; its engines and optimizers are as they are. At the updates
that OVERFLOW_STEPS lists, what the score pass reads is 1e6 times too large.
"""

import os
import sys

from deepspeed.accelerator import get_accelerator

from dmdr_fast.cli import run_user_command
from dmdr_fast.engine import trainer
from dmdr_fast.engine.score import ScoreRole
from dmdr_fast.train import main

PLANTED = [int(step) for step in os.environ.get("OVERFLOW_STEPS", "").split(",") if step]
call, update, begun = ScoreRole.__call__, trainer.dmdr_update, []


def overflowing(self, x_t, t, condition):
    return call(self, x_t * 1e6 if begun and begun[-1] in PLANTED else x_t, t, condition)


def counted(now):
    begun.append(now.step)
    return update(now)


type(get_accelerator()).is_fp16_supported = lambda self: True
ScoreRole.__call__, trainer.dmdr_update = overflowing, counted
sys.exit(run_user_command(main))
