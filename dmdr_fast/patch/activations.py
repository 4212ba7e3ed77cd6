"""diffusers' gated activations: one projection, its halves value and gate."""

from __future__ import annotations

from collections.abc import Iterator

from diffusers.models.activations import GEGLU, SwiGLU
from torch import Tensor, nn

from dmdr_fast import ops
from dmdr_fast.patch.structure import GELU_MUL, SILU_MUL, Replacement, Site, stands_in


@stands_in
class FusedGEGLU(GEGLU):
    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        if args or kwargs.get("scale") is not None:
            return super().forward(hidden_states, *args, **kwargs)  # it says that `scale` is deprecated
        return ops.gelu_mul(self.proj(hidden_states))


@stands_in
class FusedSwiGLU(SwiGLU):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return ops.silu_mul(self.proj(hidden_states))


def _geglu_sites(module: nn.Module, wanted: frozenset[str]) -> Iterator[Site]:
    if GELU_MUL in wanted:
        yield Site(GELU_MUL)


def _swiglu_sites(module: nn.Module, wanted: frozenset[str]) -> Iterator[Site]:
    if SILU_MUL in wanted:
        yield Site(SILU_MUL)


REPLACEMENTS = (
    Replacement(FusedGEGLU, _geglu_sites, {"forward": ("815549c87e16",)}),
    Replacement(FusedSwiGLU, _swiglu_sites, {"forward": ("2e20d3f394d7",)}),
)
