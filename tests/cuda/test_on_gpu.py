"""How calls behave on a device: streams, CUDA graphs, several devices, and through the public ops."""

from __future__ import annotations

import pytest
import torch

from dmdr_fast import ops
from tests.cuda.test_dmd_gradient import arguments, check, latents
from tests.raw import RawFunctions

reference = RawFunctions(None)

pytestmark = pytest.mark.gpu


def on_device(args: tuple, device: str = "cuda") -> list:
    return [arg.to(device) if isinstance(arg, torch.Tensor) else arg for arg in args]


def test_calls_wait_for_the_work_before_them_on_their_stream(on_gpu):
    args = on_device(arguments(latents(8, 262144)))
    expected = on_gpu.functions.dmd_gradient_fwd(*args)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = [torch.zeros_like(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]
        torch.cuda._sleep(50_000_000)  # the inputs arrive late: a kernel on another stream would read zeros
        for value, given in zip(late, args, strict=True):
            if isinstance(value, torch.Tensor):
                value.copy_(given)
        results = on_gpu.functions.dmd_gradient_fwd(*late)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_a_graph_replays_every_op(on_gpu):
    backend = on_gpu.functions
    gradient = on_device(arguments(latents(2, 65536)))
    image, seed = torch.randn(2, 3, 256, 256, device="cuda").bfloat16(), torch.tensor([1, 2], device="cuda")
    x = torch.randn(2, 77, 1152, device="cuda").bfloat16()
    shift, scale = (torch.randn(2, 1, 1152, device="cuda").bfloat16() for _ in range(2))

    def everything() -> list[torch.Tensor]:
        results = [*backend.dmd_gradient_fwd(*gradient), backend.normal_noise_fwd([4, 1000], seed, 0, torch.float32)]
        out, inside = backend.preprocess_reward_fwd(image, 224, 224, [0.5] * 3, [0.5] * 3, True, -1.0, 1.0, True)
        results += [out, backend.preprocess_reward_bwd(out, inside, 256, [0.5] * 3, True, -1.0, 1.0, image.dtype)]
        y, mean, rstd = backend.layer_norm_modulate_fwd(x, shift, scale, 1e-6, x.dtype)
        return [*results, y, *backend.layer_norm_modulate_bwd(y, x, scale, mean, rstd, 1e-6, x.dtype, True, True)]

    expected = everything()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything()
    for _ in range(3):
        for value in captured:
            value.fill_(7)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_tensors_of_another_device_than_the_current_one(on_gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    args = arguments(latents(2, 65536))
    results = on_gpu.functions.dmd_gradient_fwd(*on_device(args, "cuda:1"))
    assert torch.cuda.current_device() == 0 and results[0].device.index == 1
    check(tuple(result.cpu() for result in results), args)


def test_the_public_ops_take_it_when_asked(on_gpu, monkeypatch):
    monkeypatch.setenv("DMDR_FAST_BACKEND", "cuda")
    monkeypatch.setenv("DMDR_FAST_STRICT", "1")
    x0 = torch.randn(2, 4, 64, 64, device="cuda", requires_grad=True)
    others = [torch.randn(2, 4, 64, 64, device="cuda") for _ in range(3)]
    loss = ops.dmd_loss(x0, *others, sigma=0.5)
    loss.backward()
    gradient = ops.dmd_gradient(x0.detach(), *others, sigma=0.5)
    torch.testing.assert_close(x0.grad, gradient.grad / x0.numel())
    assert ops.explain("renoise", x0, 0.5, 0.5, seed=torch.tensor([1, 2], device="cuda")).backend == "cuda"


def test_a_large_batch_of_noise_is_right(on_gpu):
    seed = torch.tensor([5, 6], device="cuda")
    noise = on_gpu.functions.normal_noise_fwd([1 << 22], seed, 0, torch.float32)
    truth = reference.normal_noise_fwd([1 << 22], seed, 0, torch.float64)
    assert (noise.double() - truth).abs().max() < 1e-6
