"""The head that the aesthetic predictor and ImageReward share: five linear layers with nothing between them."""

from __future__ import annotations

import itertools

from torch import Tensor, nn

WIDTHS = (1024, 128, 64, 16, 1)
POSITIONS = (0, 2, 4, 6, 7)  # in the published Sequential, whose dropouts do nothing here


def linear_head(state: dict[str, Tensor], prefix: str, width: int, *, where: str) -> nn.Sequential:
    """Frozen fp32 head from features [B, width] to scores [B, 1], from ``{prefix}layers.N.{weight,bias}`` of ``state``.

    Raises:
        ValueError: a weight is missing or has another shape.
    """
    head = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise((width, *WIDTHS))))
    remedy = "set path of its reward.terms entry to the published checkpoint"
    for place, layer in zip(POSITIONS, head, strict=True):
        for kind in ("weight", "bias"):
            key, parameter = f"{prefix}layers.{place}.{kind}", getattr(layer, kind)
            if key not in state:
                raise ValueError(
                    f"{where}: its checkpoint lacks {key}: expected a head of five linear layers: {remedy}"
                )
            if state[key].shape != parameter.shape:
                raise ValueError(
                    f"{where}: {key}: expected shape {list(parameter.shape)} for features of width {width}, got "
                    f"{list(state[key].shape)}: {remedy}, or the model whose features it takes"
                )
            parameter.data.copy_(state[key])
    return head.requires_grad_(False).eval()
