"""NFT against hand-written fp64, gradcheck and closed forms of Gaussian policies."""

import pytest
import torch

from dmdr_fast.algorithm.recipe import Networks
from dmdr_fast.algorithm.rl.forward_process import nft_loss
from dmdr_fast.algorithm.rl.method import Setting
from dmdr_fast.algorithm.rl.nft import NFT
from dmdr_fast.algorithm.rollout import sample
from dmdr_fast.algorithm.schedules import timestep_grid
from dmdr_fast.algorithm.step import dmdr_update
from dmdr_fast.algorithm.streams import Shard, Streams

from ..networks import CLASSES, SHAPE, Denoiser, PlainRole, recipe, reward_model, update
from .gaussians import Mean

CPU = torch.device("cpu")
RNG = torch.Generator().manual_seed(4)
V, OLD, GOAL = (torch.randn(5, *SHAPE, dtype=torch.float64, generator=RNG) for _ in range(3))
BETTER = torch.tensor([1.0, -1.0, 0.0, 0.4, -0.7], dtype=torch.float64)
MIX = torch.randn(SHAPE[0] * 16, CLASSES, generator=RNG, dtype=torch.float64)


def by_hand(v, old, goal, better, beta):
    """The paper's formula, sample by sample."""
    total = 0.0
    for i, a in enumerate(better.tolist()):
        r, plus, minus = 0.5 + a / 2, (1 - beta) * old[i] + beta * v[i], (1 + beta) * old[i] - beta * v[i]
        total = total + r * ((plus - goal[i]) ** 2).mean() + (1 - r) * ((minus - goal[i]) ** 2).mean()
    return total / len(better)


@pytest.mark.parametrize("beta", [0.1, 1.0, 2.0])
def test_loss(beta):
    v, old = V.clone().requires_grad_(), OLD.clone().requires_grad_()
    loss, errors = nft_loss(v, old, GOAL, BETTER, beta)
    expected = by_hand(v, OLD, GOAL, BETTER, beta)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, v)[0], torch.autograd.grad(expected, v)[0])
    torch.testing.assert_close(errors, (V - GOAL).square().mean((1, 2, 3)))
    assert not old.grad and not errors.requires_grad
    assert torch.autograd.gradcheck(lambda x: nft_loss(x, OLD, GOAL, BETTER, beta)[0], v)


def test_at_the_old_prediction_the_gradient_is_the_signed_denoising_losss():
    v = V.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(nft_loss(v, v.detach(), GOAL, BETTER, 0.3)[0], v)
    torch.testing.assert_close(gradient, 2 * 0.3 * BETTER.view(-1, 1, 1, 1) * (V - GOAL) / V.numel())


def test_bf16_is_computed_in_fp32():
    given = [x.bfloat16() for x in (V, OLD, GOAL)]
    loss, _ = nft_loss(*given, BETTER.float(), 0.5)
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss.double(), by_hand(*(x.double() for x in given), BETTER, 0.5), rtol=1e-6, atol=0)


def rewards(images, labels):
    return torch.log_softmax(images.double().flatten(1) @ MIX, -1).gather(1, labels[:, None])[:, 0]


