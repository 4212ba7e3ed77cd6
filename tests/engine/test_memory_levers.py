"""The memory levers in the engine: the same numbers with less, the measured effect of 8 bits, and clear refusals."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmdr_fast import cli, preflight
from dmdr_fast.algorithm.dmd import DMDOptions
from dmdr_fast.config import AdamW
from dmdr_fast.engine import compute, runtime
from dmdr_fast.engine.memory import Probe, check_levers, dmd_gradient_change
from dmdr_fast.engine.optimizers import build_optimizer
from dmdr_fast.engine.shards import save_generator
from dmdr_fast.errors import UserError
from dmdr_fast.models.sit import SiT, load_sit_weights
from tests.engine.memory_worker import SIZES
from tests.engine.test_roles import inputs, roles_of
from tests.tiers import sampled
from tests.two_ranks import run_two_ranks

WORKER = Path(__file__).with_name("memory_worker.py")


@pytest.fixture(scope="module")
def ranks():
    return runtime.start()


def config_of(tmp_path, *flags):
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "teacher.pt").touch()
    given = ["--teacher.weights", str(tmp_path / "teacher.pt"), "--rl.method", "none", *flags]
    return cli.parse(["--config", str(tmp_path / "empty.yaml"), *given])[0]


def trained_weights(roles):
    """Both trained roles after one update each, as rank 0 of one sees them."""
    x, t, y = inputs()
    for role in (roles.generator, roles.fake):
        role.set_lr([1e-2])
        role.backward((role(x, t, y) * x).mean(), last=True)
        assert role.step()
    with torch.no_grad():
        return torch.stack([role(x, t, y) for role in (roles.generator, roles.fake)])


@pytest.mark.parametrize("stage", sampled(["3", "0"]))
def test_activation_modes_train_the_same_weights(ranks, tmp_path, stage):
    outputs = [
        trained_weights(roles_of(ranks, tmp_path, "--deepspeed.stage", stage, "--memory.activation", mode)[1])
        for mode in ("none", "selective", "offload")
    ]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(outputs[2], outputs[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("stage", "mode", "frozen"), sampled([("2", "selective", "native"), ("3", "offload", "int8")]))
def test_compiled_blocks_train_the_same_weights(ranks, tmp_path, monkeypatch, stage, mode, frozen):
    """A LoRA on a frozen base, captured as it is compiled and run as it is."""
    monkeypatch.setattr(compute, "BACKEND", "eager")
    monkeypatch.setattr(torch._logging._internal.trace_log, "propagate", False)  # pytest would keep megabytes of it
    options = ("--deepspeed.stage", stage, "--memory.frozen", frozen)
    eager = roles_of(ranks, tmp_path, *options, "--compute.blocks", "eager")[1]
    compiled = roles_of(ranks, tmp_path, *options, "--compute.blocks", "compiled", "--memory.activation", mode)[1]
    graphs = compute.compiled_graphs()
    want, got = (trained_weights(roles) for roles in (eager, compiled))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert compute.compiled_graphs() > graphs
    torch._dynamo.reset()


@pytest.mark.thorough
def test_cpu_offload_by_the_deepspeed_json_trains_the_same_weights(ranks, tmp_path):
    """Parameters and optimizer states offloaded; DeepSpeed's AdamW in torch, since its own would be compiled here."""
    optimizer = {"type": "AdamW", "params": {"torch_adam": True, "lr": "auto"}}
    cpu = {"device": "cpu", "pin_memory": False}
    outputs = []
    for zero in ({}, {"offload_optimizer": cpu, "offload_param": cpu}):
        path = tmp_path / "deepspeed.json"
        path.write_text(json.dumps({"zero_optimization": zero, "optimizer": optimizer}))
        roles = roles_of(ranks, tmp_path, "--deepspeed.stage", "3", "--deepspeed.config", str(path))[1]
        outputs.append(trained_weights(roles))
    torch.testing.assert_close(*outputs)


@pytest.mark.thorough
def test_two_ranks_read_their_parts_and_gather_once(tmp_path):
    torch.manual_seed(0)
    weights = {name: 0.1 * torch.randn(p.shape) for name, p in SiT(**SIZES).named_parameters()}
    save_file(weights, tmp_path / "sit.safetensors")
    run_two_ranks(WORKER, tmp_path / "store", tmp_path / "sit.safetensors")


@pytest.mark.parametrize("sharing", sampled(["shared_score", "separate"]))
def test_int8_base_says_how_far_the_gradient_moves(ranks, tmp_path, sharing):
    flags = ["--sharing", sharing, "--deepspeed.stage", "3", "--teacher.cfg_scale", "2"]
    teacher, roles = roles_of(ranks, tmp_path, *flags, "--memory.frozen", "int8")
    (note,) = [n for n in roles.notes if n.startswith("frozen base")]
    assert 0.0 < float(note.split("differs by ")[1].split()[0]) < 5.0, note
    frozen = roles.teacher.network if sharing == "separate" else roles.fake.engine
    assert torch.int8 in {p.dtype for p in frozen.parameters()}
    assert torch.int8 not in {p.dtype for p in roles.generator.engine.parameters()}
    with torch.no_grad():
        got, want = roles.teacher(*inputs()), teacher(*inputs())
    assert 0 < (got - want).norm() / want.norm() < 0.01
    x, t, y = inputs()
    roles.fake.backward(roles.fake(x, t, y).square().mean(), last=True)
    assert roles.fake.step()


