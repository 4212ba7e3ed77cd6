"""The running standard deviation of a reward, kept on the device and alike on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DECAY = 0.99
EPS = 1e-6


class RunningScale:
    """Moving averages over updates of a reward's mean and mean square; their spread normalises it.

    With the global batch's mean m_k and mean square q_k of update k, w = sum d^(n-k), M = sum d^(n-k) m_k,
    Q = sum d^(n-k) q_k (d = 0.99) and sigma^2 = Q/w - (M/w)^2. fp64 throughout: the difference of squares leaves no
    error worth the name. Values that are not finite are left out. Nothing here waits for the device.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._state = torch.zeros(3, dtype=torch.float64, device=device)  # w, M, Q
        self._pending = torch.zeros(3, dtype=torch.float64, device=device)  # count, sum, sum of squares, of this rank

    def observe(self, values: Tensor) -> None:
        """Add scores [B] of the running update, on this rank."""
        values = values.detach().double()
        finite = values.isfinite()
        values = torch.where(finite, values, 0.0)
        self._pending += torch.stack([finite.sum(), values.sum(), (values * values).sum()])

    def factor(self) -> Tensor:
        """1 / (sigma + 1e-6), fp32 0-d; 0, no effect, as long as no spread is known.

        That is until an update has ended, and until two scores have differed by more than rounding leaves of the
        variance: of an update of one sample, or of rewards that were all alike, the next would else count up to a
        million times.
        """
        weight, mean, square = self._state
        per_weight = 1 / torch.where(weight > 0, weight, 1.0)
        variance = square * per_weight - (mean * per_weight) ** 2
        known = variance > EPS**2 * (1 + square * per_weight)
        return torch.where(known, 1 / (variance.clamp(min=0).sqrt() + EPS), 0.0).float()

    def end_update(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Take what all ranks observed since the last call into the averages; the same bits on all of them."""
        count, total, squares = sum_over_ranks(self._pending)
        seen = count > 0
        moments = torch.stack([torch.ones_like(count), total, squares]) / torch.where(seen, count, 1.0)
        moments[0] = 1.0
        self._state = torch.where(seen, DECAY * self._state + moments, self._state)
        self._pending.zero_()

    def state(self) -> list[float]:
        """w, M and Q; as JSON they come back exactly. Waits for the device."""
        return self._state.tolist()

    def load(self, state: Sequence[float]) -> None:
        """Go on from a :meth:`state`."""
        self._state = torch.tensor(state, dtype=torch.float64, device=self._state.device)
