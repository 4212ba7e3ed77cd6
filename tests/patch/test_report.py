"""What patch says, what it refuses, and that it can be taken back."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from diffusers.models.attention_processor import FusedJointAttnProcessor2_0
from diffusers.models.normalization import AdaLayerNormContinuous
from diffusers.models.transformers import transformer_flux
from torch import nn

import dmdr_fast.patch
from dmdr_fast.patch import Left, Replaced
from dmdr_fast.patch.structure import digest
from tests.patch.families import FAMILIES, randomised, run


def test_undo_puts_back_what_was_there(family):
    model = randomised(family.build(1))
    inputs = family.inputs()
    before = run(model, family, inputs)
    state = {name: value.data_ptr() for name, value in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    processors = [getattr(module, "processor", None) for module in model.modules()]

    report = dmdr_fast.patch(model, family.ops)
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == state
    assert [type(module) for module in model.modules()] != classes
    # diffusers and accelerate find layers by the name of their class
    assert [type(module).__name__ for module in model.modules()] == [cls.__name__ for cls in classes]
    assert all(isinstance(module, cls) for module, cls in zip(model.modules(), classes, strict=True))
    assert not torch.equal(run(model, family, inputs), before)

    report.undo()
    assert [type(module) for module in model.modules()] == classes
    assert [set(vars(module)) for module in model.modules()] == attributes
    after = [getattr(module, "processor", None) for module in model.modules()]
    assert all(a is b for a, b in zip(after, processors, strict=True))
    assert torch.equal(run(model, family, inputs), before)
    report.undo()  # nothing left to do


def test_other_models_of_the_class_are_untouched():
    family = FAMILIES["flux"]
    model, other = family.build(1), family.build(1)
    shared = other.transformer_blocks[0].attn.processor
    model.transformer_blocks[0].attn.set_processor(shared)
    dmdr_fast.patch(model)
    assert type(other.transformer_blocks[0]) is transformer_flux.FluxTransformerBlock
    assert type(shared) is transformer_flux.FluxAttnProcessor


def test_report_of_flux():
    model = FAMILIES["flux"].build(1)
    with dmdr_fast.patch(model) as report:
        assert set(report.replaced) == {
            Replaced("layer_norm_modulate", "transformer_blocks.0.norm1.norm"),
            Replaced("layer_norm_modulate", "transformer_blocks.0.norm1_context.norm"),
            Replaced("gated_residual_layer_norm_modulate", "transformer_blocks.0.norm2"),
            Replaced("gated_residual_layer_norm_modulate", "transformer_blocks.0.norm2_context"),
            Replaced("gated_residual", "transformer_blocks.0.ff"),
            Replaced("gated_residual", "transformer_blocks.0.ff_context"),
            Replaced("qk_norm_rope", "transformer_blocks.0.attn"),
            Replaced("layer_norm_modulate", "single_transformer_blocks.0.norm.norm"),
            Replaced("gated_residual", "single_transformer_blocks.0.proj_out"),
            Replaced("qk_norm_rope", "single_transformer_blocks.0.attn"),
            Replaced("layer_norm_modulate", "norm_out.norm"),
        }
        assert report.left == ()
        assert "qk_norm_rope: 2 replaced (transformer_blocks.*.attn x1" in str(report)
    separate = dmdr_fast.patch(model, ["gated_residual", "layer_norm_modulate"])
    assert Replaced("gated_residual", "transformer_blocks.0.attn.to_out") in separate.replaced
    assert Replaced("layer_norm_modulate", "transformer_blocks.0.norm2") in separate.replaced
    assert separate.counts == {"gated_residual": 5, "layer_norm_modulate": 6}


def test_report_says_what_does_not_fit():
    report = dmdr_fast.patch(FAMILIES["z_image"].build(1))
    reason = "the text refiner has neither scales nor gates"
    assert Left("rms_norm_scale", "context_refiner.0", reason) in report.left
    assert reason in str(report)
    assert "silu_mul" not in report.counts
    assert "silu_mul: left noise_refiner.*.feed_forward x1, context_refiner" in str(report)
    assert "name silu_mul in ops= to have it" in str(report)
    sd3 = FAMILIES["sd3"].build(1)
    without_norm = type(sd3).from_config({**sd3.config, "qk_norm": None})
    report = dmdr_fast.patch(without_norm)
    assert Left("qk_norm_rope", "transformer_blocks.1.attn", "it has no QK norm") in report.left
    layer_norm = type(sd3).from_config({**sd3.config, "qk_norm": "layer_norm"})
    (reason,) = {entry.reason for entry in dmdr_fast.patch(layer_norm).left}
    assert reason == "its QK norm is torch.nn.modules.normalization.LayerNorm, the op's is RMSNorm"
    affine = nn.Sequential(AdaLayerNormContinuous(8, 8))
    assert not dmdr_fast.patch(affine, strict=False).replaced


def test_models_inside_others_are_found():
    wrapped = nn.ModuleDict({"transformer": FAMILIES["sit"].build(1), "text": nn.Linear(2, 2)})
    assert dmdr_fast.patch(wrapped).replaced[0].module == "transformer.blocks.0.norm1"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": torch.zeros(1)}, TypeError, "model: expected a torch.nn.Module, got Tensor"),
        ({"ops": "gated_residual"}, TypeError, r"write ops=\['gated_residual'\]"),
        ({"ops": ["gated_residuals"]}, ValueError, r"ops: expected some of .*, got \['gated_residuals'\]"),
        ({"ops": []}, ValueError, "ops: expected some of"),
        (
            {"model": nn.Linear(2, 2)},
            ValueError,
            "expected SD3, Flux, .* or SiT, or a model that contains one, got Linear",
        ),
        ({"ops": ["gated_residual", "gelu_mul"]}, ValueError, "gelu_mul: found no place for it in SiT"),
        ({"ops": ["qk_norm_rope"]}, ValueError, "qk_norm_rope: found no place for it in SiT"),
        (
            {"model": torch.compile(nn.Linear(2, 2))},
            ValueError,
            "it is compiled already: patch it first, then torch.compile",
        ),
    ],
)
def test_refusals(arguments, error, message):
    sit = FAMILIES["sit"].build(1)
    with pytest.raises(error, match=message):
        dmdr_fast.patch(**{"model": sit} | arguments)
    assert type(sit.blocks[0]).__module__ == "dmdr_fast.models.sit_layers"


def test_a_block_that_is_compiled_is_named():
    model = FAMILIES["flux"].build(1)
    model.compile_repeated_blocks(backend="eager")
    with pytest.raises(ValueError, match=r"model: transformer_blocks\.0 is compiled already: patch it first"):
        dmdr_fast.patch(model, strict=False)


def _subclass(model):
    model.transformer_blocks[0].__class__ = type("MyBlock", (transformer_flux.FluxTransformerBlock,), {})
    return "transformer_blocks.0", "a subclass of FluxTransformerBlock"


def _hooked_norm(model):
    model.transformer_blocks[0].norm2_context.register_forward_hook(lambda *_: None)
    return "transformer_blocks.0.norm2_context", "norm2_context has hooks"


def _hooked_qk_norm(model):
    model.transformer_blocks[0].attn.norm_added_k.register_forward_pre_hook(lambda *_: None)
    return "transformer_blocks.0.attn", "norm_added_k has hooks"


def _own_forward(model):
    block = model.transformer_blocks[0]
    block.forward = block.forward
    return "transformer_blocks.0", "it has a forward set on the instance"


def _other_norm(model):
    model.transformer_blocks[0].norm2 = nn.RMSNorm(32)
    return "transformer_blocks.0.norm2", "norm2 is a RMSNorm, expected nn.LayerNorm"


def _norm_with_weights(model):
    model.transformer_blocks[0].norm2 = nn.LayerNorm(32)
    return "transformer_blocks.0.norm2", "norm2 has weights"


class RMSNorm(nn.RMSNorm):
    """Somebody's own norm of that name."""


