"""The eager counterparts compute what the ops do: compared in float64, values and gradients."""

import importlib
from pathlib import Path

import pytest
import torch

import benchmarks
from benchmarks.bench_preprocess_reward import RewardPreprocessing
from dmdr_fast import ops
from tests.cases import OPS, valid_calls


@pytest.fixture(autouse=True)
def draws():
    torch.manual_seed(0)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


FILES = [
    importlib.import_module(f"benchmarks.{path.stem}") for path in Path(benchmarks.__file__).parent.glob("bench_*.py")
]
# An op's counterpart has its name, in the file of one of its benchmarks.
EAGER = {name: getattr(file, name) for file in FILES for name in ops.__all__ if name in vars(file)}
# Those that compute something else: the rotation's rows, noise of their own, plain PyTorch.
APART = {"qk_norm_rope", "grpo_loss"}
# As the trainers that the counterparts are of have it.
OPTIONS = {"sde_step_logprob": {"kind": "flow_grpo", "eta": 0.7}}
DIFFERENTIATED = {op: about.wrt for op, about in OPS.items() if about.wrt} | {"sde_step_logprob": "v"}


def flat(result):
    """All floating tensors of a result, nested tuples opened."""
    if isinstance(result, torch.Tensor):
        return [result]
    return [tensor for part in result for tensor in flat(part)]


def plain(name):
    """The eager counterpart of an op."""
    if name != "preprocess_reward":
        return EAGER[name]
    return lambda image, size, mean, std: RewardPreprocessing(mean, std)(image, size)


@pytest.mark.parametrize("name", sorted(DIFFERENTIATED.keys() - APART))
def test_same_values_and_gradients(name):
    call, wrt = valid_calls(torch.float64)[name] | OPTIONS.get(name, {}), DIFFERENTIATED[name].split()
    for argument in wrt:
        call[argument].requires_grad_()
    # Eager resizes, rotates and casts to float32 in places, as trainers do.
    tolerance = {"rtol": 1e-4, "atol": 1e-5}
    results = [flat(function(**call)) for function in (getattr(ops, name), plain(name))]
    torch.testing.assert_close([r.double() for r in results[0]], [r.double() for r in results[1]], **tolerance)
    grads = [
        torch.autograd.grad(sum(r.sin().sum() for r in out if r.requires_grad), [call[a] for a in wrt])
        for out in results
    ]
    torch.testing.assert_close(grads[0], grads[1], **tolerance)


def test_rotation_of_queries_and_keys():
    tensors = {"q": normal(2, 5, 3, 8), "k": normal(2, 5, 3, 8), "q_weight": normal(8), "k_weight": normal(8)}
    angle = normal(5, 4).repeat_interleave(2, dim=-1)
    table, results = {"cos": angle.cos(), "sin": angle.sin()}, []
    for function in (ops.qk_norm_rope, EAGER["qk_norm_rope"]):
        results.append(function(**tensors, **table))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_unseeded_noise_is_standard_normal():
    like = torch.empty(200_000)
    noise = EAGER["normal_noise"](like, None)
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    x0, half = torch.zeros(2, 100_000), torch.tensor([0.5, 0.25])
    assert EAGER["renoise"](x0, 1 - half, half).std(1).tolist() == pytest.approx(half.tolist(), rel=0.02)
