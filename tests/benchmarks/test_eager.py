"""The eager counterparts compute what the ops do: compared in float64, values and gradients."""

import pytest
import torch

from benchmarks import eager
from dmdr_fast import ops


@pytest.fixture(autouse=True)
def draws():
    torch.manual_seed(0)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def latents(*names):
    return {name: normal(3, 4, 5, 6) for name in names}


def tokens():
    return {"x": normal(2, 5, 8), "shift": normal(2, 8), "scale": normal(2, 8)}


def sigma():
    return torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)


CALLS = {
    "renoise": (lambda: latents("x0", "noise") | {"alpha": 1 - sigma(), "sigma": sigma()}, {}, ["x0"]),
    "dmd_loss": (
        lambda: latents("x0", "x_t", "pred_fake", "pred_real", "pred_real_uncond") | {"sigma": sigma()},
        {"cfg_scale": 4.0},
        ["x0"],
    ),
    "preprocess_reward": (
        lambda: {"image": normal(2, 3, 40, 33)},
        {"size": 16, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)},
        ["image"],
    ),
    "sde_step_logprob": (
        lambda: latents("x", "v", "next_sample") | {"sigma": sigma(), "sigma_next": sigma() / 2},
        {"kind": "flow_grpo", "eta": 0.7},
        ["v"],
    ),
    "grpo_loss": (
        lambda: {"logprob": 1e-3 * normal(9), "old_logprob": 1e-3 * normal(9), "advantage": 4 * normal(9)},
        {"clip_low": 1e-3, "clip_high": 1e-3},
        ["logprob"],
    ),
    "layer_norm_modulate": (tokens, {}, ["x", "shift", "scale"]),
    "gated_residual": (
        lambda: {"x": normal(2, 5, 8), "h": normal(2, 5, 8), "gate": normal(2, 8)},
        {},
        ["x", "h", "gate"],
    ),
    "gated_residual_layer_norm_modulate": (
        lambda: tokens() | {"h": normal(2, 5, 8), "gate": normal(2, 8)},
        {},
        ["x", "h", "gate", "shift", "scale"],
    ),
    "rms_norm_scale": (
        lambda: {"x": normal(2, 5, 8), "weight": normal(8), "scale": normal(2, 8)},
        {},
        ["x", "weight", "scale"],
    ),
    "gated_residual_rms_norm": (
        lambda: {"x": normal(2, 5, 8), "h": normal(2, 5, 8), "gate": normal(2, 8), "weight": normal(8)},
        {},
        ["x", "h", "gate", "weight"],
    ),
    "gelu_mul": (lambda: {"packed": normal(2, 5, 8)}, {}, ["packed"]),
    "silu_mul": (lambda: {"packed": normal(2, 5, 8)}, {}, ["packed"]),
    "multi_lora": (
        lambda: {
            "x": normal(3, 5, 8),
            "base_out": normal(3, 5, 6),
            "A": normal(8, 2),
            "B": normal(2, 6),
            "scale": sigma(),
        },
        {},
        ["x", "base_out", "A", "B"],
    ),
}


def flat(result):
    """All floating tensors of a result, nested tuples opened."""
    if isinstance(result, torch.Tensor):
        return [result]
    return [tensor for part in result for tensor in flat(part)]


def plain(name):
    """The eager counterpart of an op."""
    if name != "preprocess_reward":
        return getattr(eager, name)
    return lambda image, size, mean, std: eager.RewardPreprocessing(mean, std)(image, size)


@pytest.mark.parametrize("name", CALLS)
def test_same_values_and_gradients(name):
    draw, options, wrt = CALLS[name]
    tensors = draw()
    for argument in wrt:
        tensors[argument].requires_grad_()
    # Eager resizes, rotates and casts to float32 in places, as trainers do.
    tolerance = {"rtol": 1e-4, "atol": 1e-5}
    results = [flat(function(**tensors, **options)) for function in (getattr(ops, name), plain(name))]
    torch.testing.assert_close([r.double() for r in results[0]], [r.double() for r in results[1]], **tolerance)
    grads = [
        torch.autograd.grad(sum(r.sin().sum() for r in out if r.requires_grad), [tensors[a] for a in wrt])
        for out in results
    ]
    torch.testing.assert_close(grads[0], grads[1], **tolerance)


def test_rotation_of_queries_and_keys():
    tensors = {"q": normal(2, 5, 3, 8), "k": normal(2, 5, 3, 8), "q_weight": normal(8), "k_weight": normal(8)}
    angle = normal(5, 4).repeat_interleave(2, dim=-1)
    table, results = {"cos": angle.cos(), "sin": angle.sin()}, []
    for function in (ops.qk_norm_rope, eager.qk_norm_rope):
        results.append(function(**tensors, **table))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_unseeded_noise_is_standard_normal():
    like = torch.empty(200_000)
    noise = eager.normal_noise(like, None)
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    x0, half = torch.zeros(2, 100_000), torch.tensor([0.5, 0.25])
    assert eager.renoise(x0, 1 - half, half).std(1).tolist() == pytest.approx(half.tolist(), rel=0.02)
