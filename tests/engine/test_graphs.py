"""``compute.cuda_graphs``: replayed forwards give the numbers of those that run, to the byte, whatever changes.

On a CPU a graph is a tape of its operations (``tape.py``), on a GPU a graph.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from dmdr_fast.algorithm.score_pass import scores_at
from dmdr_fast.engine import compute, graphs, runtime
from dmdr_fast.errors import UserError
from dmdr_fast.models.lora import add_lora
from dmdr_fast.models.sit import SiT
from tests.engine import tape
from tests.engine.test_memory_levers import config_of
from tests.engine.test_roles import inputs, roles_of

TAPED = Path(__file__).with_name("train_taped.py")
STEPS = ("--train.cold_start_steps", "1", "--train.generator_steps", "2")
LORA = ("--sharing", "shared_all", "--student.lora.rank", "4", "--memory.frozen", "int8")
CASES = {
    "separate, stage 0": ("--sharing", "separate", "--deepspeed.stage", "0"),
    "separate, stage 2, bf16": ("--sharing", "separate", "--deepspeed.stage", "2", "--deepspeed.dtype", "bf16"),
    "shared_score, bf16": ("--sharing", "shared_score", "--deepspeed.dtype", "bf16", "--compute.blocks", "fused"),
    "shared_score, fp32 scores": ("--deepspeed.dtype", "bf16", "--dmd.score_dtype", "fp32"),
    "shared_all, int8": LORA,
}


@pytest.fixture
def taped(monkeypatch):
    monkeypatch.setattr(graphs, "DEVICE", "cpu")
    monkeypatch.setattr(graphs, "capture", tape.capture)
    monkeypatch.setattr(graphs, "new_pool", lambda: None)


@pytest.fixture(scope="module")
def ranks():
    return runtime.start()


def trained(roles, *, lora):
    """Predictions without grad of all roles before, between and after their updates."""
    x, t, y = inputs()
    seen = []
    for real_scale in (0.5, 0.25, 0.0) if lora else (0.0,) * 3:
        with torch.no_grad():
            seen.append(roles.generator(x, t, y))
            seen += scores_at(roles.networks.score, x, t, y, torch.full_like(y, 10), real_scale=real_scale)
        for role in (roles.generator, roles.fake):
            role.set_lr([1e-2])
            role.backward((role(x, t, y) * x).mean(), last=True)
            assert role.step()
        x, t, y = seen[0], 1 - t, y.flip(0)
    return seen


@pytest.mark.parametrize("name", CASES)
def test_replayed_roles_follow_their_weights_inputs_and_scales(taped, ranks, tmp_path, name):
    lora = "separate" not in name
    want = trained(roles_of(ranks, tmp_path, *CASES[name])[1], lora=lora)
    _, roles = roles_of(ranks, tmp_path, *CASES[name], "--compute.cuda_graphs", "true")
    got = trained(roles, lora=lora)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert not torch.equal(want[0], want[4]) and not torch.equal(want[1], want[5])
    assert roles.graphs.count == (2 if lora else 3)  # generator; fake and teacher in one pass, or in two


def test_the_start_and_the_log_tell_of_graphs(run, tmp_path):
    options = ("--rl.method", "grpo", "--rl.grpo.group_size", "2", "--student.steps", "2", "--deepspeed.stage", "2")
    given = [*STEPS, *options, "--compute.cuda_graphs", "true", "--run_dir", tmp_path]
    code, out, err = run(given, script=TAPED)
    assert code == 0, err
    assert "CUDA graphs of rollouts and the score pass" in out
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["cuda_graphs"] for line in log] == [2.0] * 2


class Network(nn.Module):
    """Counts how often Python runs it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.ran = nn.Linear(3, 3), 0
        add_lora(self, "fake", rank=1, targets=["linear"])

    def forward(self, x, t, condition):
        self.ran += 1
        return self.linear(x) * t[:, None] + condition["a"]


