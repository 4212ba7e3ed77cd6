"""The update: leaf gradients are the joint loss's, at no more memory and at the cost that the design promises."""

import itertools

import numpy as np
import pytest
import torch

from dmdr_fast import ops
from dmdr_fast.algorithm.dmd import DMDOptions, score_matching_loss
from dmdr_fast.algorithm.recipe import Networks
from dmdr_fast.algorithm.rl.method import Method
from dmdr_fast.algorithm.rl.refl import ReFL
from dmdr_fast.algorithm.schedules import RenoiseLaw
from dmdr_fast.algorithm.score_pass import scores_at, separate_scores, shared_scores
from dmdr_fast.algorithm.simulation import simulate, stop_places
from dmdr_fast.algorithm.step import dmdr_update, fake_update, generator_update
from dmdr_fast.algorithm.streams import Shard, Streams

from .networks import CLASSES, SHAPE, Denoiser, labels, networks, recipe, reward_model, update

CPU = torch.device("cpu")
STREAMS = Streams(11)
SHARD = Shard.of_rank(0, 1, 6)
MIX = torch.randn(SHAPE[0] * 16, CLASSES, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def refl(chunk):
    return ReFL(chunk=chunk)


def decode(x):
    return torch.tanh(x)


def reward_score(images, labels):
    logits = images.double().flatten(1) @ MIX
    return torch.log_softmax(logits, -1).gather(1, labels[:, None])[:, 0]


REWARD = reward_model(decode, reward_score)
WEIGHT = 0.7


def joint_gradients(generator, fake, real, numbers, sample, step):
    """The gradient of one joint loss, everything in one graph, by the formulas of the DMDR reference in fp64."""
    rollout, y = sample.rollout, sample.batch.condition
    t_in = rollout.t_in.double().view(-1, 1, 1, 1)
    x_in = rollout.x_in.double()
    x0 = x_in - t_in * generator(x_in, rollout.t_in, y)
    t = STREAMS.times(numbers.renoise, "dmd_t", step, step=step, shard=SHARD, device=CPU).double()
    like = torch.empty((SHARD.size, *SHAPE), dtype=torch.float64)
    noise = ops.normal_noise(like, STREAMS.noise_seed("dmd_noise", step, device=CPU))
    sigma = t.view(-1, 1, 1, 1)
    x_t = (1 - sigma) * x0 + sigma * noise
    with torch.no_grad():
        cond, uncond = real(x_t, t, y), real(x_t, t, torch.full_like(y, CLASSES))
        guided = uncond + numbers.dmd.cfg_scale * (cond - uncond)
        p_real = x0 - (x_t - sigma * guided)
        p_fake = x0 - (x_t - sigma * fake(x_t, t, y))
        g = (p_real - p_fake) / (p_real.abs().mean(dim=(1, 2, 3), keepdim=True) + 1e-8)
    loss = 0.5 * torch.nn.functional.mse_loss(x0, (x0 - g).detach())
    loss = loss - WEIGHT * reward_score(decode(x0), y).mean()
    return torch.autograd.grad(loss, list(generator.parameters()))


class Captured:
    """Keeps the gradients that a role accumulated instead of stepping."""

    def __init__(self, role):
        self.role, self.gradients = role, None

    def __call__(self, *args):
        return self.role(*args)

    def backward(self, loss, *, last):
        loss.backward()

    def step(self):
        self.gradients = [p.grad.clone() for p in self.role.module.parameters()]
        self.role.module.zero_grad()
        return True


@pytest.mark.parametrize("chunk", [2, 6])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("phase", ["cold start, tilted", "RL"])
def test_leaf_gradients_equal_the_joint_loss(phase, steps, chunk, monkeypatch):
    nets, generator, fake, real = networks()
    weighed = {"method": refl(chunk), "reward_weight": WEIGHT}
    if phase != "RL":
        weighed = {"tilt": refl(chunk), "tilt_weight": WEIGHT, "cold_start_steps": 50, "reward_weight": 0.1}
    numbers = recipe(steps, dmd=DMDOptions(cfg_scale=3.0), **weighed)
    captured = Captured(nets.generator)
    nets = type(nets)(captured, nets.fake, nets.score)
    noise = Streams.noise
    monkeypatch.setattr(Streams, "noise", lambda *a, **k: noise(*a, **k).double())
    for step in range(3):
        now = update(nets, numbers, STREAMS, [SHARD], step, reward=REWARD)
        sample = simulate(now, (step, 0), SHARD)
        metrics, applied = generator_update(now, [sample])
        expected = joint_gradients(generator, fake, real, numbers, sample, step)
        assert applied and set(metrics) == {"dmd_loss", "reward", "rl_grad_ratio"}
        for got, want in zip(captured.gradients, expected, strict=True):
            assert (got - want).norm() <= 1e-5 * want.norm()


def test_gradient_accumulation_equals_one_large_batch():
    gradients = []
    for shards in ([Shard(0, 6, 6)], [Shard(0, 2, 6), Shard(2, 4, 6), Shard(4, 6, 6)]):
        nets, *_ = networks()
        numbers = recipe(2, reward_weight=0.5)
        captured = Captured(nets.generator)
        captured.backward = lambda loss, last, count=len(shards): (loss / count).backward()  # noqa: B008
        nets = type(nets)(captured, nets.fake, nets.score)
        now = update(nets, numbers, STREAMS, shards, reward=REWARD)
        generator_update(now, [simulate(now, (0, 0), shard) for shard in shards])
        gradients.append(captured.gradients)
    for one, split in zip(*gradients, strict=True):
        torch.testing.assert_close(split, one, rtol=1e-5, atol=1e-7)


def stop_gradient(stops, monkeypatch):
    """The generator's gradient, flat, of one update whose micro-batches of 64 stop at ``stops``."""
    nets, *_ = networks()
    numbers, count = recipe(2, reward_weight=0.5), len(stops)
    captured = Captured(nets.generator)
    captured.backward = lambda loss, last: (loss / count).backward()
    nets = type(nets)(captured, nets.fake, nets.score)
    left = list(stops)
    monkeypatch.setattr(Streams, "stop_step", lambda *draw: left.pop(0))
    shards = [Shard(64 * m, 64 * m + 64, 64 * count) for m in range(count)]
    now = update(nets, numbers, STREAMS, shards, reward=REWARD)
    generator_update(now, [simulate(now, (0, 0), shard) for shard in shards])
    return torch.cat([g.flatten() for g in captured.gradients])


def test_a_stop_step_per_micro_step_is_unbiased_and_varies_less(monkeypatch):
    """Over all that can be drawn, the mean is that of one stop step per update, and the variance nears a third of it:
    there are three micro-steps. What differs between their samples keeps it from there."""
    one = torch.stack([stop_gradient((s,) * 3, monkeypatch) for s in range(2)])
    each = torch.stack([stop_gradient(s, monkeypatch) for s in itertools.product(range(2), repeat=3)])
    torch.testing.assert_close(each.mean(0), one.mean(0), rtol=1e-6, atol=1e-9)
    variance = [(g - g.mean(0)).square().sum(1).mean() for g in (one, each)]
    assert variance[1] < 0.6 * variance[0]


def test_micro_steps_draw_their_own_stop_steps_uniformly(monkeypatch):
    """Those of two micro-steps are independent; the first is the stop step of an update that does not accumulate."""
    shards = [Shard(0, 2, 8), Shard(4, 6, 8)]  # of rank 0 of 2
    places = stop_places(recipe(3), shards)
    assert list(places) == [0, 1]
    assert list(stop_places(recipe(3, stop_step_per="rank"), shards)) == [0, 2]
    assert list(stop_places(recipe(3, stop_step_per="rank"), [Shard(2, 4, 8), Shard(6, 8, 8)])) == [1, 3]
    assert list(stop_places(recipe(3), shards, group=2)) == [0, 0]
    drawn, stop_step = [], Streams.stop_step
    monkeypatch.setattr(Streams, "stop_step", lambda *draw: drawn.append(stop_step(*draw)) or 0)
    for step in range(900):
        now = update(Networks(lambda x, t, y: x, None, None), recipe(3), STREAMS, [SHARD], step)
        for place in places:
            simulate(now, (step, 0), SHARD, 1, place)
    assert drawn[::2] == [int(STREAMS.rng("stop", step, 0).integers(3)) for step in range(900)]
    counts = np.bincount(np.array(drawn).reshape(-1, 2) @ [3, 1], minlength=9)
    assert abs(counts - 100).max() < 4 * (900 * 8 / 81) ** 0.5


def test_a_rollout_serves_as_many_fake_updates_as_it_is_reused(monkeypatch):
    """R = 5, reused 2 times: rollouts for updates 0, 2 and 4, each update with its own times and noise."""
    monkeypatch.setattr(Streams, "stop_step", lambda streams, n, *draw: n - 1)
    seen, drawn = [], []

    def watched(now, samples, index):
        seen.append((index, samples[0].rollout.x0))
        return fake_update(now, samples, index)

    def data(index, shard, group=1):
        drawn.append(index)
        return labels(index, shard, group)

    monkeypatch.setattr("dmdr_fast.algorithm.step.fake_update", watched)
    nets, *_ = networks()
    dmdr_update(update(nets, recipe(2, fake_updates=5, rollout_reuse=2), STREAMS, [SHARD], 7, data))
    assert drawn == [(7, 0), (7, 2), (7, 4)]
    assert [index for index, _ in seen] == [(7, r) for r in range(5)]
    x0 = [x for _, x in seen]
    assert x0[0] is x0[1] and x0[2] is x0[3] and x0[4] is not x0[3] and not torch.equal(x0[1], x0[2])
    assert nets.generator.forwards == 3 * 2 + 1 and nets.fake.forwards == 5 + 1


@pytest.mark.parametrize("tilt", [Method(), ReFL()])
def test_rl_begins_when_the_cold_start_ends(tilt):
    nets, *_ = networks()
    numbers = recipe(1, cold_start_steps=2, reward_weight=0.5, tilt=tilt, tilt_weight=0.2)
    steps = [update(nets, numbers, STREAMS, [SHARD], step, reward=REWARD) for step in range(4)]
    tilted = tilt.uses_reward
    assert ["reward" in dmdr_update(now).metrics for now in steps] == [tilted, tilted, True, True]
    assert [now.rl for now in steps] == [False, False, True, True]
    assert [numbers.rl_weight(step) for step in range(4)] == [0.2, 0.2, 0.5, 0.5]


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_generator_forwards_per_update(steps, monkeypatch):
    """R truncated rollouts and one graded forward; the last rollout is shared with the generator update."""
    for stop in range(steps):
        monkeypatch.setattr(Streams, "stop_step", lambda *draw, stop=stop: stop)
        nets, *_ = networks()
        dmdr_update(update(nets, recipe(steps, fake_updates=3), STREAMS, [SHARD]))
        assert nets.generator.forwards == 3 * (stop + 1) + 1
        assert nets.fake.forwards == 3 + 1


@pytest.mark.parametrize("own", [None, RenoiseLaw("uniform", t_min=0.1, t_max=0.2, shift=3.0)])
def test_fake_update_descends_the_denoising_loss(own):
    """At times of the shared law, or of its own."""
    nets, _generator, fake, _ = networks()
    numbers = recipe(1, fake_updates=1, renoise=RenoiseLaw("uniform"), fake_renoise=own)
    fake_before = [p.detach().clone() for p in fake.parameters()]
    now = update(nets, numbers, STREAMS, [SHARD])
    sample = simulate(now, (0, 0), SHARD)
    x0, y = sample.rollout.x0.double(), sample.batch.condition
    t = STREAMS.times(own or numbers.renoise, "fake_t", 0, 0, step=0, shard=SHARD, device=CPU).double()
    assert own is None or (t.min() >= 0.25 and t.max() <= 3 / 7)  # 3 u / (1 + 2 u) of [0.1, 0.2]
    noise = STREAMS.noise("fake_noise", 0, 0, shape=SHAPE, shard=SHARD, device=CPU).double()
    sigma = t.view(-1, 1, 1, 1)
    loss = (fake((1 - sigma) * x0 + sigma * noise, t, y) - (noise - x0)).square().mean()
    expected = torch.autograd.grad(loss, list(fake.parameters()))
    metrics, _ = fake_update(now, [sample], (0, 0))
    assert metrics["fake_loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    for parameter, before, gradient in zip(fake.parameters(), fake_before, expected, strict=True):
        torch.testing.assert_close(parameter.detach(), before - 1e-2 * gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["flow", "eps", "x0"])
def test_score_matching_targets(kind):
    rng = torch.Generator().manual_seed(1)
    prediction, x0, noise = torch.randn(3, 4, 2, dtype=torch.float64, generator=rng).unbind()
    target = {"flow": noise - x0, "eps": noise, "x0": x0}[kind]
    expected = ((prediction - target) ** 2).sum().item() / 8
    assert score_matching_loss(prediction, x0, noise, kind).item() == pytest.approx(expected)


def test_shared_pass_equals_separate_calls_with_a_scale_per_sample():
    network = Denoiser(4)
    scale = torch.ones(1)

    def set_scale(value):
        scale.data = value

    def scaled(x, t, y):
        return network(x, t, y) * scale.view(-1, 1, 1, 1)

    x = torch.randn(5, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    t, y = torch.rand(5, generator=torch.Generator().manual_seed(3)), torch.tensor([0, 1, 2, 0, 1])
    null = torch.full_like(y, CLASSES)
    shared = shared_scores(scaled, set_scale, fake_scale=2.0)
    for uncond in (None, null):
        out = scores_at(shared, x, t, y, uncond, real_scale=0.25)
        torch.testing.assert_close(out.fake, 2.0 * network(x, t, y))
        torch.testing.assert_close(out.real, 0.25 * network(x, t, y))
        if uncond is None:
            assert out.real_uncond is None
        else:
            torch.testing.assert_close(out.real_uncond, 0.25 * network(x, t, null))
    separate = scores_at(separate_scores(network, network), x, t, y, null, real_scale=0.0)
    torch.testing.assert_close(separate.real_uncond, network(x, t, null))
    with pytest.raises(ValueError, match="real_scale must be 0"):
        scores_at(separate_scores(network, network), x, t, y, null, real_scale=0.5)
