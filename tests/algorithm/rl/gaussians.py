"""The stochastic step as the papers write it, in fp64: the independent truth of the policy's tests."""

from __future__ import annotations

import math

import torch

KINDS = {"flow_grpo": 0.7, "dance": 0.3, "cps": 0.6}


def gamma(t, t_next, kind, eta):
    """Diffusion coefficient of the SDE; flow_grpo replaces t = 1 in the denominator by the next time."""
    return eta * math.sqrt(t / (1 - (t_next if t == 1 else t))) if kind == "flow_grpo" else eta


def step(x, v, t, t_next, kind, eta):
    """(mean, std) of x' by way of x0_hat = x - t v and noise_hat = x + (1 - t) v."""
    x, v = x.double(), v.double()
    x0, noise = x - t * v, x + (1 - t) * v
    if kind == "cps":
        std = t_next * math.sin(eta * math.pi / 2)
        return (1 - t_next) * x0 + math.sqrt(t_next**2 - std**2) * noise, std
    g, dt = gamma(t, t_next, kind, eta), t_next - t
    return x + v * dt + 0.5 * g**2 / t * noise * dt, g * math.sqrt(-dt)


def log_density(x, mean, std, kind):
    """Mean over a sample of the log-density; cps leaves out all but the square."""
    if kind == "cps":
        return -(x.double() - mean).square().flatten(1).mean(1)
    return torch.distributions.Normal(mean, std).log_prob(x.double()).flatten(1).mean(1)


class Mean(torch.nn.Module):
    """The generator v = -mu at every time: a one-step student's x0 is noise + mu, a Gaussian around its parameter."""

    def __init__(self, mu):
        super().__init__()
        self.mu = torch.nn.Parameter(mu.clone())

    def forward(self, x, t, condition):
        return -self.mu.expand_as(x)
