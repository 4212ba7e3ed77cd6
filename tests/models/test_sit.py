"""SiT against a second implementation (numpy, fp64, sample by sample), its names, sizes, start and errors."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from dmdr_fast.models.recompute import set_recompute
from dmdr_fast.models.sit import SIT_CONFIGS, SiT
from dmdr_fast.models.sit_layers import sincos_positions

SMALL = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 3,
    "hidden_size": 24,
    "depth": 2,
    "num_heads": 3,
    "num_classes": 5,
}


def small_sit(**changes) -> SiT:
    """A small SiT with no zero weight anywhere (the published start would hide most of the network)."""
    model = SiT(**{**SMALL, **changes})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "pos_embed":
                parameter.normal_(0, 0.3, generator=generator)
    return model


def batch(size=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(size, 3, 8, 8, generator=generator, dtype=dtype)
    t = torch.rand(size, generator=generator, dtype=dtype)
    return x, t, torch.tensor([0, 4, 5])[:size]


def numpy_sit(weights, x, t, label, *, heads, patch):
    """One sample through the published architecture, written from its formulas: x [C, H, W] -> all output
    channels."""
    w = {name: value.detach().double().numpy() for name, value in weights.items()}

    def linear(name, value):
        return np.einsum("...i,oi->...o", value, w[f"{name}.weight"]) + w[f"{name}.bias"]

    def silu(value):
        return value / (1 + np.exp(-value))

    def gelu(value):
        return 0.5 * value * (1 + np.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))

    def norm(value):
        mean = value.mean(-1, keepdims=True)
        return (value - mean) / np.sqrt(((value - mean) ** 2).mean(-1, keepdims=True) + 1e-6)

    grid = x.shape[1] // patch
    tokens = []
    for row in range(grid):
        for column in range(grid):
            tile = x[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            tokens.append(np.einsum("cij,dcij->d", tile, w["x_embedder.proj.weight"]) + w["x_embedder.proj.bias"])
    h = np.stack(tokens) + w["pos_embed"][0]

    angles = np.array([t * 10000 ** (-i / 128) for i in range(128)])
    wave = np.concatenate([np.cos(angles), np.sin(angles)])
    c = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", wave)))
    c = c + w["y_embedder.embedding_table.weight"][label]

    depth = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))
    width = h.shape[-1] // heads
    for i in range(depth):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = np.split(
            linear(f"blocks.{i}.adaLN_modulation.1", silu(c)), 6
        )
        q, k, v = np.split(linear(f"blocks.{i}.attn.qkv", norm(h) * (1 + scale_a) + shift_a), 3, axis=-1)
        mixed = np.zeros_like(h)
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            score = q[:, part] @ k[:, part].T / math.sqrt(width)
            weight = np.exp(score - score.max(-1, keepdims=True))
            mixed[:, part] = weight / weight.sum(-1, keepdims=True) @ v[:, part]
        h = h + gate_a * linear(f"blocks.{i}.attn.proj", mixed)
        inner = gelu(linear(f"blocks.{i}.mlp.fc1", norm(h) * (1 + scale_m) + shift_m))
        h = h + gate_m * linear(f"blocks.{i}.mlp.fc2", inner)

    shift, scale = np.split(linear("final_layer.adaLN_modulation.1", silu(c)), 2)
    patches = linear("final_layer.linear", norm(h) * (1 + scale) + shift)
    channels = patches.shape[-1] // patch**2
    image = np.zeros((channels, x.shape[1], x.shape[2]))
    for index, values in enumerate(patches):
        row, column = divmod(index, grid)
        for i in range(patch):
            for j in range(patch):
                image[:, row * patch + i, column * patch + j] = values[(i * patch + j) * channels :][:channels]
    return image


def test_forward_equals_second_implementation():
    model = small_sit().double()
    x, t, y = batch()
    got = model(x, t, y)
    for i in range(len(x)):
        want = numpy_sit(model.state_dict(), x[i].numpy(), float(t[i]), int(y[i]), heads=3, patch=2)
        np.testing.assert_allclose(got[i].detach().numpy(), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("patch,heads", [(1, 2), (4, 6)])
def test_other_patch_sizes_and_heads(patch, heads):
    model = small_sit(patch_size=patch, num_heads=heads).double()
    x, t, y = batch(1)
    want = numpy_sit(model.state_dict(), x[0].numpy(), float(t[0]), int(y[0]), heads=heads, patch=patch)
    np.testing.assert_allclose(model(x, t, y)[0].detach().numpy(), want, rtol=1e-10, atol=1e-10)


def test_published_sit_keeps_the_velocity_half_and_runs_time_backwards():
    """A SiT checkpoint predicts x0 - eps at its own time 1 - t, beside a second half that is not used."""
    model = small_sit(learn_sigma=True, time_reversed=True).double()
    x, t, y = batch()
    for i, got in enumerate(model(x, t, y)):
        want = -numpy_sit(model.state_dict(), x[i].numpy(), 1 - float(t[i]), int(y[i]), heads=3, patch=2)[:3]
        np.testing.assert_allclose(got.detach().numpy(), want, rtol=1e-10, atol=1e-10)


def test_bfloat16_weights_keep_the_time_embedding_exact():
    """In bf16 t = 0.999 and t = 1 are the same number; the waves must tell them apart."""
    model = small_sit().to(torch.bfloat16)
    x, _, y = batch(1, torch.float32)
    near, end = (model(x, torch.tensor([t]), y) for t in (0.96, 0.9609))
    assert near.dtype == torch.float32 and not torch.equal(near, end)
    t = torch.tensor([0.3])
    want = numpy_sit(model.state_dict(), x[0].double().numpy(), 0.3, int(y[0]), heads=3, patch=2)
    error = np.linalg.norm(model(x, t, y)[0].detach().numpy() - want) / np.linalg.norm(want)
    assert error < 0.03, error  # bf16 rounds at 2^-9 = 0.002 in each of about 20 operations


def test_positions_equal_the_closed_form():
    got = sincos_positions(16, 3)
    assert got.shape == (1, 9, 16) and got.dtype == torch.float32
    for token in range(9):
        row, column = divmod(token, 3)
        want = []
        for place in (column, row):
            angle = [place / 10000 ** (i / 4) for i in range(4)]
            want += [math.sin(a) for a in angle] + [math.cos(a) for a in angle]
        np.testing.assert_allclose(got[0, token].numpy(), want, rtol=0, atol=6e-8)


def test_parameter_names_are_the_published_ones():
    block = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"]
    modules = ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2"]
    modules += [f"blocks.{i}.{name}" for i in range(2) for name in block]
    modules += ["final_layer.linear", "final_layer.adaLN_modulation.1"]
    want = {f"{name}.{kind}" for name in modules for kind in ("weight", "bias")}
    want |= {"pos_embed", "y_embedder.embedding_table.weight"}
    model = SiT(**SMALL)
    assert set(model.state_dict()) == want == {name for name, _ in model.named_parameters()}
    assert model.y_embedder.embedding_table.weight.shape == (6, 24)


def test_parameter_count_of_sit_xl_2():
    """675 M; the published model, with its doubled output, reports 675,129,632."""
    with torch.device("meta"):
        counts = [
            sum(p.numel() for p in SiT(**SIT_CONFIGS["SiT-XL/2"], learn_sigma=sigma).parameters())
            for sigma in (True, False)
        ]
    assert counts == [675_129_632, 675_129_632 - 16 * 1152 - 16]


def test_named_configurations_have_published_sizes():
    want = {
        "SiT-S/2": (12, 384, 6),
        "SiT-B/2": (12, 768, 12),
        "SiT-L/2": (24, 1024, 16),
        "SiT-XL/2": (28, 1152, 16),
    }
    got = {name: (c["depth"], c["hidden_size"], c["num_heads"]) for name, c in SIT_CONFIGS.items()}
    assert got == want and all(c["patch_size"] == 2 for c in SIT_CONFIGS.values())


def test_start_is_zero_velocity_with_xavier_maps():
    model = SiT(**{**SMALL, "hidden_size": 96})
    x, t, y = batch(dtype=torch.float32)
    assert torch.equal(model(x, t, y), torch.zeros_like(x))
    for block in model.blocks:
        assert not block.adaLN_modulation[1].weight.any() and not block.adaLN_modulation[1].bias.any()
    patch = model.x_embedder.proj.weight  # Xavier uniform over the flattened patch: bound sqrt(6 / (in + out))
    for weight, fan in ((patch, 3 * 4 + 96), (model.blocks[0].attn.qkv.weight, 96 + 3 * 96)):
        bound = math.sqrt(6 / fan)
        assert weight.abs().max() <= bound and weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert model.t_embedder.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.y_embedder.embedding_table.weight.std().item() == pytest.approx(0.02, rel=0.15)
    assert not model.pos_embed.requires_grad


def test_null_condition_is_the_last_class():
    model = SiT(**SMALL)
    y = torch.tensor([1, 3])
    assert model.null_condition(y).tolist() == [5, 5] and model.null_condition(y).dtype == y.dtype
    assert model.prediction == "flow"


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_compiles_without_a_graph_break(mode):
    torch.compiler.reset()
    model, (x, t, y) = small_sit(depth=1), batch(dtype=torch.float32)
    set_recompute(model, mode)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = compiled(x, t, y)
    torch.testing.assert_close(got, model(x, t, y), rtol=1e-5, atol=1e-5)
    weights = [p for p in model.parameters() if p.requires_grad]
    want = torch.autograd.grad(model(x, t, y).square().mean(), weights)
    for a, b in zip(torch.autograd.grad(got.square().mean(), weights), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"input_size": 9}, "input_size .* multiple of model.patch_size 2, got 9"),
        ({"num_heads": 5}, "hidden_size must be a multiple of model.num_heads 5, got 24"),
        ({"hidden_size": 30, "num_heads": 3}, "hidden_size must be a multiple of 4 .*got 30"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
    ],
)
def test_sizes_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        SiT(**{**SMALL, **change})


@pytest.mark.parametrize(
    "name,value,message",
    [
        ("x", torch.zeros(3, 3, 10, 10), r"x must be \[B, 3, 8, 8\], got \[3, 3, 10, 10\]"),
        ("x", torch.zeros(3, 4, 8, 8), r"got \[3, 4, 8, 8\]: change the data, or model.resolution"),
        ("t", torch.zeros(2), r"t must be \[3\], one per sample, got \[2\]"),
        ("y", torch.zeros(3, 1, dtype=torch.int64), r"y must be \[3\], one per sample, got \[3, 1\]"),
        ("y", torch.zeros(3), "y must hold integer classes"),
        ("y", torch.tensor([0, 6, 1]), r"classes 0\.\.4 or the null class 5, got 0\.\.6"),
        ("y", torch.tensor([0, -1, 1]), r"got -1\.\.1"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(name, value, message):
    inputs = dict(zip("xty", batch(dtype=torch.float32), strict=True)) | {name: value}
    with pytest.raises(ValueError, match=message):
        SiT(**SMALL)(**inputs)


def test_every_parameter_belongs_to_a_module_that_reads_it_itself():
    """ZeRO-3 gathers a module's own parameters around its forward: only Linear, Conv2d, Embedding and SiT may
    have any."""
    owners = {type(m) for m in SiT(**SMALL).modules() if list(m.parameters(recurse=False))}
    assert owners == {nn.Linear, nn.Conv2d, nn.Embedding, SiT}
