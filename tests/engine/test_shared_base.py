"""One frozen base for three roles: each wears its own adapter, the score pass is one batch, the file is the adapter."""

import pytest
import torch
from safetensors.torch import load_file

from dmdr_fast.algorithm.score_pass import scores_at
from dmdr_fast.engine import runtime
from dmdr_fast.engine.conditions import build_conditions
from dmdr_fast.engine.networks import build_roles
from dmdr_fast.engine.pipeline_model import PipelineModel
from dmdr_fast.engine.roles import Role
from dmdr_fast.engine.shards import EMA, save_generator

from .pipeline_runs import config_of


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Roles of Z-Image with adapters that have moved, a batch, and the plain teacher."""
    ranks, folder = runtime.start(), tmp_path_factory.mktemp("shared")
    config = config_of("z_image", folder, folder / "run", sharing="shared_all", student__lora__rank=2)
    model = PipelineModel.open(config)
    conditions, _ = build_conditions(config, model, ranks)
    roles = build_roles(config, model, conditions, ranks, lora_seed=0)
    draw = torch.Generator().manual_seed(0)
    for role in (roles.generator, roles.fake):
        for parameter in role.parameters:
            parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=draw))
    batch = conditions.batch(torch.arange(3).numpy())
    x = torch.randn(3, *model.latent_shape, generator=draw)
    return roles, model, ranks, (x, torch.tensor([0.2, 0.5, 0.9]), batch)


@torch.no_grad()
def test_the_batched_score_pass_is_three_passes(made):
    roles, _, _, (x, t, batch) = made
    scores = scores_at(roles.networks.score, x, t, batch.condition, batch.uncond, real_scale=0.7)
    base, g, f = roles.fake.module, roles.generator.adapter, roles.fake.adapter
    real = Role(base, torch.float32, {g: None, f: 0.7})
    torch.testing.assert_close(scores.fake, roles.fake(x, t, batch.condition), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.real, real(x, t, batch.condition), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.real_uncond, real(x, t, batch.uncond), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_each_role_wears_its_own_adapter(made):
    roles, model, ranks, (x, t, batch) = made
    teacher = model.load(ranks.device)
    outputs = [role(x, t, batch.condition) for role in (roles.teacher, roles.generator, roles.fake, roles.teacher)]
    torch.testing.assert_close(outputs[0], teacher(x, t, batch.condition))
    torch.testing.assert_close(outputs[3], outputs[0], rtol=0, atol=0)
    assert all((outputs[0] - other).norm() > 0.01 * outputs[0].norm() for other in outputs[1:3])
    assert (outputs[1] - outputs[2]).norm() > 0.01 * outputs[0].norm()


def test_the_adapters_are_trained_by_the_optimizer_that_is_asked_for(tmp_path, monkeypatch):
    asked = []

    def build_optimizer(parameters, settings, kind):
        asked.append(kind)
        return torch.optim.AdamW(parameters, lr=settings.lr)

    monkeypatch.setattr("dmdr_fast.engine.roles.build_optimizer", build_optimizer)
    ranks = runtime.start()
    config = config_of("z_image", tmp_path, tmp_path / "run", sharing="shared_all", student__lora__rank=2)
    config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"kind": "adamw_8bit"})})
    model = PipelineModel.open(config)
    build_roles(config, model, build_conditions(config, model, ranks)[0], ranks, lora_seed=0)
    assert asked == ["adamw_8bit"] * 2


@torch.no_grad()
def test_the_file_merged_into_the_teacher_is_the_generator(made, tmp_path):
    roles, model, ranks, (x, t, batch) = made
    ema = EMA(roles.generator.trained, 0.9)
    for name, saved_ema in (("now", None), ("average", ema)):
        path = tmp_path / f"{name}.safetensors"
        save_generator(roles.generator, saved_ema, path, ranks, merges_lora=False)
        assert all(name.rpartition(".")[2] in ("lora_A", "lora_B") for name in load_file(path))
        merged = model.load(ranks.device, path)
        assert not any("lora" in name for name, _ in merged.named_parameters())
        want = roles.generator(x, t, batch.condition)
        torch.testing.assert_close(merged(x, t, batch.condition), want, rtol=1e-4, atol=1e-5)


def test_a_gradient_that_is_not_finite_moves_nothing(made):
    roles, _, _, (x, t, batch) = made
    before = roles.fake.adapter.state_dict()
    roles.fake.backward((roles.fake(x, t, batch.condition) * torch.nan).sum(), last=True)
    assert not roles.fake.step()
    assert all(torch.equal(before[name], value) for name, value in roles.fake.adapter.state_dict().items())
    roles.fake.backward(roles.fake(x, t, batch.condition).square().mean(), last=True)
    assert roles.fake.step() and roles.fake.gradient_norm > 0.0
    assert all(p.grad is None for p in roles.generator.parameters), "the other adapter was graded"
