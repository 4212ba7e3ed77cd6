"""What others hang on patched blocks: FSDP2's hooks and diffusers' caches."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import dmdr_fast.patch
from tests.patch.families import FAMILIES, cast, counted, randomised, run


def fused_modules(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__module__.startswith("dmdr_fast.patch.")]


def test_no_patched_layer_returns_a_view(family):
    """But for those that end in an nn.Linear, which returns one itself."""
    model = randomised(family.build(1))
    dmdr_fast.patch(model, family.ops)
    views = []

    def look(module, _, output):
        outputs = output if isinstance(output, tuple) else (output,)
        views.extend(type(module).__name__ for tensor in outputs if tensor is not None and tensor._base is not None)

    for module in fused_modules(model):
        if type(module).__name__ != "FinalLayer":
            module.register_forward_hook(look)
    run(model, family, cast(family.inputs(), torch.float32))
    assert not views


@pytest.fixture
def one_rank(tmp_path):
    found = dist.is_initialized()  # by a test before this one, for the rest of the process
    if not found:
        dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    if not found:
        dist.destroy_process_group()


def test_blocks_under_fsdp2(one_rank):
    """Its warning of views would be an error here; sharded, a model is refused."""
    for family in FAMILIES.values():
        model, inputs = randomised(family.build(1)), cast(family.inputs(), torch.float32)
        dmdr_fast.patch(model, family.ops)
        plain = run(model, family, inputs)
        for module in fused_modules(model):
            if "fused_ops" in vars(module):  # a block
                fully_shard(module, mesh=one_rank)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "FSDP2-wrapped module")
            sharded = run(model, family, inputs)
            sharded.sum().backward()
        torch.testing.assert_close(sharded, plain)
        assert all(weight.grad is not None for name, weight in model.named_parameters() if "attn.to_q" in name)
        with pytest.raises(ValueError, match="is sharded already: patch it first, then shard it"):
            dmdr_fast.patch(model, strict=False)


@pytest.mark.parametrize("name", ["flux", "qwen_image"])
def test_first_block_cache(name):
    """The second step is close to the first, so all blocks but the first are skipped: patched as unpatched."""
    family = FAMILIES[name]
    model, inputs = randomised(family.build(3)), family.inputs()
    close = {k: [t + 1e-3 for t in v] if isinstance(v, list) else v + 1e-3 for k, v in inputs.items()}

    def two_steps(model: nn.Module) -> tuple[list[Tensor], list[int]]:
        apply_first_block_cache(model, FirstBlockCacheConfig(threshold=0.5))
        outputs, launches = [], []
        for step in (inputs, close):
            with torch.no_grad(), model.cache_context("test"), counted() as calls:
                outputs.append(run(model, family, step))
            launches.append(sum(calls.values()))
        return outputs, launches

    plain, _ = two_steps(copy.deepcopy(model))
    dmdr_fast.patch(model)
    fused, launches = two_steps(model)
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)
    assert launches[1] < launches[0]
