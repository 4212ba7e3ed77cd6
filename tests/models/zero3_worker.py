"""One of the ranks of test_sit_zero3: a SiT built, loaded and adapted while ZeRO-3 partitions it. Run as a
script.

python zero3_worker.py RANK WORLD STORE CHECKPOINT; exits 0 when every number holds.
"""

import os
import sys

import deepspeed
import torch
import torch.distributed as dist

from dmdr_fast.models.lora import add_lora
from dmdr_fast.models.lora_export import merge
from dmdr_fast.models.recompute import set_recompute
from dmdr_fast.models.sit import SiT, load_sit_weights

SMALL = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 3,
    "hidden_size": 24,
    "depth": 2,
    "num_heads": 3,
    "num_classes": 5,
}
CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
}


def main(rank: int, world: int, store: str, checkpoint: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled at start-up, for inference only
    deepspeed.init_distributed("gloo")

    torch.manual_seed(rank)  # ranks draw other values: rank 0's must win
    with deepspeed.zero.Init(config_dict_or_path=CONFIG):
        model = SiT(**SMALL)
    assert all(p.numel() == 0 for p in model.parameters()), "not partitioned"
    torch.manual_seed(0)
    plain = SiT(**SMALL)
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        for (name, ours), (_, want) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
            if name.startswith(("x_embedder", "pos_embed", "final_layer")) or "adaLN" in name:
                close = ours.std().isclose(want.std(), rtol=0.3, atol=1e-7)
                assert close, f"{name}: {ours.std()} is not the published start's {want.std()}"

    load_sit_weights(model, checkpoint)
    load_sit_weights(plain, checkpoint)
    adapters = []
    for network in (model, plain):
        adapters.append(add_lora(network, "fake", rank=4, targets=["attn.qkv"], generator=torch.Generator()))
    adapter, plain_adapter = adapters
    start = {name: 0.3 * torch.randn(p.shape) for name, p in plain_adapter.named_parameters()}
    for each in adapters:
        each.load_state_dict(start)
    optimizer = torch.optim.SGD(plain_adapter.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(
        model=model, config=CONFIG, optimizer=torch.optim.SGD(adapter.parameters(), lr=1e-3)
    )
    assert all(p.numel() == 0 for p in model.parameters()), "the adapter is not partitioned"
    assert all(torch.equal(value, start[name]) for name, value in adapter.state_dict().items())

    x, t, y = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([1, 5])
    scale = torch.tensor([2.0, 0.75])
    for mode in ("selective", "full"):
        set_recompute(model, mode)
        with adapter.scaled(scale), plain_adapter.scaled(scale):
            out, want = engine(x, t, y), plain(x, t, y)
        torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
        engine.backward(out.square().mean())
        engine.step()
        want.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = plain_adapter.state_dict()
    for name, value in adapter.state_dict().items():
        assert (moved[name] - start[name]).norm() > 1e-3 * start[name].norm(), f"{name} did not train"
        torch.testing.assert_close(value, moved[name], rtol=1e-4, atol=1e-5)
    assert all(p.numel() == 0 for p in model.parameters()), "left gathered"

    try:
        merge(model.lora_adapters["fake"])
    except ValueError as error:
        assert "GatheredParameters" in str(error)
    else:
        raise AssertionError("merged partitioned weights")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
