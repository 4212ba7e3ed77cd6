"""The networks of the score pass: their dtype, what overflows in it, and how much of the DMD gradient is rounding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from dmdr_fast.algorithm.dmd import dmd_gradient
from dmdr_fast.algorithm.recipe import Recipe
from dmdr_fast.algorithm.rollout import Network, truncated_rollout
from dmdr_fast.algorithm.score_pass import ScorePass, Scores, scores_at
from dmdr_fast.config import Config
from dmdr_fast.engine.compute import uncompiled
from dmdr_fast.engine.engines import DTYPES
from dmdr_fast.engine.memory import Probe
from dmdr_fast.engine.roles import Role, Worn
from dmdr_fast.models.attention import torch_attention
from dmdr_fast.models.cast import ReadAs

ALIKE = 1e-5  # |v_fake - v_real| / |v_real| below which the two scores are one network's, rounded in fp32


class ScoreRole(Role):
    """A network as the score pass calls it: in ``dmd.score_dtype``, whatever its weights are stored in. No grad.

    ``overflowed`` counts the samples whose prediction was not finite, on the device.
    """

    def __init__(self, network: nn.Module, config: Config, worn: Worn | None = None) -> None:
        own, wanted = config.deepspeed.dtype, config.dmd.score_dtype
        super().__init__(network, DTYPES[own if wanted == "compute" else wanted], worn)
        self.module, self.own = getattr(network, "module", network), DTYPES[own]
        self.read_as = ReadAs(self.module, self.own)
        self.overflowed: Tensor | None = None

    @torch.no_grad()
    def __call__(self, x_t: Tensor, t: Tensor, condition: Any) -> Tensor:
        with ExitStack() as stack:
            if self.dtype != self.own:
                stack.enter_context(self.read_as(self.dtype))
            if self.dtype != self.own and self.dtype == torch.float32:
                stack.enter_context(torch_attention(self.module))
            prediction = super().__call__(x_t, t, condition)
        if self.dtype == torch.float16:
            bad = (~prediction.isfinite()).flatten(1).any(1).sum()
            self.overflowed = bad if self.overflowed is None else self.overflowed + bad
        return prediction

    @property
    def instead(self) -> str:
        """What to set ``dmd.score_dtype`` to where fp16 overflows."""
        return "fp32" if self.own == torch.float16 else "compute or fp32"

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Inside, the network computes in fp32."""
        dtype, self.dtype = self.dtype, torch.float32
        try:
            yield
        finally:
            self.dtype = dtype


def take_overflow(roles: Sequence[ScoreRole]) -> Tensor | None:
    """Samples whose scores were not finite since the last call, 0-d on the device; None where fp16 is not used."""
    found = [role.overflowed for role in roles if role.overflowed is not None]
    for role in roles:
        role.overflowed = None
    return torch.stack(found).sum() if found else None


@dataclass(frozen=True)
class Rounding:
    """What the score pass's dtype does to the DMD gradient on a probe.

    error: |g - g_32| / |g_32|. apart: |v_fake - v_real| / |v_real|. stand_in: the fake score was still the teacher, and
    the teacher's unconditional prediction stood in for it.
    """

    error: float
    apart: float
    stand_in: bool


def score_rounding(
    score: ScorePass, roles: Sequence[ScoreRole], generator: Network, probe: Probe, recipe: Recipe, step: int
) -> Rounding:
    """The rounding error of g at renoised samples of the generator. All ranks must call.

    The samples are the generator's first step on the probe's ``x0``, taken as its noise.
    """
    with uncompiled():  # a few samples are not worth a graph each
        x0 = truncated_rollout(
            generator, lambda i: probe.x0, probe.condition, recipe.grid, 0, kind=recipe.prediction, path=recipe.path
        ).x0
    probe = replace(probe, x0=x0)

    def scores() -> Scores:
        scale = recipe.real_scale(step)
        return scores_at(score, probe.x_t, probe.t, probe.condition, probe.null, real_scale=scale)

    with ExitStack() as stack:
        stack.enter_context(uncompiled())
        rounded = scores()
        for role in roles:
            stack.enter_context(role.exact())
        exact = scores()
    apart = _distance(exact.fake, exact.real)
    stand_in = apart < ALIKE
    if stand_in:
        rounded, exact = (s._replace(fake=cast(Tensor, s.real_uncond)) for s in (rounded, exact))  # there is a null
        apart = _distance(exact.fake, exact.real)
    if not recipe.dmd.uses_cfg:
        rounded, exact = (s._replace(real_uncond=None) for s in (rounded, exact))
    alpha, sigma = probe.path.alpha_sigma(probe.t)
    g, g32 = (dmd_gradient(probe.x0, probe.x_t, s, alpha, sigma, recipe.dmd).grad.double() for s in (rounded, exact))
    take_overflow(roles)
    return Rounding(((g - g32).norm() / g32.norm()).item(), apart, stand_in)


def can_measure(config: Config) -> bool:
    """Whether there is rounding to measure, and an fp32 pass to measure it by: float8 products have none."""
    types = {config.deepspeed.dtype, config.dmd.score_dtype} - {"compute"}
    return types != {"fp32"} and config.dmd.score_dtype != "fp32" and config.memory.frozen != "float8"


def rounding_line(rounding: Rounding, config: Config) -> str:
    """What the start-up says."""
    own, wanted = config.deepspeed.dtype, config.dmd.score_dtype
    note = " (the fake score is still the teacher; its unconditional prediction stands in)" if rounding.stand_in else ""
    return (
        f"scores     in {own if wanted == 'compute' else wanted}: rounding moves the DMD gradient by "
        f"{100 * rounding.error:.3g} % on a probe where the scores are {100 * rounding.apart:.3g} % apart{note}"
    )


def _distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()