@torch.no_grad()
def test_the_file_of_an_adapter_on_an_int8_base_is_the_generator(ranks, tmp_path):
    """Not the integers beside their scales: what was trained, in a plain network."""
    flags = ["--sharing", "shared_all", "--student.lora.rank", "2", "--student.lora.scale", "0.5"]
    network, roles = roles_of(ranks, tmp_path, *flags, "--memory.frozen", "int8")
    for parameter in roles.generator.parameters:
        parameter.add_(0.1 * torch.randn_like(parameter))
    path = tmp_path / "generator.safetensors"
    save_generator(roles.generator, None, path, ranks, merges_lora=True)
    load_sit_weights(network, path)
    torch.testing.assert_close(network(*inputs()), roles.generator(*inputs()), rtol=1e-4, atol=1e-5)


class Doubled(torch.Tensor):
    """A quantised kind of tensor, as torchao's float8 is one: what it holds is not what it means."""

    def dequantize(self):
        return 2 * self.as_subclass(torch.Tensor)


def test_weights_of_a_quantised_kind_are_saved_as_numbers(ranks, tmp_path):
    roles = roles_of(ranks, tmp_path, "--sharing", "shared_all", "--student.lora.rank", "2")[1]
    layer = roles.generator.module.blocks[0].mlp.fc1
    held = layer.weight.detach()
    layer.weight = torch.nn.Parameter(held.as_subclass(Doubled), requires_grad=False)
    save_generator(roles.generator, None, tmp_path / "generator.safetensors", ranks, merges_lora=True)
    saved = load_file(tmp_path / "generator.safetensors")["blocks.0.mlp.fc1.weight"]
    assert torch.equal(saved, 2 * held)


@pytest.mark.parametrize(("shared", "cfg"), [(False, 1.0), (True, 1.0), (False, 3.0)])
def test_gradient_change_against_the_formula(shared, cfg):
    """g = (x0_fake - x0_real) / mean|x0 - x0_real| with x0_hat = x_t - t v, in fp64."""
    torch.manual_seed(0)
    x0, noise, cond, uncond, cond8, uncond8 = torch.randn(6, 3, 2, 4, 4, dtype=torch.float64)
    t = torch.tensor([0.2, 0.5, 0.9])
    probe = Probe(x0.float(), noise.float(), t, None, None)
    w = t.double().view(3, 1, 1, 1)
    x_t = (1 - w) * x0 + w * noise

    def gradient(fake, c, u):
        real = x_t - w * (u + cfg * (c - u))
        return (x_t - w * fake - real) / (x0 - real).abs().mean((1, 2, 3), keepdim=True)

    g, g8 = gradient(uncond, cond, uncond), gradient(uncond8 if shared else uncond, cond8, uncond8)
    native, eight = ((c.float(), u.float()) for c, u in ((cond, uncond), (cond8, uncond8)))
    got = dmd_gradient_change(native, eight, probe, DMDOptions(cfg_scale=cfg), shared=shared)
    assert got == pytest.approx(((g8 - g).norm() / g.norm()).item(), rel=1e-4)


def test_8bit_adamw_follows_adamw():
    pytest.importorskip("bitsandbytes")
    target = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    moved = []
    for kind in ("adamw", "adamw_8bit"):
        parameter = torch.nn.Parameter(torch.zeros(64, 256))
        optimizer = build_optimizer([parameter], AdamW(lr=1e-2), kind)
        for _ in range(5):
            optimizer.zero_grad()
            (parameter - target).square().sum().backward()
            optimizer.step()
        moved.append(parameter.detach())
    states = [v for v in optimizer.state[parameter].values() if isinstance(v, torch.Tensor) and v.dtype == torch.uint8]
    assert sum(v.numel() for v in states) == 2 * parameter.numel()
    assert (moved[1] - moved[0]).norm() / moved[0].norm() < 0.1


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("optimizer.kind", "adamw_8bit", "optimizer.kind: adamw_8bit needs bitsandbytes or torchao.*not installed"),
        ("optimizer.kind", "paged_adamw_8bit", "optimizer.kind: paged_adamw_8bit needs bitsandbytes,"),
        ("memory.frozen", "float8", "memory.frozen: float8 needs torchao,"),
        ("memory.attention", "flash_attn_3", "memory.attention: flash_attn_3 needs flash_attn_interface,"),
    ],
)
def test_a_package_that_is_missing_is_named_before_anything_is_loaded(tmp_path, monkeypatch, flag, value, message):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=message):
        preflight.check(config_of(tmp_path, f"--{flag}", value, "--run_dir", str(tmp_path)))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--optimizer.kind", "paged_adamw_8bit"), "optimizer.kind: .* pages CUDA memory, this run is on cpu"),
        (("--memory.frozen", "float8"), "memory.frozen: float8 needs .*; use int8"),
    ],
)
def test_a_lever_that_needs_a_gpu_is_refused_on_the_cpu(tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        check_levers(config_of(tmp_path, *flags), torch.device("cpu"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--rollout.keep_gathered", "true"), "rollout.keep_gathered: only deepspeed.stage=3"),
        (("--decoder.tiling", "true"), "decoder.tiling, decoder.recompute: there is no VAE"),
        (
            ("--memory.frozen", "float8", "--deepspeed.stage", "3"),
            "memory.frozen: float8 weights cannot be partitioned",
        ),
        (("--memory.activation", "some"), "memory.activation: expected none | selective | full | offload"),
    ],
)
def test_levers_that_do_not_fit_are_refused(tmp_path, flags, message):
    with pytest.raises(UserError) as refused:
        config_of(tmp_path, *flags)
    assert message in str(refused.value)
