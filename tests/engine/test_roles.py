"""Roles on one rank: what is trained, what is frozen, what ZeRO-3 shards, and the LoRA scales each role wears."""

import pytest
import torch
from safetensors.torch import save_file

from dmdr_fast import cli
from dmdr_fast.algorithm.score_pass import scores_at
from dmdr_fast.engine import networks, runtime
from dmdr_fast.engine.conditions import Labels
from dmdr_fast.engine.networks import build_roles
from dmdr_fast.engine.shards import master_shard
from dmdr_fast.engine.sit_model import SiTModel, build_network
from dmdr_fast.engine.state import slots
from dmdr_fast.errors import UserError
from dmdr_fast.models.lora import add_lora
from tests.tiers import sampled

SMALL = [
    "--rl.method",
    "none",
    "--model.hidden_size",
    "32",
    "--model.depth",
    "2",
    "--model.num_heads",
    "2",
    "--teacher.train.data",
    "digits",
]


@pytest.fixture(scope="module")
def ranks():
    return runtime.start()


def roles_of(ranks, tmp_path, *flags):
    (tmp_path / "empty.yaml").write_text("")
    config, _ = cli.parse(["--config", str(tmp_path / "empty.yaml"), *SMALL, "--model.num_classes", "10", *flags])
    torch.manual_seed(0)
    teacher = build_network(config)
    torch.nn.init.normal_(teacher.final_layer.linear.weight, std=0.2)
    for block in teacher.blocks:
        torch.nn.init.normal_(block.adaLN_modulation[1].weight, std=0.2)
    save_file({n: p.detach().clone() for n, p in teacher.named_parameters()}, tmp_path / "teacher.safetensors")
    model = SiTModel(config, tmp_path / "teacher.safetensors")
    return teacher, build_roles(config, model, Labels(10, ranks.device), ranks, lora_seed=0)


def inputs(batch=4):
    rng = torch.Generator().manual_seed(1)
    return torch.randn(batch, 1, 8, 8, generator=rng), torch.rand(batch, generator=rng), torch.arange(batch)


@pytest.mark.parametrize("stage", ["0", "3"])
@pytest.mark.parametrize("sharing", ["shared_score", "separate"])
def test_all_roles_start_as_the_teacher(ranks, tmp_path, sharing, stage):
    teacher, roles = roles_of(ranks, tmp_path, "--sharing", sharing, "--deepspeed.stage", stage)
    with torch.no_grad():
        expected = teacher(*inputs())
        for network in (roles.generator, roles.fake, roles.teacher):
            torch.testing.assert_close(network(*inputs()), expected)
        x, t, y = inputs()
        scores = scores_at(roles.networks.score, x, t, y, torch.full_like(y, 10), real_scale=0.0)
        torch.testing.assert_close(scores.real, expected)
        torch.testing.assert_close(scores.real_uncond, teacher(x, t, torch.full_like(y, 10)))


@pytest.mark.parametrize("sharing", sampled(["shared_score", "separate"]))
def test_stage_3_shards_every_role_frozen_ones_too(ranks, tmp_path, sharing):
    _, roles = roles_of(ranks, tmp_path, "--sharing", sharing, "--deepspeed.stage", "3")
    engines = {"generator": roles.generator.engine, "fake": roles.fake.engine}
    if sharing == "separate":
        engines["teacher"] = roles.teacher.network
    for name, engine in engines.items():
        for parameter_name, parameter in engine.module.named_parameters():
            assert hasattr(parameter, "ds_tensor"), (name, parameter_name)


