"""Peak memory of the generator update: leaf gradients against one joint graph, measured."""

import gc

import torch

from dmdr_fast import ops
from dmdr_fast.algorithm.recipe import Batch, Networks
from dmdr_fast.algorithm.rl.refl import ReFL
from dmdr_fast.algorithm.rl.reward_gradient import refl_leaf_gradient
from dmdr_fast.algorithm.rollout import clean_sample
from dmdr_fast.algorithm.score_pass import scores_at, shared_scores
from dmdr_fast.algorithm.simulation import simulate
from dmdr_fast.algorithm.step import generator_update
from dmdr_fast.algorithm.streams import Shard, Streams
from dmdr_fast.models.lora import add_lora
from dmdr_fast.models.sit import SiT

from .memory import PeakMemory
from .networks import PlainRole, recipe, reward_model, update

CPU = torch.device("cpu")
SHARD = Shard(0, 4, 4)
STREAMS = Streams(1)


def setup():
    torch.manual_seed(0)
    size = {"input_size": 16, "in_channels": 4, "hidden_size": 64, "depth": 4, "num_heads": 4, "num_classes": 10}
    generator, base = SiT(**size), SiT(**size)
    for network in (generator, base):
        torch.nn.init.normal_(network.final_layer.linear.weight, std=0.05)
    base.requires_grad_(False)
    adapter = add_lora(base, "fake", rank=4, targets=["attn.qkv"])
    decoder = torch.nn.Sequential(  # 8x upsampling like a VAE decoder's: its graph is the larger one
        *(
            m
            for c in (4, 16, 16)
            for m in (torch.nn.Conv2d(c, 16, 3, padding=1), torch.nn.SiLU(), torch.nn.Upsample(scale_factor=2))
        ),
        torch.nn.Conv2d(16, 3, 3, padding=1),
    ).requires_grad_(False)
    reward = reward_model(decoder, lambda images, labels: -images.square().flatten(1).mean(1))
    score = shared_scores(base, adapter.set_scale, fake_scale=2.0)
    generator_role = PlainRole(generator)
    nets = Networks(generator_role, PlainRole(base, before=lambda: adapter.set_scale(2.0)), score)
    return nets, generator, reward


def data(index, shard, group=1):
    y = torch.arange(shard.start, shard.stop) % 10
    return Batch(y, torch.full_like(y, 10), y, {"labels": y})


def joint_update(nets, generator, reward, numbers, sample):
    """The reference's structure: generator, score pass and reward in one graph, one backward."""
    r, y = sample.rollout, sample.batch.condition
    x0 = clean_sample(r.x_in, r.t_in, generator(r.x_in, r.t_in, y))
    images = reward.decode(x0)
    loss = -numbers.reward_weight * reward.score(images, {"labels": y}, "")[0].mean()
    t = STREAMS.times(numbers.renoise, "dmd_t", 0, step=0, shard=SHARD, device=CPU)
    x_t = ops.renoise(x0, 1 - t, t, seed=STREAMS.noise_seed("dmd_noise", 0, device=CPU))
    scores = scores_at(nets.score, x_t.detach(), t, y, None, real_scale=0.0)
    loss = loss + ops.dmd_loss(x0, x_t.detach(), scores.fake, scores.real, sigma=t)
    nets.generator.backward(loss, last=True)
    nets.generator.step()


def test_leaf_gradients_peak_below_the_joint_loss():
    peaks = {}
    for name in ("leaf", "joint"):
        nets, generator, reward = setup()
        numbers = recipe(1, latent_shape=(4, 16, 16), reward_weight=0.1, method=ReFL(chunk=1))
        now = update(nets, numbers, STREAMS, [SHARD], data=data, reward=reward)
        sample = simulate(now, (0, 0), SHARD)
        gc.collect()
        with PeakMemory() as memory:
            if name == "leaf":
                generator_update(now, [sample])
            else:
                joint_update(nets, generator, reward, numbers, sample)
        peaks[name] = memory.peak
    print(f"peak of the generator update: leaf {peaks['leaf'] / 2**20:.1f} MiB, joint {peaks['joint'] / 2**20:.1f} MiB")
    assert peaks["leaf"] < 0.75 * peaks["joint"]


def peak_of(function):
    """(result, peak bytes) of a call."""
    gc.collect()
    with PeakMemory() as memory:
        result = function()
    return result, memory.peak


def test_refl_by_the_sample_peaks_at_one_samples_reward_and_the_generators_own_graph():
    nets, generator, reward = setup()
    rows = torch.arange(8)
    noise, t, y = torch.randn(8, 4, 16, 16), torch.ones(8), rows % 10

    def score(images, rows):
        return reward.score(images, {"labels": y[rows]}, "")[0]

    def sample():
        return clean_sample(noise, t, generator(noise, t, y))

    def update(chunk):
        with torch.no_grad():
            x0 = sample()
        gradient, _ = refl_leaf_gradient(x0, reward.decode, score, ReFL(chunk=chunk))
        nets.generator.backward((sample() * gradient).sum(), last=True)

    update(1)  # the gradients' own buffers are there from now on
    leaf = torch.randn(1, 4, 16, 16, requires_grad=True)
    _, one = peak_of(lambda: torch.autograd.grad(score(reward.decode(leaf), slice(0, 1)).sum(), leaf))
    _, own = peak_of(lambda: nets.generator.backward(sample().sum(), last=True))
    _, by_one = peak_of(lambda: update(1))
    _, whole = peak_of(lambda: update(8))
    print(
        f"ReFL, batch 8: {by_one / 2**20:.1f} MiB by the sample, {whole / 2**20:.1f} at once; {one / 2**20:.1f} + "
        f"{own / 2**20:.1f} for one sample's decode and reward and for the generator"
    )
    assert by_one <= 1.25 * (one + own)
    assert whole > 1.25 * (one + own)  # what the chunks save
