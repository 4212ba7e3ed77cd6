"""The student's sampler as a scheduler of diffusers, for flow matching.

The export copies this file into the pipeline's folder, where diffusers loads it: it imports nothing of dmdr_fast.
"""

from __future__ import annotations

import hashlib

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from torch import Tensor


class RenoiseScheduler(FlowMatchEulerDiscreteScheduler):
    """x_{t'} = (1 - t') x0 + t' noise with x0 = x_t - t v, on the times of its config; the last step gives x0.

    Pipelines keep their ``generator`` to themselves: they draw the first noise with it and hand a scheduler none. So
    the later noise of each sample is drawn from a digest of its first noise: the same generator gives the same image,
    whatever the batch and the device.
    """

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, *, return_dict: bool = True
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[Tensor]:
        if self.step_index is None:
            self._init_step_index(timestep)
            self._draws = [generator_of(one) for one in sample]
        now, later = self.sigmas[self.step_index], self.sigmas[self.step_index + 1]
        previous = sample.float() - now * model_output
        if self.step_index < len(self.timesteps) - 1:
            noise = torch.stack([torch.randn(sample.shape[1:], generator=draw) for draw in self._draws])
            previous = (1.0 - later) * previous + later * noise.to(previous.device)
        self._step_index += 1
        previous = previous.to(model_output.dtype)
        return FlowMatchEulerDiscreteSchedulerOutput(previous) if return_dict else (previous,)


def generator_of(sample: Tensor) -> torch.Generator:
    """A generator whose seed is a digest of ``sample``."""
    digest = hashlib.sha256(sample.float().cpu().contiguous().numpy().tobytes()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