@pytest.mark.parametrize("times", ["grid", "renoise"])
@pytest.mark.parametrize("parts", [1, 2])
def test_an_update_is_the_formula_on_the_generators_own_samples(times, parts):
    """Micro-batches of one batch or of two; N forwards of each without grad and one with."""
    generator, numbers = Denoiser(1), NFT(group_size=2, beta=0.5, times=times)
    role = PlainRole(generator, lr=1e-2)
    role.backward = lambda loss, *, last: (loss / parts).backward()
    shards, whole = [Shard(i * 4 // parts, (i + 1) * 4 // parts, 4) for i in range(parts)], Shard(0, 4, 4)
    recipe_ = recipe(3, method=numbers, reward_weight=0.7, regularizer="none")
    reward = reward_model(lambda x: x, rewards)
    now = update(Networks(role, None, None), recipe_, Streams(3), shards, reward=reward)
    metrics = dmdr_update(now).metrics
    assert role.forwards == parts * (3 + numbers.graded_forwards(3)) and {"reward", "kept"} <= set(metrics)

    truth, old, streams = Denoiser(1), Denoiser(1), now.streams
    y = now.data((0, 2), whole, 2).condition
    x0 = sample(
        old,
        lambda i: streams.noise("rl_rollout", 0, i, shape=SHAPE, shard=whole, device=CPU),
        y,
        timestep_grid(3),
    ).double()
    found = rewards(x0, y).view(2, 2)
    a = ((found - found.mean(1, keepdim=True)) / (found.std(1, correction=0, keepdim=True) + 1e-4)).flatten()
    if times == "grid":
        t = torch.tensor([timestep_grid(3)[i] for i in streams.rng("nft_t", 0).integers(3, size=4)])
    else:
        t = streams.times(recipe_.renoise, "nft_t", 0, step=0, shard=whole, device=CPU)
    noise = streams.noise("nft_noise", 0, shape=SHAPE, shard=whole, device=CPU).double()
    sigma = t.double().view(-1, 1, 1, 1)
    x_t = (1 - sigma) * x0 + sigma * noise
    loss = 0.7 * by_hand(truth(x_t, t, y), old(x_t, t, y).detach(), noise - x0, a.clamp(-1, 1), 0.5)
    gradients = torch.autograd.grad(loss, list(truth.parameters()))
    for got, start, gradient in zip(generator.parameters(), old.parameters(), gradients, strict=True):
        torch.testing.assert_close(got - start, -1e-2 * gradient, rtol=1e-4, atol=1e-9)  # x0 and noise are fp32
    assert metrics["nft_error"] > 0


def test_a_group_all_alike_has_no_gradient():
    generator = Denoiser(1)
    recipe_ = recipe(1, method=NFT(group_size=2), reward_weight=1.0, regularizer="none")
    reward = reward_model(lambda x: x, lambda images, labels: torch.zeros(len(images)))
    now = update(Networks(PlainRole(generator), None, None), recipe_, Streams(3), [Shard(0, 4, 4)], reward=reward)
    assert dmdr_update(now).metrics["kept"] == 0
    for got, start in zip(generator.parameters(), Denoiser(1).parameters(), strict=True):
        torch.testing.assert_close(got, start, rtol=0, atol=1e-15)


def test_another_prediction_is_refused():
    assert not list(NFT().problems(Setting(1, "dmd", None, False, "sit", "flow")))
    words = "rl.method: nft is of flow matching and SDXL predicts eps; take refl or dpo"
    assert list(NFT().problems(Setting(1, "dmd", None, False, "sdxl", "eps"))) == [words]
    assert next(NFT(group_size=1).problems(Setting(1, "dmd", None, False, "sit", "flow"))).startswith("rl.nft.group")


START, END = torch.tensor([0.5, -0.25]), torch.tensor([1.5, 0.75])


def ends(numbers, score, steps=1, size=1024, updates=30, lr=0.5, **changes):
    """Where updates take the policy x0 = noise + mu; the mean of the last two thirds."""
    policy, path = Mean(START), []
    recipe_ = recipe(steps, latent_shape=(2,), method=numbers, reward_weight=1.0, **changes)
    reward = reward_model(lambda x: x, lambda images, labels: score(images))
    nets = Networks(PlainRole(policy, lr=lr), None, None, reference=Mean(START))
    for i in range(updates):
        dmdr_update(update(nets, recipe_, Streams(1), [Shard(0, size, size)], step=i, reward=reward))
        path.append(policy.mu.detach().clone())
    return torch.stack(path[updates // 3 :]).mean(0)


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_it_ends_where_the_reward_is_highest(beta):
    """The expected gradient is -b E[clip(A) (x0 - mu)], 0 only where the reward is symmetric about mu."""
    score = lambda x: -0.5 * (x - END).square().sum(1)  # noqa: E731
    got = ends(NFT(beta=beta), score, updates=45, lr=1.0 / beta, regularizer="none")
    torch.testing.assert_close(got, END, rtol=0, atol=0.05)


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_with_a_kl_it_ends_as_far_from_the_reference_as_its_weights_say(beta):
    """A linear reward with |A| < 1, A = R - group mean: -b (1 - 1/K) slope + kl (mu - start) / 2 = 0."""
    slope, kl_weight = torch.tensor([0.2, 0.1]), 0.4
    got = ends(
        NFT(group_size=8, beta=beta, std="none"), lambda x: x @ slope, regularizer="kl", kl_weight=kl_weight, lr=2.0
    )
    torch.testing.assert_close(got, START + 2 * beta * (1 - 1 / 8) * slope / kl_weight, rtol=0, atol=0.06)