def _foreign_qk_norm(model):
    model.transformer_blocks[0].attn.norm_q = RMSNorm(16, eps=1e-6)
    return "transformer_blocks.0.attn", "its QK norm is tests.patch.test_report.RMSNorm"


def _two_eps(model):
    model.transformer_blocks[0].attn.norm_k.eps = 1e-5
    return "transformer_blocks.0.attn", "norm_q and norm_k have eps 1e-06 and 1e-05"


def _other_processor(model):
    model.transformer_blocks[0].attn.set_processor(FusedJointAttnProcessor2_0())
    return "transformer_blocks.0.attn", "its processor is a FusedJointAttnProcessor2_0"


def _patched_already(model):
    dmdr_fast.patch(model, ["gated_residual"])
    return "transformer_blocks.0", "it is patched already"


@pytest.mark.parametrize(
    "change",
    [
        _subclass,
        _hooked_norm,
        _hooked_qk_norm,
        _own_forward,
        _other_norm,
        _norm_with_weights,
        _foreign_qk_norm,
        _two_eps,
        _other_processor,
        _patched_already,
    ],
)
def test_unknown_structure(change):
    model = FAMILIES["flux"].build(1)
    path, reason = change(model)
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=f"{path} is of unknown structure: .*{reason}"):
        dmdr_fast.patch(model)
    assert [type(module) for module in model.modules()] == classes
    report = dmdr_fast.patch(model, strict=False)
    unknown = [entry for entry in report.left if entry.unknown]
    assert any(entry.module.startswith(path) and reason in entry.reason for entry in unknown)
    # what is next to it is patched all the same
    assert Replaced("qk_norm_rope", "single_transformer_blocks.0.attn") in report.replaced


