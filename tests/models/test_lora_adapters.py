"""Adapters of several roles on one base: formulas, scales, gradients, and what must not change."""

import copy
import math

import pytest
import torch
from torch import nn

from dmdr_fast.models.lora import LoraLinear, add_lora
from dmdr_fast.models.recompute import MODES, set_recompute
from dmdr_fast.models.sit import SiT
from tests.tiers import sampled

SMALL = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 3,
    "hidden_size": 24,
    "depth": 2,
    "num_heads": 3,
    "num_classes": 5,
}


def filled(model: nn.Module, seed=0) -> nn.Module:
    """No parameter zero: neither the base's gates nor an adapter's B."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return model


def sit_with_lora(*roles, form="standard", targets=("attn.qkv",), **changes):
    model = SiT(**{**SMALL, **changes})
    adapters = [add_lora(model, role, rank=4, targets=targets, form=form) for role in roles]
    return filled(model), *adapters


def batch(size=4):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(size, 3, 8, 8, generator=generator)
    return x, torch.rand(size, generator=generator), torch.arange(size) % 6


def layer(form="standard", bias=True, width=6, roles=("fake",)):
    """A model of one Linear named "qkv" in fp64, with adapters, nothing zero."""
    model = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width, bias=bias)})
    adapters = [add_lora(model, role, rank=2, targets=["qkv"], form=form, dtype=torch.float64) for role in roles]
    return filled(model.double())["qkv"], *adapters


def test_standard_form_is_the_formula():
    module, adapter = layer()
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    adapter.set_scale(0.7)
    delta = torch.einsum("btd,dr,ro->bto", x, module.lora_A_fake, module.lora_B_fake)
    want = torch.einsum("btd,od->bto", x, module.weight) + module.bias + 0.7 * delta
    torch.testing.assert_close(module(x), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_post_projection_acts_on_the_output_of_q_and_v(bias):
    module, adapter = layer("post_projection", bias=bias)
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    adapter.set_scale(2.0)
    q, k, v = nn.functional.linear(x, module.weight, module.bias).split(6, dim=-1)
    q = q + 2.0 * q @ (module.lora_A_q_fake @ module.lora_B_q_fake)  # the reference's own order: A B first
    v = v + 2.0 * v @ (module.lora_A_v_fake @ module.lora_B_v_fake)
    torch.testing.assert_close(module(x), torch.cat([q, k, v], -1), rtol=1e-12, atol=1e-12)


def test_post_projection_compiles_to_one_graph_and_has_tangents():
    module, first, second = layer("post_projection", roles=("fake", "student"))
    first.set_scale(torch.tensor([0.5, 0.0, -2.0]))
    second.set_scale(0.75)
    x, direction = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    eager, traced = (run(x).square().sum() for run in (module, compiled))
    torch.testing.assert_close(traced, eager)
    torch.testing.assert_close(*(torch.autograd.grad(loss, list(first.parameters())) for loss in (traced, eager)))
    _, tangent = torch.func.jvp(module, (x,), (direction,))
    torch.testing.assert_close(tangent, (module(x + 1e-6 * direction) - module(x - 1e-6 * direction)) / 2e-6)


@pytest.mark.parametrize("form", ["standard", "post_projection"])
def test_roles_add_up_and_none_reads_another(form):
    module, first, second = layer(form, roles=("fake", "student"))
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    base = module(x)
    with first.scaled(0.5):
        one = module(x) - base
    with second.scaled(-1.5):
        two = module(x) - base
    with first.scaled(0.5), second.scaled(-1.5):
        both = module(x) - base
    torch.testing.assert_close(both, one + two, rtol=1e-12, atol=1e-12)
    assert one.norm() > 0.1 and two.norm() > 0.1


@pytest.mark.parametrize("form", ["standard", "post_projection"])
def test_layer_gradients(form):
    module, adapter = layer(form)
    adapter.set_scale(torch.tensor([0.5, 0.0, -2.0]))
    x = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: module(x), (x, *adapter.parameters()))


@pytest.mark.parametrize("form", ["standard", "post_projection"])
def test_scale_per_sample_equals_separate_calls(form):
    model, adapter = sit_with_lora("fake", form=form)
    x, t, y = batch()
    scales = [2.0, 0.75, 0.0, None]
    want = []
    for i, scale in enumerate(scales):
        with adapter.scaled(scale), torch.no_grad():
            want.append(model(x[i : i + 1], t[i : i + 1], y[i : i + 1]))
    with adapter.scaled(torch.tensor([2.0, 0.75, 0.0, 0.0])), torch.no_grad():
        got = model(x, t, y)
    torch.testing.assert_close(got, torch.cat(want), rtol=1e-4, atol=1e-4)
    assert (want[0] - want[2]).abs().max() > 0.05  # the adapter does something


@pytest.mark.parametrize("form", ["standard", "post_projection"])
def test_off_is_bit_equal_to_the_base_and_runs_no_lora(form, monkeypatch):
    model, adapter = sit_with_lora("fake", form=form)
    plain = SiT(**SMALL)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "lora" not in k}, strict=True)
    inputs = batch()
    adapter.set_scale(1.0)
    assert not torch.equal(model(*inputs), plain(*inputs))
    adapter.set_scale(None)
    monkeypatch.setattr("dmdr_fast.ops.multi_lora", None)
    assert torch.equal(model(*inputs), plain(*inputs))


@pytest.mark.parametrize("form", ["standard", "post_projection"])
def test_a_new_adapter_changes_nothing_at_any_scale(form):
    model = filled(SiT(**SMALL))
    inputs = batch()
    before = model(*inputs)
    adapter = add_lora(model, "fake", rank=4, targets=["attn.qkv"], form=form)
    assert adapter.scale is None
    adapter.set_scale(2.0)
    assert torch.equal(model(*inputs), before)


def test_gradients_reach_the_active_adapter_only():
    model, fake, _student = sit_with_lora("fake", "student", targets=("attn.qkv", "mlp.fc2"))
    fake.set_scale(2.0)
    model(*batch()).square().mean().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert reached == {name for name, _ in model.named_parameters() if name.endswith("_fake")}
    assert all(p.grad.norm() > 0 for p in fake.parameters()) and len(reached) == 2 * 2 * 2
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if "lora_" in n
    }


@pytest.mark.parametrize("form", ["standard", "post_projection"])
def test_checkpointed_gradients_are_those_of_the_forwards_scale(form):
    """The scale is off, then another one, by the time the blocks are recomputed."""
    model, adapter = sit_with_lora("fake", form=form)
    x, t, y = batch()
    gradients = {}
    for after in (None, torch.full((4,), 0.1)):
        for mode in MODES:
            set_recompute(model, mode)
            with adapter.scaled(torch.tensor([2.0, 0.75, 0.0, 1.0])):
                loss = model(x, t, y).square().mean()
            adapter.set_scale(after)
            gradients[after is None, mode] = torch.autograd.grad(loss, list(adapter.parameters()))
            assert adapter.scale is after
    want = gradients[True, "none"]
    for got in gradients.values():
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("form", sampled(["standard", "post_projection"]))
@pytest.mark.parametrize("mode", sampled(["none", "selective", "full"]))
def test_compiles_without_a_graph_break_for_any_scale(form, mode):
    torch.compiler.reset()
    model, adapter = sit_with_lora("fake", form=form, depth=1)
    set_recompute(model, mode)
    inputs = batch()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=1e-4, atol=1e-4)
    for scale in (0.5, 0.7, torch.tensor([2.0, 0.0, 1.0, 0.5])):
        adapter.set_scale(scale)
        got, want = compiled(*inputs), model(*inputs)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        pairs = (torch.autograd.grad(out.square().mean(), list(adapter.parameters())) for out in (got, want))
        for a, b in zip(*pairs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_changed_float_scale_is_no_new_graph():
    torch.compiler.reset()
    model, adapter = sit_with_lora("fake", depth=1)
    graphs = []
    compiled = torch.compile(model, fullgraph=True, backend=lambda graph, _: (graphs.append(1), graph.forward)[1])
    with torch.no_grad():
        for scale in (0.5, 0.7, 0.9):
            adapter.set_scale(scale)
            compiled(*batch())
    assert len(graphs) == 1


def test_layers_keep_identity_hooks_and_parameters():
    model = SiT(**SMALL)
    qkv, before = model.blocks[0].attn.qkv, dict(model.named_parameters())
    calls = []
    qkv.register_forward_hook(lambda *_: calls.append(1))
    add_lora(model, "fake", rank=4, targets=["attn.qkv"])
    model(*batch())
    after = dict(model.named_parameters())
    assert model.blocks[0].attn.qkv is qkv and type(qkv) is LoraLinear and isinstance(qkv, nn.Linear) and calls
    assert all(after[name] is parameter for name, parameter in before.items())
    assert set(after) - set(before) == {f"blocks.{i}.attn.qkv.lora_{f}_fake" for i in range(2) for f in "AB"}


def test_published_starts():
    """standard: PEFT's U(-1, 1)/sqrt(in); post_projection: the reference's N(0, 1); init_std overrides; B
    zero."""
    model = nn.ModuleDict({"qkv": nn.Linear(256, 768)})
    start = {}
    for role, options in (("a", {}), ("b", {"form": "post_projection"}), ("c", {"init_std": 0.02})):
        start[role] = add_lora(model, role, rank=64, targets=["qkv"], **options).state_dict()
    a = start["a"]["qkv.lora_A"]
    assert a.shape == (256, 64) and start["a"]["qkv.lora_B"].shape == (64, 768)
    assert a.abs().max() <= 256**-0.5 and a.std().item() == pytest.approx(256**-0.5 / math.sqrt(3), rel=0.03)
    assert start["b"]["qkv.lora_A_v"].shape == (256, 64) and start["b"]["qkv.lora_B_q"].shape == (64, 256)
    assert start["b"]["qkv.lora_A_q"].std().item() == pytest.approx(1.0, rel=0.03)
    assert not torch.equal(start["b"]["qkv.lora_A_q"], start["b"]["qkv.lora_A_v"])
    assert start["c"]["qkv.lora_A"].std().item() == pytest.approx(0.02, rel=0.03)
    assert not any(v.any() for state in start.values() for name, v in state.items() if "lora_B" in name)


def test_generator_and_dtype():
    def start(seed, dtype):
        model = nn.ModuleDict({"qkv": nn.Linear(8, 24, dtype=torch.bfloat16)})
        generator = torch.Generator().manual_seed(seed)
        torch.rand(1)  # the global generator must not matter
        adapter = add_lora(model, "fake", rank=2, targets=["qkv"], dtype=dtype, generator=generator)
        return adapter.state_dict()["qkv.lora_A"]

    assert start(1, torch.float32).dtype == torch.float32
    assert torch.equal(start(1, torch.float32), start(1, torch.float32))
    assert torch.equal(start(1, torch.bfloat16), start(1, torch.float32).bfloat16())
    assert not torch.equal(start(1, torch.float32), start(2, torch.float32))


def test_fp32_adapter_over_bf16_base():
    """The update is computed in fp32 and rounded once with the base's output."""
    model = nn.ModuleDict({"qkv": filled(nn.Linear(32, 96)).bfloat16()})
    adapter = add_lora(model, "fake", rank=4, targets=["qkv"])
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_(0, 0.5)
    adapter.set_scale(1.0)
    x = torch.randn(2, 7, 32).bfloat16()
    base = nn.functional.linear(x, model["qkv"].weight, model["qkv"].bias)
    a, b = adapter.parameters()
    want = base.double() + x.double() @ a.double() @ b.double()
    got = model["qkv"](x)
    assert got.dtype == torch.bfloat16
    assert ((got.double() - want).norm() / want.norm()).item() < 4e-3


