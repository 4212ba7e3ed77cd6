"""The methods by name, as ``rl.method`` has them; reading this loads no torch."""

from __future__ import annotations

from typing import Any

from dmdr_fast.algorithm.rl.advantage_weighted import AdvantageWeightedDMD
from dmdr_fast.algorithm.rl.dpo import DPO
from dmdr_fast.algorithm.rl.grpo import GRPO
from dmdr_fast.algorithm.rl.hybrid import Hybrid
from dmdr_fast.algorithm.rl.method import Method
from dmdr_fast.algorithm.rl.nft import NFT
from dmdr_fast.algorithm.rl.refl import ReFL

METHODS: dict[str, type[Method]] = {
    "refl": ReFL,
    "grpo": GRPO,
    "dpo": DPO,
    "hybrid": Hybrid,
    "nft": NFT,
    "none": Method,
}
# Other forms of a method, with the same options, by its option ``mode``.
FORMS: dict[str, type[Method]] = {"advantage_weighted_dmd": AdvantageWeightedDMD}


def method_of(name: str, **options: Any) -> Method:
    """The method of a name, with its options."""
    return FORMS.get(options.get("mode", ""), METHODS[name])(**options)
