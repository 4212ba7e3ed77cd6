"""Thresholds on the signs of collapse: they warn, and end the run where the configuration says so."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field

from dmdr_fast.config import Monitors

# Metric -> (key of its threshold, which side is bad, what it means)
WATCHED = {
    "diversity": ("min_diversity", operator.lt, "samples of a class grow alike"),
    "rl_grad_ratio": ("max_grad_ratio", operator.gt, "the reward outweighs DMD"),
    "fake_loss": ("max_fake_loss", operator.gt, "the fake score does not follow the generator"),
    "score_rounding": ("max_score_rounding", operator.gt, "the DMD gradient is the rounding of the scores"),
    "saturation": ("max_saturation", operator.gt, "samples leave the data's range"),
    "clip_fraction": ("max_clip_fraction", operator.gt, "the policy moves further than its rollouts support"),
}


@dataclass
class CollapseMonitor:
    """Counts, per metric, the log intervals in a row beyond its threshold; a checkpoint keeps ``in_a_row``."""

    thresholds: Monitors
    in_a_row: dict[str, int] = field(default_factory=dict)

    def look(self, metrics: dict[str, float]) -> tuple[list[str], str | None]:
        """(warnings of this interval, the one that has lasted ``patience`` intervals and so means collapse)."""
        warnings, collapsed = [], None
        for name, (key, beyond, meaning) in WATCHED.items():
            bound, value = getattr(self.thresholds, key), metrics.get(name)
            if bound is None or value is None or math.isnan(value):  # no two samples of one class: no diversity
                continue
            if not beyond(value, bound):
                self.in_a_row[name] = 0
                continue
            self.in_a_row[name] = self.in_a_row.get(name, 0) + 1
            warnings.append(f"{name} {value:.4g} is beyond monitors.{key} {bound:g}: {meaning}")
            if self.in_a_row[name] >= self.thresholds.patience:
                collapsed = warnings[-1]
        return warnings, collapsed