def test_state_dict_moves_between_roles_and_copies():
    _model, fake = sit_with_lora("fake", form="post_projection")
    other, student = sit_with_lora("student", form="post_projection")
    state = {name: value + 1 for name, value in fake.state_dict().items()}
    student.load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in student.state_dict().items())
    assert "blocks.1.attn.qkv.lora_B_v" in state and len(state) == 2 * 4

    twin = copy.deepcopy(other)  # as an EMA does
    twin.lora_adapters["student"].set_scale(3.0)
    assert student.scale is None and twin.lora_adapters["student"].model is twin
    inputs = batch()
    assert not torch.equal(twin(*inputs), other(*inputs))
    student.set_scale(3.0)
    assert torch.equal(twin(*inputs), other(*inputs))


def test_state_dict_that_does_not_fit_is_refused():
    _model, fake = sit_with_lora("fake")
    state = fake.state_dict()
    with pytest.raises(
        ValueError, match=r"expected 4 tensors, got 3; first that differs: blocks\.0\.attn\.qkv\.lora_A"
    ):
        fake.load_state_dict({k: v for k, v in state.items() if k != "blocks.0.attn.qkv.lora_A"})
    with pytest.raises(ValueError, match=r"lora_A expected \[24, 4\], got \[24, 8\]: use the rank"):
        fake.load_state_dict(state | {"blocks.0.attn.qkv.lora_A": torch.zeros(24, 8)})