def test_a_changed_library_is_unknown(monkeypatch):
    original = transformer_flux.FluxSingleTransformerBlock.forward

    def forward(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None):
        return original(self, hidden_states, encoder_hidden_states, 2 * temb, image_rotary_emb)

    monkeypatch.setattr(transformer_flux.FluxSingleTransformerBlock, "forward", forward)
    with pytest.raises(ValueError, match=r"FluxSingleTransformerBlock\.forward is not the source this version knows"):
        dmdr_fast.patch(FAMILIES["flux"].build(1))


def test_a_library_without_the_layers_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "dmdr_fast.patch.flux", None)  # what an ImportError inside it comes to
    sit = dmdr_fast.patch(FAMILIES["sit"].build(1))
    assert sit.counts == FAMILIES["sit"].ops
    with pytest.raises(ValueError, match=r"not supported as installed: diffusers\.models\..*transformer_flux: "):
        dmdr_fast.patch(FAMILIES["flux"].build(1))


def test_digest_is_of_what_is_computed():
    def plain(x, y):
        return x + 2 * y

    def documented(x: int, y: int) -> int:
        """With words."""
        return x + 2 * y  # and a comment

    def other(x, y):
        return x + 3 * y

    documented.__name__ = "plain"
    same = {digest(function) for function in (plain, documented)}
    assert len(same) == 2 and digest(other) not in same  # the name counts
    namespace: dict = {}
    exec("def plain(x, y):\n    return x + 2 * y", namespace)
    assert digest(namespace["plain"]) == "no source"


def test_undo_refuses_when_something_came_on_top():
    model = FAMILIES["flux"].build(1)
    report = dmdr_fast.patch(model)
    attention = model.transformer_blocks[0].attn
    fused = attention.processor
    attention.set_processor(transformer_flux.FluxAttnProcessor())
    with pytest.raises(RuntimeError, match=r"transformer_blocks\.0\.attn is no longer as patch left it"):
        report.undo()
    attention.set_processor(fused)
    block = model.single_transformer_blocks[0]
    block.forward = block.forward
    with pytest.raises(RuntimeError, match=r"single_transformer_blocks\.0 is no longer as patch left it"):
        report.undo()
    del block.forward
    report.undo()


def test_copies_and_files_of_a_patched_model_stay_patched():
    family = FAMILIES["flux"]
    model = randomised(family.build(1))
    report = dmdr_fast.patch(model)
    inputs = family.inputs()
    output = run(model, family, inputs)
    clone = copy.deepcopy(model)
    report.undo()
    file = io.BytesIO()
    torch.save(clone, file)
    file.seek(0)
    for patched in (clone, torch.load(file, weights_only=False), pickle.loads(pickle.dumps(clone))):
        assert torch.equal(run(patched, family, inputs), output)
    clone.load_state_dict(model.state_dict())


def test_settings_of_a_processor_come_along():
    model = FAMILIES["flux"].build(1)
    model.transformer_blocks[0].attn.set_attention_backend("native")
    dmdr_fast.patch(model)
    backend = model.transformer_blocks[0].attn.processor._attention_backend
    assert backend == "native"


def test_importing_the_package_imports_no_model_library():
    code = (
        "import sys, dmdr_fast.patch; assert callable(dmdr_fast.patch); "
        "assert not {'diffusers', 'transformers', 'peft', 'deepspeed'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
