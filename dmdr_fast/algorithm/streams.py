"""Randomness as a pure function of (run seed, purpose, counters, global sample index).

Nothing here has state, so a resumed run draws what the uninterrupted one would have drawn, and a sample's randomness
does not depend on how many ranks share the batch: every rank draws (small things) or addresses (noise) the whole
global batch and keeps its own part.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dmdr_fast import ops


@dataclass(frozen=True)
class Shard:
    """Samples [start, stop) of a global batch of ``total``: what this rank works on in one micro-step."""

    start: int
    stop: int
    total: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def rows(self) -> slice:
        """Of a tensor of the global batch."""
        return slice(self.start, self.stop)

    @classmethod
    def of_rank(cls, rank: int, world_size: int, micro_batch: int, micro_step: int = 0, micro_steps: int = 1) -> Shard:
        """Rank-contiguous order inside each micro-step, micro-steps one after the other."""
        start = (micro_step * world_size + rank) * micro_batch
        return cls(start, start + micro_batch, micro_steps * world_size * micro_batch)


@dataclass(frozen=True)
class Streams:
    """Independent random streams of one run, addressed by a purpose and counters (step, fake update, ...)."""

    seed: int
    size: int = 0

    def of_size(self, number: int) -> Streams:
        """The streams of samples of size ``number``: noise of two sizes in one draw must not overlap."""
        return replace(self, size=number)

    def _words(self, purpose: str, counters: tuple[int, ...]) -> np.ndarray:
        named = f"{purpose}@{self.size}" if self.size else purpose
        text = ":".join([str(self.seed), named, *map(str, counters)])
        return np.frombuffer(hashlib.sha256(text.encode()).digest()[:16], dtype="<u8")

    def rng(self, purpose: str, *counters: int) -> np.random.Generator:
        """A host generator (Philox) for small draws: labels, times, the stop step."""
        return np.random.Generator(np.random.Philox(key=self._words(purpose, counters)))

    def stop_step(self, steps: int, *counters: int) -> int:
        """Where a rollout of ``steps`` stops, uniform on 0..steps-1."""
        return int(self.rng("stop", *counters).integers(steps))

    def noise_seed(self, purpose: str, *counters: int, device: torch.device) -> Tensor:
        """The int64[2] seed that ``ops.normal_noise`` and ``ops.renoise`` take."""
        return torch.from_numpy(self._words(purpose, counters).view(np.int64).copy()).to(device, non_blocking=True)

    def noise(self, purpose: str, *counters: int, shape: tuple[int, ...], shard: Shard, device: torch.device) -> Tensor:
        """Standard normal noise fp32 [shard.size, *shape]: the shard's part of the global batch's noise."""
        like = torch.empty((shard.size, *shape), device=device)
        seed = self.noise_seed(purpose, *counters, device=device)
        return ops.normal_noise(like, seed, offset=shard.start * like[0].numel())

    def times(self, law, purpose: str, *counters: int, step: int, shard: Shard, device: torch.device) -> Tensor:
        """Renoise times fp32 [shard.size] drawn from a :class:`~dmdr_fast.algorithm.schedules.RenoiseLaw`."""
        drawn = law.draw(self.rng(purpose, *counters), shard.total, step)[shard.rows]
        return torch.from_numpy(drawn.copy()).to(device, non_blocking=True)
