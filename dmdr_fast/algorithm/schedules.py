"""The schedules of DMDR: DynaDG, DynaRS, the laws of the renoise time and the student's timestep grid.

All are functions of plain numbers; t = 1 is pure noise, t = 0 is data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np


def cosine_decay(step: int, dynamic_step: int) -> float:
    """c(step) = (1 + cos(pi * step / dynamic_step)) / 2 until ``dynamic_step``, 0 afterwards; 0 when it is 0."""
    if step >= dynamic_step:
        return 0.0
    return 0.5 * (1.0 + math.cos(math.pi * step / dynamic_step))


def real_score_lora_scale(step: int, *, initial: float, dynamic_step: int) -> float:
    """DynaDG: the scale s_r(step) = s_r0 * c(step) of the fake score's LoRA in the real score.

    Source: DMDR (arXiv 2511.13649), dynamic distribution guidance, as in its SiT reference (s_r0 = 0.75).
    """
    return initial * cosine_decay(step, dynamic_step)


def renoise_beta(step: int, *, alpha0: float, beta0: float, dynamic_step: int) -> tuple[float, float]:
    """DynaRS: the parameters of t ~ Beta(alpha, beta), alpha = 1 + (alpha0 - 1) c(step), likewise beta.

    High noise first (4, 1.5 in the paper's recipe), uniform from ``dynamic_step`` on.
    Source: DMDR (arXiv 2511.13649), dynamic renoise sampling.
    """
    c = cosine_decay(step, dynamic_step)
    return 1.0 + (alpha0 - 1.0) * c, 1.0 + (beta0 - 1.0) * c


def shift_time(t, shift: float):
    """Timestep shift t' = shift * t / (1 + (shift - 1) * t); keeps 0 and 1 (SD3, arXiv 2403.03206, eq. 23)."""
    return shift * t / (1.0 + (shift - 1.0) * t)


def unshift_time(t, shift: float):
    """The inverse of :func:`shift_time`: t / (shift - (shift - 1) * t)."""
    return t / (shift - (shift - 1.0) * t)


def timestep_grid(steps: int, *, shift: float = 1.0, times: tuple[float, ...] | None = None) -> tuple[float, ...]:
    """The student's grid 1 = t_0 > t_1 > ... > t_N = 0: shift_time(1 - i/N), or ``times`` and 0.

    A first time below 1 is where pure noise enters, as it is: x_{t_0} = noise.
    """
    if times is not None:
        return (*times, 0.0)
    return tuple(shift_time(1.0 - i / steps, shift) for i in range(steps + 1))


@dataclass(frozen=True)
class RenoiseLaw:
    """The law of the renoise time t, for the score pass and, unless it has its own, the fake update.

    kind: ``dyna_rs`` (Beta, moving with the step), ``uniform`` or ``logit_normal`` (sigmoid of N(mean, std^2)).
    Draws are mapped to [t_min, t_max] (t_min + (t_max - t_min) u), then shifted.
    per: ``sample`` draws one t per sample, ``batch`` one for all ``count`` of them.
    """

    kind: Literal["dyna_rs", "uniform", "logit_normal"] = "dyna_rs"
    alpha0: float = 4.0
    beta0: float = 1.5
    dynamic_step: int = 0
    mean: float = 0.0
    std: float = 1.0
    t_min: float = 0.001
    t_max: float = 0.999
    shift: float = 1.0
    per: Literal["sample", "batch"] = "sample"

    def beta(self, step: int) -> tuple[float, float]:
        """(alpha, beta) of DynaRS at this generator step."""
        return renoise_beta(step, alpha0=self.alpha0, beta0=self.beta0, dynamic_step=self.dynamic_step)

    def draw(self, rng: np.random.Generator, count: int, step: int) -> np.ndarray:
        """``count`` renoise times, float32 [count], for generator step ``step``."""
        drawn = 1 if self.per == "batch" else count
        if self.kind == "dyna_rs":
            u = rng.beta(*self.beta(step), size=drawn)
        elif self.kind == "uniform":
            u = rng.random(drawn)
        elif self.kind == "logit_normal":
            u = 1.0 / (1.0 + np.exp(-rng.normal(self.mean, self.std, size=drawn)))
        else:
            raise ValueError(f"RenoiseLaw.kind: expected dyna_rs, uniform or logit_normal, got {self.kind!r}")
        t = shift_time(self.t_min + (self.t_max - self.t_min) * u, self.shift)
        return np.broadcast_to(t, (count,)).astype(np.float32)


UNIFORM = RenoiseLaw(kind="uniform", t_min=0.0, t_max=1.0)
