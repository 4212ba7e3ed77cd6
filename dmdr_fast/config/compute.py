"""How the networks compute: what runs a transformer block."""

from __future__ import annotations

from typing import Literal

from dmdr_fast.config.base import Section, key


class Compute(Section):
    """The compute path of every network of a run."""

    blocks: Literal["auto", "eager", "fused", "compiled"] = key(
        "auto",
        "The repeated blocks of every network. eager: as the model has them; fused: with the fused ops; compiled: each "
        "kind of block compiled by torch.compile; auto: compiled on CUDA, on a CPU what was measured faster.",
    )
    cuda_graphs: bool = key(
        False,
        "Replay forwards without grad (rollouts, score pass) as CUDA graphs: one launch for a forward. On CUDA at "
        "deepspeed.stage 0 and 2; the memory of a forward stays taken.",
    )
