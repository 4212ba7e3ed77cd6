"""Signs of collapse, read from what an update has at hand; 0-d tensors on the device."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def diversity(x0: Tensor, classes: Tensor) -> Tensor:
    """Mean RMS distance of two samples of one class: mean over pairs i != j, y_i = y_j of |x_i - x_j| / sqrt(D).

    x0 [B, ...], classes int64 [B]; fp32. NaN where no two samples share a class. A generator that has collapsed to one
    sample per class has 0.
    """
    flat = x0.flatten(1).float()
    squares = flat.square().sum(1)
    distances = (squares[:, None] + squares[None, :] - 2.0 * flat @ flat.T).clamp_min(0.0).sqrt()
    pairs = (classes[:, None] == classes[None, :]).float()
    pairs.fill_diagonal_(0.0)
    return (distances * pairs).sum() / pairs.sum() / flat.shape[1] ** 0.5


@torch.no_grad()
def saturation(x0: Tensor, bound: float) -> Tensor:
    """The share of values with |x0| > bound."""
    return (x0.abs() > bound).float().mean()


class OutputGradient:
    """A generator that notes the norm of the gradient that reaches its output: what a loss asks of it.

    Used around a role's forward while losses are built; ``norm`` is 0-d, to be read after a backward.
    """

    def __init__(self, network) -> None:
        self.network = network
        self.squares: Tensor | None = None

    def __call__(self, x_t: Tensor, t: Tensor, condition) -> Tensor:
        prediction = self.network(x_t, t, condition)
        if prediction.requires_grad:
            prediction.register_hook(self._note)
        return prediction

    def _note(self, gradient: Tensor) -> None:
        squares = gradient.detach().float().square().sum()
        self.squares = squares if self.squares is None else self.squares + squares

    @property
    def norm(self) -> Tensor:
        assert self.squares is not None, "no gradient has reached the output"
        return self.squares.sqrt()