@torch.no_grad()
def test_what_is_captured_and_when(taped):
    net, found = Network(), graphs.Graphs()
    replayed, adapter = found.of(net), net.lora_adapters["fake"]

    def call(batch):
        given = torch.randn(batch, 3), torch.rand(batch), {"a": torch.randn(1, 3).expand(batch, 3)}
        ran, out = net.ran, replayed(*given)
        captured = net.ran - ran
        assert torch.equal(out, net(*given))
        return captured, out

    assert call(2)[0] == 2  # once to warm up, once recorded
    captured, first = call(2)
    before = first.clone()
    assert captured == 0 and call(2)[0] == 0
    assert torch.equal(first, before)  # a caller's own
    assert call(3)[0] == 2 and call(2)[0] == call(3)[0] == 0  # another batch size
    adapter.set_scale(0.5)
    assert call(2)[0] == 2  # an adapter acts
    adapter.set_scale(2.0)
    assert call(2)[0] == 0
    adapter.set_scale(torch.tensor([1.0, 0.0]))
    assert call(2)[0] == 2  # a scale per sample
    with compute.uncompiled():
        assert call(2)[0] == 1
    adapter.set_scale(None)
    assert call(2)[0] == 0
    assert found.count == 4
    adapter.set_scale(1.0)
    with torch.enable_grad():
        assert call(2)[1].requires_grad
    assert found.count == 4


def test_what_cannot_be_captured_is_one_line(taped, monkeypatch):
    def fails(function, given, pool):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(graphs, "capture", fails)
    with torch.no_grad(), pytest.raises(UserError) as error:
        graphs.Graphs().of(nn.Bilinear(3, 3, 1))(torch.ones(1, 3), torch.ones(1), torch.ones(1))
    expected = "compute.cuda_graphs: a forward cannot be captured (CUDA error: operation not permitted when stream is "
    assert str(error.value) == expected + "capturing); set it to false"


def test_where_graphs_are_refused(tmp_path):
    flag = ("--compute.cuda_graphs", "true")
    with pytest.raises(UserError, match=r"compute\.cuda_graphs: needs a CUDA device, this run is on cpu; set it"):
        graphs.check(config_of(tmp_path, *flag), torch.device("cpu"))
    graphs.check(config_of(tmp_path, *flag), torch.device("cuda"))
    graphs.check(config_of(tmp_path), torch.device("cpu"))
    with pytest.raises(UserError, match=r"compute\.cuda_graphs: under deepspeed\.stage 3 weights are gathered to new"):
        config_of(tmp_path, *flag, "--deepspeed.stage", "3")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("blocks", ["eager", "compiled"])
@torch.no_grad()
def test_graphs_on_a_gpu(blocks):
    """Two networks that share a pool, replayed in turn, while weights, inputs and scales change."""
    torch.manual_seed(0)
    found, nets = graphs.Graphs(), []
    for _ in range(2):
        net = SiT(8, 2, 4, hidden_size=64, depth=2, num_heads=2).cuda().bfloat16()
        add_lora(net, "fake", rank=4, targets=["attn.qkv"])
        for parameter in net.parameters():
            parameter.normal_(0, 0.1)
        if blocks == "compiled":
            compute.compile_blocks(list(net.blocks))
        nets.append((net, found.of(net)))
    for step in range(3):
        for net, replayed in nets:
            x, t = torch.randn(4, 4, 8, 8, device="cuda").bfloat16(), torch.rand(4, device="cuda")
            y = torch.randint(1000, (4,), device="cuda")
            net.lora_adapters["fake"].set_scale(torch.rand(4, device="cuda"))
            for parameter in net.parameters():
                parameter.add_(0.01)
            torch.cuda.set_sync_debug_mode("error" if step else "default")
            got = replayed(x, t, y)
            torch.cuda.set_sync_debug_mode("default")
            assert torch.equal(got, net(x, t, y)), step
    assert found.count == 2
