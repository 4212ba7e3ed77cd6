"""DPO: of two samples of one condition, the generator comes to denoise the preferred one better than its reference.

Source: Diffusion-DPO (arXiv 2311.12908), online: the pair is the best and the worst of a group of the generator's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dmdr_fast import ops
from dmdr_fast.algorithm.paths import FLOW, Path
from dmdr_fast.algorithm.rl.options import DPOOptions
from dmdr_fast.algorithm.rollout import Network
from dmdr_fast.algorithm.score_pass import join
from dmdr_fast.ops.dmd import Prediction


def dpo_loss(
    generator: Network,
    reference: Network,
    x0_w: Tensor,
    x0_l: Tensor,
    t: Tensor,
    noise: Tensor,
    condition: Any,
    options: DPOOptions,
    *,
    prediction: Prediction = "flow",
    path: Path = FLOW,
    weight: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """mean over pairs of -log sigmoid(-beta/2 ((e_w - e_w_ref) - (e_l - e_l_ref))), 0-d and graded.

    e = mean over a sample of (prediction - target)^2 at x_t = alpha x0 + sigma noise, in fp32 (fp64 for fp64); target:
    ``flow`` noise - x0, ``eps`` noise, ``x0`` x0. Both samples of a pair have the same t and the same noise, and are
    one batch: [all winners | all losers].

    Args:
        generator, reference: networks of (x_t, t, condition). The reference runs first, without grad; it may be the
            generator with an adapter switched off.
        x0_w, x0_l: the preferred sample and the other [P, ...]; constants.
        t: fp32 [P], the pair's. noise: x0_w's shape. condition: the pair's (tensor, or dictionary of them, batch P).
        prediction: what the networks predict, on ``path``.
        weight: fp32 [P], of each pair in the mean; 1 by default.

    Returns:
        loss, and 0-d without grad: margin, the mean of the sigmoid's argument; accuracy, the fraction of pairs where
        it is above 0 (0 while the generator is the reference).

    Raises:
        ValueError: the prediction is not one of the three.
    """
    clean, twice = torch.cat((x0_w, x0_l)).detach(), torch.cat((noise, noise))
    targets = {"flow": lambda: twice - clean, "eps": lambda: twice, "x0": lambda: clean}
    if prediction not in targets:
        raise ValueError(f"dpo_loss: prediction must be one of {sorted(targets)}, got {prediction!r}")
    target, times, conditions = targets[prediction](), t.repeat(2), join(condition, condition)
    alpha, sigma = path.alpha_sigma(times)
    x_t = ops.renoise(clean, alpha, sigma, noise=twice)
    dtype = torch.promote_types(clean.dtype, torch.float32)

    def error_gap(network: Network) -> Tensor:
        """e_w - e_l [P]."""
        difference = network(x_t, times, conditions).to(dtype) - target.to(dtype)
        winner, loser = difference.square().flatten(1).mean(1).chunk(2)
        return winner - loser

    with torch.no_grad():
        held = error_gap(reference)
    with torch.enable_grad():
        margin = -0.5 * options.beta * (error_gap(generator) - held)
        each = -F.logsigmoid(margin)
        loss = (each if weight is None else weight * each).mean()
    margin = margin.detach()
    return loss, {"accuracy": (margin > 0).float().mean(), "margin": margin.mean()}
