"""Noise paths: their coefficients, what a prediction means on them, and the multi-step teacher's sampling."""

import pytest
import torch

from dmdr_fast import ops
from dmdr_fast.algorithm.paths import FLOW, clean_sample
from dmdr_fast.algorithm.rollout import ode_sample, truncated_rollout
from dmdr_fast.algorithm.schedules import timestep_grid

TIMES = torch.tensor([1.0, 0.7, 0.25, 0.0])


class VPPath:
    """Variance preserving: Stable Diffusion's 1,000 steps (arXiv 2112.10752), t being step round(999 t)."""

    abar = (1.0 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()).cumprod(0)

    def alpha_sigma(self, t):
        abar = self.abar[(999 * t).round().long()]
        return abar.sqrt().float(), (1.0 - abar).sqrt().float()


VP = VPPath()


@pytest.mark.parametrize(("path", "kind"), [(FLOW, "flow"), (FLOW, "v"), (FLOW, "x0"), (VP, "eps"), (VP, "v")])
def test_the_exact_prediction_gives_the_clean_sample_back(path, kind):
    rng = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 4, 3, generator=rng).double()
    alpha, sigma = (c.double()[:, None] for c in path.alpha_sigma(TIMES))
    x_t = ops.renoise(x0, *path.alpha_sigma(TIMES), noise=noise)
    torch.testing.assert_close(x_t, alpha * x0 + sigma * noise)
    v = (alpha * x_t - x0) / torch.where(sigma == 0, torch.ones_like(sigma), sigma)
    predictions = {"flow": noise - x0, "eps": noise, "x0": x0, "v": v}
    rows = slice(None) if kind in ("flow", "x0") or path is VP else slice(0, 3)  # v is 0/0 where sigma is 0
    found = clean_sample(x_t[rows], TIMES[rows], predictions[kind][rows], kind, path)
    torch.testing.assert_close(found, x0[rows], rtol=1e-5, atol=1e-5)


def test_an_unknown_prediction_is_refused():
    with pytest.raises(ValueError, match="got 'noise'"):
        clean_sample(torch.zeros(1, 2), torch.ones(1), torch.zeros(1, 2), "noise")


def test_ddim_converges_to_the_exact_flow_of_a_gaussian():
    """For x0 ~ N(0, s^2): eps_hat = sigma x / (alpha^2 s^2 + sigma^2), and x / sqrt(alpha^2 s^2 + sigma^2) is kept."""
    s = 0.5

    def network(x, t, condition):
        alpha, sigma = (c.double()[:, None] for c in VP.alpha_sigma(t))
        return sigma * x / (alpha**2 * s**2 + sigma**2)

    z = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    alpha, sigma = (c.double()[:, None] for c in VP.alpha_sigma(torch.ones(5)))
    exact = s * z / (alpha**2 * s**2 + sigma**2).sqrt()
    errors = [(ode_sample(network, z, None, n, kind="eps", path=VP) - exact).abs().max().item() for n in (50, 200)]
    assert errors[1] < 0.025 and errors[1] < errors[0] / 2


def test_rollout_of_an_eps_student():
    rng = torch.Generator().manual_seed(3)
    noises = torch.randn(3, 2, 4, generator=rng)
    grid = timestep_grid(2)

    def student(x, t, condition):
        return torch.tanh(x) * t[:, None]

    rollout = truncated_rollout(student, lambda i: noises[i], None, grid, 1, kind="eps", path=VP)
    (a1, a2), (s1, s2) = VP.alpha_sigma(torch.tensor(grid[:2]))
    x0 = (noises[0] - s1 * torch.tanh(noises[0])) / a1
    x = a2 * x0 + s2 * noises[1]
    torch.testing.assert_close(rollout.x_in, x)
    torch.testing.assert_close(rollout.x0, (x - s2 * torch.tanh(x) * 0.5) / a2)
