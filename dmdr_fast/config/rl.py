"""Reinforcement learning: the reward and how it is used."""

from __future__ import annotations

from typing import Literal

from dmdr_fast.config.base import NonNegative, Positive, Section, key


class Reward(Section):
    """The reward that the generator maximises after the cold start, by its gradient (ReFL)."""

    kind: Literal["none", "digits", "classifier"] = key("none", "digits: embedded; classifier: an image classifier.")
    path: str | None = key(None, "Folder or hub id of the classifier (transformers).")
    weight: NonNegative = key(0.05, "Weight of the reward's gradient beside the DMD gradient; 0: no reward.")
    chunk: Positive = key(64, "Samples decoded and scored at a time; less is less memory.")
