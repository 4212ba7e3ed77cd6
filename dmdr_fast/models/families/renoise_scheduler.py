"""The student's sampler as a scheduler of diffusers, for flow matching.

The export copies this file into the pipeline's folder, where diffusers loads it: it imports nothing of dmdr_fast.
"""

from __future__ import annotations

import hashlib
import math

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from torch import Tensor


class RenoiseScheduler(FlowMatchEulerDiscreteScheduler):
    """x_{t'} = (1 - t') x0 + t' noise with x0 = x_t - t v, on the times of its config; the last step gives x0.

    noise = cos(eta pi / 2) n_hat + sin(eta pi / 2) n, n fresh, n_hat = x0 + v the noise that is in x_t: fresh noise
    alone at eta 1, the Euler step x_t + (t' - t) v at eta 0, coefficients-preserving sampling between them.

    ``times``, where its config has them, are the sigmas, whatever a pipeline asks for; the others follow from a shift.

    Pipelines keep their ``generator`` to themselves: they draw the first noise with it and hand a scheduler none. So
    the later noise of each sample follows from the signs of its first noise: the same generator gives the same image,
    whatever the batch, the device and the dtype.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        shift_terminal: float | None = None,
        stochastic_sampling: bool = False,
        times: list[float] | None = None,
        eta: float = 1.0,
    ) -> None:
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            shift=shift,
            use_dynamic_shifting=use_dynamic_shifting,
            base_shift=base_shift,
            max_shift=max_shift,
            shift_terminal=shift_terminal,
            stochastic_sampling=stochastic_sampling,
        )

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
        if self.config.times is not None:
            self.sigmas = torch.tensor([*self.config.times, 0.0], dtype=torch.float32, device=device)
            self.timesteps = self.sigmas[:-1] * self.config.num_train_timesteps
            self.num_inference_steps = len(self.timesteps)

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
            noise = noise.to(previous.device)
            if self.config.eta < 1.0:
                angle = self.config.eta * math.pi / 2
                noise = math.cos(angle) * (previous + model_output) + math.sin(angle) * noise
            previous = (1.0 - later) * previous + later * noise
        self._step_index += 1
        previous = previous.to(model_output.dtype)
        return FlowMatchEulerDiscreteSchedulerOutput(previous) if return_dict else (previous,)


def generator_of(sample: Tensor) -> torch.Generator:
    """A generator whose seed is a digest of the signs of ``sample``, which no rounding changes."""
    digest = hashlib.sha256(sample.signbit().cpu().contiguous().numpy().tobytes()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
