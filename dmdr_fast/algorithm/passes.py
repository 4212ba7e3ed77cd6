"""How often one update runs each network, and how often that has to gather partitioned weights (ZeRO-3)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dmdr_fast.algorithm.rollout import expected_forwards

Passes = Mapping[str, Mapping[str, float]]  # phase of the update -> role -> passes over the role's network


@dataclass(frozen=True)
class Schedule:
    """What decides how often networks run: N, R, micro-steps, and what RL adds.

    ``rollout_reuse`` fake updates share a rollout. ``stop_ranks`` ranks draw stop steps of their own. ``epochs`` steps
    of the generator have a DMD gradient each. ``policy_steps`` are the graded generator forwards of a method's own
    losses, ``reference_steps`` the forwards of the reference in them, ``plain_steps`` others without grad,
    ``kl_on_x0`` 1 where there is one more for a KL on x0, ``one_network`` whether all roles share a base. The reference
    is a network as large as the generator, or the generator without its LoRA.
    """

    steps: int
    fake_updates: int
    accumulation: int = 1
    rollout_reuse: int = 1
    stop_ranks: int = 1
    same_step: bool = False
    keep_gathered: bool = False
    epochs: int = 1
    policy_steps: int = 0
    reference_steps: int = 0
    plain_steps: int = 0
    kl_on_x0: int = 0
    one_network: bool = False

    @property
    def rollout_steps(self) -> float:
        """Forwards of one rollout in expectation: of the longest where ranks draw their own stop steps, as all wait."""
        return expected_forwards(self.steps, self.stop_ranks)

    @property
    def rollouts(self) -> int:
        """Rollouts of one update and micro-batch."""
        return math.ceil(self.fake_updates / self.rollout_reuse)

    @property
    def redrawn(self) -> int:
        """Forwards in the generator's update that draw x0 anew: its own rollout has it, until G has moved."""
        return self.epochs if self.same_step else self.epochs - 1

    def passes(self) -> Passes:
        """Passes of one update; a graded one is two, forward and backward."""
        policy = {
            "policy rollout": {"generator": 1.0 if self.keep_gathered else float(self.steps)},
            "policy update": {"generator": 2.0 * self.policy_steps + self.reference_steps + self.plain_steps},
        }
        once = {
            "rollout": {"generator": self.rollouts * (1.0 if self.keep_gathered else self.rollout_steps)},
            "fake update": {"fake": 2.0 * self.fake_updates},
            "score pass": {"fake": float(self.epochs), "teacher": float(self.epochs)},
            "generator update": {"generator": self.epochs * (2.0 + self.kl_on_x0) + self.redrawn},
        } | (policy if self.policy_steps else {})
        return {p: {role: n * self.accumulation for role, n in roles.items()} for p, roles in once.items()}

    def fresh_passes(self) -> Passes:
        """Those of :meth:`passes` that find no weights left from the pass before, where a network is small enough.

        A network's weights are released at the end of a backward pass: all rollouts of the generator but the first
        find them, and so does the graded pass that follows. A teacher by itself has no backward pass: its weights are
        released after every pass.
        """
        micro, every = self.epochs * self.accumulation, self.fake_updates * self.accumulation
        rolled = self.rollouts * self.accumulation
        shared = self.one_network  # between any two backward passes, of either role, its weights are gathered once
        once = {
            "rollout": {"generator": rolled if shared else 1.0},
            "fake update": {"fake": every - rolled if shared else every - 1.0},
            "score pass": {"fake": micro if shared else 1.0, "teacher": float(micro)},
            "generator update": {"generator": 0.0 if shared else micro - 1.0},
        }
        if self.policy_steps:
            graded = self.policy_steps * self.accumulation
            once |= {"policy rollout": {"generator": 1.0}, "policy update": {"generator": graded - 1.0}}
        return once


def gathers(elements: float, bucket: int, units: int) -> int:
    """All-gathers of one pass over ``elements`` in ``units`` modules, of which ``bucket`` elements are prefetched."""
    return min(units, math.ceil(elements / max(bucket, 1)))
