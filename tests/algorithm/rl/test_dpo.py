"""The DPO loss against the formula in hand-written fp64."""

import math

import pytest
import torch

from dmdr_fast.algorithm.paths import FLOW
from dmdr_fast.algorithm.rl.dpo import DPO
from dmdr_fast.algorithm.rl.preference import dpo_loss
from dmdr_fast.algorithm.rollout import ode_sample
from dmdr_fast.algorithm.streams import Shard, Streams

from ..networks import SHAPE, Denoiser, networks, recipe, reward_model, update

P = 4
RNG = torch.Generator().manual_seed(6)
ONE, OTHER, NOISE = torch.randn(3, P, *SHAPE, dtype=torch.float64, generator=RNG)
FIRST = torch.tensor([True, False, True, False]).view(-1, 1, 1, 1)
W, L = torch.where(FIRST, ONE, OTHER), torch.where(FIRST, OTHER, ONE)
T = torch.tensor([1.0, 0.7, 0.3, 0.05])
Y = torch.tensor([0, 1, 2, 0])
BETA = 3.0


class VariancePreserving:
    def alpha_sigma(self, t):
        return (1 - t * t).sqrt(), t


def by_hand(generator, reference, prediction, vp):
    """The loss, and the sigmoid's arguments, one pair after the other."""
    arguments = []
    for i in range(P):
        t = T[i : i + 1].double()
        alpha, sigma = (1 - t * t).sqrt() if vp else 1 - t, t
        difference = []
        for x0 in (W[i : i + 1], L[i : i + 1]):
            noise = NOISE[i : i + 1]
            x_t = alpha * x0 + sigma * noise
            target = {"flow": noise - x0, "eps": noise, "x0": x0}[prediction]
            e, e_ref = (((f(x_t, T[i : i + 1], Y[i : i + 1]) - target) ** 2).mean() for f in (generator, reference))
            difference.append(e - e_ref.detach())
        arguments.append(-BETA / 2 * (difference[0] - difference[1]))
    arguments = torch.stack(arguments)
    return -torch.log(1 / (1 + torch.exp(-arguments))).mean(), arguments.detach()


@pytest.mark.parametrize(("prediction", "vp"), [("flow", False), ("eps", True), ("eps", False), ("x0", False)])
def test_loss_gradient_and_stats(prediction, vp):
    generator, reference = Denoiser(1), Denoiser(2)
    path = VariancePreserving() if vp else FLOW
    got, stats = dpo_loss(generator, reference, W, L, T, NOISE, Y, DPO(beta=BETA), prediction=prediction, path=path)
    expected, arguments = by_hand(generator, reference, prediction, vp)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)  # the path's coefficients are fp32
    gradients = (torch.autograd.grad(value, list(generator.parameters())) for value in (got, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert 0 < (arguments > 0).double().mean() < 1
    assert stats["accuracy"].item() == pytest.approx((arguments > 0).double().mean().item())
    torch.testing.assert_close(stats["margin"], arguments.mean(), rtol=1e-6, atol=1e-6)


def test_gradcheck():
    generator, reference = Denoiser(1, width=3), Denoiser(2, width=3)

    def loss(label):
        call = lambda x, t, y: torch.func.functional_call(generator, {"label": label}, (x, t, y))  # noqa: E731
        return dpo_loss(call, reference, W, L, T, NOISE, Y, DPO(beta=BETA))[0]

    assert torch.autograd.gradcheck(loss, generator.label.detach().clone().requires_grad_())


def test_a_generator_that_is_its_reference_has_loss_log_two():
    network = Denoiser(1, dtype=torch.float32)
    pair = (W.float(), L.float(), T, NOISE.float(), Y)
    loss, stats = dpo_loss(network, network, *pair, DPO())
    assert loss.item() == pytest.approx(math.log(2)) and stats["margin"] == 0 and stats["accuracy"] == 0


def test_a_sample_against_itself_has_no_gradient():
    generator, reference = Denoiser(1), Denoiser(2)
    loss, _ = dpo_loss(generator, reference, W, W, T, NOISE, Y, DPO())
    assert all((g.abs() < 1e-12).all() for g in torch.autograd.grad(loss, list(generator.parameters())))


def test_a_large_margin_does_not_overflow():
    generator, reference = Denoiser(1, dtype=torch.float32), Denoiser(2, dtype=torch.float32)
    loss, _ = dpo_loss(generator, reference, W.float(), L.float(), T, NOISE.float(), Y, DPO(beta=1e6))
    assert loss.isfinite() and loss > 100
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, list(generator.parameters())))


def test_one_batch_for_each_network_the_reference_first_without_grad():
    seen = []

    def named(name, network):
        return lambda x, t, y: seen.append((name, torch.is_grad_enabled(), len(x))) or network(x, t, y)

    dpo_loss(named("generator", Denoiser(1)), named("reference", Denoiser(2)), W, L, T, NOISE, Y, DPO(beta=BETA))
    assert seen == [("reference", False, 2 * P), ("generator", True, 2 * P)]


def test_errors_of_bf16_predictions_are_summed_in_fp32():
    """The errors of a pair differ by less than bf16 can tell; the loss is that of the rounded predictions in fp64."""
    networks = [Denoiser(1, dtype=torch.bfloat16), Denoiser(2, dtype=torch.bfloat16)]
    x0_w, x0_l, noise = W.float(), (W + 1e-3).float(), NOISE.float()
    loss, stats = dpo_loss(*networks, x0_w, x0_l, T, noise, Y, DPO(beta=1e3))
    gaps = []
    for network in networks:
        t = T.view(-1, 1, 1, 1)
        errors = [
            (network((1 - t) * x0 + t * noise, T, Y).double() - (noise.double() - x0.double())).square().mean((1, 2, 3))
            for x0 in (x0_w, x0_l)
        ]
        gaps.append(errors[0] - errors[1])
    arguments = -500 * (gaps[0] - gaps[1])
    assert loss.dtype is torch.float32 and (arguments.abs() > 1e-2).all()
    torch.testing.assert_close(stats["margin"].double(), arguments.mean(), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(loss.double(), torch.nn.functional.softplus(-arguments).mean(), rtol=1e-2, atol=1e-3)


def test_pairs_are_drawn_by_the_student_s_sampler():
    nets, *_ = networks()
    numbers = recipe(3, eta=0.0, method=DPO(group_size=3))
    score = reward_model(lambda x: x, lambda images, labels: images.flatten(1).sum(1))
    now = update(nets, numbers, Streams(2), [Shard(0, 6, 6)], reward=score)
    (scored,) = numbers.method.collect(now).scored
    first = now.streams.noise("rl_rollout", 0, 0, shape=numbers.latent_shape, shard=now.shards[0], device=now.device)
    y = now.data((0, 2), now.shards[0], 3).condition
    torch.testing.assert_close(scored.x0, ode_sample(nets.generator, first, y, 3), rtol=1e-5, atol=1e-5)


def test_an_unknown_prediction_is_refused():
    with pytest.raises(ValueError, match="kind must be flow, eps or x0, got 'v'"):
        dpo_loss(Denoiser(1), Denoiser(2), W, L, T, NOISE, Y, DPO(), prediction="v")
