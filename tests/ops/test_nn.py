"""The modules against the torch modules they stand in for, state_dict included."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from dmdr_fast import ops


def test_adaptive_norms_stand_in_for_layer_norm():
    x, h = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    gate, shift, scale = (torch.randn(2, 1, 8) for _ in range(3))
    plain = nn.LayerNorm(8, eps=1e-5, elementwise_affine=False)
    norm = ops.nn.LayerNormModulate(8, eps=1e-5)
    fused = ops.nn.GatedResidualLayerNormModulate(8, eps=1e-5)
    for module in (norm, fused):
        assert isinstance(module, nn.LayerNorm)
        module.load_state_dict(plain.state_dict())
    torch.testing.assert_close(norm(x, shift, scale), plain(x) * (1 + scale) + shift)
    residual, modulated = fused(x, h, gate, shift, scale)
    torch.testing.assert_close(residual, x + gate * h)
    torch.testing.assert_close(modulated, plain(x + gate * h) * (1 + scale) + shift)


def test_qk_norm_rope_uses_the_norms_it_is_given():
    q_norm, k_norm = nn.RMSNorm(8, eps=1e-6), nn.RMSNorm(8, eps=1e-6)
    nn.init.normal_(q_norm.weight)
    module = ops.nn.QKNormRope(8, q_norm=q_norm)
    module.k_norm.load_state_dict(k_norm.state_dict())
    assert set(module.state_dict()) == {"q_norm.weight", "k_norm.weight"}
    q, k = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4, 8)
    out_q, out_k = module(q, k)
    torch.testing.assert_close(out_q, q_norm(q))
    torch.testing.assert_close(out_k, k_norm(k))
    cos, sin = torch.zeros(3, 8), torch.ones(3, 8)  # a quarter turn
    turned = torch.stack((-q_norm(q)[..., 1::2], q_norm(q)[..., 0::2]), -1).flatten(-2)
    torch.testing.assert_close(module(q, k, cos, sin)[0], turned)


def test_gated_units_are_projection_and_activation():
    x = torch.randn(2, 3, 6)
    for module, activation in (
        (ops.nn.GEGLU(6, 4), F.gelu),
        (ops.nn.GEGLU(6, 4, approximate="tanh"), lambda t: F.gelu(t, approximate="tanh")),
        (ops.nn.SwiGLU(6, 4, bias=False), F.silu),
    ):
        assert "proj.weight" in module.state_dict()
        value, gate = module.proj(x).chunk(2, -1)
        torch.testing.assert_close(module(x), value * activation(gate))
    flipped = ops.nn.SwiGLU(6, 4, gate_first=True)
    gate, value = flipped.proj(x).chunk(2, -1)
    torch.testing.assert_close(flipped(x), value * F.silu(gate))


def test_preprocess_reward_holds_its_options():
    image = torch.rand(2, 3, 9, 9)
    module = ops.nn.PreprocessReward(4, [0.5] * 3, [0.25] * 3, antialias=False, value_range=(0, 1))
    expected = ops.preprocess_reward(image, 4, [0.5] * 3, [0.25] * 3, antialias=False, value_range=(0, 1))
    assert torch.equal(module(image), expected) and not module.state_dict()
