"""Decoupled DMD: its parts by the formula in fp64, their sum, their laws, their rows, and what advantages weigh."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dmdr_fast import ops
from dmdr_fast.algorithm.dmd import Augmentation, DMDOptions, Renoising, dmd_gradient, dmd_leaf_gradient
from dmdr_fast.algorithm.guidance import guide
from dmdr_fast.algorithm.paths import FLOW, clean_sample
from dmdr_fast.algorithm.rl.methods import method_of
from dmdr_fast.algorithm.schedules import UNIFORM, RenoiseLaw, shift_time
from dmdr_fast.algorithm.score_pass import Scores, separate_scores, shared_scores
from dmdr_fast.algorithm.simulation import simulate
from dmdr_fast.algorithm.step import dmdr_update, leaf_gradient
from dmdr_fast.algorithm.streams import Shard, Streams

from .networks import CLASSES, SHAPE, Denoiser, networks, recipe, reward_model, update

CPU = torch.device("cpu")
B = 6
RNG = torch.Generator().manual_seed(8)
X0 = torch.randn(B, *SHAPE, dtype=torch.float64, generator=RNG)
Y = torch.arange(B) % CLASSES
NULL = torch.full_like(Y, CLASSES)
FAKE, REAL = Denoiser(1), Denoiser(2)
SCORE = separate_scores(FAKE, REAL)
F = torch.tensor([0.0, 0.5, 1.0, 1.0, 1.7, 2.0], dtype=torch.float64)


class VariancePreserving:
    def alpha_sigma(self, t):
        return (1 - 0.98 * t * t).sqrt(), 0.98**0.5 * t


def drawn(t, number):
    return Renoising(torch.full((B,), t, dtype=torch.float64), torch.tensor([number, 5]))


def renoised(x0, at):
    t = at.t.double().view(-1, 1, 1, 1)
    return (1 - t) * x0 + t * ops.normal_noise(torch.empty_like(x0), at.seed)


@pytest.mark.parametrize("guidance", [None, F])
@pytest.mark.parametrize(
    ("prediction", "mode", "path"),
    [
        ("flow", "standard", FLOW),
        ("flow", "offset", FLOW),
        ("flow", "per_token", FLOW),
        ("eps", "standard", VariancePreserving()),
        ("x0", "standard", FLOW),
    ],
)
@torch.no_grad()
def test_the_parts_at_one_time_noise_and_normaliser_are_the_plain_gradient(prediction, mode, path, guidance):
    plain = DMDOptions(cfg_scale=4.0, cfg_mode=mode, token=2, prediction=prediction, normalizer="none")
    both = replace(plain, ca=Augmentation(normalizer="none"))
    at, how = drawn(0.75, 3), {"real_scale": 0.0, "path": path, "guidance": guidance}
    whole, loss = dmd_leaf_gradient(X0, at, Y, NULL, SCORE, plain, **how)
    parts, own_loss = dmd_leaf_gradient(X0, at, Y, NULL, SCORE, both, ca=at, **how)
    assert (parts - whole).norm() <= 1e-12 * whole.norm()
    assert own_loss.item() == pytest.approx(loss.item(), rel=1e-12)
    # with normalisers: each part times its own is what it was without
    x_t = at(X0, path)
    fake, c, u = (net(x_t, at.t, y) for net, y in ((FAKE, Y), (REAL, Y), (REAL, NULL)))
    own, coefficients = replace(plain, normalizer="per_sample"), path.alpha_sigma(at.t)
    outs = [
        dmd_gradient(X0, x_t, scores, *coefficients, own, scale)
        for scores, scale in ((Scores(fake, c, None), None), (Scores(c, c, u), guidance))
    ]
    together = sum(out.grad * out.weight.view(-1, 1, 1, 1) for out in outs)
    assert (together / X0.numel() - whole).norm() <= 1e-12 * whole.norm()


@pytest.mark.parametrize("mode", ["standard", "per_token"])
@torch.no_grad()
def test_each_part_by_hand(mode):
    """DM / n_dm + CA / n_ca with times, noises and normalisers of their own."""
    options = DMDOptions(cfg_scale=3.0, cfg_mode=mode, token=2, ca=Augmentation(normalizer="global"))
    dm, ca = drawn(0.5, 1), drawn(0.25, 2)
    g, loss = dmd_leaf_gradient(X0, dm, Y, NULL, SCORE, options, real_scale=0.0, ca=ca, guidance=F)

    def denoised(network, at, y):
        x_t = renoised(X0, at)
        return x_t - at.t.view(-1, 1, 1, 1) * network(x_t, at.t, y), x_t

    c_dm, _ = denoised(REAL, dm, Y)
    part_dm = (denoised(FAKE, dm, Y)[0] - c_dm) / (X0 - c_dm).abs().mean((1, 2, 3), keepdim=True)
    (c, x_ca), (u, _) = denoised(REAL, ca, Y), denoised(REAL, ca, NULL)
    if mode == "standard":
        ca_hand = -(3.0 - 1.0) * F.view(-1, 1, 1, 1) * (c - u)
    else:
        v = guide(REAL(x_ca, ca.t, Y), REAL(x_ca, ca.t, NULL), 1.0 + 2.0 * F, "per_token", 2)
        ca_hand = c - clean_sample(x_ca, ca.t, v)
    part_ca = ca_hand / (X0 - (c - ca_hand)).abs().mean()
    expected = part_dm + part_ca
    torch.testing.assert_close(g * X0.numel(), expected, rtol=1e-6, atol=1e-8)
    assert loss.item() == pytest.approx(0.5 * expected.square().mean().item(), rel=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_ca_s_times_are_uniform_below_the_generator_s_on_its_own_scale(shift):
    law, shard = Augmentation(t_min=0.001, shift=shift), Shard(0, 20000, 20000)
    u = Streams(0).times(UNIFORM, "ca_t", 1, step=0, shard=shard, device=CPU)
    for place in (1.0, 0.5):
        t_in = torch.full_like(u, shift_time(place, shift))
        tau = law.times(u, t_in)
        assert (tau <= t_in * (1 + 1e-6)).all() and tau.min() > 0
        unshifted = np.sort((tau / (shift - (shift - 1) * tau)).double().numpy())
        expected = 0.001 + (place - 0.001) * (np.arange(20000) + 0.5) / 20000
        assert np.abs(unshifted - expected).max() < 2.0 * place / np.sqrt(20000)  # Kolmogorov-Smirnov
    low = law.times(u[:4], torch.full((4,), 1e-5))
    torch.testing.assert_close(low, torch.full((4,), float(shift_time(0.001, shift))))


def test_four_rows_in_one_pass_and_two_without_ca():
    """[fake at tau_dm | cond at tau_dm | cond at tau_ca | null at tau_ca], each with its LoRA scale."""
    seen = []

    def network(x, t, y):
        seen.append((x.clone(), t, y, scale[0].clone()))
        return REAL(x, t, y)

    scale = [None]
    score = shared_scores(network, lambda value: scale.__setitem__(0, value), fake_scale=2.0)
    options = DMDOptions(cfg_scale=3.0, ca=Augmentation())
    dm, ca = drawn(0.5, 1), drawn(0.25, 2)
    dmd_leaf_gradient(X0, dm, Y, NULL, score, options, real_scale=0.7, ca=ca)
    ((x, t, y, worn),) = seen
    assert len(x) == 4 * B and torch.equal(t, torch.cat([dm.t, dm.t, ca.t, ca.t]))
    assert torch.equal(y, torch.cat([Y, Y, Y, NULL]))
    assert torch.equal(worn, torch.tensor([2.0] * B + [0.7] * 3 * B))
    torch.testing.assert_close(x, torch.cat([renoised(X0, at) for at in (dm, dm, ca, ca)]))
    rows = {"fake": 0, "real": 0}

    def counted(name, net):
        def call(x, t, y):
            rows[name] += len(x)
            return net(x, t, y)

        return call

    score = separate_scores(counted("fake", FAKE), counted("real", REAL))
    dmd_leaf_gradient(X0, dm, Y, NULL, score, options, real_scale=0.0, ca=ca)
    assert rows == {"fake": B, "real": 3 * B}
    dmd_leaf_gradient(X0, dm, Y, None, score, options, real_scale=0.0)
    assert rows == {"fake": 2 * B, "real": 4 * B}


def part(numbers, rl, guidance=None):
    """(DMD's gradient on x0 of one micro-batch, the sample)."""
    nets, *_ = networks()
    reward = reward_model(lambda x: x, lambda images, labels: images.flatten(1).sum(1)) if rl else None
    now = update(nets, numbers, Streams(3), [Shard(0, B, B)], reward=reward)
    sample = simulate(now, (0, 0), now.shards[0])
    return leaf_gradient(now, sample, sample.rollout.x0.double(), guidance)[0], sample


GUIDED = {"dmd": DMDOptions(cfg_scale=3.0, normalizer="none", ca=Augmentation(normalizer="none"))}


def test_the_update_draws_each_part_by_its_own_law():
    """DM at the renoise law's time, as the fake update has it; CA at its own, up to the time of the rollout's step."""
    numbers = recipe(4, renoise=RenoiseLaw(dynamic_step=10), **GUIDED)
    g, sample = part(numbers, False)
    streams, draw = Streams(3), {"step": 0, "shard": sample.shard, "device": CPU}
    x0, (_, fake, real) = sample.rollout.x0.double(), networks()[1:]
    y, null = sample.batch.condition, sample.batch.uncond

    def velocities(t, name, *pairs):
        noise = ops.normal_noise(torch.empty_like(x0), streams.noise_seed(f"{name}_noise", 0, device=CPU))
        sigma = t.double().view(-1, 1, 1, 1)
        x_t = (1 - sigma) * x0 + sigma * noise
        return (sigma, *(network(x_t, t, given) for network, given in pairs))

    sigma, v_fake, v_c = velocities(streams.times(numbers.renoise, "dmd_t", 0, **draw), "dmd", (fake, y), (real, y))
    tau = 0.001 + streams.times(UNIFORM, "ca_t", 0, **draw) * (sample.rollout.t_in - 0.001)
    own, c, u = velocities(tau, "ca", (real, y), (real, null))
    expected = sigma * (v_c - v_fake) + 2.0 * own * (c - u)
    torch.testing.assert_close(g * x0.numel(), expected, rtol=1e-5, atol=1e-7)


def test_advantages_weigh_ca_alone():
    numbers = recipe(2, **GUIDED)
    (none, _), (one, _), (some, _) = (part(numbers, False, f) for f in (torch.zeros(B), torch.ones(B), F.float()))
    torch.testing.assert_close(one, part(numbers, False)[0], rtol=1e-6, atol=1e-9)
    alone = part(recipe(2, dmd=DMDOptions(normalizer="none")), False)[0]
    torch.testing.assert_close(none, alone, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(some, none + F.view(-1, 1, 1, 1) * (one - none), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("ca", [None, Augmentation()])
def test_the_regulariser_dm_is_dmd_without_guidance_once_rl_has_begun(ca):
    options = DMDOptions(cfg_scale=3.0, ca=ca)
    numbers = recipe(2, dmd=options, regularizer="dm", reward_weight=1.0, method=method_of("dpo"))
    plain = part(recipe(2), False)[0]
    torch.testing.assert_close(part(numbers, True)[0], plain, rtol=0, atol=0)
    assert (part(replace(numbers, cold_start_steps=1), True)[0] - plain).norm() > 0.1 * plain.norm()


def test_an_update_with_weighted_ca_trains():
    nets, *_ = networks(torch.float32)
    reward = reward_model(lambda x: x, lambda images, labels: images.flatten(1).sum(1))
    method = method_of("grpo", mode="advantage_weighted_dmd", group_size=3)
    numbers = recipe(2, dmd=DMDOptions(cfg_scale=3.0, ca=Augmentation()), reward_weight=0.5, method=method)
    outcome = dmdr_update(update(nets, numbers, Streams(0), [Shard(0, B, B)], reward=reward))
    assert outcome.skipped == () and outcome.metrics["dmd_loss"].isfinite() and outcome.metrics["kept"] == 1.0