@pytest.mark.parametrize(
    "change,message",
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"form": "dora"}, "form must be one of .*standard.*got 'dora'"),
        ({"role": "fake score"}, "role must be an identifier"),
        ({"role": "q_fake"}, "not start with q_ or v_, .*got 'q_fake'"),
        ({"role": "taken"}, r"not be one of \['taken'\], got 'taken'"),
        ({"targets": "attn.qkv"}, "targets must be a list"),
        ({"targets": []}, "targets must be a list"),
        (
            {"targets": ["attn.qkv", "to_q"]},
            r"'to_q' matches no nn.Linear; the model has blocks\.\*\.adaLN_modulation",
        ),
        ({"targets": ["kv"]}, "'kv' matches no nn.Linear"),
        (
            {"targets": ["mlp.fc2"], "form": "post_projection", "hidden_size": 16, "num_heads": 2},
            "three equal parts",
        ),
    ],
)
def test_bad_arguments_are_refused_and_leave_the_model_alone(change, message):
    sizes = {key: change.pop(key) for key in ("hidden_size", "num_heads") if key in change}
    model = SiT(**{**SMALL, **sizes})
    add_lora(model, "taken", rank=1, targets=["attn.proj"])
    names = set(model.state_dict())
    with pytest.raises(ValueError, match=message):
        add_lora(model, **{"role": "fake", "rank": 4, "targets": ["attn.qkv"], **change})
    assert set(model.state_dict()) == names and set(model.lora_adapters) == {"taken"}


def test_a_linear_with_its_own_forward_is_refused():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(ValueError, match="qkv is a Doubled with a forward of its own"):
        add_lora(nn.ModuleDict({"qkv": Doubled(4, 12)}), "fake", rank=1, targets=["qkv"])


@pytest.mark.parametrize(
    "scale,message",
    [
        (float("nan"), "must be finite"),
        (torch.ones(2, 2), r"float32 tensor \[B\], got torch.float32 \[2, 2\]"),
        (torch.ones(2, dtype=torch.float64), "got torch.float64"),
    ],
)
def test_scales_that_cannot_be_are_refused(scale, message):
    _, adapter = sit_with_lora("fake")
    with pytest.raises(ValueError, match=message):
        adapter.set_scale(scale)


def test_scale_of_another_batch_is_refused():
    model, adapter = sit_with_lora("fake")
    adapter.set_scale(torch.ones(3))
    with pytest.raises(ValueError, match=r"scale: expected .*\[4\]"):
        model(*batch(4))
