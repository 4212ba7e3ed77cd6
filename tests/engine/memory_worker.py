"""One of the two ranks of test_memory_levers: weights read part by part, and kept gathered over a rollout.

python memory_worker.py RANK STORE WEIGHTS; exits 0 when every number holds.
"""

import os
import sys

import deepspeed
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from dmdr_fast.models.partitioned import kept_whole
from dmdr_fast.models.sit import SiT, load_sit_weights
from dmdr_fast.models.sit_weights import stored_sit_tensors
from dmdr_fast.models.stored import load_partitioned, parameters_on_meta
from tests.algorithm.memory import PeakMemory

SIZES = {"input_size": 8, "hidden_size": 64, "depth": 6, "num_heads": 4, "num_classes": 10}
SETTINGS = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
}
STEPS = 4


class Gathers(TorchDispatchMode):
    """Counts the all-gathers inside."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.namespace == "c10d" and "allgather" in function._opname
        return function(*args, **(kwargs or {}))


def rollout(network, inputs):
    """STEPS forwards without grad, each on the output of the one before."""
    x, t, y = inputs
    with torch.no_grad(), Gathers() as gathers:
        for _ in range(STEPS):
            x = x - 0.25 * network(x, t, y)
    return x, gathers.count


def main(rank: int, store: str, weights: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled at start-up, for inference only
    deepspeed.init_distributed("gloo")

    plain = SiT(**SIZES)
    load_sit_weights(plain, weights)
    with parameters_on_meta():
        model = SiT(**SIZES)
    stored = stored_sit_tensors(model, weights)
    with PeakMemory() as memory:
        load_partitioned(model, stored, dtype=torch.float32, settings=SETTINGS)
    whole = sum(p.nbytes for p in plain.parameters())
    largest = max(sum(p.nbytes for p in m.parameters(recurse=False)) for m in plain.modules())
    assert whole / 2 <= memory.live < 0.51 * whole, (memory.live, whole)
    # The module that is being read, and its flattened copy.
    assert memory.peak < memory.live + 2.1 * largest < 0.8 * whole, (memory.peak, largest, whole)
    assert all(p.numel() == 0 for p in model.parameters()), "not partitioned"

    engine, *_ = deepspeed.initialize(
        model=model, config=SETTINGS, optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    )
    inputs = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([1, 10])
    want, _ = rollout(plain, inputs)
    apart, many = rollout(engine, inputs)
    torch.testing.assert_close(apart, want)
    with kept_whole(model.parameters()):
        assert all(p.numel() for p in model.parameters())
        kept, none = rollout(engine, inputs)
        assert all(p.numel() for p in model.parameters()), "let go after a forward"
    with Gathers() as gathers, kept_whole(model.parameters()):
        pass
    assert torch.equal(kept, apart)
    assert all(p.numel() == 0 for p in model.parameters()), "left gathered"
    assert none == 0 and gathers.count == 1 and many >= 10 * STEPS, (none, gathers.count, many)

    out = engine(*inputs)  # and training goes on
    engine.backward(out.square().mean())
    engine.step()
    plain(*inputs).square().mean().backward()
    everywhere = [torch.zeros_like(plain.final_layer.linear.weight.grad) for _ in range(2)]
    dist.all_gather(everywhere, plain.final_layer.linear.weight.grad)
    step = 0.1 * torch.stack(everywhere).mean(0)
    with deepspeed.zero.GatheredParameters([model.final_layer.linear.weight]):
        torch.testing.assert_close(model.final_layer.linear.weight, plain.final_layer.linear.weight - step)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