def test_only_the_adapter_of_the_fake_score_is_trained(ranks, tmp_path):
    _, roles = roles_of(ranks, tmp_path, "--lora.rank", "4")
    trained = {n for n, p in roles.fake.engine.module.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert roles.trained_parameters["fake"] == 2 * 4 * (32 + 96)
    x, t, y = inputs()
    roles.fake.backward(roles.fake(x, t, y).square().mean(), last=True)
    roles.fake.step()
    moved = roles.fake(x, t, y)
    teacher = roles.teacher(x, t, y)
    scores = scores_at(roles.networks.score, x, t, y, None, real_scale=0.0)
    torch.testing.assert_close(scores.fake, moved)
    torch.testing.assert_close(scores.real, teacher)
    assert not torch.equal(moved, teacher)


BATCHES = [(sharing, stage) for sharing in ("shared_all", "shared_score") for stage in ("2", "0", "3")]


@pytest.mark.parametrize(("sharing", "stage"), sampled([BATCHES[0], *BATCHES[3:], *BATCHES[1:3]], 2))
def test_a_batch_in_other_micro_steps_has_the_same_gradient(ranks, tmp_path, sharing, stage):
    """Set between steps, as a phase does. The truth for the generator's own weights is torch's gradient."""
    student = ["--student.lora.rank", "2"] if sharing == "shared_all" else []
    teacher, roles = roles_of(ranks, tmp_path, "--sharing", sharing, "--deepspeed.stage", stage, *student)
    x, t, y = inputs()
    teacher(x, t, y).square().mean().backward()
    truth = torch.nn.utils.get_total_norm([p.grad for p in teacher.parameters() if p.grad is not None]).item()
    for role in (roles.generator, roles.fake):
        norms = []
        for micro_batch in (4, 2, 1, 4):
            role.set_lr([0.0])
            role.set_batch(micro_batch, 4 // micro_batch)
            for start in range(0, 4, micro_batch):
                rows = slice(start, start + micro_batch)
                role.backward(role(x[rows], t[rows], y[rows]).square().mean(), last=start + micro_batch == 4)
            assert role.step()
            norms.append(role.gradient_norm)
        assert norms == pytest.approx([norms[0]] * 4, rel=1e-5) and norms[0] > 0
        if role is roles.generator and sharing == "shared_score":
            assert norms[0] == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize(("stage", "dtype"), sampled([("0", "bf16"), ("2", "bf16"), ("3", "bf16"), ("0", "fp32")], 2))
def test_the_first_step_is_adam_s_first(ranks, tmp_path, stage, dtype):
    """w <- (1 - lr decay) w - lr g / |g|, whatever the moments' decays, from masters that are the weights."""
    engine = ["--deepspeed.stage", stage, "--deepspeed.dtype", dtype]
    _, roles = roles_of(ranks, tmp_path, *engine, "--optimizer.generator.weight_decay", "2")
    role, lr = roles.generator, 1e-2
    (x, t, y), name = inputs(), "final_layer.linear.weight"
    if stage == "0":
        masters = [slot.master.detach().reshape(-1) for slot in slots(role)]
        weights = [p.detach().float().reshape(-1) for p in role.trained.values()]
        assert torch.equal(torch.cat(masters), torch.cat(weights))
    before = {n: master_shard(p).detach().float().clone() for n, p in role.trained.items()}
    role.set_lr([lr])
    role.backward((role(x, t, y) - x).square().mean(), last=True)
    assert role.step()
    moved = (master_shard(role.trained[name]) - (1 - 2 * lr) * before[name]).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, lr), rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("stage", sampled(["0", "2", "3"]))
def test_a_weight_that_trains_beside_the_adapter_is_refused(ranks, tmp_path, monkeypatch, stage):
    def unfrozen(network, *given, **options):
        adapter = add_lora(network, *given, **options)
        network.final_layer.linear.bias.requires_grad_(True)
        return adapter

    monkeypatch.setattr(networks, "add_lora", unfrozen)
    with pytest.raises(UserError, match=r"^final_layer\.linear\.bias is trainable beside the LoRA"):
        roles_of(ranks, tmp_path, "--deepspeed.stage", stage)


def test_a_reference_that_is_gone_is_named(ranks, tmp_path):
    _, roles = roles_of(ranks, tmp_path, "--rl.method", "dpo", "--reward.terms", "[{kind: digits}]")
    with pytest.raises(UserError, match=r"gone\.safetensors: missing, and the KL or DPO"):
        roles.frozen_reference.load(tmp_path / "gone.safetensors")
