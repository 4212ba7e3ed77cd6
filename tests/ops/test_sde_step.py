"""sde_step_logprob against the steps as their code bases write them, and torch's Normal."""

from __future__ import annotations

import math

import pytest
import torch

from dmdr_fast import ops

KINDS = {"flow_grpo": 0.7, "dance": 0.3, "cps": 0.6}
SEED = torch.tensor([8, 9])


def step(x, v, t, t_next, kind, eta):
    """(mean, std) of one sample, as in the papers: through x0_hat = x - t v and x1_hat = x + (1 - t) v."""
    x0, x1 = x - t * v, x + (1 - t) * v
    if kind == "cps":
        std = t_next * math.sin(eta * math.pi / 2)
        return (1 - t_next) * x0 + math.sqrt(t_next**2 - std**2) * x1, std
    dt = t_next - t
    gamma = eta * math.sqrt(t / (1 - (t_next if t == 1 else t))) if kind == "flow_grpo" else eta
    # The probability flow plus Langevin: score = -(x + (1 - t) v) / t = -x1_hat / t.
    return x + v * dt + 0.5 * gamma**2 * x1 / t * dt, gamma * math.sqrt(-dt)


def batch(kind, t=(1.0, 0.6, 0.2), t_next=(0.75, 0.55, 0.0), shape=(4, 5), dtype=torch.float64):
    x, v = torch.randn(len(t), *shape).to(dtype), torch.randn(len(t), *shape).to(dtype)
    means, stds = zip(
        *(step(x[i].double(), v[i].double(), t[i], t_next[i], kind, KINDS[kind]) for i in range(len(t))),
        strict=True,
    )
    sigma, sigma_next = (torch.tensor(s, dtype=torch.float64) for s in (t, t_next))
    return x, v, sigma, sigma_next, torch.stack(means), torch.tensor(stds, dtype=torch.float64)


def log_density(x, mean, std, kind):
    std = std.reshape(-1, *[1] * (x.dim() - 1))
    if kind == "cps":
        return -(x - mean).square().flatten(1).mean(1)
    return torch.distributions.Normal(mean, std).log_prob(x).flatten(1).mean(1)


@pytest.mark.parametrize("kind", KINDS)
def test_given_next_sample(kind):
    x, v, sigma, sigma_next, mean, std = batch(kind)
    target = torch.randn_like(x)
    out = ops.sde_step_logprob(x, v, sigma, sigma_next, kind=kind, eta=KINDS[kind], next_sample=target)
    assert out.next_sample is target
    torch.testing.assert_close(out.mean, mean)
    torch.testing.assert_close(out.std, std)
    torch.testing.assert_close(out.logprob, log_density(target, mean, std, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_drawn_next_sample(kind):
    x, v, sigma, sigma_next, mean, std = batch(kind)
    out = ops.sde_step_logprob(x, v, sigma, sigma_next, kind=kind, eta=KINDS[kind], seed=SEED, offset=7)
    noise = ops.normal_noise(x, SEED, offset=7)
    torch.testing.assert_close(out.next_sample, mean + std.reshape(-1, 1, 1) * noise)
    torch.testing.assert_close(out.logprob, log_density(out.next_sample, mean, std, kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_replayed_step_has_the_same_log_prob_bit_for_bit(kind, dtype):
    x, v, sigma, sigma_next, mean, std = batch(kind, t=(1.0, 0.6), t_next=(0.75, 0.55), shape=(8, 9), dtype=dtype)
    options = {"kind": kind, "eta": KINDS[kind]}
    drawn = ops.sde_step_logprob(x, v, sigma, sigma_next, seed=SEED, **options)
    replayed = ops.sde_step_logprob(x, v, sigma, sigma_next, next_sample=drawn.next_sample, **options)
    assert drawn.next_sample.dtype is dtype
    assert drawn.logprob.dtype is drawn.mean.dtype is drawn.std.dtype is torch.float32
    assert torch.equal(drawn.logprob, replayed.logprob)
    truth = log_density(drawn.next_sample.double(), mean, std, kind)
    torch.testing.assert_close(drawn.logprob.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_a_replay(kind):
    x, v, sigma, sigma_next, *_ = batch(kind, shape=(3,))
    target = torch.randn_like(x)

    def replay(x, v):
        out = ops.sde_step_logprob(x, v, sigma, sigma_next, kind=kind, eta=KINDS[kind], next_sample=target)
        return out.logprob, out.mean

    assert torch.autograd.gradcheck(replay, (x.requires_grad_(), v.requires_grad_()))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_a_drawn_step(kind):
    x, v, sigma, sigma_next, *_ = batch(kind, shape=(3,))
    options = {"kind": kind, "eta": KINDS[kind]}

    def drawn(x, v):
        return ops.sde_step_logprob(x, v, sigma, sigma_next, seed=SEED, **options).next_sample

    x.requires_grad_()
    v.requires_grad_()
    assert torch.autograd.gradcheck(drawn, (x, v))
    # The log-prob treats the drawn sample as fixed: its gradient is that of a replay.
    out = ops.sde_step_logprob(x, v, sigma, sigma_next, seed=SEED, **options)
    fixed = out.next_sample.detach()
    again = ops.sde_step_logprob(x, v, sigma, sigma_next, next_sample=fixed, **options)
    weights = torch.randn(3, dtype=torch.float64)
    ours = torch.autograd.grad(out.logprob, (x, v), weights)
    theirs = torch.autograd.grad(again.logprob, (x, v), weights)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_numbers_serve_every_sample_and_eta_zero_is_deterministic_for_cps():
    x, v, *_ = batch("cps", t=(0.5, 0.5), t_next=(0.25, 0.25))
    out = ops.sde_step_logprob(x, v, 0.5, 0.25, kind="cps", eta=0.0, seed=SEED)
    torch.testing.assert_close(out.next_sample, x - 0.25 * v)  # the plain Euler step
    assert torch.equal(out.logprob, torch.zeros(2).double())


def test_empty_batch():
    x = torch.empty(0, 3, requires_grad=True)
    none = torch.empty(0)
    out = ops.sde_step_logprob(x, torch.empty(0, 3), none, none, kind="dance", eta=0.3, seed=SEED)
    out.logprob.sum().backward()
    assert out.logprob.shape == (0,) and x.grad.shape == (0, 3)
