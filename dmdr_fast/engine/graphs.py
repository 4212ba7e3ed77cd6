"""CUDA graphs of forwards without grad (``compute.cuda_graphs``): rollouts and the score pass, at stages 0 and 2.

The host starts a replayed forward in one launch. Optimizers change the weights in place there, so a graph that is
captured once serves every update.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from dmdr_fast.algorithm.rollout import Network
from dmdr_fast.config import Config
from dmdr_fast.engine import compute
from dmdr_fast.errors import UserError
from dmdr_fast.models.lora import LoraAdapter

DEVICE = "cuda"
# (function of tensors, values for its arguments, pool) -> a function that copies its arguments there and replays.
capture: Callable[..., Any] = torch.cuda.make_graphed_callables
new_pool: Callable[[], Any] = torch.cuda.graph_pool_handle


def check(config: Config, device: torch.device) -> None:
    """Raise a UserError where ``compute.cuda_graphs`` is asked for on another device than CUDA."""
    if config.compute.cuda_graphs and device.type != DEVICE:
        raise UserError(f"compute.cuda_graphs: needs a CUDA device, this run is on {device.type}; set it to false")


class Graphs:
    """The graphs of a run, in one memory pool: each output is copied out before another graph may write there."""

    def __init__(self) -> None:
        self.pool, self.count = new_pool(), 0

    def of(self, network: Network) -> Replayed:
        """``network`` (a module, or DeepSpeed's engine around one), replayed where it can be."""
        return Replayed(self, network)

    def captured(self, function: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[..., Tensor]:
        """``function`` of tensors like ``inputs``, as a graph.

        Raises:
            UserError: it waits for the device, or does something else that no graph can hold.
        """
        try:
            replay = capture(function, tuple(tensor.contiguous().clone() for tensor in inputs), pool=self.pool)
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"compute.cuda_graphs: a forward cannot be captured ({reason}); set it to false") from error
        self.count += 1
        return replay


class Replayed:
    """``network(x_t, t, condition)``: without grad captured once for each signature, and replayed with new inputs.

    x_t [B, *latent_shape] in the compute dtype, t fp32 [B], condition a tensor or a dictionary of them, batch first.
    The scales of the network's LoRA adapters are inputs too. A signature is the inputs' shapes and dtypes, and which
    adapters act. With grad, and inside ``compute.uncompiled()``, the network runs as it is.
    """

    def __init__(self, graphs: Graphs, network: Network) -> None:
        self.graphs, self.network = graphs, network
        self.module: Any = getattr(network, "module", network)  # an engine adds nothing where there is no grad
        self.replays: dict[Any, Callable[..., Tensor]] = {}

    def __call__(self, x_t: Tensor, t: Tensor, condition: Any) -> Tensor:
        if torch.is_grad_enabled() or compute.is_uncompiled():
            return self.network(x_t, t, condition)
        adapters = [a for a in getattr(self.module, "lora_adapters", {}).values() if a.scale is not None]
        inputs, structure = tree_flatten((x_t, t, condition, [adapter.scale for adapter in adapters]))
        signature = (*((tensor.shape, tensor.dtype) for tensor in inputs), *(adapter.role for adapter in adapters))
        if signature not in self.replays:
            self.replays[signature] = self.graphs.captured(self._forward(structure, adapters), inputs)
        return self.replays[signature](*inputs).clone()

    def _forward(self, structure: Any, adapters: list[LoraAdapter]) -> Callable[..., Tensor]:
        """The network as a function of tensors alone."""

        def forward(*inputs: Tensor) -> Tensor:
            x_t, t, condition, scales = tree_unflatten(inputs, structure)
            given = [adapter.scale for adapter in adapters]
            try:
                for adapter, scale in zip(adapters, scales, strict=True):
                    adapter.scale = scale
                return self.module(x_t, t, condition)
            finally:
                for adapter, scale in zip(adapters, given, strict=True):
                    adapter.scale = scale

        return forward
