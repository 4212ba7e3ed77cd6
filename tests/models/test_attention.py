"""Which attention kernel is taken: by name, by what is installed, by what the model asks of it."""

from __future__ import annotations

import importlib.machinery
import sys
import types

import pytest
import torch

from dmdr_fast.models import attention
from dmdr_fast.models.attention import Choice, attend, choose_attention, set_attention
from tests.patch.families import FAMILIES, randomised, run

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16 = {"dtype": torch.bfloat16}


@pytest.fixture(scope="module")
def sit():
    return randomised(FAMILIES["sit"].build(1))


@pytest.fixture
def installed(monkeypatch):
    """installed("flash_attn", ...): packages of these names, each a softmax written out, beside a Hopper GPU."""

    def install(*names, capability=(9, 0)):
        for name in names:
            module = types.ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            module.flash_attn_func = softmax_attention
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")

    return install


def softmax_attention(q, k, v):
    """[B, T, H, D], by the formula."""
    logits = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhts,bshd->bthd", logits.softmax(-1), v)


@pytest.mark.parametrize("kernel", ["sdpa", "cudnn", "flash_attn", "flash_attn_3"])
def test_every_kernel_computes_the_same(installed, sit, kernel):
    installed("flash_attn", "flash_attn_interface")
    q, k, v = torch.randn(3, 2, 7, 4, 16, dtype=torch.float64)
    torch.testing.assert_close(attend(q, k, v, kernel), softmax_attention(q, k, v), rtol=1e-12, atol=1e-12)
    inputs = FAMILIES["sit"].inputs()
    want = run(sit, FAMILIES["sit"], inputs)
    set_attention(sit, Choice(kernel))
    try:
        torch.testing.assert_close(run(sit, FAMILIES["sit"], inputs), want, rtol=1e-4, atol=1e-5)
    finally:
        set_attention(sit, Choice("sdpa"))


def test_auto_without_packages_is_sdpa_and_says_why(installed, sit):
    installed(capability=(8, 0))
    choice = choose_attention("auto", sit, device=CUDA, **BF16)
    assert choice.kernel == "sdpa"
    assert "cudnn: is fastest from Hopper on" in str(choice) and "flash_attn_3: not installed" in str(choice)
    assert "pip install flash-attn" in str(choice)


@pytest.mark.parametrize(
    ("packages", "capability", "dtype", "device", "kernel"),
    [
        ((), (9, 0), torch.bfloat16, CUDA, "cudnn"),
        (("flash_attn", "flash_attn_interface"), (9, 0), torch.bfloat16, CUDA, "cudnn"),
        (("flash_attn", "flash_attn_interface"), (10, 0), torch.float16, CUDA, "cudnn"),
        (("flash_attn", "flash_attn_interface"), (8, 0), torch.bfloat16, CUDA, "flash_attn"),
        ((), (8, 0), torch.bfloat16, CUDA, "sdpa"),
        (("flash_attn",), (9, 0), torch.float32, CUDA, "sdpa"),
        (("flash_attn",), (9, 0), torch.bfloat16, CPU, "sdpa"),
    ],
)
def test_auto_takes_the_fastest_that_runs(installed, sit, packages, capability, dtype, device, kernel):
    installed(*packages, capability=capability)
    choice = choose_attention("auto", sit, dtype=dtype, device=device)
    assert choice.kernel == kernel
    assert bool(choice.reason) == (kernel in ("sdpa", "cudnn"))


def test_without_cudnn_flash_attention_is_next(installed, sit, monkeypatch):
    installed("flash_attn", "flash_attn_interface")
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    assert choose_attention("auto", sit, device=CUDA, **BF16).kernel == "flash_attn_3"
    with pytest.raises(ValueError, match="cudnn cannot run: this torch was built without cuDNN"):
        choose_attention("cudnn", sit, device=CUDA, **BF16)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_take_cudnn(installed, monkeypatch, family):
    """It is torch's function with another order of kernels, which is put back here: the order is the process's."""
    installed()
    model = FAMILIES[family].build(1)
    choice = choose_attention("auto", model, device=CUDA, **BF16)
    assert (choice.kernel, choice.reason) == ("cudnn", "first of torch's kernels on a GPU")
    orders = []
    monkeypatch.setattr(torch._C, "_set_sdp_priority_order", orders.append)
    set_attention(model, choice)
    assert orders == [[3, 1, 2, 0, 4]]  # cuDNN, FlashAttention, memory-efficient, plain, another device's
    before = torch._C._get_sdp_priority_order()
    monkeypatch.undo()
    try:
        set_attention(model, choice)
        assert torch._C._get_sdp_priority_order() == orders[0]
    finally:
        torch._C._set_sdp_priority_order(before)


def test_models_that_cannot_switch_and_models_with_masks(installed):
    installed("flash_attn", capability=(8, 0))
    sd3, qwen = FAMILIES["sd3"].build(1), FAMILIES["qwen_image"].build(1)
    choice = choose_attention("auto", sd3, device=CUDA, **BF16)
    assert choice.kernel == "sdpa" and "SD3Transformer2DModel calls torch's attention by name" in choice.reason
    assert "mask" in choose_attention("auto", qwen, device=CUDA, **BF16).reason
    assert choose_attention("flash_attn", qwen, device=CUDA, **BF16).kernel == "flash_attn"  # asked for by name


def test_diffusers_backend_is_switched_and_switched_back(monkeypatch):
    flux = FAMILIES["flux"].build(1)
    asked = []
    monkeypatch.setattr(type(flux), "set_attention_backend", lambda self, name: asked.append(name))
    set_attention(flux, Choice("sdpa"))
    assert asked == []  # it is what runs anyway
    set_attention(flux, Choice("flash_attn_3"))
    for processor in attention._processors(flux):
        processor._attention_backend = "_flash_3"
    set_attention(flux, Choice("sdpa"))
    assert asked == ["_flash_3", "native"]


@pytest.mark.parametrize("kernel", ["flash_attn", "flash_attn_3"])
def test_a_kernel_by_name_that_cannot_run_is_an_error(installed, sit, kernel):
    with pytest.raises(ValueError, match=f"{kernel} cannot run: not installed .*memory.attention to auto or sdpa"):
        choose_attention(kernel, sit, device=CUDA, **BF16)
    installed("flash_attn", "flash_attn_interface")
    with pytest.raises(ValueError, match="needs a CUDA device, this is cpu"):
        choose_attention(kernel, sit, device=CPU, **BF16)
